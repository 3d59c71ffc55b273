"""CudaBuffer in programs: CUDA graphs, torch.compile and autograd, kernels of others beside it, ranks out of step."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace

import pytest
import torch

from cutehop.comm.config import EpConfig
from tests.dist.test_ep_op import TOYS, check_effects, check_fp8_gradients, check_gradients
from tests.ep_gpu_work import open_buffer, settle
from tests.ep_traffic import Sizes, Traffic, differ, go_home, round_trip, wrong_rows

pytestmark = [pytest.mark.dist, pytest.mark.gpu]

REPLAYS = 100
ROUTINGS = ("random", "hostile", "one_rank", "none")


@pytest.fixture(scope="module", params=[8, 2])
def ranks(request):
    """Of the module, so that pytest runs all tests of one pool before it makes the next."""
    return request.param


def ragged(ranks: int) -> tuple[int, ...]:
    return (37, 0, 64, 5, 1, 33, 16, 8)[-ranks:]


class Layer:
    """Layout, dispatch, an expert and combine in one graph; the routing lies in the captured inputs.

    views: write tokens and expert outputs into the memory that peers pull from.
    """

    def __init__(self, buffer, sizes: Sizes, device: str, views: bool) -> None:
        self.buffer, self.sizes, self.device, self.views = buffer, sizes, device, views
        traffic = Traffic(sizes, 0, device)
        self.x, self.scales, self.idx, self.weights, *_ = (
            None if each is None else each.clone() for each in traffic.arguments(buffer.rank)
        )
        self.factor = traffic.factor.clone()
        self.step()  # loads the kernels
        settle(buffer.group)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.got, self.home = self.step()

    def step(self):
        buffer, sizes, x = self.buffer, self.sizes, self.x
        _, per_expert, in_rank = torch.ops.cutehop.ep_layout(self.idx, sizes.experts, buffer.ranks)
        if self.views:
            x = buffer.dispatch_input(*x.shape, x.dtype).copy_(x)
        got = buffer.dispatch(
            x, self.scales, self.idx, self.weights, in_rank, per_expert, num_worst_tokens=buffer.ranks * 64
        )
        # As Traffic's, of what a replay receives.
        rows = got.recv_x if x.dtype == torch.bfloat16 else got.recv_x.view(torch.uint8).bfloat16()
        y = rows * self.factor[buffer.rank]
        if self.views:
            y = buffer.combine_input(got.handle, sizes.hidden).copy_(y)
        weights = (got.recv_topk_weights + 1) * self.factor[buffer.rank].float()
        return got, buffer.combine(y, got.handle, weights)

    def replay(self, traffic: Traffic) -> torch.Tensor:
        """With other tokens and choices; bool (): something is wrong."""
        rank = self.buffer.rank
        x, scales, idx, weights, *_ = traffic.arguments(rank)
        for ours, theirs in zip((self.x, self.scales, self.idx, self.weights), (x, scales, idx, weights)):
            if ours is not None:
                ours.view(torch.uint8).copy_(theirs.view(torch.uint8))
        self.factor.copy_(traffic.factor)
        self.graph.replay()
        wrong = wrong_rows(traffic, rank, self.got, self.buffer.ranks * 64)
        for result, want in zip(self.home, traffic.combined(rank, 0)):
            wrong = wrong | differ(result, want)
        return wrong


def replay_graphs(group, rank, device):
    """Two graphs on one buffer, eager calls of other shapes in between; every replay routes differently."""
    ranks = group.size()
    buffer = open_buffer(group, EpConfig(ranks, 1024, 64, 4 * ranks, max_topk=8, scales="f32"), device)
    shapes = [
        Sizes(ragged(ranks), hidden=512, k=5),
        Sizes(ragged(ranks)[::-1], hidden=1024, rows="f32", k=8),
    ]
    layers = [Layer(buffer, sizes, device, views) for sizes, views in zip(shapes, (False, True))]
    wrong = []
    for number in range(2 * REPLAYS):
        which = number % 7 % 2
        sizes = shapes[which]
        routing = ROUTINGS[number % len(ROUTINGS)]
        traffic = Traffic(replace(sizes, routing=routing), number, device)
        wrong.append(layers[which].replay(traffic))
        if number % 10 == 9:
            eager = Traffic(Sizes(ragged(ranks), hidden=208, rows="f32", k=number % 8 + 1), number, device)
            worst = 0 if number % 20 == 9 else 64 * ranks
            wrong.append(round_trip(buffer, eager, worst, biases=2, cached=True))
        if number % 50 == 0:
            settle(group)
    for _ in range(5):  # what lies in the inputs now, without a look at the results in between
        for layer in layers:
            layer.graph.replay()
    wrong.append(layers[which].replay(traffic))
    settle(group)
    refuse_capture(buffer, traffic)
    buffer.destroy()
    return [bool(each) for each in wrong]


def refuse_capture(buffer, traffic):
    """The number of rows is not known on the CPU before the graph runs."""
    arguments = traffic.arguments(buffer.rank)
    with (
        pytest.raises(RuntimeError, match="num_worst_tokens 0 waits for the counts, which cannot be captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        buffer.dispatch(*arguments)


def test_graphs(gpu_ranks, ranks):
    wrong = gpu_ranks(ranks).run(replay_graphs, "cuda", timeout=200)
    assert wrong == [[False] * (2 * REPLAYS + 2 * REPLAYS // 10 + 1)] * ranks


def wait_for_others(group, rank, device):
    """Each rank in turn is late by some milliseconds at each point, on the GPU, and no CPU waits: the others run ahead.
    Another stream multiplies matrices meanwhile."""
    ranks = group.size()
    buffer = open_buffer(group, EpConfig(ranks, 1024, 64, 4 * ranks, max_topk=8), device, num_sms=4)
    side = torch.cuda.Stream()
    a = torch.randint(-2, 3, (2048, 2048), device=device).bfloat16()  # sums are exact in any order
    expected = a @ a
    products, wrong = [], []
    traffics = [Traffic(Sizes(ragged(ranks), hidden=1024), seed, device) for seed in range(3)]
    for late in range(ranks):
        with torch.cuda.stream(side):
            products += [a @ a for _ in range(4)]
        for point in range(3):
            traffic = traffics[point]

            def pause(here, late=late, point=point):
                if (rank, here) == (late, point):
                    torch.cuda._sleep(10_000_000)

            pause(0)
            got = buffer.dispatch(*traffic.arguments(rank), num_worst_tokens=64 * ranks)
            pause(1)  # a slow consumer
            wrong.append(go_home(buffer, traffic, got, biases=1))
            pause(2)
            got = buffer.dispatch(*traffic.arguments(rank), num_worst_tokens=64 * ranks)
            wrong.append(go_home(buffer, traffic, got))
    settle(group)
    wrong += [differ(product, expected) for product in products]
    buffer.destroy()
    return [bool(each) for each in wrong]


def test_ranks_out_of_step(gpu_ranks, ranks):
    assert gpu_ranks(ranks).run(wait_for_others, "cuda") == [[False] * ranks * 10] * ranks


def use_two_streams(group, rank, device):
    """A buffer on each of two streams, which run side by side."""
    ranks = group.size()
    config = EpConfig(ranks, 512, 64, 4 * ranks, max_topk=8)
    pairs = [(open_buffer(group, config, device, num_sms=4), torch.cuda.Stream()) for _ in range(2)]
    wrong = []
    for seed in range(20):
        for buffer, stream in pairs:
            with torch.cuda.stream(stream):
                traffic = Traffic(Sizes(ragged(ranks), hidden=512), seed, device)
                wrong.append(round_trip(buffer, traffic, 64 * ranks, cached=True))
    settle(group)
    for buffer, _ in pairs:
        buffer.destroy()
    return [bool(each) for each in wrong]


def test_two_buffers_on_two_streams(gpu_ranks, ranks):
    assert gpu_ranks(ranks).run(use_two_streams, "cuda") == [[False] * 40] * ranks


@pytest.mark.parametrize("worst", [False, True], ids=["exact", "worst"])
def test_gradients(gpu_ranks, worst):
    for case in TOYS:
        gpu_ranks(2).run(check_gradients, case, "cuda", False, worst)


@pytest.mark.parametrize("worst", [False, True], ids=["exact", "worst"])
def test_gradients_under_compile(gpu_ranks, worst):
    gpu_ranks(2).run(check_gradients, TOYS[0], "cuda", True, worst)


def test_gradients_of_weights_beside_fp8(gpu_ranks):
    gpu_ranks(2).run(check_fp8_gradients, "cuda")


# inductor writes Triton code, and Triton compiles C.
can_write_kernels = importlib.util.find_spec("triton") is not None and any(map(shutil.which, ("cc", "gcc", "clang")))
needs_triton = pytest.mark.skipif(not can_write_kernels, reason="inductor needs triton and a C compiler")


@pytest.mark.parametrize(
    ("backend", "worst"),
    [("aot_eager", 0), ("aot_eager", 100), pytest.param("inductor", 100, marks=needs_triton)],
)
def test_compiled_calls_run_in_order(gpu_ranks, backend, worst):
    gpu_ranks(2).run(check_effects, "cuda", backend, worst, timeout=200)
