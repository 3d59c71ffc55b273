"""CUDA body of the grouped GEMM ops for few rows per expert: describe the operands by tensor maps, find the scratch
memory, launch.

`cutehop.ops._gemm_cuda` calls it where `cutehop.cute_kernels.gemm.config.choose` says so. What depends
only on shapes, strides, dtypes and the addresses of a and b is worked out once and remembered as a `_Call`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cutehop.cute_kernels import gemm_decode
from cutehop.cute_kernels.errors import check
from cutehop.cute_kernels.gemm.config import GemmConfig
from cutehop.cute_kernels.gemm_decode import config as cfg
from cutehop.cute_kernels.jit import Kernel, TensorMap, tensor_map
from cutehop.ops._mla_checks import sms_of
from cutehop.ops._scratch import Need, prepare_captures, scratch_of

_MAX_CALLS = 4096  # remembered at a time


class _Call(NamedTuple):
    """All of a call that its key determines; sizes are in the order of work.GemmDecodeArgs."""

    kernel: Kernel
    grid: tuple[int, int, int]
    x_map: TensorMap
    w_map: TensorMap
    scratch: Need
    sizes: tuple[int, ...]


_calls: dict[tuple[Any, ...], _Call] = {}


def run(
    a: Tensor,
    b: Tensor,
    counts_or_ends: Tensor,
    a_scales: Tensor | None,
    b_scales: Tensor | None,
    epilogue: str,
    out: Tensor,
    out_scales: Tensor,
    masked: bool,
    config: cfg.GemmDecodeConfig,
) -> None:
    """Fill out and out_scales, as cutehop::masked_grouped_gemm (masked) or cutehop::grouped_gemm, whose arguments these
    are: checked, and with the device of `a` current.

    config: of a's dtype and this epilogue, from `cfg.choose`. Right for any number of rows, fast for at most
    config.tile_n of an expert. Sums are cut where the rows of all experts together say, so the last bits of a row may
    depend on other rows; equal inputs give equal bits. ValueError for addresses that TMA cannot read.
    """
    device = a.get_device()
    stream = torch._C._cuda_getCurrentRawStream(device)
    a_ptr, b_ptr = a.data_ptr(), b.data_ptr()
    scale_strides = None if a_scales is None else a_scales.stride()
    key = (config, device, a_ptr, a.shape, a.stride(), b_ptr, b.shape, b.stride(), scale_strides)
    call = _calls.get(key)
    if call is None:
        assert (epilogue, masked) == (config.epilogue, a.dim() == 3)
        if out.numel() == 0:
            return
        for name, address in (("a", a_ptr), ("b", b_ptr)):
            check(
                address % 16 == 0,
                f"{'masked_' if masked else ''}grouped_gemm: {name} at {address:#x}, no multiple of 16 bytes; "
                f"call {name}.clone()",
            )
        call = _prepare(a, b, scale_strides, config, stream)
        if len(_calls) >= _MAX_CALLS:
            _calls.clear()
        _calls[key] = call
    partials, tickets, _, _ = scratch_of(device, stream, call.scratch)
    call.kernel.launch(
        call.grid,
        stream,
        call.x_map,
        call.w_map,
        counts_or_ends.data_ptr(),
        0 if a_scales is None else a_scales.data_ptr(),
        0 if b_scales is None else b_scales.data_ptr(),
        out.data_ptr(),
        out_scales.data_ptr(),
        partials,
        tickets,
        *call.sizes,
    )


def _prepare(
    a: Tensor, b: Tensor, scale_strides: tuple[int, ...] | None, config: cfg.GemmDecodeConfig, stream: int
) -> _Call:
    masked = a.dim() == 3
    experts, weight_rows, k = b.shape
    columns = weight_rows // 2 if config.paired else weight_rows
    k_blocks = -(-k // config.block_k)
    blocks, limit = a.shape[:-1] if masked else (1, a.shape[0])
    units = cfg.max_units(config, experts, blocks * limit, columns, k_blocks)
    check(units < 1 << 31, f"grouped_gemm: {units} K blocks of tiles, limit 2^31 - 1; pass fewer rows")
    ctas = min(sms_of(a.device), units)
    *scale_block, scale_row, scale_k = scale_strides or (0, 0, 0)
    sizes = (
        scale_block[0] if scale_block else 0,
        scale_row,
        scale_k,
        experts,
        limit,
        limit if masked else 0,
        columns,
        -(-columns // config.tile_out),
        k_blocks,
        -(-weight_rows // cfg.GROUP),
    )
    prepare_captures(a.get_device())
    return _Call(
        kernel=gemm_decode.gemm_decode_kernel(config, stream),
        grid=(ctas, 1, 1),
        x_map=operand_map(a if masked else a.unsqueeze(0), cfg.BOX_N, config),
        w_map=operand_map(b, cfg.HALF_ROWS, config),
        scratch=(2 * ctas * config.partial_bytes, ctas, 0),
        sizes=sizes,
    )


def operand_map(tensor: Tensor, box_rows: int, config: cfg.GemmDecodeConfig | GemmConfig) -> TensorMap:
    """Map of (blocks, rows, K), boxes of one K block and `box_rows` rows. An extent of 1 may carry any stride, which
    the encoder would refuse."""
    steps = [step if size > 1 else tensor.shape[2] for step, size in zip(tensor.stride(), tensor.shape)]
    return tensor_map(
        tensor.data_ptr(),
        "bf16" if config.dtype == "bf16" else "u8",
        (tensor.shape[2], tensor.shape[1], tensor.shape[0]),
        (steps[1] * config.element_bytes, steps[0] * config.element_bytes),
        (config.block_k, box_rows, 1),
    )
