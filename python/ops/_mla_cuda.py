"""CUDA bodies of the MLA ops: check, choose the variant, find the scratch memory, launch.

Host time is part of the product (a decode step calls this once per layer), so whatever depends only on shapes, strides,
dtypes and the addresses of q and the cache is worked out once and remembered as a `_Call`: checks, tensor maps, grids.
A warm call reads the tensors' attributes, looks the call up and packs pointers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cutehop.cute_kernels import mla
from cutehop.cute_kernels.jit import Kernel, TensorMap, tensor_map
from cutehop.cute_kernels.mla import config as cfg
from cutehop.ops._mla_checks import check_address, check_decode, check_outputs, sms_of
from cutehop.ops._scratch import Need, prepare_captures, scratch_of

_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_LOG2E = math.log2(math.e)
_MAX_CALLS = 4096  # remembered at a time


class _Call(NamedTuple):
    """All of a decode call that its key determines. Arguments are in the order of DecodeArgs and CombineArgs."""

    decode: Kernel
    combine: Kernel | None  # None: no plan of these shapes leaves anything to combine
    grid: tuple[int, int, int]
    combine_grid: tuple[int, int, int]
    q_map: TensorMap | None  # None: no map describes q, every call makes a copy
    q_step: tuple[int, int]  # q_group, q_kv_step
    q_rows: int
    k_map: TensorMap
    scratch: Need
    partial_out_bytes: int
    table_stride: int
    sizes: tuple[int, int]  # batch, slots
    shapes: tuple[int, int, int, int, int]  # s_q, heads_per_kv, h_q, total_q, ragged
    split_blocks: int
    to_combine: tuple[int, int, int]  # partitions, sequences, row groups
    scale_log2: float


_calls: dict[tuple[Any, ...], _Call] = {}


def plan(
    cache_seqlens: Tensor,
    s_q: int,
    h_q: int,
    h_kv: int = 1,
    num_sms: int = 132,
    split_tokens: int = 0,
    *,
    tile_scheduler_metadata: Tensor,
    num_splits: Tensor,
) -> None:
    """Body of cutehop::mla_plan."""
    device = cache_seqlens.get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            outputs = {"tile_scheduler_metadata": tile_scheduler_metadata, "num_splits": num_splits}
            return plan(cache_seqlens, s_q, h_q, h_kv, num_sms, split_tokens, **outputs)
    if cache_seqlens.shape[0] == 0:
        tile_scheduler_metadata.zero_()
        num_splits.zero_()
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    heads_per_kv = h_q // h_kv
    row_tiles = cfg.row_tiles(s_q, heads_per_kv)
    mla.plan_kernel(cfg.PlanConfig(), stream).launch(
        (1, 1, 1),
        stream,
        cache_seqlens.data_ptr(),
        tile_scheduler_metadata.data_ptr(),
        num_splits.data_ptr(),
        cache_seqlens.shape[0],
        tile_scheduler_metadata.shape[0],
        cfg.combine_chunk(cache_seqlens.shape[0], s_q * heads_per_kv, h_kv),
        row_tiles,
        row_tiles * h_kv,
        *cfg.plan_costs(s_q * heads_per_kv),
        split_tokens // cfg.BLOCK,
    )


def decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    tile_scheduler_metadata: Tensor,
    num_splits: Tensor,
    softmax_scale: float,
    causal: bool = False,
    attn_sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int = 0,
    split_tokens: int = 0,
    empty_lse_neg_inf: bool = False,
    *,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Body of cutehop::mla_decode: fills out and lse. A q that no tensor map describes is copied first, see _q_map."""
    device = q.get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return decode(
                q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, softmax_scale, causal,
                attn_sink, cu_seqlens_q, max_seqlen_q, split_tokens, empty_lse_neg_inf, out=out, lse=lse,
            )  # fmt: skip
    stream = torch._C._cuda_getCurrentRawStream(device)
    q_ptr, out_ptr = q.data_ptr(), out.data_ptr()
    key = (
        # What the checks read; where they ask for a contiguous tensor, its strides do not matter further.
        q_ptr, q.shape, q.stride(), q.dtype, device,
        k_cache.data_ptr(), k_cache.shape, k_cache.stride(), k_cache.dtype, k_cache.get_device(),
        block_table.shape, block_table.stride(), block_table.dtype, block_table.get_device(),
        cache_seqlens.shape, cache_seqlens.is_contiguous(), cache_seqlens.dtype, cache_seqlens.get_device(),
        tile_scheduler_metadata.shape, tile_scheduler_metadata.is_contiguous(), tile_scheduler_metadata.dtype,
        tile_scheduler_metadata.get_device(),
        num_splits.shape, num_splits.is_contiguous(), num_splits.dtype, num_splits.get_device(),
        out.shape, out.is_contiguous(), out.dtype, out.get_device(), out_ptr % 16,
        lse.shape, lse.is_contiguous(), lse.dtype, lse.get_device(),
        attn_sink is not None and _signature(attn_sink), cu_seqlens_q is not None and _signature(cu_seqlens_q),
        softmax_scale, max_seqlen_q, split_tokens,
    )  # fmt: skip
    call = _calls.get(key)
    if call is None:
        check_decode(
            q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, softmax_scale, causal,
            attn_sink, cu_seqlens_q, max_seqlen_q, split_tokens, empty_lse_neg_inf,
        )  # fmt: skip
        check_outputs(q, out, lse, ragged=cu_seqlens_q is not None)
        check_address("k_cache", k_cache)
        check_address("out", out)
        if out.numel() == 0:
            return
        call = _prepare(
            q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, cu_seqlens_q is not None, max_seqlen_q,
            split_tokens, softmax_scale, stream,
        )  # fmt: skip
        _remember(key, call)
    q_map = call.q_map
    if q_map is None:  # the copy has to live until the launch, or the scratch memory might get its memory
        q_map, _, q = _q_map(q, k_cache.shape[2], *call.shapes[:2], call.q_rows, cu_seqlens_q is not None)
    partial_out, tickets, arrivals, report = scratch_of(device, stream, call.scratch)
    partial_rows = partial_out + call.partial_out_bytes
    plan_ptr, splits_ptr, lse_ptr = tile_scheduler_metadata.data_ptr(), num_splits.data_ptr(), lse.data_ptr()
    cu_ptr = cu_seqlens_q.data_ptr() if cu_seqlens_q is not None else 0
    sink_ptr = attn_sink.data_ptr() if attn_sink is not None else 0
    empty_lse = -math.inf if empty_lse_neg_inf else math.inf
    call.decode.launch(
        call.grid, stream, q_map, call.k_map, block_table.data_ptr(), call.table_stride,
        cache_seqlens.data_ptr(), cu_ptr, plan_ptr, splits_ptr, sink_ptr, out_ptr, lse_ptr, partial_out, partial_rows,
        tickets, arrivals, report, *call.sizes, *call.q_step, *call.shapes, causal, sink_ptr != 0, call.split_blocks,
        call.scale_log2, empty_lse,
    )  # fmt: skip
    if call.combine is not None:
        call.combine.launch(
            call.combine_grid, stream, plan_ptr, splits_ptr, cu_ptr, sink_ptr, out_ptr, lse_ptr, partial_out,
            partial_rows, arrivals, report, *call.sizes, *call.shapes, sink_ptr != 0, call.split_blocks,
            *call.to_combine, empty_lse,
        )  # fmt: skip


