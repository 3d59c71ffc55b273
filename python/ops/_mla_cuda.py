"""CUDA bodies of the MLA ops: check, choose the variant, find the workspace, launch.

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
from cutehop.ops._mla_checks import check_address, check_decode, check_outputs

_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_LOG2E = math.log2(math.e)
_COMBINE_CTAS = 1056  # more would only take turns: a CTA goes on to the next sequence
_CAPTURE_TICKETS = 4 << 20  # int32 per device, for captured calls
_MAX_CALLS = 4096  # remembered at a time


class _Call(NamedTuple):
    """All of a decode call that its key determines. Arguments are in the order of DecodeArgs and CombineArgs."""

    decode: Kernel
    combine: Kernel | None  # None: no plan of this many partitions leaves anything to combine
    grid: tuple[int, int, int]
    combine_grid: tuple[int, int, int]
    q_map: TensorMap | None  # None: no map describes q, every call makes a copy
    q_group: int
    q_kv_step: int
    k_map: TensorMap
    workspace_tiles: int
    table_stride: int
    shapes: tuple[int, int, int, int, int]  # s_q, heads_per_kv, h_q, total_q, ragged
    batch: int
    combines: int


_calls: dict[tuple[Any, ...], _Call] = {}
_workspaces: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
_capture_tickets: dict[int, tuple[Tensor, int]] = {}  # per device: zeros, and how many are taken


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
    mla.plan_kernel(cfg.PlanConfig(), stream).launch(
        (1, 1, 1),
        stream,
        cache_seqlens.data_ptr(),
        tile_scheduler_metadata.data_ptr(),
        num_splits.data_ptr(),
        cache_seqlens.shape[0],
        tile_scheduler_metadata.shape[0],
        cfg.min_piece(s_q * heads_per_kv),
        cfg.row_tiles(s_q, heads_per_kv),
        cfg.combine_cost(s_q * heads_per_kv),
        split_tokens // cfg.BLOCK,
    )


def decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    tile_scheduler_metadata: Tensor,
    num_splits: Tensor,
    *,
    softmax_scale: float,
    causal: bool = False,
    attn_sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int = 0,
    split_tokens: int = 0,
    empty_lse_neg_inf: bool = False,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Body of cutehop::mla_decode: fills out and lse. A q that no tensor map describes is copied first, see _q_map."""
    device = q.get_device()
    tensors = (q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits)
    options: dict[str, Any] = {
        "softmax_scale": softmax_scale, "causal": causal, "attn_sink": attn_sink, "cu_seqlens_q": cu_seqlens_q,
        "max_seqlen_q": max_seqlen_q, "split_tokens": split_tokens, "empty_lse_neg_inf": empty_lse_neg_inf,
    }  # fmt: skip
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return decode(*tensors, **options, out=out, lse=lse)
    stream = torch._C._cuda_getCurrentRawStream(device)
    key = (
        *(_signature(t) for t in tensors), _signature(out), _signature(lse),
        attn_sink is not None and _signature(attn_sink), cu_seqlens_q is not None and _signature(cu_seqlens_q),
        q.data_ptr(), k_cache.data_ptr(), softmax_scale, max_seqlen_q, split_tokens,
    )  # fmt: skip
    call = _calls.get(key)
    if call is None:
        check_decode(*tensors, **options)
        check_outputs(q, out, lse, ragged=cu_seqlens_q is not None)
        check_address("k_cache", k_cache)
        if out.numel() == 0:
            return
        call = _remember(key, _prepare(*tensors, cu_seqlens_q is not None, max_seqlen_q, split_tokens, stream))
    check_address("out", out)

    q_map = call.q_map
    if q_map is None:  # the copy has to live until the launch, or the workspace might get its memory
        q_map, _, _, q = _q_map(q, k_cache.shape[2], *call.shapes[:2], cu_seqlens_q is not None)
    scratch = _workspace(device, stream, call.workspace_tiles) if call.workspace_tiles else (0, 0, 0)
    splits_ptr, plan_ptr, out_ptr, lse_ptr = (
        num_splits.data_ptr(), tile_scheduler_metadata.data_ptr(), out.data_ptr(), lse.data_ptr(),
    )  # fmt: skip
    cu_ptr = cu_seqlens_q.data_ptr() if cu_seqlens_q is not None else 0
    sink_ptr = attn_sink.data_ptr() if attn_sink is not None else 0
    empty_lse = -math.inf if empty_lse_neg_inf else math.inf
    call.decode.launch(
        call.grid, stream, q_map, call.k_map, block_table.data_ptr(), call.table_stride,
        cache_seqlens.data_ptr(), cu_ptr, plan_ptr, splits_ptr, sink_ptr, out_ptr, lse_ptr, *scratch,
        call.q_group, call.q_kv_step, *call.shapes, causal, sink_ptr != 0, split_tokens // cfg.BLOCK,
        softmax_scale * _LOG2E, empty_lse,
    )  # fmt: skip
    if call.combine is not None:
        call.combine.launch(
            call.combine_grid, stream, plan_ptr, splits_ptr, cu_ptr, sink_ptr, out_ptr, lse_ptr, scratch[0], scratch[1],
            call.batch, *call.shapes, sink_ptr != 0, split_tokens == 0, call.combines, empty_lse,
        )  # fmt: skip


