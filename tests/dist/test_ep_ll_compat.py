"""The low-latency methods of `cutehop.compat.deep_ep` among ranks: DeepEP V1's loop of checks, hooks, events, masks.

The same functions run over gloo on CPU ranks and, marked gpu, over ranks on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from cutehop.compat.deep_ep import Buffer
from cutehop.ref import ep
from tests.ep_ll_cases import LlCase, LlInputs, everyone, same_bits
from tests.ranks import Pools, RankPool

pytestmark = pytest.mark.dist
FORMATS = [  # keywords of low_latency_dispatch
    {"use_fp8": False},
    {},
    {"round_scale": True},
    {"round_scale": True, "use_ue8m0": True},
    {"use_fp8": False, "round_scale": True, "use_ue8m0": True},  # nothing to round
]
GPU_WORLDS = [pytest.param(("cuda", ranks), marks=pytest.mark.gpu) for ranks in (2, 8)]


@pytest.fixture(params=[("cpu", 2), ("cpu", 3), *GPU_WORLDS], ids=str)
def world(request: pytest.FixtureRequest, ranks_on: Callable[[str], Pools]) -> tuple[str, RankPool]:
    device, ranks = request.param
    return device, ranks_on(device)(ranks)


def make(group: Any, device: str, **options: Any) -> Buffer:
    given = {"low_latency_mode": True, "explicitly_destroy": True, "timeout_s": 30, "device": device, **options}
    return Buffer(group, **given)


class Marked:
    """V1's inputs: row t of rank r holds r - 128, and in its last 128 columns t, so that it tells where it is from."""

    def __init__(self, ranks: int, rank: int, device: str) -> None:
        rng = torch.Generator().manual_seed(7)
        self.ranks, self.rank, self.tokens, self.hidden, self.experts, self.k = ranks, rank, 24, 512, 3 * ranks, 3
        self.ids, self.weights = [], []
        for source in range(ranks):
            n = 24 - source
            ids = torch.rand((n, self.experts), generator=rng).argsort(1)[:, :3].contiguous()
            ids.view(-1)[torch.randperm(ids.numel(), generator=rng)[:10]] = -1
            self.ids.append(ids)
            self.weights.append(torch.randn(ids.shape, generator=rng).abs())
        n = len(self.ids[rank])
        self.x = torch.full((n, self.hidden), rank - 128.0)
        self.x[:, -128:] = torch.arange(n)[:, None]
        self.x = self.x.bfloat16().to(device)
        self.topk_idx, self.topk_weights = self.ids[rank].to(device), self.weights[rank].to(device)
        self.valid_weight = self.topk_weights.masked_fill(self.topk_idx < 0, 0).sum(1)

    def check_received(self, recv_x: Any, recv_count: Tensor, handle: tuple, rounded: bool) -> Tensor:
        """What V1 checks of a dispatch. Returns the rows as bf16, for the experts."""
        src_info, layout_range, tokens, hidden, experts, *_ = handle
        assert (tokens, hidden, experts) == (self.tokens, self.hidden, self.experts)
        values = torch.zeros((3, self.ranks * self.tokens, self.hidden), dtype=torch.bfloat16, device=self.x.device)
        for expert, count in enumerate(recv_count.tolist()):
            global_id = self.rank * 3 + expert
            assert count == sum(int((ids == global_id).sum()) for ids in self.ids)
            rows = self._values(recv_x, expert, count)
            values[expert, :count] = rows
            marks, tails = rows[:, :-128].float(), rows[:, -128:].float()
            exact = torch.equal(tails[:, 0].int(), src_info[expert, :count])
            assert exact if not rounded else (tails[:, 0] - src_info[expert, :count]).abs().max() <= 1
            assert (marks == marks[:, :1]).all()
            begins = 0
            for source, packed in enumerate(layout_range[expert].tolist()):
                begin, size = packed >> 32, packed & 0xFFFFFFFF
                assert begin == begins
                assert size == (self.ids[source] == global_id).sum()
                assert ((marks[begin : begin + size] - (source - 128)).abs() <= (8 if rounded else 0.5)).all()
                assert (src_info[expert, begin : begin + size].diff() > 0).all()
                begins += size
            assert begins == count
        return values

    def _values(self, recv_x: Any, expert: int, count: int) -> Tensor:
        if isinstance(recv_x, Tensor):
            return recv_x[expert, :count]
        assert recv_x[1].shape[2] == (4 if recv_x[1].dtype == torch.float32 else 1)
        return ep.dequantize_fp8(recv_x[0][expert, :count], recv_x[1][expert, :count])

    def check_combined(self, combined: Tensor, fp8: bool) -> None:
        assert combined.shape == self.x.shape
        assert torch.isfinite(combined).all()
        a, b = combined.double() + 1, (self.x.float() * self.valid_weight[:, None]).double() + 1
        assert 1 - 2 * (a * b).sum() / (a * a + b * b).sum() < (9e-4 if fp8 else 1e-5)


