"""The outputs of dispatch, cached dispatch and combine, uninitialised. Buffers and the fakes of the ops allocate here,
so that torch.compile sees the shapes, dtypes and strides that a call returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import SymInt, Tensor, int32

Allocate = Callable[[tuple[Any, ...], tuple[Any, ...], torch.dtype], Tensor]

# What torch's own compiled code allocates with, past the dispatcher and in half of new_empty's time.
_empty_cpu = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]
_empty_cuda = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]


class Counts(NamedTuple):
    """Outputs whose shapes do not depend on what arrives; Dispatched and EpHandle say what they hold."""

    num_recv_tokens_per_expert: Tensor
    rank_prefix_matrix: Tensor
    send_row: Tensor


class Rows(NamedTuple):
    """Outputs with a row per received token."""

    recv_x: Tensor
    recv_scales: Tensor | None
    recv_topk_idx: Tensor | None
    recv_topk_weights: Tensor | None
    recv_src_idx: Tensor


def allocator(like: Tensor) -> Allocate:
    """Makes uninitialised tensors on the device of `like` from shape, strides and dtype."""
    if type(like) is Tensor:
        if like.is_cuda and like.get_device() == torch._C._cuda_getDevice():
            return _empty_cuda
        if like.is_cpu:
            return _empty_cpu
    # A fake, whose sizes may be symbols; a GPU that is not current.
    return lambda shape, strides, dtype: like.new_empty_strided(shape, strides, dtype=dtype)


def counts(is_token_in_rank: Tensor, num_tokens_per_expert: Tensor) -> Counts:
    """is_token_in_rank (n, R), num_tokens_per_expert (E,): all three int32, shapes (E / R,), (R, R), (n, R)."""
    allocate = allocator(is_token_in_rank)
    n, ranks = is_token_in_rank.shape
    return Counts(
        allocate((num_tokens_per_expert.shape[0] // ranks,), (1,), int32),
        allocate((ranks, ranks), (ranks, 1), int32),
        allocate((n, ranks), (ranks, 1), int32),
    )


def rows(
    x: Tensor,
    scales: Tensor | None,
    topk_idx: Tensor | None,
    topk_weights: Tensor | None,
    num_rows: int | SymInt,
) -> Rows:
    """num_rows rows of everything that is sent, contiguous, None for what is not, and the int32 source indices."""
    allocate = allocator(x)
    return Rows(
        _wide(allocate, x, num_rows),
        None if scales is None else _wide(allocate, scales, num_rows),
        None if topk_idx is None else _wide(allocate, topk_idx, num_rows),
        None if topk_weights is None else _wide(allocate, topk_weights, num_rows),
        allocate((num_rows,), (1,), int32),
    )


def cached(x: Tensor, scales: Tensor | None, recv_src_idx: Tensor) -> tuple[Tensor, Tensor | None]:
    """recv_x and recv_scales with the rows of the first dispatch."""
    allocate, num_rows = allocator(x), recv_src_idx.shape[0]
    return _wide(allocate, x, num_rows), None if scales is None else _wide(allocate, scales, num_rows)


def combined(y: Tensor, topk_weights: Tensor | None, is_token_in_rank: Tensor) -> tuple[Tensor, Tensor | None]:
    """combined_x of y's dtype and combined_topk_weights, a row per token of this rank."""
    allocate, n = allocator(y), is_token_in_rank.shape[0]
    return _wide(allocate, y, n), None if topk_weights is None else _wide(allocate, topk_weights, n)


def _wide(allocate: Allocate, like: Tensor, num_rows: int | SymInt) -> Tensor:
    """Rows as wide as those of `like`, of its dtype."""
    columns = like.shape[1]
    return allocate((num_rows, columns), (columns, 1), like.dtype)
