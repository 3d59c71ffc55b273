"""The outputs of dispatch, cached dispatch and combine, uninitialised. Buffers and the fakes of the ops allocate here,
so that torch.compile sees the shapes, dtypes and strides that a call returns.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import SymInt, Tensor, float32, int32


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


def counts(is_token_in_rank: Tensor, num_tokens_per_expert: Tensor) -> Counts:
    """is_token_in_rank (n, R), num_tokens_per_expert (E,): all three int32, shapes (E / R,), (R, R), (n, R)."""
    n, ranks = is_token_in_rank.shape
    return Counts(
        is_token_in_rank.new_empty((num_tokens_per_expert.shape[0] // ranks,), dtype=int32),
        is_token_in_rank.new_empty((ranks, ranks), dtype=int32),
        is_token_in_rank.new_empty((n, ranks), dtype=int32),
    )


def rows(
    x: Tensor,
    scales: Tensor | None,
    topk_idx: Tensor | None,
    topk_weights: Tensor | None,
    num_rows: int | SymInt,
) -> Rows:
    """num_rows rows of everything that is sent, contiguous, None for what is not, and the int32 source indices."""
    return Rows(
        x.new_empty((num_rows, x.shape[1])),
        None if scales is None else scales.new_empty((num_rows, scales.shape[1])),
        None if topk_idx is None else topk_idx.new_empty((num_rows, topk_idx.shape[1])),
        None if topk_weights is None else topk_weights.new_empty((num_rows, topk_weights.shape[1])),
        x.new_empty((num_rows,), dtype=int32),
    )


def cached(x: Tensor, scales: Tensor | None, recv_src_idx: Tensor) -> tuple[Tensor, Tensor | None]:
    """recv_x and recv_scales with the rows of the first dispatch."""
    num_rows = recv_src_idx.shape[0]
    return (
        x.new_empty((num_rows, x.shape[1])),
        None if scales is None else scales.new_empty((num_rows, scales.shape[1])),
    )


def combined(y: Tensor, topk_weights: Tensor | None, is_token_in_rank: Tensor) -> tuple[Tensor, Tensor | None]:
    """combined_x of y's dtype and combined_topk_weights, a row per token of this rank."""
    n = is_token_in_rank.shape[0]
    return (
        y.new_empty((n, y.shape[1])),
        None if topk_weights is None else y.new_empty((n, topk_weights.shape[1]), dtype=float32),
    )
