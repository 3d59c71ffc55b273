"""CudaBuffer on 2, 3, 5 and 8 ranks, bit for bit against the reference: values, orders of calls, views, stray writes.

The functions take a device; where they need no kernel, two CPU ranks run them over gloo as well.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from cutehop.comm.config import EpConfig
from cutehop.comm.kernels import config as sizes
from cutehop.comm.layout import EpLayout
from tests.ep_cases import CASES, MAX_TOKENS, EpCase, EpInputs, check_case
from tests.ep_gpu_work import (
    Canaries,
    bytes_of_a_call,
    guarded_outputs,
    heap_with_guard,
    open_buffer,
    poison_rows,
    settle,
)
from tests.ep_traffic import Sizes, Traffic, differ, go_home, round_trip, wrong_rows

pytestmark = pytest.mark.dist

WIDEST = 8208  # columns: rows of more than one and of unequal pieces
LOCAL = 16  # experts of a rank, so that two ranks have 32

# With those of tests/ep_cases.py, whose experts become 16 a rank where they are 4.
FURTHER = [
    EpCase(hidden=7168, k=8, tokens=(40, 3, 0, 17)),
    EpCase(hidden=8200, k=2, routing="some", tokens=(9, 24)),  # 16400 bytes: three pieces, the last one shorter
    EpCase(hidden=4104, routing="repeated", tokens=(1, 33)),
    EpCase(hidden=WIDEST, rows="f32", tokens=(17, 5)),  # 65 scales: no multiple of 16 bytes
    EpCase(hidden=2048, rows="f32", column_major=True),  # 16 scales: copied 16 bytes at a time
    EpCase(hidden=7168, rows="ue8m0", tokens=(11, 0, 30)),
    EpCase(hidden=2048, rows="ue8m0", column_major=True),
    EpCase(k=32, local_experts=LOCAL),
    EpCase(k=31, local_experts=LOCAL, routing="one_rank", idx_dtype=torch.int32),
    EpCase(k=2, local_experts=1, routing="some"),
    EpCase(tokens=(MAX_TOKENS,), routing="one_rank"),
]


def cases(ranks: int) -> list[EpCase]:
    return [
        replace(case, ranks=ranks, local_experts=LOCAL if case.local_experts > 1 else 1, seed=number)
        for number, case in enumerate(CASES + FURTHER)
    ]


def widest_config(ranks: int, local_experts: int) -> EpConfig:
    """Takes every case."""
    return EpConfig(ranks, WIDEST, MAX_TOKENS, ranks * local_experts, max_topk=32, scales="f32")


@pytest.fixture(scope="module", params=[3, 5, 2, 8])
def ranks(request):
    """Of the module, so that pytest runs all tests of one pool before it makes the next."""
    return request.param


def run_cases(group, rank, device):
    """All cases on two buffers that live side by side, one shape after the other. Memory and outputs begin as NaN."""
    buffers = {local: open_buffer(group, widest_config(group.size(), local), device) for local in (1, LOCAL)}
    chosen = cases(group.size())
    for case in chosen:
        inputs, buffer = EpInputs(case), buffers[case.local_experts]
        poison_rows(buffer)
        with guarded_outputs():
            check_case(buffer, inputs)
    for buffer in buffers.values():
        buffer.destroy()
    return len(chosen)


@pytest.mark.gpu
def test_cases(gpu_ranks, ranks):
    assert gpu_ranks(ranks).run(run_cases, "cuda", timeout=200) == [len(CASES) + len(FURTHER)] * ranks


def run_cases_as_large_ones(group, rank, device):
    """As if rows were many: all SMs copy those from elsewhere."""
    before, sizes.COPY_BYTES = sizes.COPY_BYTES, 0
    try:
        return run_cases(group, rank, device)
    finally:
        sizes.COPY_BYTES = before


@pytest.mark.gpu
def test_cases_as_large_ones(gpu_ranks, ranks):
    found = gpu_ranks(ranks).run(run_cases_as_large_ones, "cuda", timeout=200)
    assert found == [len(CASES) + len(FURTHER)] * ranks


def mixed_sizes(ranks: int) -> list[Sizes]:
    """What tests/ep_cases.py has not: ids out of any range, other 1-byte dtypes, experts named twice by chance."""
    tokens = tuple((37, 0, 64, 5, 1, 33, 16, 8)[:ranks])
    return [
        Sizes(tokens, routing="hostile", k=8),
        Sizes(tokens, hidden=200, routing="hostile", idx_dtype=torch.int32, k=5),
        Sizes(tokens, hidden=208, rows="f32", dtype=torch.uint8, column_major=True, k=7),
        Sizes(tokens[::-1], rows="f32", routing="hostile", column_major=True),
        Sizes(tokens[::-1], hidden=640, rows="int32", dtype=torch.int8, routing="one_rank"),
        Sizes(tokens, routing="none"),
        Sizes((64,) * ranks, hidden=1024, routing="one_rank", idx_dtype=torch.int32, k=32),
    ]


def run_traffic(group, rank, device):
    """Every way to say how many rows are returned, with what calls must not read set to NaN."""
    ranks = group.size()
    buffer = open_buffer(group, EpConfig(ranks, 1024, 64, 4 * ranks, max_topk=32, scales="f32"), device)
    wrong = []
    for seed, sizes in enumerate(mixed_sizes(ranks)):
        traffic = Traffic(sizes, seed, device)
        exact, most = traffic.rows_of(rank), ranks * 64
        for biases, worst in enumerate((0, exact, most + 77)):  # 0 rows, if exact is, mean the exact number too
            poison_rows(buffer)
            with guarded_outputs():
                wrong.append(round_trip(buffer, traffic, worst, biases, weights=biases != 1, cached=True))
    buffer.destroy()
    return [bool(each) for each in wrong]


@pytest.mark.gpu
def test_traffic(gpu_ranks, ranks):
    assert gpu_ranks(ranks).run(run_traffic, "cuda") == [[False] * 21] * ranks


def call_in_any_order(group, rank, device):
    """Three dispatches on two buffers before the first combine; handles used late, in reverse, and twice."""
    ranks, rng = group.size(), random.Random(1)
    config = EpConfig(ranks, 512, 64, 4 * ranks, max_topk=8, scales="f32")
    buffers = [open_buffer(group, config, device) for _ in range(2)]
    wrong = []
    for turn in range(4):
        pending = []
        for seed in range(3 * turn, 3 * turn + 3):
            tokens = tuple(rng.choice((0, 1, 30, 64)) for _ in range(ranks))
            sizes = Sizes(tokens, rng.choice((16, 144, 512)), rows=rng.choice(("bf16", "f32")), k=seed % 8 + 1)
            buffer, traffic, worst = rng.choice(buffers), Traffic(sizes, seed, device), rng.choice((0, ranks * 64))
            got = buffer.dispatch(*traffic.arguments(rank), num_worst_tokens=worst)
            pending.append((buffer, traffic, got, worst))
        for buffer, traffic, got, worst in reversed(pending):
            wrong.append(go_home(buffer, traffic, got, biases=1))
            wrong.append(wrong_rows(traffic, rank, got, worst))  # later calls left alone what this one returned
            x, scales, *_ = traffic.arguments(rank)
            again = got._replace(recv_x=buffer.dispatch_cached(x, scales, got.handle)[0])
            wrong.append(wrong_rows(traffic, rank, again, worst))
            wrong.append(go_home(buffer, traffic, again, biases=2, weights=False))
    for buffer in buffers:
        buffer.destroy()
    return [bool(each) for each in wrong]


@pytest.mark.gpu
def test_calls_in_any_order(gpu_ranks, ranks):
    assert gpu_ranks(ranks).run(call_in_any_order, "cuda") == [[False] * 48] * ranks


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that begins one element behind a multiple of 16 bytes."""
    memory = tensor.new_empty(tensor.numel() + 1)
    return memory[1:].view(tensor.shape).copy_(tensor)


