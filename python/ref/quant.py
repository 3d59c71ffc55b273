"""Float8 values with scales, in plain torch: the specification.

    activations   e4m3 (..., H), a float32 scale per 128 columns of a row: quantize_fp8
    weights       e4m3 (..., N, K), a float32 scale per block of 128 rows and 128 columns: quantize_blocks

A value is float32(q) * scale. Both have one rule, that of cutehop.ref.ep.quantize_fp8, which rows that travel between
ranks have too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..cute_kernels.errors import check
from .ep import FP8_GROUP, FP8_MAX, FP8_MIN_AMAX
from .ep import quantize_fp8 as _quantize_rows

__all__ = [
    "FP8_GROUP", "FP8_MAX", "FP8_MIN_AMAX",
    "dequantize_blocks", "dequantize_fp8", "expand_scales", "quantize_blocks", "quantize_fp8",
]  # fmt: skip


def quantize_fp8(x: Tensor, round_scale: bool = False) -> tuple[Tensor, Tensor]:
    """Cast rows to e4m3: cutehop.ref.ep.quantize_fp8 for any number of dimensions.

    x: bfloat16 or float32 (..., H), finite, H a multiple of 128.  round_scale: scales are powers of two.

    Returns q float8_e4m3fn (..., H), scales float32 (..., H / 128).  ValueError for another H.
    """
    hidden = x.shape[-1] if x.dim() else 0
    check(
        hidden > 0 and hidden % FP8_GROUP == 0,
        f"quantize_fp8: x has {hidden} columns, needs a positive multiple of {FP8_GROUP}; pad them with zeros",
    )
    shape = (*x.shape[:-1], hidden // FP8_GROUP)
    q, scales = _quantize_rows(x.reshape(-1, hidden), round_scale)
    if round_scale:
        exponents = scales.view(torch.uint8)[:, : hidden // FP8_GROUP]
        scales = (exponents.int() << 23).view(torch.float32)
    return q.view(x.shape), scales.reshape(shape)


def dequantize_fp8(q: Tensor, scales: Tensor) -> Tensor:
    """float32 (..., H) of e4m3 (..., H) and float32 scales (..., H / 128)."""
    return q.float() * scales.repeat_interleave(FP8_GROUP, -1)


def quantize_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """Cast weights to e4m3 with the rule of quantize_fp8 for blocks of 128 x 128; edge blocks are what is left of them.

    w: bfloat16 or float32 (..., N, K), finite.

    Returns q float8_e4m3fn (..., N, K), scales float32 (..., ceil(N / 128), ceil(K / 128)).
    """
    rows, columns = w.shape[-2:]
    padded = functional.pad(w.float(), (0, -columns % FP8_GROUP, 0, -rows % FP8_GROUP))
    blocks = padded.unflatten(-1, (-1, FP8_GROUP)).unflatten(-3, (-1, FP8_GROUP))
    amax = blocks.abs().amax((-3, -1)).clamp_min(FP8_MIN_AMAX)
    largest = amax.new_tensor(FP8_MAX)  # see cutehop.ref.ep.quantize_fp8
    q = w.float() * expand_scales(largest / amax, rows, columns)
    return q.to(torch.float8_e4m3fn), amax / largest


def dequantize_blocks(q: Tensor, scales: Tensor) -> Tensor:
    """float32 (..., N, K) of quantize_blocks' pair."""
    return q.float() * expand_scales(scales, *q.shape[-2:])


def expand_scales(scales: Tensor, rows: int, columns: int) -> Tensor:
    """(..., rows, columns): each element's scale of scales (..., ceil(rows / 128), ceil(columns / 128))."""
    return scales.repeat_interleave(FP8_GROUP, -2)[..., :rows, :].repeat_interleave(FP8_GROUP, -1)[..., :columns]
