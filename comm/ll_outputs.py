"""What low-latency calls return, and its allocation: buffers and the fakes of the ops allocate here, so that
torch.compile sees the shapes, dtypes and strides that a call returns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .ll_config import GROUP, LlConfig
from .outputs import allocator

PACK = 4  # UE8M0 scales in an int32


class LlHandle(NamedTuple):
    """Where the rows of a dispatch came from: what a rank needs to send its experts' outputs home.

    src_info: int32 (L, R * T), index of each received row's token on its source rank.
    layout_range: int64 (L, R), low 32 bits: rows that the expert received from the rank, high 32 bits: the first one.
    recv_count: int32 (L,), rows that the expert received.
    send_slot: int32 (L, R * T), where each row goes: source * T * max_topk + token * max_topk + choice.
    choice_rows: int32 (R * T, max_topk), row s * T + t is of token t of rank s: at j the row of its choice j among all
        rows of this rank's experts, local expert * R * T + row of the expert; -1 for a choice that is none of this
        rank's experts, or whose row did not fit since a token chose an expert twice, and for j >= k.
    src_info and send_slot are undefined past the received rows, choice_rows, on GPUs, for tokens without a choice on
    this rank.
    """

    src_info: Tensor
    layout_range: Tensor
    recv_count: Tensor
    send_slot: Tensor
    choice_rows: Tensor


class LlDispatched(NamedTuple):
    """What a rank receives, by local expert; cutehop.ref.ep_ll defines order and values.

    recv_x: (L, R * T, H) bfloat16 or e4m3.
    recv_scales: None with bfloat16. With e4m3 float32 (L, R * T, H / 128), or int32 (L, R * T, ceil(H / 512)) of four
        UE8M0 each, in memory as (L, columns, R * T), so that the scales of one column lie side by side.
    recv_count: int32 (L,), how many rows of each expert are received; rows past them are undefined.
    handle: for combine.
    """

    recv_x: Tensor
    recv_scales: Tensor | None
    recv_count: Tensor
    handle: LlHandle


def empty_dispatched(config: LlConfig, like: Tensor, use_fp8: bool, use_ue8m0: bool) -> LlDispatched:
    """The outputs of a dispatch, uninitialised, on the device of `like`."""
    allocate = allocator(like)
    experts, rows, hidden = config.experts_per_rank, config.rows, config.hidden
    scales = None
    if use_fp8:
        columns = -(-hidden // (GROUP * PACK)) if use_ue8m0 else hidden // GROUP
        dtype = torch.int32 if use_ue8m0 else torch.float32
        scales = allocate((experts, rows, columns), (columns * rows, 1, rows), dtype)
    count = allocate((experts,), (1,), torch.int32)
    return LlDispatched(
        allocate(
            (experts, rows, hidden), (rows * hidden, hidden, 1), torch.float8_e4m3fn if use_fp8 else torch.bfloat16
        ),
        scales,
        count,
        LlHandle(
            allocate((experts, rows), (rows, 1), torch.int32),
            allocate((experts, config.ranks), (config.ranks, 1), torch.int64),
            count,
            allocate((experts, rows), (rows, 1), torch.int32),
            allocate((rows, config.max_topk), (config.max_topk, 1), torch.int32),
        ),
    )


def empty_combined(config: LlConfig, topk_weights: Tensor) -> Tensor:
    """The output of a combine, uninitialised."""
    return allocator(topk_weights)((topk_weights.shape[0], config.hidden), (config.hidden, 1), torch.bfloat16)