def use_views(group, rank, device):
    """Zero copy at both ends, also with NaN behind the rows; stale views; tensors at odd addresses."""
    ranks = group.size()
    tokens = tuple((37, 0, 64, 5, 1, 33, 16, 8)[:ranks])
    buffer = open_buffer(group, EpConfig(ranks, 512, 64, 4 * ranks, max_topk=8, scales="f32"), device)
    wrong = []
    for seed, rows in enumerate(("bf16", "f32", "bf16")):
        traffic = Traffic(Sizes(tokens, 256, rows=rows), seed, device)
        x, scales, *rest = traffic.arguments(rank)
        poison_rows(buffer)
        view = buffer.dispatch_input(64, 256, x.dtype)
        view.view(torch.uint8).fill_(0xFF)
        view[: len(x)].copy_(x)
        worst = 0 if seed else ranks * 64
        with guarded_outputs():
            got = buffer.dispatch(view[: len(x)], scales, *rest, num_worst_tokens=worst)
            wrong.append(wrong_rows(traffic, rank, got, worst))
            y = buffer.combine_input(got.handle, 256)
            assert y.shape == got.recv_x.shape
            y.view(torch.uint8).fill_(0xFF)
            m = traffic.rows_of(rank)
            y[:m] = traffic.expert(got.recv_x[:m], rank)
            outgoing = misaligned(traffic.outgoing_weights(got.recv_topk_weights, rank))
            bias = misaligned(traffic.bias[0, rank, : len(x)])
            combined, weights = buffer.combine(y, got.handle, outgoing, bias)
            for result, want in zip((combined, weights), traffic.combined(rank, 1)):
                wrong.append(differ(result, want))
            again, _ = buffer.dispatch_cached(misaligned(x), scales, got.handle)
            wrong.append(differ(again[:m].view(torch.uint8), got.recv_x[:m].view(torch.uint8)))
            once_more, _ = buffer.combine(misaligned(y), got.handle, None, bias)
            wrong.append(differ(once_more, combined))
        if len(x):
            with pytest.raises(ValueError, match="dispatch_input: stale view"):
                buffer.dispatch(view[: len(x)], scales, *rest)
        if len(y):
            with pytest.raises(ValueError, match="combine_input: stale view"):
                buffer.combine(y, got.handle)
    refuse_views(buffer, traffic, got)
    buffer.destroy()
    return [bool(each) for each in wrong]


