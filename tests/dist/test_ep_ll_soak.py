"""A long run of random low-latency calls: `pytest tests/dist/test_ep_ll_soak.py -s --soak-iterations 10000`. Every result
is compared.

Each iteration draws tokens per rank (0 to 128), choices, formats and forms of the calls on one of two buffers, one of
them with masks: up to three operations in flight, received in any order; a graph of a dispatch and its combine; calls of
the normal mode between a send and its receive. Ranks fall behind each other at random, on the CPU and on the GPU.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
import torch

from cutehop.comm.config import EpConfig
from cutehop.comm.ll_config import LlConfig
from cutehop.ref import ep_ll as ref
from tests.dist.test_ep_soak import Disturbance
from tests.ep_gpu_work import open_buffer, settle
from tests.ep_ll_cases import FORMATS, make_buffer
from tests.ep_ll_traffic import LlSizes, LlTraffic, differ, receive, send
from tests.ep_traffic import Sizes, Traffic, round_trip

pytestmark = pytest.mark.dist

MAX_TOKENS = 128
HIDDEN = 640  # five groups: scales that fill no word, chunks of 128 columns
MAX_TOPK = 8
LOCAL_EXPERTS = 5
ROUTINGS = ("random", "random", "some", "one_rank", "none")


def config_for(ranks: int, elastic: bool = False) -> LlConfig:
    return LlConfig(ranks, HIDDEN, MAX_TOKENS, LOCAL_EXPERTS * ranks, min(MAX_TOPK, LOCAL_EXPERTS * ranks), elastic)


def draw_sizes(rng: random.Random, config: LlConfig) -> LlSizes:
    """Equal on all ranks, which draw with equal seeds."""
    most = rng.choice((1, 8, MAX_TOKENS))
    return LlSizes(
        tokens=tuple(rng.choice((0, 1, most, rng.randint(0, most))) for _ in range(config.ranks)),
        k=rng.randint(1, config.max_topk),
        rows=rng.choice(tuple(FORMATS)),
        routing=rng.choice(ROUTINGS),
        idx_dtype=rng.choice((torch.int64, torch.int32)),
    )


class Pair:
    """A dispatch and its combine in a CUDA graph; tokens and choices lie in the captured inputs."""

    def __init__(self, buffer, sizes: LlSizes, device: str) -> None:
        self.buffer, self.sizes, self.device = buffer, sizes, device
        traffic = LlTraffic(buffer.config, sizes, 0, device)
        self.x, self.topk_idx, self.weights = (each.clone() for each in traffic.arguments(buffer.rank))
        self.factor = traffic.factor.clone()
        self.step(traffic)  # loads the kernels
        settle(buffer.group)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.got, self.home = self.step(traffic)

    def step(self, traffic: LlTraffic):
        traffic.factor = self.factor
        got = self.buffer.dispatch(self.x, self.topk_idx, **FORMATS[self.sizes.rows])
        y = traffic.outputs(self.buffer.rank, got)
        return got, self.buffer.combine(y, got.handle, self.topk_idx, self.weights)

    def replay(self, seed: int, routing: str) -> torch.Tensor:
        rank = self.buffer.rank
        traffic = LlTraffic(self.buffer.config, replace(self.sizes, routing=routing), seed, self.device)
        for ours, theirs in zip((self.x, self.topk_idx, self.weights), traffic.arguments(rank)):
            ours.copy_(theirs)
        self.factor.copy_(traffic.factor)
        self.graph.replay()
        return traffic.wrong_rows(rank, self.got) | differ(self.home, traffic.combined(rank))


class Soak:
    def __init__(self, group, device: str) -> None:
        self.rank, self.ranks, self.device = group.rank(), group.size(), device
        self.rng, self.disturb = random.Random(11), Disturbance(self.rank, device)
        self.buffers = [make_buffer(group, config_for(self.ranks, elastic), device) for elastic in (False, True)]
        normal = EpConfig(self.ranks, 512, 64, 4 * self.ranks, max_topk=8, scales="f32")
        self.normal = open_buffer(group, normal, device)
        self.pairs = []
        if device != "cpu":
            for buffer, rows in zip(self.buffers, ("bf16", "ue8m0")):
                tokens = (7, 0, MAX_TOKENS, 1, 16, 64, 3, 33)[: self.ranks]
                self.pairs.append(Pair(buffer, LlSizes(tokens, 6, rows), device))

    def iterate(self, number: int) -> torch.Tensor:
        """bool (): a result is wrong."""
        kind = self.rng.random()
        if kind < 0.2 and self.pairs:
            pair, routing = self.rng.choice(self.pairs), self.rng.choice(ROUTINGS)
            self.disturb()
            return pair.replay(number, routing)
        buffer = self.rng.choice(self.buffers)
        return self.in_one_launch(buffer, number) if kind < 0.5 else self.in_flight(buffer, number)

    def draw(self, number: int, part: int) -> LlTraffic:
        config = self.buffers[0].config
        return LlTraffic(config, draw_sizes(self.rng, config), 4 * number + part, self.device)

    def in_one_launch(self, buffer, number: int) -> torch.Tensor:
        traffic = self.draw(number, 0)
        coded = max(traffic.sizes.tokens) <= 8 and self.rng.random() < 0.5
        x, topk_idx, weights = traffic.arguments(self.rank)
        self.disturb()
        got = buffer.dispatch(x, topk_idx, **FORMATS[traffic.sizes.rows])
        y = traffic.outputs(self.rank, got)
        self.disturb()
        home = buffer.combine(y, got.handle, topk_idx, weights, use_logfmt=coded)
        return traffic.wrong_rows(self.rank, got) | differ(home, traffic.combined(self.rank, coded))

    def in_flight(self, buffer, number: int) -> torch.Tensor:
        """One to three dispatches, then their combines, received in an order that is this rank's own."""
        traffics = [self.draw(number, part) for part in range(self.rng.randint(1, 3))]
        order = random.Random(number * self.ranks + self.rank)
        with_normal, wrong, epochs = self.rng.random() < 0.2, [], []
        for traffic in traffics:
            self.disturb()
            epochs.append(send(buffer, traffic))
        if with_normal:
            sizes = Sizes(tuple(self.rng.randint(0, 64) for _ in range(self.ranks)), hidden=512, rows="f32")
            wrong.append(round_trip(self.normal, Traffic(sizes, number, self.device)))
        turns = order.sample(range(len(traffics)), len(traffics))
        received = {}
        for turn in turns:
            received[turn], bad = receive(buffer, traffics[turn], epochs[turn])
            wrong.append(bad)
        for turn, traffic in enumerate(traffics):
            self.disturb()
            y, handle = traffic.outputs(self.rank, received[turn]), received[turn].handle
            epochs[turn] = buffer.combine_send(y, handle, num_topk=traffic.sizes.k)
        for turn in reversed(turns):
            traffic = traffics[turn]
            _, topk_idx, weights = traffic.arguments(self.rank)
            home = buffer.combine_receive(epochs[turn], topk_idx, weights)
            wrong.append(differ(home, traffic.combined(self.rank)))
        return torch.stack(wrong).any()

    def destroy(self) -> None:
        for buffer in (*self.buffers, self.normal):
            buffer.destroy()


