"""Ops of expert parallelism: `cutehop::ep_layout`, `ep_dispatch`, `ep_dispatch_cached`, `ep_combine`.

R ranks, E experts, L = E / R of them on each rank; n tokens of this rank with k choices each, m received rows.
cutehop.ref.ep defines the values. The last three run on every rank of the group of the buffer that they name.

ep_layout(topk_idx, num_experts, num_ranks) -> (num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank)
    topk_idx                 int64 | int32 (n, k), k 1..32, contiguous; an id outside [0, E) is no choice.
    Returns int32 (R,), int32 (E,), bool (n, R).

ep_dispatch(x, scales, topk_idx, topk_weights, is_token_in_rank, num_tokens_per_expert, buffer, num_worst_tokens=0)
        -> (recv_x, recv_scales, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert, rank_prefix_matrix,
            recv_src_idx, send_row)
    x                        (n, H) bfloat16 | any 1-byte dtype, contiguous, H * itemsize a multiple of 16 bytes.
    scales                   float32 | int32 (n, S), any strides, with 1-byte x only; or None.
    topk_idx, topk_weights   (n, k) as above, float32 (n, k); both or neither None.
    is_token_in_rank, num_tokens_per_expert   of ep_layout.
    buffer                   name of a cutehop.comm.base.Buffer.
    num_worst_tokens         0: m is the number of received rows, the CPU waits for it. Above 0: m is this number,
                             nothing waits, and rows past the received ones are undefined, but for recv_topk_idx = -1.
    Returns recv_x (m, H), recv_scales (m, S), recv_topk_idx (m, k) with local ids or -1, recv_topk_weights (m, k),
    int32 (L,) choices of each local expert, and with is_token_in_rank the handle: int32 (R, R), (m,), (n, R).
    What was not sent comes back with shape (0,).

ep_dispatch_cached(x, scales, rank_prefix_matrix, recv_src_idx, is_token_in_rank, send_row, buffer)
        -> (recv_x, recv_scales)
    New rows, of any H and dtype, the way of an earlier dispatch, without a CPU wait.

ep_combine(y, topk_weights, bias_0, bias_1, rank_prefix_matrix, recv_src_idx, is_token_in_rank, send_row, buffer)
        -> (combined_x, combined_topk_weights)
    y                        bfloat16 (m, H), contiguous: row i is what this rank adds to the token of received row i.
    topk_weights             float32 (m, k) or None, added up likewise.
    bias_0, bias_1           bfloat16 (n, H) or None, where the sums begin.
    Returns bfloat16 (n, H), float32 (n, k) or shape (0,).

Gradients: of dispatch by combine, of combine by cached dispatch, for bfloat16 x, y, biases and for weights (1-byte rows
and scales have none). They are collective like the calls themselves, so all ranks run backward through a call or none.

torch.compile drops no call of the three, used or not, and keeps their order. Its inductor backend has two faults there,
seen with torch 2.13. It forgets the order of calls that no tensor connects (pytorch pull request 189209), unless it is
given options={"reorder_for_peak_memory": False}. And it needs num_worst_tokens, as it takes the number of received rows
from the wrong place: the compiled call raises an AssertionError about sizes. A buffer is looked up by its name when a
call runs; a backward is compiled for this rank of it.

Errors: TypeError for dtypes, ValueError for the rest; RuntimeError for a destroyed buffer, EpTimeoutError (a
RuntimeError) where a peer did not do its part in time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cutehop.comm import checks, outputs
from cutehop.comm.base import EpHandle, find
from cutehop.ops._define import define, define_ordered
from cutehop.ref import ep as ref

HANDLE = "Tensor rank_prefix_matrix, Tensor recv_src_idx, Tensor is_token_in_rank, Tensor send_row"
Outputs = tuple[Tensor, ...]


def _allocate_layout(topk_idx: Tensor, num_experts: int, num_ranks: int) -> Outputs:
    checks.check_layout(topk_idx, num_experts, num_ranks)
    return (
        topk_idx.new_empty((num_ranks,), dtype=torch.int32),
        topk_idx.new_empty((num_experts,), dtype=torch.int32),
        topk_idx.new_empty((topk_idx.shape[0], num_ranks), dtype=torch.bool),
    )


def _or_absent(result: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty((0,), dtype=dtype) if result is None else result


def _dispatch(
    x: Tensor,
    scales: Tensor | None,
    topk_idx: Tensor | None,
    topk_weights: Tensor | None,
    is_token_in_rank: Tensor,
    num_tokens_per_expert: Tensor,
    buffer: str,
    num_worst_tokens: int = 0,
) -> Outputs:
    got = find(buffer).dispatch(
        x,
        scales,
        topk_idx,
        topk_weights,
        is_token_in_rank,
        num_tokens_per_expert,
        num_worst_tokens=num_worst_tokens,
    )
    rows = outputs.Rows(got.recv_x, got.recv_scales, got.recv_topk_idx, got.recv_topk_weights, got.handle.recv_src_idx)
    counts = outputs.Counts(got.num_recv_tokens_per_expert, got.handle.rank_prefix_matrix, got.handle.send_row)
    return _dispatch_results(rows, counts)


def _dispatch_fake(
    x: Tensor,
    scales: Tensor | None,
    topk_idx: Tensor | None,
    topk_weights: Tensor | None,
    is_token_in_rank: Tensor,
    num_tokens_per_expert: Tensor,
    buffer: str,
    num_worst_tokens: int = 0,
) -> Outputs:
    arguments = (x, scales, topk_idx, topk_weights)
    checks.check_dispatch(*arguments, is_token_in_rank, num_tokens_per_expert, num_worst_tokens)
    num_rows = num_worst_tokens or torch.library.get_ctx().new_dynamic_size()
    rows = outputs.rows(*arguments, num_rows)
    return _dispatch_results(rows, outputs.counts(is_token_in_rank, num_tokens_per_expert))


def _dispatch_results(rows: outputs.Rows, counts: outputs.Counts) -> Outputs:
    """In the order of the schema."""
    x = rows.recv_x
    return (
        x,
        _or_absent(rows.recv_scales, x, torch.float32),
        _or_absent(rows.recv_topk_idx, x, torch.int64),
        _or_absent(rows.recv_topk_weights, x, torch.float32),
        counts.num_recv_tokens_per_expert,
        counts.rank_prefix_matrix,
        rows.recv_src_idx,
        counts.send_row,
    )


def _cached(
    x: Tensor,
    scales: Tensor | None,
    rank_prefix_matrix: Tensor,
    recv_src_idx: Tensor,
    is_token_in_rank: Tensor,
    send_row: Tensor,
    buffer: str,
) -> Outputs:
    handle = EpHandle(rank_prefix_matrix, recv_src_idx, is_token_in_rank, send_row)
    recv_x, recv_scales = find(buffer).dispatch_cached(x, scales, handle)
    return recv_x, _or_absent(recv_scales, x, torch.float32)


def _cached_fake(
    x: Tensor,
    scales: Tensor | None,
    rank_prefix_matrix: Tensor,
    recv_src_idx: Tensor,
    is_token_in_rank: Tensor,
    send_row: Tensor,
    buffer: str,
) -> Outputs:
    checks.check_cached(x, scales, rank_prefix_matrix, recv_src_idx, is_token_in_rank, send_row)
    recv_x, recv_scales = outputs.cached(x, scales, recv_src_idx)
    return recv_x, _or_absent(recv_scales, x, torch.float32)


def _combine(
    y: Tensor,
    topk_weights: Tensor | None,
    bias_0: Tensor | None,
    bias_1: Tensor | None,
    rank_prefix_matrix: Tensor,
    recv_src_idx: Tensor,
    is_token_in_rank: Tensor,
    send_row: Tensor,
    buffer: str,
) -> Outputs:
    handle = EpHandle(rank_prefix_matrix, recv_src_idx, is_token_in_rank, send_row)
    combined_x, combined_weights = find(buffer).combine(y, handle, topk_weights, bias_0, bias_1)
    return combined_x, _or_absent(combined_weights, y, torch.float32)


def _combine_fake(
    y: Tensor,
    topk_weights: Tensor | None,
    bias_0: Tensor | None,
    bias_1: Tensor | None,
    rank_prefix_matrix: Tensor,
    recv_src_idx: Tensor,
    is_token_in_rank: Tensor,
    send_row: Tensor,
    buffer: str,
) -> Outputs:
    handle = (rank_prefix_matrix, recv_src_idx, is_token_in_rank, send_row)
    checks.check_combine(y, topk_weights, bias_0, bias_1, *handle)
    combined_x, combined_weights = outputs.combined(y, topk_weights, is_token_in_rank)
    return combined_x, _or_absent(combined_weights, y, torch.float32)


def _dispatch_setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, _, topk_idx, _, is_token_in_rank, _, ctx.buffer, _ = inputs
    recv_x, recv_scales, recv_topk_idx, _, _, rank_prefix_matrix, recv_src_idx, send_row = output
    ctx.rows_have_gradient = x.dtype == torch.bfloat16
    ctx.has_choices = topk_idx is not None
    ctx.mark_non_differentiable(recv_scales, *([] if ctx.rows_have_gradient else [recv_x]))
    ctx.save_for_backward(recv_topk_idx, rank_prefix_matrix, recv_src_idx, is_token_in_rank, send_row)


def _dispatch_backward(ctx: Any, grad_x: Tensor, _s: Any, _i: Any, grad_weights: Tensor, *_: Any) -> tuple[Any, ...]:
    """Every rank takes part in the same calls, so they do not depend on which gradients this rank needs."""
    recv_topk_idx, *handle = ctx.saved_tensors
    if not ctx.rows_have_gradient:  # the narrowest rows that combine takes carry the weights' gradient
        grad_x = torch.zeros((recv_topk_idx.shape[0], 8), dtype=torch.bfloat16, device=recv_topk_idx.device)
    # A weight that is 0 because its expert is elsewhere does not depend on the sender's weight.
    weights = grad_weights.masked_fill(recv_topk_idx < 0, 0) if ctx.has_choices else None
    x, weights = torch.ops.cutehop.ep_combine(grad_x.contiguous(), weights, None, None, *handle, ctx.buffer)
    return (
        x if ctx.rows_have_gradient else None,
        None,
        None,
        weights if ctx.has_choices else None,
        None,
        None,
        None,
        None,
    )


def _cached_setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, _, *handle, ctx.buffer = inputs
    recv_x, recv_scales = output
    ctx.mark_non_differentiable(recv_scales, *([] if x.dtype == torch.bfloat16 else [recv_x]))
    ctx.save_for_backward(*handle)


def _cached_backward(ctx: Any, grad_x: Tensor, _s: Any) -> tuple[Any, ...]:
    """Runs for bfloat16 x only: no other input and output has a gradient."""
    x, _ = torch.ops.cutehop.ep_combine(grad_x.contiguous(), None, None, None, *ctx.saved_tensors, ctx.buffer)
    return x, None, None, None, None, None, None


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    _, topk_weights, bias_0, bias_1, *handle, ctx.buffer = inputs
    ctx.given = [each is not None for each in (topk_weights, bias_0, bias_1)]
    ctx.save_for_backward(*handle)


def _combine_backward(ctx: Any, grad_x: Tensor, grad_weights: Tensor) -> tuple[Any, ...]:
    handle = ctx.saved_tensors
    rank_prefix_matrix, recv_src_idx = handle[:2]
    received = rank_prefix_matrix[-1, find(ctx.buffer).rank]
    # combine reads no row past the received ones, and cached dispatch leaves those undefined.
    unread = (torch.arange(recv_src_idx.shape[0], device=recv_src_idx.device) >= received)[:, None]

    def back(rows: Tensor) -> Tensor:
        return torch.ops.cutehop.ep_dispatch_cached(rows, None, *handle, ctx.buffer)[0]

    y = back(grad_x.contiguous()).masked_fill(unread, 0)
    has_weights, *has_bias = ctx.given
    weights = None
    if has_weights:  # as bytes, padded to a row that can travel
        k = grad_weights.shape[1]
        as_bytes = functional.pad(grad_weights, (0, -k % 4)).view(torch.uint8)
        weights = back(as_bytes).view(torch.float32)[:, :k].masked_fill(unread, 0)
    biases = [grad_x if given else None for given in has_bias]
    return y, weights, *biases, None, None, None, None, None


define(
    "ep_layout",
    "(Tensor topk_idx, int num_experts, int num_ranks)"
    " -> (Tensor num_tokens_per_rank, Tensor num_tokens_per_expert, Tensor is_token_in_rank)",
    allocate=_allocate_layout,
    cpu=ref.layout,
    cuda="cutehop.ops._ep_cuda:layout",
)
define_ordered(
    "ep_dispatch",
    "(Tensor x, Tensor? scales, Tensor? topk_idx, Tensor? topk_weights, Tensor is_token_in_rank,"
    " Tensor num_tokens_per_expert, str buffer, int num_worst_tokens=0) -> (Tensor recv_x, Tensor recv_scales,"
    " Tensor recv_topk_idx, Tensor recv_topk_weights, Tensor num_recv_tokens_per_expert, Tensor rank_prefix_matrix,"
    " Tensor recv_src_idx, Tensor send_row)",
    body=_dispatch,
    fake=_dispatch_fake,
    setup_context=_dispatch_setup,
    backward=_dispatch_backward,
)
define_ordered(
    "ep_dispatch_cached",
    f"(Tensor x, Tensor? scales, {HANDLE}, str buffer) -> (Tensor recv_x, Tensor recv_scales)",
    body=_cached,
    fake=_cached_fake,
    setup_context=_cached_setup,
    backward=_cached_backward,
)
define_ordered(
    "ep_combine",
    f"(Tensor y, Tensor? topk_weights, Tensor? bias_0, Tensor? bias_1, {HANDLE}, str buffer)"
    " -> (Tensor combined_x, Tensor combined_topk_weights)",
    body=_combine,
    fake=_combine_fake,
    setup_context=_combine_setup,
    backward=_combine_backward,
)