def refuse_views(buffer, traffic, got):
    """What raises on this rank alone, and takes nothing away."""
    x, *_ = traffic.arguments(buffer.rank)
    view = buffer.dispatch_input(64, 256)
    if 0 < len(x) < len(view):
        with pytest.raises(ValueError, match="rows begin 512 bytes into the view"):
            buffer.dispatch_cached(view[1 : 1 + len(x)], None, got.handle)
    with pytest.raises(ValueError, match="65 tokens"):
        buffer.dispatch_input(65)
    more = got.handle._replace(recv_src_idx=got.handle.recv_src_idx.new_zeros(buffer.ranks * 64 + 1))
    with pytest.raises(ValueError, match="rows, the buffer's memory holds"):
        buffer.combine_input(more)


@pytest.mark.gpu
def test_views(gpu_ranks, ranks):
    assert gpu_ranks(ranks).run(use_views, "cuda") == [[False] * 15] * ranks


CANARY_CASES = [
    EpCase(tokens=(30, 0, 47, 1)),
    EpCase(tokens=(5, 30), hidden=136, k=3, routing="some", idx_dtype=torch.int32),
    EpCase(hidden=208, rows="f32", tokens=(29, 3, 18)),
    EpCase(hidden=1024, rows="ue8m0", routing="one_rank", column_major=True),
]


def watch_for_stray_writes(group, rank, device):
    """Between the regions, behind the last one, and in the part of each that a call does not use. Bytes watched."""
    ranks = group.size()
    config = EpConfig(ranks, 1024, MAX_TOKENS, 4 * ranks, max_topk=8, scales="f32")
    with heap_with_guard():
        buffer = open_buffer(group, config, device)
    assert buffer._memory.host.numel() == EpLayout(config).host_bytes
    watched = []
    for number, case in enumerate(CANARY_CASES):
        inputs = EpInputs(replace(case, ranks=ranks, seed=number))
        scales, handle = inputs.scales[rank], inputs.received[rank].handle
        used = bytes_of_a_call(
            EpLayout(config),
            n=len(inputs.xs[rank]),
            row_bytes=case.hidden * inputs.xs[rank].itemsize,
            k=case.k,
            scale_words=0 if scales is None else scales.shape[1],
            sent=handle.is_token_in_rank.sum(0).tolist(),
            received=len(handle.recv_src_idx),
            y_bytes=2 * case.hidden,
        )
        canaries = Canaries(buffer, used)
        check_case(buffer, inputs)
        watched.append(canaries.check())
    assert not buffer._memory.host[: EpLayout(config).recv_counts.offset].any()  # no error was written
    buffer.destroy()
    return watched