def soak(group, rank, device, iterations):
    """(first wrong iteration or -1, masks that were set, iterations per second)."""
    run = Soak(group, device)
    first_wrong = torch.full((), -1, device=device)
    settle(group)
    begin = time.monotonic()
    for number in range(iterations):
        wrong = run.iterate(number)
        first_wrong = torch.where(wrong & (first_wrong < 0), number, first_wrong)
        if number % 50 == 49 and device != "cpu":
            torch.cuda.synchronize()  # a CPU may run ahead by that much
    settle(group)
    rate = iterations / (time.monotonic() - begin)
    status = torch.zeros(group.size(), dtype=torch.int32, device=device)
    run.buffers[1].query_mask(status)
    run.destroy()
    return first_wrong.item(), sum(status.tolist()), rate


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [2, 8])
def test_soak(gpu_ranks, ranks, pytestconfig):
    iterations = pytestconfig.getoption("--soak-iterations")
    found = gpu_ranks(ranks).run(soak, "cuda", iterations, timeout=60 + iterations / 2)
    print(f"\n{ranks} ranks: {iterations} iterations, {min(rate for *_, rate in found):.0f}/s")
    assert [each[:2] for each in found] == [(-1, 0)] * ranks


def test_soak_on_cpu_ranks(cpu_ranks):
    assert [each[:2] for each in cpu_ranks(3).run(soak, "cpu", 60)] == [(-1, 0)] * 3


@pytest.mark.parametrize("seed", range(12))
def test_what_the_soak_expects_is_the_reference(seed):
    """LlTraffic against cutehop.ref.ep_ll: rows, scales, handles and sums."""
    ranks = seed % 4 + 1
    config = config_for(ranks)
    traffic = LlTraffic(config, draw_sizes(random.Random(seed), config), seed, "cpu")
    given = [traffic.arguments(rank) for rank in range(ranks)]
    xs, ids, weights = ([each[i] for each in given] for i in range(3))
    sizes = {"num_experts": config.num_experts, "max_tokens": MAX_TOKENS, "max_topk": config.max_topk}
    received = ref.dispatch(xs, ids, **sizes, **FORMATS[traffic.sizes.rows])
    assert not any(traffic.wrong_rows(rank, received[rank]) for rank in range(ranks))
    for rank in range(ranks):
        if received[rank].recv_count.any():
            received[rank].recv_x.view(torch.uint8).bitwise_xor_(1)
            assert traffic.wrong_rows(rank, received[rank])
            received[rank].recv_x.view(torch.uint8).bitwise_xor_(1)
    ys = [traffic.outputs(rank, received[rank]) for rank in range(ranks)]
    handles = [each.handle for each in received]
    for coded in (False, True):
        want = ref.combine(ys, handles, ids, weights, **sizes, use_logfmt=coded)
        assert not any(differ(traffic.combined(rank, coded), want[rank]) for rank in range(ranks))