def v1s_loop(group: Any, rank: int, device: str) -> int:
    """Inputs x hook x formats x repeated dispatch x zero copy, on one Buffer, without cleaning."""
    given = Marked(group.size(), rank, device)
    buffer = make(group, device)
    stats = torch.zeros(3, dtype=torch.int32, device=device)
    waits = [torch.zeros(group.size(), dtype=torch.int64, device=device) for _ in range(2)]
    dispatches = round_trips = 0
    buffer.clean_low_latency_buffer(given.tokens, given.hidden, given.experts)
    for hook_wanted, options, repeat, zero_copy in product((False, True), FORMATS, (1, 2), (False, True)):
        for _ in range(repeat):
            recv_x, count, handle, event, hook = buffer.low_latency_dispatch(
                given.x,
                given.topk_idx,
                given.tokens,
                given.experts,
                cumulative_local_expert_recv_stats=stats,
                dispatch_wait_recv_cost_stats=waits[0],
                async_finish=not hook_wanted,
                return_recv_hook=hook_wanted,
                **options,
            )
            assert (hook is None) != hook_wanted
            hook() if hook else event.current_stream_wait()
            dispatches += 1
        fp8, rounded = options.get("use_fp8", True), options.get("round_scale", False)
        y = given.check_received(recv_x, count, handle, rounded and fp8)
        if zero_copy:
            buffer.get_next_low_latency_combine_buffer(handle)[:] = y
            y.zero_()
        out = torch.empty_like(given.x) if repeat == 2 else None
        combined, event, hook = buffer.low_latency_combine(
            y,
            given.topk_idx,
            given.topk_weights,
            handle,
            zero_copy=zero_copy,
            async_finish=not hook_wanted,
            return_recv_hook=hook_wanted,
            out=out,
            combine_wait_recv_cost_stats=waits[1],
        )
        hook() if hook else event.current_stream_wait()
        assert out is None or combined is out
        if not rounded or not fp8:
            given.check_combined(combined, fp8)
        assert torch.equal(stats, dispatches * count)
        round_trips += 1
    assert all(int(wait.min()) >= 0 for wait in waits)
    buffer.destroy()
    return round_trips


def test_v1s_loop(world):
    device, pool = world
    assert pool.run(v1s_loop, device) == [2 * len(FORMATS) * 2 * 2] * pool.ranks


def overlapping(group: Any, rank: int, device: str) -> None:
    """Three hooks in flight, called in another order; a fourth call and a second use of a hook raise; int32 ids."""
    case = LlCase(ranks=group.size(), idx_dtype=torch.int32)
    inputs, buffer = LlInputs(case), make(group, device)
    x, topk_idx, weights, y = inputs.on(rank, torch.device(device))
    arguments = (x, topk_idx, case.max_tokens, case.experts)

    def combined(handle: tuple) -> tuple:
        return buffer.low_latency_combine(y, topk_idx, weights, handle, return_recv_hook=True)

    calls = [buffer.low_latency_dispatch(*arguments, return_recv_hook=True) for _ in range(3)]
    with pytest.raises(RuntimeError, match="sends ago are outstanding"):
        buffer.low_latency_dispatch(*arguments, return_recv_hook=True)
    want = inputs.received[rank]
    for i in (1, 2, 0):
        (recv_x, _), recv_count, _, _, hook = calls[i]
        hook()
        assert same_bits(recv_count, want.recv_count)
        for expert, count in enumerate(want.recv_count.tolist()):
            assert same_bits(recv_x[expert, :count], want.recv_x[expert, :count])
        with pytest.raises(RuntimeError, match="hook: was called"):
            hook()
    homes = [combined(calls[i][2]) for i in range(3)]
    for result, _, hook in reversed(homes):
        hook()
        assert same_bits(result, inputs.combined()[rank])
    with pytest.raises(RuntimeError, match="zero_copy without a tensor to read"):
        buffer.low_latency_combine(y, topk_idx, weights, calls[0][2], zero_copy=True)
    for name, sizes in (("T", (17, case.experts)), ("experts", (16, 2 * case.experts))):
        with pytest.raises(ValueError, match="make another Buffer for other sizes"):
            buffer.low_latency_dispatch(x, topk_idx, *sizes), name
    buffer.destroy()
    with pytest.raises(RuntimeError, match="was destroyed"):
        buffer.low_latency_dispatch(*arguments)


def test_hooks_in_flight(world):
    device, pool = world
    pool.run(overlapping, device)


