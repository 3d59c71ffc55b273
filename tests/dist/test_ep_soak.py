"""A long run of random calls: `pytest tests/dist/test_ep_soak.py -s --soak-iterations 10000`. Every result is compared.

Each iteration draws shapes, dtypes, routing and forms of the calls, makes one to three dispatches on two buffers, then
their combines in any order. Ranks fall behind each other at random, on the CPU and on the GPU, and the GPU has matrices
to multiply on another stream.
"""

from __future__ import annotations

import random
import time

import pytest
import torch

from cutehop.comm.config import EpConfig
from cutehop.ref import ep as ref
from tests.ep_gpu_work import open_buffer, settle
from tests.ep_traffic import Sizes, Traffic, differ, go_home, wrong_rows

pytestmark = pytest.mark.dist

MAX_TOKENS = 192
MAX_HIDDEN = 1024
MAX_TOPK = 8
LOCAL_EXPERTS = 8


def draw_sizes(rng: random.Random, ranks: int) -> Sizes:
    """Equal on all ranks, which draw with equal seeds."""
    rows = rng.choice(("bf16", "f32", "int32"))
    unit = 8 if rows == "bf16" else 16  # columns of 16 bytes
    routing = rng.choices(("random", "one_rank", "none", "hostile"), (6, 1, 1, 2))[0]
    most = rng.choice((4, 50, MAX_TOKENS))
    return Sizes(
        tokens=tuple(rng.choice((0, 1, most, rng.randint(0, most))) for _ in range(ranks)),
        hidden=unit * rng.randint(1, MAX_HIDDEN // unit),
        local_experts=LOCAL_EXPERTS,
        k=rng.randint(1, MAX_TOPK),
        rows=rows,
        dtype=rng.choice((torch.float8_e4m3fn, torch.uint8)),
        idx_dtype=rng.choice((torch.int64, torch.int32)),
        column_major=rng.random() < 0.5,
        routing=routing,
    )


class Disturbance:
    """What makes this rank late, and its GPU busy. Differs between ranks; nothing on a CPU, where time is short."""

    def __init__(self, rank: int, device: str) -> None:
        self._on = device != "cpu"
        self._rng = random.Random(rank)
        if self._on:
            self._side = torch.cuda.Stream()
            self._matrix = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)

    def __call__(self) -> None:
        if not self._on:
            return
        if self._rng.random() < 0.2:
            time.sleep(self._rng.random() * 1e-3)
        if self._rng.random() < 0.2:
            torch.cuda._sleep(self._rng.randrange(1_000_000))
        if self._rng.random() < 0.1:
            with torch.cuda.stream(self._side):
                self._matrix @ self._matrix  # for its time


def iterate(rng, buffers, number, disturb, device) -> torch.Tensor:
    """One iteration; bool (): a result is wrong."""
    rank, ranks = buffers[0].rank, buffers[0].ranks
    pending, wrong = [], []
    for part in range(rng.choice((1, 1, 2, 3))):
        buffer, traffic = rng.choice(buffers), Traffic(draw_sizes(rng, ranks), 4 * number + part, device)
        worst = rng.choice((0, ranks * MAX_TOKENS))
        disturb()
        got = buffer.dispatch(*traffic.arguments(rank), num_worst_tokens=worst)
        wrong.append(wrong_rows(traffic, rank, got, worst))
        pending.append((buffer, traffic, got, worst))
    rng.shuffle(pending)
    for buffer, traffic, got, worst in pending:
        biases, weights, cached = rng.randrange(3), rng.random() < 0.5, rng.random() < 0.3
        disturb()
        wrong.append(go_home(buffer, traffic, got, biases, weights))
        if cached:
            disturb()
            x, scales, *_ = traffic.arguments(rank)
            recv_x, recv_scales = buffer.dispatch_cached(x, scales, got.handle)
            wrong.append(wrong_rows(traffic, rank, got._replace(recv_x=recv_x, recv_scales=recv_scales), worst))
    return torch.stack(wrong).any()


def soak(group, rank, device, iterations):
    """(first wrong iteration or -1, iterations per second)."""
    config = EpConfig(
        group.size(), MAX_HIDDEN, MAX_TOKENS, LOCAL_EXPERTS * group.size(), max_topk=MAX_TOPK, scales="f32"
    )
    buffers = [open_buffer(group, config, device) for _ in range(2)]
    rng, disturb = random.Random(7), Disturbance(rank, device)
    first_wrong = torch.full((), -1, device=device)
    settle(group)
    begin = time.monotonic()
    for number in range(iterations):
        wrong = iterate(rng, buffers, number, disturb, device)
        first_wrong = torch.where(wrong & (first_wrong < 0), number, first_wrong)
    settle(group)
    rate = iterations / (time.monotonic() - begin)
    for buffer in buffers:
        buffer.destroy()
    return first_wrong.item(), rate


@pytest.fixture(scope="module", params=[2, 8])
def ranks(request):
    return request.param


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_soak(gpu_ranks, ranks, pytestconfig):
    iterations = pytestconfig.getoption("--soak-iterations")
    found = gpu_ranks(ranks).run(soak, "cuda", iterations, timeout=60 + iterations / 2)
    print(f"\n{ranks} ranks: {iterations} iterations, {min(rate for _, rate in found):.0f}/s")
    assert [first_wrong for first_wrong, _ in found] == [-1] * ranks


def test_soak_on_cpu_ranks(cpu_ranks):
    assert [first_wrong for first_wrong, _ in cpu_ranks(3).run(soak, "cpu", 60)] == [-1] * 3


@pytest.mark.parametrize("seed", range(12))
def test_what_the_soak_expects_is_the_reference(seed):
    """Traffic against cutehop.ref.ep: what is received, and the sums with 0, 1 and 2 biases."""
    ranks = seed % 5 + 1
    traffic = Traffic(draw_sizes(random.Random(seed), ranks), seed, "cpu")
    sizes, everybody = traffic.sizes, range(ranks)
    given = [traffic.arguments(rank) for rank in everybody]
    rows = [x.view(torch.float8_e4m3fn) if s is not None else x for x, s, *_ in given]
    received = ref.dispatch(
        [x if s is None else (x, s) for x, (_, s, *_) in zip(rows, given)],
        [idx for _, _, idx, *_ in given],
        [weights for _, _, _, weights, *_ in given],
        sizes.experts,
    )
    for rank, want in enumerate(received):
        ours = traffic.received(rank)
        want_x, want_scales = want.recv_x if isinstance(want.recv_x, tuple) else (want.recv_x, None)
        assert not differ(ours.x.view(want_x.dtype), want_x)
        assert ours.scales is want_scales is None or not differ(ours.scales, want_scales)
        assert not differ(ours.topk_idx, want.recv_topk_idx)
        assert not differ(ours.topk_weights, want.recv_topk_weights)
        assert not differ(ours.src_idx, want.handle.recv_src_idx)
    ys = [traffic.expert(traffic.received(rank).x, rank) for rank in everybody]
    weights = [traffic.outgoing_weights(received[rank].recv_topk_weights, rank) for rank in everybody]
    biases = [tuple(traffic.bias[:, rank, :n]) for rank, n in enumerate(sizes.tokens)]
    for count, bias in enumerate((None, [first for first, _ in biases], biases)):
        xs, ws = ref.combine(ys, [got.handle for got in received], weights, bias)
        for rank in everybody:
            for ours, theirs in zip(traffic.combined(rank, count), (xs[rank], ws[rank])):
                assert not differ(ours, theirs)
