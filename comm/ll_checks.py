"""Argument checks of the low-latency ops and buffers. They read no tensor values and wait for nothing.

The fakes of the ops run them too, so the number of tokens may be a symbol; it is compared by torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import BFLOAT16, FLOAT32, HANDLE_CURE, IDX_DTYPES, INT32, INT64, _dims, _placed, _same, _typed
from .ll_config import LlConfig

E4M3 = torch.float8_e4m3fn


def check_dispatch_send(
    config: LlConfig,
    device: torch.device,
    x: Tensor,
    topk_idx: Tensor,
    use_fp8: bool,
    round_scale: bool,
    use_ue8m0: bool,
) -> None:
    op = "ep_ll_dispatch_send"
    if (round_scale or use_ue8m0) and not use_fp8:
        option = "use_ue8m0" if use_ue8m0 else "round_scale"
        raise ValueError(f"{op}: {option} True with use_fp8 False, it is about the scales of e4m3 rows; leave it out")
    _typed(op, "x", x, (BFLOAT16,))
    _dims(op, "x", x, 2, "(n, H)")
    _same(op, "columns of x", x.shape[1], config.hidden, "make the buffer for this hidden size")
    _check_topk_idx(op, config, device, topk_idx)
    _same(op, "rows of topk_idx", topk_idx.shape[0], x.shape[0], "pass a row per token")
    _placed(op, "x", x, device)


def check_dispatch_receive(
    config: LlConfig,
    device: torch.device,
    epoch: Tensor,
    num_topk: int,
) -> None:
    op = "ep_ll_dispatch_recv"
    _check_epoch(op, device, epoch)
    _check_num_topk(op, config, num_topk)


def check_stats(config: LlConfig, device: torch.device, recv_stats: Tensor | None, wait_stats: Tensor | None) -> None:
    op = "ep_ll_dispatch_recv"
    if recv_stats is not None:
        _check_vector(op, "recv_stats", recv_stats, INT32, config.experts_per_rank, "local expert", device)
    _check_wait_stats(op, config, device, wait_stats)


def check_outputs(
    config: LlConfig,
    device: torch.device,
    recv_x: Tensor,
    recv_scales: Tensor | None,
    use_fp8: bool,
    use_ue8m0: bool,
) -> None:
    """That the outputs which a caller brings to a dispatch are those of the buffer, for these options."""
    op, cure = "ep_ll_dispatch_recv", "pass what empty_outputs returns for the options of the send"
    scales_dtype = None if recv_scales is None else recv_scales.dtype
    want = (E4M3, INT32 if use_ue8m0 else FLOAT32) if use_fp8 else (BFLOAT16, None)
    if (recv_x.dtype, scales_dtype) != want:
        raise TypeError(
            f"{op}: out is {recv_x.dtype} with scales {scales_dtype}, needs {want[0]} with {want[1]}; {cure}"
        )
    shape = (config.experts_per_rank, config.rows, config.hidden)
    if recv_x.shape != shape:
        raise ValueError(f"{op}: out.recv_x has shape {tuple(recv_x.shape)}, needs {shape}; {cure}")
    _placed(op, "out.recv_x", recv_x, device)


def check_combine_send(
    config: LlConfig,
    device: torch.device,
    y: Tensor,
    src_info: Tensor,
    layout_range: Tensor,
    recv_count: Tensor,
    send_slot: Tensor,
    choice_rows: Tensor,
    num_topk: int,
) -> None:
    op = "ep_ll_combine_send"
    rows = (config.experts_per_rank, config.rows)
    _typed(op, "y", y, (BFLOAT16,))
    _check_shape(op, "y", y, (*rows, config.hidden), "pass a row per received row and past them")
    _placed(op, "y", y, device)
    for name, tensor, dtype, shape in (
        ("src_info", src_info, INT32, rows),
        ("layout_range", layout_range, INT64, (rows[0], config.ranks)),
        ("recv_count", recv_count, INT32, rows[:1]),
        ("send_slot", send_slot, INT32, rows),
        ("choice_rows", choice_rows, INT32, (config.rows, config.max_topk)),
    ):
        _typed(op, name, tensor, (dtype,))
        _check_shape(op, name, tensor, shape, HANDLE_CURE)
        _placed(op, name, tensor, device)
    _check_num_topk(op, config, num_topk)


def check_combine_receive(
    config: LlConfig,
    device: torch.device,
    epoch: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    out: Tensor | None = None,
    wait_stats: Tensor | None = None,
) -> None:
    _check_epoch("ep_ll_combine_recv", device, epoch)
    check_combine_inputs(config, device, topk_idx, topk_weights, out, wait_stats)


def check_combine_inputs(
    config: LlConfig,
    device: torch.device,
    topk_idx: Tensor,
    topk_weights: Tensor,
    out: Tensor | None,
    wait_stats: Tensor | None,
) -> None:
    op = "ep_ll_combine_recv"
    _check_topk_idx(op, config, device, topk_idx)
    _typed(op, "topk_weights", topk_weights, (FLOAT32,))
    _dims(op, "topk_weights", topk_weights, 2, "(n, k)")
    _same(op, "rows of topk_weights", topk_weights.shape[0], topk_idx.shape[0], "pass a row per token")
    _same(op, "columns of topk_weights", topk_weights.shape[1], topk_idx.shape[1], "pass a weight per choice")
    _placed(op, "topk_weights", topk_weights, device)
    if out is not None:
        _typed(op, "out", out, (BFLOAT16,))
        _check_shape(op, "out", out, (topk_idx.shape[0], config.hidden), "pass a row per token")
        _placed(op, "out", out, device)
    _check_wait_stats(op, config, device, wait_stats)


def check_mask(config: LlConfig, device: torch.device, out: Tensor) -> None:
    _check_vector("query_mask", "out", out, INT32, config.ranks, "rank", device)


def _check_topk_idx(op: str, config: LlConfig, device: torch.device, topk_idx: Tensor) -> None:
    _typed(op, "topk_idx", topk_idx, IDX_DTYPES)
    _dims(op, "topk_idx", topk_idx, 2, "(n, k)")
    n = topk_idx.shape[0]

    def message() -> str:
        return (
            f"{op}: {n} tokens, the buffer holds 0..{config.max_tokens}; make it with a larger max_tokens, or send "
            "smaller batches"
        )

    torch._check_value(n <= config.max_tokens, message)
    _check_num_topk(op, config, topk_idx.shape[1])
    _placed(op, "topk_idx", topk_idx, device)


def _check_num_topk(op: str, config: LlConfig, k: int) -> None:
    if not 1 <= k <= config.max_topk:
        raise ValueError(
            f"{op}: {k} choices per token, the buffer holds 1..{config.max_topk}; make it with a larger max_topk"
        )


def _check_epoch(op: str, device: torch.device, epoch: Tensor) -> None:
    _typed(op, "epoch", epoch, (INT32,))
    _check_shape(op, "epoch", epoch, (1,), "pass what the send returned")
    _placed(op, "epoch", epoch, device)


def _check_wait_stats(op: str, config: LlConfig, device: torch.device, wait_stats: Tensor | None) -> None:
    if wait_stats is not None:
        _check_vector(op, "wait_stats", wait_stats, INT64, config.ranks, "rank", device)


def _check_vector(
    op: str, name: str, tensor: Tensor, dtype: torch.dtype, size: int, of: str, device: torch.device
) -> None:
    _typed(op, name, tensor, (dtype,))
    _check_shape(op, name, tensor, (size,), f"pass a value per {of}")
    _placed(op, name, tensor, device)


def _check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], cure: str) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, needs {shape}; {cure}")