def _signature(t: Tensor) -> tuple[Any, ...]:
    """What the checks read of a tensor."""
    return t.shape, t.stride(), t.dtype, t.get_device()


def _remember(key: tuple[Any, ...], call: _Call) -> _Call:
    if len(_calls) >= _MAX_CALLS:
        _calls.clear()
    _calls[key] = call
    return call


def _prepare(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    tile_scheduler_metadata: Tensor,
    num_splits: Tensor,
    ragged: bool,
    max_seqlen_q: int,
    split_tokens: int,
    stream: int,
) -> _Call:
    batch, partitions = cache_seqlens.shape[0], tile_scheduler_metadata.shape[0]
    page, h_kv = k_cache.shape[1:3]
    h_q = q.shape[-2]
    s_q = max_seqlen_q if ragged else q.shape[1]
    heads_per_kv = h_q // h_kv
    row_tiles = cfg.row_tiles(s_q, heads_per_kv)
    tiles = row_tiles * h_kv
    combines = batch if split_tokens else cfg.max_combines(batch, partitions)
    name = _DTYPE_NAMES[q.dtype]
    combine = None
    if combines:
        chunk = cfg.combine_chunk(batch, partitions, split_tokens)
        combine = mla.combine_kernel(cfg.CombineConfig(name, chunk), stream)
    decode_kernel = mla.decode_kernel(cfg.DecodeConfig(name, page), stream)
    if q.get_device() not in _capture_tickets:
        _capture_tickets[q.get_device()] = torch.zeros(_CAPTURE_TICKETS, dtype=torch.int32, device=q.device), 0
    q_map, q_group, q_kv_step, described = _q_map(q, h_kv, s_q, heads_per_kv, ragged)
    return _Call(
        decode=decode_kernel,
        combine=combine,
        grid=(row_tiles, h_kv, partitions),
        combine_grid=(tiles * 32, min(combines, max(_COMBINE_CTAS // (tiles * 32), 1)), 1),
        q_map=q_map if described is q else None,
        q_group=q_group,
        q_kv_step=q_kv_step,
        k_map=_k_map(k_cache),
        workspace_tiles=_max_slots(batch, partitions, block_table.shape[1] * page, split_tokens) * tiles,
        table_stride=block_table.stride(0),
        shapes=(s_q, heads_per_kv, h_q, q.shape[0] if ragged else batch * s_q, int(ragged)),
        batch=batch,
        combines=combines,
    )


def _q_map(q: Tensor, h_kv: int, s_q: int, heads_per_kv: int, ragged: bool) -> tuple[TensorMap, int, int, Tensor]:
    """Tensor map that gives a tile of 64 packed rows as one box; q_group and q_kv_step of DecodeArgs; the q it is of.

    Packed rows (token, head) are one dimension if tokens follow each other like heads do, else a box spans heads and
    tokens. Where neither fits (several kv heads of an odd size, unusual strides) q is copied, kv head by kv head.
    """
    stride_s, stride_h = q.stride()[-3:-1]
    batch, stride_b = (1, 0) if ragged else (q.shape[0], q.stride(0))
    tokens, h_q = (q.shape[0] if ragged else s_q), q.shape[-2]
    steps = [stride for stride, extent in ((stride_h, h_q), (stride_s, tokens), (stride_b, batch)) if extent > 1]
    aligned = q.data_ptr() % 16 == 0 and all(stride and stride % 8 == 0 for stride in steps)  # 0: expanded
    if aligned and ((s_q == 1 and not ragged) or (h_kv == 1 and stride_s == h_q * stride_h)):
        dims, strides, box = (h_q * tokens, 1, batch), (stride_h, stride_h, stride_b), (cfg.TILE_M, 1)
        q_group, q_kv_step = 1 << 30, s_q * heads_per_kv
    elif aligned and (cfg.TILE_M % heads_per_kv == 0 or heads_per_kv % cfg.TILE_M == 0):
        heads = min(heads_per_kv, cfg.TILE_M)
        dims, strides, box = (h_q, tokens, batch), (stride_h, stride_s, stride_b), (heads, cfg.TILE_M // heads)
        q_group, q_kv_step = heads_per_kv, heads_per_kv
    else:
        q = q.unflatten(-2, (h_kv, heads_per_kv)).transpose(-4, -3).contiguous()  # ([b,] h_kv, tokens, heads, 576)
        rows = tokens * h_q
        dims, strides, box = (rows, 1, batch), (cfg.HEAD_DIM, cfg.HEAD_DIM, rows * cfg.HEAD_DIM), (cfg.TILE_M, 1)
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
    return q_map, q_group, q_kv_step, q


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


def _max_slots(batch: int, partitions: int, max_tokens: int, split_tokens: int) -> int:
    """Most partial results a plan can ask for: a cut between partitions adds a piece to a sequence that is split."""
    if split_tokens:
        return batch * -(-max_tokens // split_tokens)
    cuts = partitions - 1
    return cuts + min(cuts, batch)


def _workspace(device: int, stream: int, tiles: int) -> tuple[int, int, int]:
    """Addresses of the partial outputs, the partial lse and the tickets of so many row tiles.

    Calls on one stream run one after the other and share a workspace that only grows; a capture gets one of its own,
    because its replays may run on any stream. Tickets must be zero before the first launch; launches leave them so.
    """
    if torch._C._cuda_isCurrentStreamCapturing():
        buffer = torch.empty(_floats(tiles), dtype=torch.float32, device=torch.device("cuda", device))
        tickets = _take_capture_tickets(device, tiles)
    else:
        cached = _workspaces.get((device, stream))
        if cached is None or cached[1].numel() < tiles:
            cuda = torch.device("cuda", device)
            cached = (
                torch.empty(_floats(tiles), dtype=torch.float32, device=cuda),
                torch.zeros(tiles, dtype=torch.int32, device=cuda),
            )
            _workspaces[device, stream] = cached
        buffer, tickets = cached
    address = buffer.data_ptr()
    return address, address + tiles * cfg.TILE_M * cfg.HEAD_DIM_V * 4, tickets.data_ptr()


def _floats(tiles: int) -> int:
    return tiles * cfg.TILE_M * (cfg.HEAD_DIM_V + 1)


def _take_capture_tickets(device: int, count: int) -> Tensor:
    """Zeros that no other call uses, taken for good: nobody says when a graph is gone.

    They come from a stock that was zeroed before any capture; when it is used up, zeroing becomes part of the graph.
    """
    stock, taken = _capture_tickets[device]
    if taken + count > stock.numel():
        return torch.zeros(count, dtype=torch.int32, device=torch.device("cuda", device))
    _capture_tickets[device] = stock, taken + count
    return stock[taken : taken + count]