def _signature(t: Tensor) -> tuple[Any, ...]:
    """What the checks read of a tensor."""
    return t.shape, t.stride(), t.dtype, t.get_device()


def _remember(key: tuple[Any, ...], call: _Call) -> None:
    if len(_calls) >= _MAX_CALLS:
        _calls.clear()
    _calls[key] = call


def _prepare(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    tile_scheduler_metadata: Tensor,
    ragged: bool,
    max_seqlen_q: int,
    split_tokens: int,
    softmax_scale: float,
    stream: int,
) -> _Call:
    batch, partitions = cache_seqlens.shape[0], tile_scheduler_metadata.shape[0]
    page, h_kv = k_cache.shape[1:3]
    h_q = q.shape[-2]
    s_q = max_seqlen_q if ragged else q.shape[1]
    heads_per_kv = h_q // h_kv
    rows = s_q * heads_per_kv
    row_tiles = cfg.row_tiles(s_q, heads_per_kv)
    tiles = row_tiles * h_kv
    split_blocks = split_tokens // cfg.BLOCK
    max_blocks = -(-block_table.shape[1] * page // cfg.BLOCK)
    combines = cfg.max_combines(batch, partitions, max_blocks, split_blocks)
    slots = cfg.max_slots(batch, partitions, max_blocks, split_blocks)
    name = _DTYPE_NAMES[q.dtype]
    combine, combine_grid = None, (0, 0, 0)
    if combines:
        config = cfg.CombineConfig(name, *cfg.combine_shape(batch, rows, h_kv, split_blocks))
        combine = mla.combine_kernel(config, stream)
        combine_grid = cfg.combine_grid(config, combines, tiles, rows, sms_of(q.device))
    prepare_captures(q.get_device())
    q_rows = cfg.q_rows(rows, ragged, split_blocks)
    q_map, q_step, described = _q_map(q, h_kv, s_q, heads_per_kv, q_rows, ragged)
    return _Call(
        decode=mla.decode_kernel(
            cfg.DecodeConfig(name, page, cfg.few_sequences(batch, partitions), q_rows == cfg.FEW_ROWS), stream
        ),
        combine=combine,
        grid=(row_tiles, h_kv, partitions),
        combine_grid=combine_grid,
        q_map=q_map if described is q else None,
        q_step=q_step,
        q_rows=q_rows,
        k_map=_k_map(k_cache),
        scratch=(
            slots * tiles * (cfg.PARTIAL_OUT_BYTES + cfg.PARTIAL_ROWS_BYTES),
            partitions * tiles,
            cfg.arrivals(slots) * tiles,
        ),
        partial_out_bytes=slots * tiles * cfg.PARTIAL_OUT_BYTES,
        table_stride=block_table.stride(0),
        sizes=(batch, slots),
        shapes=(s_q, heads_per_kv, h_q, q.shape[0] if ragged else batch * s_q, int(ragged)),
        split_blocks=split_blocks,
        to_combine=(partitions, combines, cfg.row_groups(rows)),
        scale_log2=softmax_scale * _LOG2E,
    )


def _q_map(
    q: Tensor, h_kv: int, s_q: int, heads_per_kv: int, tile: int, ragged: bool
) -> tuple[TensorMap, tuple[int, int], Tensor]:
    """Tensor map that gives `tile` packed rows as one box; q_group and q_kv_step of DecodeArgs; the q it is of.

    Packed rows (token, head) are one dimension if tokens follow each other like heads do, else a box spans heads and
    tokens. Where neither fits (several kv heads of an odd size, unusual strides) q is copied, kv head by kv head.
    """
    stride_s, stride_h = q.stride()[-3:-1]
    batch, stride_b = (1, 0) if ragged else (q.shape[0], q.stride(0))
    tokens, h_q = (q.shape[0] if ragged else s_q), q.shape[-2]
    steps = [stride for stride, extent in ((stride_h, h_q), (stride_s, tokens), (stride_b, batch)) if extent > 1]
    aligned = q.data_ptr() % 16 == 0 and all(stride and stride % 8 == 0 for stride in steps)  # 0: expanded
    if aligned and ((s_q == 1 and not ragged) or (h_kv == 1 and stride_s == h_q * stride_h)):
        dims, strides, box = (h_q * tokens, 1, batch), (stride_h, stride_h, stride_b), (tile, 1)
        q_group, q_kv_step = 1 << 30, s_q * heads_per_kv
    elif aligned and (tile % heads_per_kv == 0 or heads_per_kv % tile == 0):
        heads = min(heads_per_kv, tile)
        dims, strides, box = (h_q, tokens, batch), (stride_h, stride_s, stride_b), (heads, tile // heads)
        q_group, q_kv_step = heads_per_kv, heads_per_kv
    else:
        q = q.unflatten(-2, (h_kv, heads_per_kv)).transpose(-4, -3).contiguous()  # ([b,] h_kv, tokens, heads, 576)
        rows = tokens * h_q
        dims, strides, box = (rows, 1, batch), (cfg.HEAD_DIM, cfg.HEAD_DIM, rows * cfg.HEAD_DIM), (tile, 1)
        q_group, q_kv_step = 1 << 30, tokens * heads_per_kv
    # an extent of 1 may carry any stride, also one that the encoder would refuse
    head, token, sequence = ((stride if extent > 1 else cfg.HEAD_DIM) * 2 for stride, extent in zip(strides, dims))
    q_map = tensor_map(
        q.data_ptr(),
        _DTYPE_NAMES[q.dtype],
        (64, dims[0], dims[1], cfg.NUM_SLABS, dims[2]),
        (head, token, 128, sequence),
        (64, *box, cfg.NUM_SLABS, 1),
    )
    return q_map, (q_group, q_kv_step), q


def _k_map(k_cache: Tensor) -> TensorMap:
    num_pages, page, h_kv, head_dim = k_cache.shape
    stride_page, stride_row, stride_head, _ = k_cache.stride()
    if h_kv == 1:
        stride_head = stride_row  # an extent of 1 may carry any stride, which the encoder would refuse
    return tensor_map(
        k_cache.data_ptr(),
        _DTYPE_NAMES[k_cache.dtype],
        (head_dim, page, h_kv, num_pages),
        (stride_row * 2, stride_head * 2, stride_page * 2),
        (64, min(page, cfg.BLOCK), 1, 1),
    )