@pytest.mark.gpu
def test_nothing_else_is_written(gpu_ranks, ranks):
    for watched in gpu_ranks(ranks).run(watch_for_stray_writes, "cuda"):
        assert min(watched) > MAX_TOKENS * 1024  # most of x, at least


def measure_memory(group, rank, device):
    """Bytes that a buffer takes from this rank's GPU, for all ranks that share it, and gives back when it releases its
    memory; the bytes of its layout."""

    def free() -> int:
        settle(group)
        now = torch.cuda.mem_get_info()[0]
        settle(group)
        return now

    open_buffer(group, EpConfig(group.size(), 8, 1, group.size(), 1), device).destroy()  # kernels and torch's pools
    config = EpConfig(group.size(), 7168, 2048, 64 * group.size(), 8)
    before = free()
    buffer = open_buffer(group, config, device)
    taken = before - free()
    assert buffer._memory.local.numel() == EpLayout(config).heap_bytes
    buffer.release_memory()
    returned = free() - (before - taken)
    buffer.destroy()
    return taken, returned, EpLayout(config).heap_bytes


@pytest.mark.gpu
def test_memory_is_what_the_layout_says(gpu_ranks, ranks):
    """Up to what the driver takes for it: granules of 2 MiB, and page tables for the mappings of all peers."""
    slack = 64 * 2**20
    for rank, (taken, returned, layout) in enumerate(gpu_ranks(ranks).run(measure_memory, "cuda")):
        gpus = torch.cuda.device_count()
        sharing = len(range(rank % gpus, ranks, gpus))
        assert sharing * layout <= taken <= sharing * layout + slack
        assert abs(taken - returned) <= slack


def run_many_experts(group, rank, device):
    """1024 experts a rank, most of them without tokens."""
    ranks = group.size()
    sizes = Sizes((33, 7, 0, 20, 1, 1, 4, 9)[:ranks], hidden=64, local_experts=1024, k=8)
    buffer = open_buffer(group, EpConfig(ranks, 64, 48, 1024 * ranks, max_topk=8), device)
    wrong = [round_trip(buffer, Traffic(sizes, seed, device), worst) for seed, worst in ((0, 0), (1, 48 * ranks))]
    buffer.destroy()
    return [bool(each) for each in wrong]


@pytest.mark.gpu
def test_many_experts(gpu_ranks, ranks):
    assert gpu_ranks(ranks).run(run_many_experts, "cuda") == [[False, False]] * ranks


@pytest.mark.parametrize("function", [run_traffic, call_in_any_order, use_views, run_many_experts])
def test_the_same_on_cpu_ranks(cpu_ranks, function):
    for found in cpu_ranks(2).run(function, "cpu"):
        assert not any(found)


def test_canaries_know_every_byte_of_a_call():
    """A call as large as the buffer leaves only the ends of lines and records."""
    config = EpConfig(2, 256, 32, 8, max_topk=8, scales="f32")
    layout = EpLayout(config)
    used = bytes_of_a_call(layout, 32, 512, 8, 4, [32, 32], 64, 512)
    for name in ("send_lists", "topk", "x", "y_weights", "y"):
        region = getattr(layout, name)
        assert used[region.offset : region.offset + region.items * region.item_bytes].all(), name
    none = bytes_of_a_call(layout, 0, 512, 8, 4, [0, 0], 0, 512)
    assert not none[layout.control_bytes :].any()
    assert int(none.sum()) == 4 * (4 * 2) + 2 * 16 + 4 * (2 + 4 + 1) + 2 * 8 * 4
