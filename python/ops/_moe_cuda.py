"""CUDA bodies of the MoE ops: routing, permutation, FP8 cast. Arguments were checked by the allocators.

Rows that are not side by side, or not at a multiple of 16 bytes, are copied first.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor

from cutehop.cute_kernels import moe
from cutehop.cute_kernels.moe import config as cfg
from cutehop.ops._mla_checks import sms_of

_ONE = cfg.OneVariant()
_MAX_PAIRS = 1 << 30
_Arguments = ParamSpec("_Arguments")


def _on_its_device(body: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """The body, run with the device of its first argument current: the dispatcher sets none."""

    @wraps(body)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        first = args[0]
        assert isinstance(first, Tensor), "ops pass their first tensor by position"
        device = first.get_device()
        if device == torch._C._cuda_getDevice():
            return body(*args, **kwargs)
        with torch.cuda.device(device):
            return body(*args, **kwargs)

    return run


def _stream(tensor: Tensor) -> int:
    stream: int = torch._C._cuda_getCurrentRawStream(tensor.get_device())
    return stream


def _dense(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() and tensor.data_ptr() % cfg.VECTOR_BYTES == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _check_pairs(op: str, pairs: int) -> None:
    if pairs > _MAX_PAIRS:
        raise ValueError(f"{op}: {pairs} choices of all tokens, supported on CUDA {_MAX_PAIRS}; split the tokens")


@_on_its_device
def route(
    logits: Tensor,
    bias: Tensor | None,
    topk: int,
    num_groups: int = 1,
    topk_groups: int = 1,
    scoring: str = "sigmoid",
    normalize: bool = True,
    scale: float = 1.0,
    *,
    topk_idx: Tensor,
    topk_weights: Tensor,
) -> None:
    """Body of cutehop::moe_route."""
    tokens, experts = logits.shape
    if tokens == 0:
        return
    logits = logits.contiguous()
    stream = _stream(logits)
    (scale_bits,) = struct.unpack("=q", struct.pack("=d", scale))
    tokens_per_cta = cfg.ROUTE_THREADS // cfg.WARP
    moe.route_kernel(cfg.route_config(experts, scoring), stream).launch(
        (-(-tokens // tokens_per_cta), 1, 1),
        stream,
        logits.data_ptr(),
        logits.itemsize,
        0 if bias is None else bias.data_ptr(),
        tokens,
        experts,
        topk,
        num_groups,
        experts // num_groups,
        topk_groups,
        normalize,
        scale_bits,
        topk_idx.data_ptr(),
        topk_weights.data_ptr(),
    )


@_on_its_device
def permute(
    x: Tensor,
    scales: Tensor | None,
    topk_idx: Tensor,
    num_experts: int,
    num_rows: int,
    *,
    rows: Tensor,
    row_scales: Tensor,
    ends: Tensor,
    pair_row: Tensor,
) -> None:
    """Body of cutehop::moe_permute: sort the pairs, then copy rows."""
    tokens, topk = topk_idx.shape
    pairs = tokens * topk
    _check_pairs("moe_permute", pairs)
    x, topk_idx = _dense(x), topk_idx.contiguous()
    stream = _stream(x)
    ids = (topk_idx.data_ptr(), topk_idx.itemsize, pairs, num_experts)
    ctas = cfg.sort_ctas(pairs)
    counts = None
    if ctas > 1:
        counts = torch.empty((ctas, num_experts), dtype=torch.int32, device=x.device)
        moe.count_kernel(_ONE, stream).launch((ctas, 1, 1), stream, *ids, counts.data_ptr())
    moe.sort_kernel(_ONE, stream).launch(
        (ctas, 1, 1),
        stream,
        *ids,
        num_rows,
        0 if counts is None else counts.data_ptr(),
        ends.data_ptr(),
        pair_row.data_ptr(),
        smem_bytes=cfg.sort_smem_bytes(num_experts),
    )
    if tokens == 0 or num_rows == 0:
        return
    row_bytes = x.shape[1] * x.itemsize
    piece_bytes, stages = cfg.ring(row_bytes)
    stride_row, stride_word = (0, 0) if scales is None else scales.stride()
    moe.permute_kernel(_ONE, stream).launch(
        (cfg.permute_ctas(tokens, row_bytes, sms_of(x.device)), 1, 1),
        stream,
        x.data_ptr(),
        rows.data_ptr(),
        pair_row.data_ptr(),
        tokens,
        topk,
        row_bytes,
        piece_bytes,
        -(-row_bytes // piece_bytes),
        stages,
        0 if scales is None else scales.data_ptr(),
        0 if scales is None else scales.shape[1],
        stride_row,
        stride_word,
        row_scales.data_ptr(),
    )


@_on_its_device
def unpermute(y: Tensor, pair_row: Tensor, weights: Tensor | None, *, out: Tensor) -> None:
    """Body of cutehop::moe_unpermute."""
    tokens, topk = pair_row.shape
    if tokens == 0:
        return
    _check_pairs("moe_unpermute", tokens * topk)
    y = _dense(y)
    weights = None if weights is None else weights.contiguous()
    stream = _stream(y)
    num_rows, hidden = y.shape
    pieces = -(-hidden // cfg.REDUCE_COLUMNS)
    moe.unpermute_kernel(_ONE, stream).launch(
        (-(-tokens * pieces // (cfg.REDUCE_THREADS // cfg.WARP)), 1, 1),
        stream,
        y.data_ptr(),
        num_rows,
        hidden,
        pair_row.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        tokens,
        topk,
        pieces,
        out.data_ptr(),
    )


@_on_its_device
def unpermute_backward(
    grad: Tensor,
    y: Tensor,
    pair_row: Tensor,
    weights: Tensor | None,
    *,
    grad_y: Tensor,
    grad_weights: Tensor,
) -> None:
    """Body of cutehop::moe_unpermute_backward."""
    tokens, topk = pair_row.shape
    num_rows, hidden = y.shape
    ctas = tokens - (-num_rows // (cfg.REDUCE_THREADS // cfg.WARP))
    if ctas == 0:
        return
    _check_pairs("moe_unpermute_backward", tokens * topk)
    grad, y = _dense(grad), _dense(y)
    weights = None if weights is None else weights.contiguous()
    stream = _stream(y)
    named = torch.zeros(num_rows + 1, dtype=torch.bool, device=y.device)
    outside = (pair_row < 0) | (pair_row >= num_rows)
    named.index_fill_(0, pair_row.long().masked_fill(outside, num_rows).flatten(), True)
    moe.unpermute_backward_kernel(_ONE, stream).launch(
        (ctas, 1, 1),
        stream,
        grad.data_ptr(),
        y.data_ptr(),
        num_rows,
        hidden,
        pair_row.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        tokens,
        topk,
        named.data_ptr(),
        grad_y.data_ptr(),
        grad_weights.data_ptr(),
    )


@_on_its_device
def quantize_fp8(x: Tensor, round_scale: bool = False, *, q: Tensor, scales: Tensor) -> None:
    """Body of cutehop::quantize_fp8."""
    if x.numel() == 0:
        return
    x = _dense(x)
    stream = _stream(x)
    vectors = x.numel() * x.itemsize // cfg.VECTOR_BYTES
    moe.quant_kernel(_ONE, stream).launch(
        (-(-vectors // (cfg.QUANT_THREADS * cfg.QUANT_VECTORS)), 1, 1),
        stream,
        x.data_ptr(),
        vectors,
        round_scale,
        q.data_ptr(),
        scales.data_ptr(),
    )