def both_modes(group: Any, rank: int, device: str) -> None:
    """Normal calls of the same Buffer between a send and its hook."""
    case = LlCase(ranks=group.size(), rows="bf16")
    inputs, buffer = LlInputs(case), make(group, device, num_nvl_bytes=2**20)
    x, topk_idx, weights, y = inputs.on(rank, torch.device(device))
    *_, handle, _, hook = buffer.low_latency_dispatch(
        x, topk_idx, case.max_tokens, case.experts, use_fp8=False, return_recv_hook=True
    )
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, case.experts)
    recv_x, *_, way, _ = buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, topk_idx, weights)
    hook()
    home, _, hook = buffer.low_latency_combine(y, topk_idx, weights, handle, return_recv_hook=True)
    combined, _, _ = buffer.combine(recv_x, way)
    assert same_bits(combined, (x.float() * in_rank.sum(1, keepdim=True)).bfloat16().cpu())
    hook()
    assert same_bits(home, inputs.combined()[rank])
    buffer.destroy()


def test_both_modes_of_one_buffer(world):
    device, pool = world
    pool.run(both_modes, device)


def masks(group: Any, rank: int, device: str) -> None:
    ranks = group.size()
    apart = ((0, 1), (1, 0))
    whole, split = (LlInputs(LlCase(ranks=ranks, masked=masked, rows="bf16")) for masked in ((), apart))
    buffer = make(group, device, enable_shrink=True)
    status = torch.full((ranks,), 7, dtype=torch.int32, device=device)

    def round_trip(inputs: LlInputs) -> None:
        x, topk_idx, weights, y = inputs.on(rank, torch.device(device))
        sizes = (inputs.case.max_tokens, inputs.case.experts)
        _, recv_count, handle, _, _ = buffer.low_latency_dispatch(x, topk_idx, *sizes, use_fp8=False)
        assert same_bits(recv_count, inputs.received[rank].recv_count)
        combined, _, _ = buffer.low_latency_combine(y, topk_idx, weights, handle)
        assert same_bits(combined, inputs.combined()[rank])

    with pytest.raises(RuntimeError, match="there are no masks before the first call"):
        buffer.low_latency_query_mask_buffer(status)
    round_trip(whole)
    everyone(group)
    if rank < 2:
        buffer.low_latency_update_mask_buffer(1 - rank, True)
    everyone(group)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [int(rank < 2 and peer == 1 - rank) for peer in range(ranks)]
    round_trip(split)
    everyone(group)
    if rank == 0:
        buffer.low_latency_update_mask_buffer(1)
    else:
        buffer.low_latency_clean_mask_buffer()
    everyone(group)
    round_trip(whole)
    buffer.destroy()


def test_masks(world):
    device, pool = world
    pool.run(masks, device)


def logfmt(group: Any, rank: int, device: str) -> None:
    """Both forms of the call, rows that are encoded and some that are not."""
    inputs, buffer = LlInputs(LlCase(ranks=group.size(), hidden=1536, rows="bf16")), make(group, device)
    for y in inputs.ys:
        y[:, ::2] *= 2.0**-14
    x, topk_idx, weights, y = inputs.on(rank, torch.device(device))
    for hook_wanted in (False, True):
        _, _, handle, _, _ = buffer.low_latency_dispatch(x, topk_idx, 16, inputs.case.experts, use_fp8=False)
        combined, _, hook = buffer.low_latency_combine(
            y, topk_idx, weights, handle, use_logfmt=True, return_recv_hook=hook_wanted
        )
        if hook:
            hook()
        assert same_bits(combined, inputs.combined(use_logfmt=True)[rank])
    with pytest.raises(RuntimeError, match="zero_copy with use_logfmt"):
        buffer.low_latency_combine(y, topk_idx, weights, handle, use_logfmt=True, zero_copy=True)
    buffer.destroy()


def test_logfmt(world):
    device, pool = world
    pool.run(logfmt, device)


def differing_first_calls(group: Any, rank: int) -> None:
    case = LlCase()
    x, topk_idx, _, _ = LlInputs(case).on(rank, torch.device("cpu"))
    buffer = make(group, "cpu")
    with pytest.raises(ValueError, match=r"T, hidden, experts, choices \[1[67], 256, 8, 4\] on rank \d"):
        buffer.low_latency_dispatch(x, topk_idx, 16 + rank, case.experts)
    _, _, handle, _, _ = buffer.low_latency_dispatch(x, topk_idx, 16, case.experts)
    with pytest.raises(ValueError, match="handle of 5 parts, low_latency_dispatch returns 8"):
        buffer.low_latency_combine(x, topk_idx, x, handle[:5])
    buffer.destroy()


def test_first_calls_that_differ(cpu_ranks):
    cpu_ranks(2).run(differing_first_calls)
