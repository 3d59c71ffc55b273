"""`cutehop.compat.deep_ep` among ranks: DeepEP V1's checks, its users' patterns of calls, and how memory is sized.

The same functions run over gloo on CPU ranks and, marked gpu, over eight ranks on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import pytest

from cutehop.compat.deep_ep import Config
from tests import deep_ep_sizes, deep_ep_users
from tests.deep_ep_calls import Case, Problem, interleaved, round_trips
from tests.ranks import Pools, RankPool

pytestmark = pytest.mark.dist


class World(NamedTuple):
    device: str
    ranks: int
    pool: RankPool

    def tokens(self, scale: int = 1) -> tuple[int, ...]:
        """Different on every rank, none on one of them."""
        return tuple(scale * n for n in (37, 64, 0, 5, 1, 33, 16, 8)[: self.ranks])


@pytest.fixture(params=[("cpu", 2), ("cpu", 4), pytest.param(("cuda", 8), marks=pytest.mark.gpu)], ids=str)
def world(request: pytest.FixtureRequest, ranks_on: Callable[[str], Pools]) -> World:
    device, ranks = request.param
    return World(device, ranks, ranks_on(device)(ranks))


def test_v1s_24_cases(world):
    """previous_event x async_finish x three inputs x with and without choices, with V1's checks of each."""
    switches = product(("constant", "random", "fp8"), (False, True), (False, True), (False, True))
    cases = [Case(*switch, dispatch_config=Config(8)) for switch in switches]
    assert len(cases) == 24
    assert world.pool.run(round_trips, world.device, [Problem(world.tokens())], cases) == [24] * world.ranks


def test_further_options(world):
    """allocate_on_comm_stream, alignment, one and two biases, packed scales, unequal and odd numbers of SMs."""
    cases = [
        Case("random", previous=True, async_finish=True, allocate=True, alignment=128),
        Case("ue8m0", alignment=16, biases=1, dispatch_config=Config(3), combine_config=Config(6)),
        Case("ue8m0", with_topk=False, async_finish=True, biases=2, dispatch_config=Config(6)),
    ]
    world.pool.run(round_trips, world.device, [Problem(world.tokens())], cases)


@pytest.mark.parametrize("routing", ["random", "holes", "first rank", "none"])
def test_routing_and_token_counts(world, routing):
    """Choices missing, all on one rank, none at all; no token anywhere; shapes change on a buffer without cleaning."""
    many, hidden = 2 * max(world.tokens()), 264
    problems = [
        Problem(world.tokens(), hidden, topk=2, routing=routing),
        Problem((0,) * world.ranks, hidden, topk=2, routing=routing),
        Problem((1,) * world.ranks, 136, topk=1, routing=routing),
        Problem((many, *world.tokens()[1:]), hidden, topk=2, routing=routing),
    ]
    world.pool.run(
        round_trips, world.device, problems, [Case(), Case(with_topk=False)], num_max_tokens_per_rank=many, num_topk=2
    )


@pytest.mark.parametrize("topk", [1, 2])
def test_one_expert_per_rank(world, topk):
    world.pool.run(round_trips, world.device, [Problem(world.tokens(), 512, world.ranks, topk)], [Case(), Case("fp8")])


def test_two_buffers_and_handles_out_of_order(world):
    world.pool.run(interleaved, world.device, [Problem(world.tokens()), Problem(world.tokens(2), 128)])


@pytest.mark.parametrize("microbatches", [False, True], ids=["one batch", "two batches"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_calls_as_vllm_makes_them(world, fp8, microbatches):
    world.pool.run(deep_ep_users.vllm, world.device, Problem(world.tokens(), routing="holes"), fp8, microbatches)


def test_calls_as_vllm_makes_them_on_three_ranks(cpu_ranks):
    """A size that is not in V1's tables: the caller passes no Config."""
    cpu_ranks(3).run(deep_ep_users.vllm, "cpu", Problem((3, 0, 9), experts=15), False, False)


@pytest.mark.parametrize("overlap", [False, True])
def test_calls_as_megatron_makes_them(world, overlap):
    problems = [Problem(world.tokens()), Problem(world.tokens(), 512), Problem(world.tokens(), 128)]
    assert world.pool.run(deep_ep_users.megatron, world.device, problems, overlap) == [2] * world.ranks


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("kind", "tuning"), [("random", None), ("fp8", {"num_sms": 8}), ("ue8m0", None)])
def test_calls_as_sglang_makes_them(world, kind, tuning, overlap):
    world.pool.run(deep_ep_users.sglang, world.device, Problem(world.tokens()), kind, overlap, tuning)


@pytest.mark.parametrize(
    "function",
    [
        deep_ep_sizes.first_call_decides,
        deep_ep_sizes.bytes_decide,
        deep_ep_sizes.keywords_decide,
        deep_ep_sizes.ranks_differ,
        deep_ep_sizes.handle_comes_first,
        deep_ep_sizes.raw_memory,
    ],
    ids=lambda function: function.__name__,
)
def test_memory(world, function):
    world.pool.run(function, world.device)


def test_a_rank_that_does_not_make_the_first_call(cpu_ranks):
    told = cpu_ranks(3, fresh=True).run(deep_ep_sizes.first_rank_stays_away, "cpu")
    assert told == ["", *["first call of deep_ep.Buffer"] * 2]


@pytest.mark.gpu
def test_replays_of_a_captured_layer(gpu_ranks):
    tokens = (37, 64, 0, 5, 1, 33, 16, 8)
    problems = [Problem(tokens, routing=routing) for routing in ("random", "holes", "none")]
    gpu_ranks(8).run(deep_ep_sizes.captured, "cuda", problems)
