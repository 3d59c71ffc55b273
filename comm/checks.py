"""Argument checks of the expert-parallel ops and buffers. They read no tensor values and wait for nothing.

Two kinds. `check_<call>` looks at dtypes and at how shapes fit each other: the fakes of the ops run it, where sizes may
be symbols. `check_<call>_fits` is the buffers': it compares with capacities and device and looks at strides, too.
Buffers make them through `Once`, as a part of the call's 60 us of host time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .config import MAX_TOPK, VECTOR, EpConfig

BFLOAT16, FLOAT32, INT32, INT64, BOOL = torch.bfloat16, torch.float32, torch.int32, torch.int64, torch.bool
IDX_DTYPES = (INT64, INT32)
SCALE_DTYPES = (FLOAT32, INT32)
LAYOUT_CURE = "pass what ep_layout returns for this topk_idx"
HANDLE_CURE = "pass the handle of one dispatch, unchanged"
_MOST_REMEMBERED = 1024  # of about 1 KB each


class Once:
    """A check that calls with arguments like earlier ones skip: a look-up costs half of what the comparisons do.

    `check` must depend on nothing but the options and the tensors' shapes, strides, dtypes and devices.
    """

    def __init__(self, check: Callable[..., None], *fixed: Any) -> None:
        """check(*fixed, *tensors, *options) raises, or returns."""
        self._check, self._fixed = check, fixed
        self._passed: set[tuple[object, ...]] = set()

    def __call__(self, tensors: tuple[Tensor | None, ...], *options: object) -> None:
        key = (
            options,
            *[t if t is None else (t.shape, t.is_contiguous() or t.stride(), t.dtype, t.device) for t in tensors],
        )
        if key not in self._passed:
            self._check(*self._fixed, *tensors, *options)
            if len(self._passed) == _MOST_REMEMBERED:
                self._passed.clear()
            self._passed.add(key)


def check_layout(topk_idx: Tensor, num_experts: int, num_ranks: int) -> None:
    """Arguments of ep_layout."""
    op = "ep_layout"
    _typed(op, "topk_idx", topk_idx, IDX_DTYPES)
    _two_dims(op, "topk_idx", topk_idx)
    k = topk_idx.shape[1]
    if not 1 <= k <= MAX_TOPK:
        raise ValueError(f"{op}: topk_idx has {k} choices per token, supported 1..{MAX_TOPK}; pass (n, k)")
    if num_ranks < 1 or num_experts < 1 or num_experts % num_ranks:
        raise ValueError(
            f"{op}: {num_experts} experts on {num_ranks} ranks, needs a positive multiple of the ranks; pad the experts"
        )


def check_dispatch(
    x: Tensor,
    scales: Tensor | None,
    topk_idx: Tensor | None,
    topk_weights: Tensor | None,
    is_token_in_rank: Tensor,
    num_tokens_per_expert: Tensor,
    num_worst_tokens: int = 0,
) -> None:
    op = "ep_dispatch"
    n = _check_tokens(op, x, scales)
    if (topk_idx is None) != (topk_weights is None):
        given, missing = ("topk_weights", "topk_idx") if topk_idx is None else ("topk_idx", "topk_weights")
        raise ValueError(f"{op}: {given} without {missing}; pass both or neither")
    if topk_idx is not None and topk_weights is not None:
        _typed(op, "topk_idx", topk_idx, IDX_DTYPES)
        _typed(op, "topk_weights", topk_weights, (FLOAT32,))
        _two_dims(op, "topk_idx", topk_idx)
        _two_dims(op, "topk_weights", topk_weights)
        _same(op, "rows of topk_idx", topk_idx.shape[0], n, "pass a row per token")
        _same(op, "rows of topk_weights", topk_weights.shape[0], n, "pass a row per token")
        _same(op, "columns of topk_weights", topk_weights.shape[1], topk_idx.shape[1], "pass a weight per choice")
    _typed(op, "num_tokens_per_expert", num_tokens_per_expert, (INT32,))
    _dims(op, "num_tokens_per_expert", num_tokens_per_expert, 1, "(E,)")
    _check_mask(op, is_token_in_rank, n, LAYOUT_CURE)
    if num_worst_tokens < 0:
        raise ValueError(f"{op}: num_worst_tokens {num_worst_tokens}, at least 0; pass 0 for the exact number of rows")


def check_cached(
    x: Tensor,
    scales: Tensor | None,
    rank_prefix_matrix: Tensor,
    recv_src_idx: Tensor,
    is_token_in_rank: Tensor,
    send_row: Tensor,
) -> None:
    op = "ep_dispatch_cached"
    n = _check_tokens(op, x, scales)
    _check_handle(op, rank_prefix_matrix, recv_src_idx, is_token_in_rank, send_row)
    _same(op, "rows of x", n, is_token_in_rank.shape[0], "pass as many tokens as the handle's dispatch had")


def check_combine(
    y: Tensor,
    topk_weights: Tensor | None,
    bias_0: Tensor | None,
    bias_1: Tensor | None,
    rank_prefix_matrix: Tensor,
    recv_src_idx: Tensor,
    is_token_in_rank: Tensor,
    send_row: Tensor,
) -> None:
    op = "ep_combine"
    _typed(op, "y", y, (BFLOAT16,))
    _two_dims(op, "y", y)
    _check_handle(op, rank_prefix_matrix, recv_src_idx, is_token_in_rank, send_row)
    rows = recv_src_idx.shape[0]
    _same(op, "rows of y", y.shape[0], rows, "pass a row per received row")
    if topk_weights is not None:
        _typed(op, "topk_weights", topk_weights, (FLOAT32,))
        _two_dims(op, "topk_weights", topk_weights)
        _same(op, "rows of topk_weights", topk_weights.shape[0], rows, "pass a row per received row")
    for name, bias in (("bias_0", bias_0), ("bias_1", bias_1)):
        if bias is not None:
            _typed(op, name, bias, (BFLOAT16,))
            _two_dims(op, name, bias)
            _same(op, f"rows of {name}", bias.shape[0], is_token_in_rank.shape[0], "pass a row per token")
            _same(op, f"columns of {name}", bias.shape[1], y.shape[1], "pass a bias as wide as y")


def check_dispatch_fits(
    config: EpConfig,
    device: torch.device,
    x: Tensor,
    scales: Tensor | None,
    topk_idx: Tensor | None,
    topk_weights: Tensor | None,
    is_token_in_rank: Tensor,
    num_tokens_per_expert: Tensor,
    num_worst_tokens: int,
) -> None:
    op = "ep_dispatch"
    check_dispatch(x, scales, topk_idx, topk_weights, is_token_in_rank, num_tokens_per_expert, num_worst_tokens)
    _check_tokens_fit(op, config, device, x, scales)
    if topk_idx is not None and topk_weights is not None:
        _placed(op, "topk_idx", topk_idx, device)
        _placed(op, "topk_weights", topk_weights, device)
        _check_topk_fits(op, config, topk_idx.shape[1])
    elif num_worst_tokens:
        raise ValueError(
            f"{op}: num_worst_tokens {num_worst_tokens} without topk_idx, needed to tell received rows from the rest; "
            "pass topk_idx and topk_weights"
        )
    _placed(op, "num_tokens_per_expert", num_tokens_per_expert, device)
    if num_tokens_per_expert.shape[0] != config.num_experts:
        raise ValueError(
            f"{op}: num_tokens_per_expert has {num_tokens_per_expert.shape[0]} experts, the buffer is for "
            f"{config.num_experts}; {LAYOUT_CURE}"
        )
    _check_mask_fits(op, config, device, is_token_in_rank)


def check_cached_fits(
    config: EpConfig, device: torch.device, x: Tensor, scales: Tensor | None, *handle: Tensor
) -> None:
    op = "ep_dispatch_cached"
    check_cached(x, scales, *handle)
    _check_tokens_fit(op, config, device, x, scales)
    _check_handle_fits(op, config, device, *handle)


def check_combine_fits(
    config: EpConfig,
    device: torch.device,
    y: Tensor,
    topk_weights: Tensor | None,
    bias_0: Tensor | None,
    bias_1: Tensor | None,
    *handle: Tensor,
) -> None:
    op = "ep_combine"
    check_combine(y, topk_weights, bias_0, bias_1, *handle)
    _check_handle_fits(op, config, device, *handle)
    _placed(op, "y", y, device)
    _check_row_bytes(op, "y", 2 * y.shape[1], config.y_row_bytes)
    if topk_weights is not None:
        _placed(op, "topk_weights", topk_weights, device)
        _check_topk_fits(op, config, topk_weights.shape[1])
    if bias_0 is not None:
        _placed(op, "bias_0", bias_0, device)
    if bias_1 is not None:
        _placed(op, "bias_1", bias_1, device)


def check_dispatch_input(config: EpConfig, n: int, hidden: int, dtype: torch.dtype) -> None:
    """Shape of a view for dispatch."""
    op = "dispatch_input"
    if dtype != BFLOAT16 and (dtype.itemsize != 1 or dtype == BOOL):
        raise TypeError(f"{op}: dtype {dtype}, supported torch.bfloat16 and 1-byte dtypes; cast the rows")
    _check_token_count(op, config, n)
    _check_row_bytes(op, "x", hidden * dtype.itemsize, config.x_row_bytes)


def check_combine_input(config: EpConfig, rows: int, hidden: int) -> None:
    """Shape of a view for combine."""
    op = "combine_input"
    if rows > config.recv_rows:
        raise ValueError(
            f"{op}: the handle has {rows} rows, the buffer's memory holds {config.recv_rows}; dispatch with "
            f"num_worst_tokens <= {config.recv_rows}, or pass combine a tensor from elsewhere"
        )
    _check_row_bytes(op, "y", 2 * hidden, config.y_row_bytes)


def _check_tokens(op: str, x: Tensor, scales: Tensor | None) -> int:
    """The number of tokens."""
    dtype = x.dtype
    if dtype != BFLOAT16 and (dtype.itemsize != 1 or dtype == BOOL):
        raise TypeError(f"{op}: x is {dtype}, supported torch.bfloat16 and 1-byte dtypes; cast it")
    _two_dims(op, "x", x)
    n: int = x.shape[0]
    if scales is not None:
        if dtype == BFLOAT16:
            raise ValueError(f"{op}: scales with bfloat16 x, they belong to 1-byte x; pass scales=None")
        _typed(op, "scales", scales, SCALE_DTYPES)
        _two_dims(op, "scales", scales)
        _same(op, "rows of scales", scales.shape[0], n, "pass a row per token")
    return n


def _check_mask(op: str, is_token_in_rank: Tensor, n: int, cure: str) -> None:
    _typed(op, "is_token_in_rank", is_token_in_rank, (BOOL,))
    _dims(op, "is_token_in_rank", is_token_in_rank, 2, "(n, R)")
    _same(op, "rows of is_token_in_rank", is_token_in_rank.shape[0], n, cure)


def _check_handle(
    op: str, rank_prefix_matrix: Tensor, recv_src_idx: Tensor, is_token_in_rank: Tensor, send_row: Tensor
) -> None:
    _typed(op, "rank_prefix_matrix", rank_prefix_matrix, (INT32,))
    _typed(op, "recv_src_idx", recv_src_idx, (INT32,))
    _typed(op, "send_row", send_row, (INT32,))
    _dims(op, "rank_prefix_matrix", rank_prefix_matrix, 2, "(R, R)")
    _dims(op, "recv_src_idx", recv_src_idx, 1, "(m,)")
    _dims(op, "send_row", send_row, 2, "(n, R)")
    _check_mask(op, is_token_in_rank, send_row.shape[0], HANDLE_CURE)


def _check_tokens_fit(op: str, config: EpConfig, device: torch.device, x: Tensor, scales: Tensor | None) -> None:
    _placed(op, "x", x, device)
    n, hidden = x.shape
    _check_token_count(op, config, n)
    _check_row_bytes(op, "x", hidden * x.dtype.itemsize, config.x_row_bytes)
    if scales is not None:
        if scales.device != device:
            raise ValueError(f"{op}: scales are on {scales.device}, the buffer is on {device}; move them")
        limit = config.scale_row_bytes
        if 4 * scales.shape[1] > limit:
            raise ValueError(
                f"{op}: scales have {scales.shape[1]} columns, the buffer holds {limit // 4} "
                f"(EpConfig scales={config.scales!r}, hidden={config.hidden}); make the buffer for these scales"
            )


def _check_handle_fits(
    op: str,
    config: EpConfig,
    device: torch.device,
    rank_prefix_matrix: Tensor,
    recv_src_idx: Tensor,
    is_token_in_rank: Tensor,
    send_row: Tensor,
) -> None:
    ranks = config.ranks
    _placed(op, "rank_prefix_matrix", rank_prefix_matrix, device)
    _placed(op, "recv_src_idx", recv_src_idx, device)
    _placed(op, "send_row", send_row, device)
    if rank_prefix_matrix.shape != (ranks, ranks) or send_row.shape[1] != ranks:
        raise ValueError(
            f"{op}: the handle has rank_prefix_matrix {tuple(rank_prefix_matrix.shape)} and send_row "
            f"{tuple(send_row.shape)}, needs {(ranks, ranks)} and (n, {ranks}); {HANDLE_CURE}"
        )
    _check_token_count(op, config, send_row.shape[0])
    _check_mask_fits(op, config, device, is_token_in_rank)


def _check_mask_fits(op: str, config: EpConfig, device: torch.device, is_token_in_rank: Tensor) -> None:
    _placed(op, "is_token_in_rank", is_token_in_rank, device)
    if is_token_in_rank.shape[1] != config.ranks:
        raise ValueError(
            f"{op}: is_token_in_rank has {is_token_in_rank.shape[1]} ranks, the buffer has {config.ranks}; "
            f"{LAYOUT_CURE}"
        )


def _check_token_count(op: str, config: EpConfig, n: int) -> None:
    if not 0 <= n <= config.max_tokens:
        raise ValueError(
            f"{op}: {n} tokens, the buffer holds 0..{config.max_tokens}; make it with a larger max_tokens, or "
            "dispatch in smaller batches"
        )


def _check_row_bytes(op: str, name: str, row_bytes: int, limit: int) -> None:
    if not 0 < row_bytes <= limit or row_bytes % VECTOR:
        raise ValueError(
            f"{op}: a row of {name} has {row_bytes} bytes, needs a multiple of {VECTOR} in {VECTOR}..{limit}; pad the "
            "hidden size, or make the buffer with a larger hidden"
        )


def _check_topk_fits(op: str, config: EpConfig, k: int) -> None:
    if not 1 <= k <= config.max_topk:
        raise ValueError(
            f"{op}: {k} choices per token, the buffer holds 1..{config.max_topk}; make it with a larger max_topk"
        )


def _typed(op: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{op}: {name} is {tensor.dtype}, supported {'|'.join(map(str, dtypes))}; cast it")


def _dims(op: str, name: str, tensor: Tensor, dims: int, shape: str) -> None:
    if tensor.dim() != dims:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, needs {shape}; reshape it")


def _two_dims(op: str, name: str, tensor: Tensor) -> None:
    _dims(op, name, tensor, 2, "(rows, columns)")


def _placed(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """On the buffer's device and contiguous."""
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, the buffer is on {device}; move it")
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} has strides {tensor.stride()}, must be contiguous; call .contiguous()")


def _same(op: str, what: str, got: int, want: int, cure: str) -> None:
    """Sizes agree. Sizes that torch.compile knows only at run time become an assertion of the compiled graph."""
    equal = got == want
    if equal is not True:
        torch._check_value(equal, lambda: f"{op}: {what} {got}, needs {want}; {cure}")
