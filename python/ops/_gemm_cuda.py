"""CUDA bodies of the grouped GEMM ops: choose the kernel, describe the operands by tensor maps, launch. Calls with few
rows of few experts go to ops/_gemm_decode_cuda.py.

The ops have checked their arguments by then (ops/_moe_checks.py). What depends only on shapes, strides, dtypes and the
addresses of a and b is worked out once and remembered as a `_Call`; a warm call looks it up and packs pointers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cutehop.cute_kernels import gemm
from cutehop.cute_kernels.errors import check
from cutehop.cute_kernels.gemm import config as cfg
from cutehop.cute_kernels.jit import Kernel, TensorMap
from cutehop.ops import _gemm_decode_cuda as decode
from cutehop.ops._mla_checks import sms_of
from cutehop.ops._scratch import prepare_captures, scratch_of

_MAX_CALLS = 4096  # remembered at a time
_MAX_TILES = 2**31 - 1024  # the numbers that CTAs ask for in vain still are int32
_SCRATCH = (0, 1, 0)  # one counter


class _Call(NamedTuple):
    """All of a call that its key determines; sizes are in the order of tiles.GemmArgs."""

    kernel: Kernel
    grid: tuple[int, int, int]
    a_map: TensorMap
    b_map: TensorMap
    sizes: tuple[int, ...]


_calls: dict[tuple[Any, ...], _Call] = {}


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    ends: Tensor,
    a_scales: Tensor | None = None,
    b_scales: Tensor | None = None,
    epilogue: str = "store",
    expected_rows: int = 0,
    *,
    out: Tensor,
    out_scales: Tensor,
) -> None:
    """Body of cutehop::grouped_gemm."""
    _run("grouped_gemm", a, b, ends, a_scales, b_scales, epilogue, expected_rows, out, out_scales)


def masked_grouped_gemm(
    a: Tensor,
    b: Tensor,
    counts: Tensor,
    a_scales: Tensor | None = None,
    b_scales: Tensor | None = None,
    epilogue: str = "store",
    expected_rows: int = 0,
    *,
    out: Tensor,
    out_scales: Tensor,
) -> None:
    """Body of cutehop::masked_grouped_gemm."""
    _run("masked_grouped_gemm", a, b, counts, a_scales, b_scales, epilogue, expected_rows, out, out_scales)


def _run(
    op: str,
    a: Tensor,
    b: Tensor,
    rows: Tensor,
    a_scales: Tensor | None,
    b_scales: Tensor | None,
    epilogue: str,
    expected_rows: int,
    out: Tensor,
    out_scales: Tensor,
) -> None:
    device = a.get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return _run(op, a, b, rows, a_scales, b_scales, epilogue, expected_rows, out, out_scales)
    masked = a.dim() == 3
    dtype = "bf16" if a.dtype == torch.bfloat16 else "fp8"
    config = cfg.choose(
        dtype, epilogue, b.shape[0], a.shape[-2], masked, expected_rows, b.shape[1], b.shape[2], sms_of(a.device)
    )
    if not isinstance(config, cfg.GemmConfig):
        if out.numel():
            decode.run(a, b, rows, a_scales, b_scales, epilogue, out, out_scales, masked, config)
        return None
    stream = torch._C._cuda_getCurrentRawStream(device)
    a_ptr, b_ptr, out_ptr = a.data_ptr(), b.data_ptr(), out.data_ptr()
    scale_strides = None if a_scales is None else a_scales.stride()
    key = (
        op, config, device, a_ptr, a.shape, a.stride(), a.dtype, b_ptr, b.shape, b.stride(),
        scale_strides, out_ptr % 16,
    )  # fmt: skip
    call = _calls.get(key)
    if call is None:
        if out.numel() == 0:
            return None
        for name, address in (("a", a_ptr), ("b", b_ptr), ("out", out_ptr)):
            check(address % 16 == 0, f"{op}: {name} at {address:#x}, no multiple of 16 bytes; call {name}.clone()")
        call = _prepare(op, config, a, b, scale_strides, stream)
        if len(_calls) >= _MAX_CALLS:
            _calls.clear()
        _calls[key] = call
    call.kernel.launch(
        call.grid,
        stream,
        call.a_map,
        call.b_map,
        rows.data_ptr(),
        0 if a_scales is None else a_scales.data_ptr(),
        0 if b_scales is None else b_scales.data_ptr(),
        out_ptr,
        out_scales.data_ptr(),
        scratch_of(device, stream, _SCRATCH)[1],
        *call.sizes,
    )
    return None


def _prepare(
    op: str, config: cfg.GemmConfig, a: Tensor, b: Tensor, scale_strides: tuple[int, ...] | None, stream: int
) -> _Call:
    experts, weight_rows, k = b.shape
    check(
        experts <= cfg.MAX_EXPERTS,
        f"{op}: {experts} experts, supported 1..{cfg.MAX_EXPERTS}; spread them over ranks or calls",
    )
    columns = weight_rows // 2 if config.paired else weight_rows
    blocks, limit = a.shape[:-1] if a.dim() == 3 else (1, a.shape[0])
    column_tiles = config.column_tiles(columns)
    tiles = (-(-limit // config.tile_m) * blocks + experts) * column_tiles
    check(tiles <= _MAX_TILES, f"{op}: {tiles} tiles of {config.tile_m} rows, limit {_MAX_TILES}; pass fewer rows")
    *a_block, a_row, a_k = scale_strides or (0, 0, 0)
    sizes = (
        a_block[0] if a.dim() == 3 and a_block else 0,
        a_row,
        a_k,
        experts,
        limit,
        limit if a.dim() == 3 else 0,
        columns,
        column_tiles,
        -(-k // config.block_k),
        -(-weight_rows // cfg.GROUP),
    )
    prepare_captures(a.get_device())
    ctas = cfg.num_ctas(experts, limit * blocks, columns, config, sms_of(a.device))
    return _Call(
        kernel=gemm.gemm_kernel(config, stream),
        grid=(ctas, 1, 1),
        a_map=decode.operand_map(a if a.dim() == 3 else a.unsqueeze(0), cfg.UNIT, config),
        b_map=decode.operand_map(b, config.box_n, config),
        sizes=sizes,
    )
