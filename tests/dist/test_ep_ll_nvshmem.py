"""Low latency through NVSHMEM to every peer: the same bits as over peer memory, on ranks that share a GPU or not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import replace

import pytest
import torch

from cutehop.comm.ll_buffer import CudaLowLatencyBuffer
from cutehop.comm.meeting import Meeting
from tests.ep_cases import same_bits
from tests.ep_ll_cases import CASES, FORMATS, LlCase, LlInputs, check_case, receive, receive_home, send, send_home

NEEDED = ("nvshmem", "nvidia.nvshmem")
HERE = importlib.util.find_spec("nvidia") is not None and all(importlib.util.find_spec(name) for name in NEEDED)

pytestmark = [
    pytest.mark.dist,
    pytest.mark.gpu,
    pytest.mark.skipif(not HERE, reason="nvshmem4py or the NVSHMEM library is not installed"),
]

CALLS = 300


@pytest.fixture(scope="module", params=[2, 8])
def ranks(request):
    return request.param


def make(group, case: LlCase, transport: str = "nvshmem", timeout_s: float = 30) -> CudaLowLatencyBuffer:
    return CudaLowLatencyBuffer(group, case.config(), transport=transport, num_sms=8, timeout_s=timeout_s)


def run_cases(group, rank, cases):
    """One NVSHMEM world for all: it takes seconds to begin."""
    world = make(group, cases[0])
    for case in cases:
        buffer = make(group, case)
        assert buffer.transport == "nvshmem"
        others = [base for peer, base in enumerate(buffer._memory._bases.tolist()) if peer != rank]
        assert others == [0] * (group.size() - 1), "no kernel knows where a peer's memory is"
        for dispatches in range(1, 6):  # every slot
            check_case(buffer, LlInputs(replace(case, seed=dispatches)), dispatches)
        buffer.destroy()
    world.destroy()


def test_cases_match_the_reference(gpu_ranks, ranks):
    gpu_ranks(ranks, fresh=True).run(run_cases, [replace(case, ranks=ranks) for case in CASES], timeout=300)


def both_transports(group, rank, case):
    """The same calls in turns over both; then the world ends and begins again, and kernels loaded before serve it."""
    for _ in range(2):
        buffers = [make(group, case, transport) for transport in ("p2p", "nvshmem")]
        for seed, rows in enumerate(FORMATS):
            inputs = LlInputs(replace(case, seed=seed, rows=rows))
            results = []
            for buffer in buffers:
                got = receive(buffer, inputs, send(buffer, inputs))
                x, topk_idx, weights, y = inputs.on(rank, buffer.device)
                home = buffer.combine(y, got.handle, topk_idx, weights)
                counts = got.recv_count.tolist()
                rows = [got.recv_x[expert, :count] for expert, count in enumerate(counts)]
                results.append([each.cpu() for each in (got.recv_count, got.handle.layout_range, home, *rows)])
            assert all(same_bits(one, other) for one, other in zip(*results, strict=True))
        for buffer in buffers:
            buffer.destroy()


def test_both_transports_give_the_same_bits(gpu_ranks, ranks):
    case = LlCase(ranks=ranks, hidden=2048, k=8, tokens=(16, 1, 9, 0))
    gpu_ranks(ranks, fresh=True).run(both_transports, case, timeout=300)


def in_flight(group, rank, case):
    """Three dispatches, then three combines, received in another order on every rank: the outbox has a part for each."""
    buffer = make(group, case)
    inputs = [LlInputs(replace(case, seed=seed)) for seed in range(3)]
    order = [(rank + i) % 3 for i in range(3)]
    for _ in range(4):
        epochs = [send(buffer, each) for each in inputs]
        got = {i: receive(buffer, inputs[i], epochs[i]) for i in order}
        epochs = [send_home(buffer, each, got[i].handle) for i, each in enumerate(inputs)]
        for i in reversed(order):
            receive_home(buffer, inputs[i], epochs[i])
    buffer.destroy()


def test_three_operations_in_flight(gpu_ranks, ranks):
    gpu_ranks(ranks, fresh=True).run(in_flight, LlCase(ranks=ranks, rows="bf16", hidden=1024), timeout=120)


def replayed(group, rank, case):
    """A captured pair, replayed; eager calls of other tokens between, and tokens changed in place."""
    buffer, inputs = make(group, case), LlInputs(case)
    x, topk_idx, weights, y = inputs.on(rank, buffer.device)
    given = x.clone()
    out = torch.empty_like(x)

    def pair():
        got = buffer.dispatch(given, topk_idx, use_fp8=False)
        return got, buffer.combine(y, got.handle, topk_idx, weights, out=out)

    pair()
    torch.cuda.synchronize()
    Meeting(group, 60).meet("warm")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, home = pair()
    want, counts = inputs.combined()[rank], inputs.received[rank].recv_count.tolist()
    rows = inputs.received[rank].recv_x
    for call in range(CALLS):
        factor = 2.0 ** (call % 5)  # exact in bf16
        given.copy_(x * factor)
        home.zero_()
        graph.replay()
        if call % 10 == 0:
            assert same_bits(home, want)
            for expert, count in enumerate(counts):
                assert same_bits(got.recv_x[expert, :count], rows[expert, :count] * factor)
        if call % 37 == 0:
            check_case(buffer, LlInputs(replace(case, seed=call)))
    buffer.destroy()


def test_graphs_and_eager_calls_in_turns(gpu_ranks, ranks):
    case = LlCase(ranks=ranks, rows="bf16", hidden=512, k=4, tokens=(16, 7, 1, 12))
    gpu_ranks(ranks, fresh=True).run(replayed, case, timeout=300)


def refuse(group, rank):
    case = LlCase(ranks=2)
    with pytest.raises(ValueError, match=r"transport 'ib', supported auto\|p2p\|nvshmem"):
        make(group, case, "ib")
    with pytest.raises(ValueError, match="pass the same"):
        make(group, case, "p2p" if rank else "nvshmem")
    buffer = make(group, case, "auto")
    assert buffer.transport == "p2p", "one node"
    check_case(buffer, LlInputs(case))
    buffer.destroy()


def test_ranks_choose_one_transport(gpu_ranks):
    gpu_ranks(2).run(refuse)
