"""CUDA bodies of the MLA ops: choose the variant, find the workspace, launch. Arguments were checked by ops/mla.py or are here.

Host time is part of the product (a decode step calls this once per layer), so everything that depends on shapes alone is
looked up, not computed: loaded kernels per device and tensor maps per cache address.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cutehop.cute_kernels import mla
from cutehop.cute_kernels.jit import Kernel, TensorMap, tensor_map
from cutehop.cute_kernels.mla import config as cfg

_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_LOG2E = math.log2(math.e)
_COMBINE_CTAS = 528  # more would only take turns: a CTA goes on to the next sequence
_CAPTURE_TICKETS = 4 << 20  # int32 per device, for captured calls


class _Decode(NamedTuple):
    decode: Kernel
    combine: dict[int, Kernel]  # by chunk


_decode_kernels: dict[tuple[int, torch.dtype, int], _Decode] = {}
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
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return plan(
                cache_seqlens, s_q, h_q, h_kv, num_sms, split_tokens,
                tile_scheduler_metadata=tile_scheduler_metadata, num_splits=num_splits,
            )  # fmt: skip
    if cache_seqlens.shape[0] == 0:
        tile_scheduler_metadata.zero_()
        num_splits.zero_()
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    mla.plan_kernel(cfg.PlanConfig(), stream).launch(
        (1, 1, 1),
        stream,
        cache_seqlens.data_ptr(),
        tile_scheduler_metadata.data_ptr(),
        num_splits.data_ptr(),
        cache_seqlens.shape[0],
        tile_scheduler_metadata.shape[0],
        cfg.min_piece(s_q * (h_q // h_kv)),
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
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return decode(
                q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, softmax_scale=softmax_scale,
                causal=causal, attn_sink=attn_sink, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
                split_tokens=split_tokens, empty_lse_neg_inf=empty_lse_neg_inf, out=out, lse=lse,
            )  # fmt: skip
    b = cache_seqlens.shape[0]
    if b == 0 or out.numel() == 0:
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    dtype = q.dtype
    num_pages, page, h_kv, _ = k_cache.shape
    kernels = _decode_kernels.get((device, dtype, page)) or _load(device, dtype, page, stream)

    ragged = cu_seqlens_q is not None
    h_q = q.shape[-2]
    s_q = max_seqlen_q if ragged else q.shape[1]
    total_q = q.shape[0] if ragged else b * s_q
    heads_per_kv = h_q // h_kv
    partitions = tile_scheduler_metadata.shape[0]
    tiles = cfg.row_tiles(s_q, heads_per_kv)
    q_map, q_group, q_kv_step, q = _q_map(q, h_kv, s_q, heads_per_kv, ragged)
    slots = _max_slots(b, partitions, block_table.shape[1] * page, split_tokens)
    partial_out, partial_lse, tickets = _workspace(device, stream, slots * tiles * h_kv) if slots else (0, 0, 0)
    cu_ptr = cu_seqlens_q.data_ptr() if cu_seqlens_q is not None else 0
    sink_ptr = attn_sink.data_ptr() if attn_sink is not None else 0
    empty_lse = -math.inf if empty_lse_neg_inf else math.inf
    num_splits_ptr, out_ptr, lse_ptr = num_splits.data_ptr(), out.data_ptr(), lse.data_ptr()

    kernels.decode.launch(
        (tiles, h_kv, partitions),
        stream,
        q_map,
        _k_map(k_cache),
        block_table.data_ptr(),
        block_table.stride(0),
        cache_seqlens.data_ptr(),
        cu_ptr,
        tile_scheduler_metadata.data_ptr(),
        num_splits_ptr,
        sink_ptr,
        out_ptr,
        lse_ptr,
        partial_out,
        partial_lse,
        tickets,
        q_group,
        q_kv_step,
        s_q,
        heads_per_kv,
        h_q,
        total_q,
        ragged,
        causal,
        attn_sink is not None,
        split_tokens // cfg.BLOCK,
        softmax_scale * _LOG2E,
        empty_lse,
    )
    combines = b if split_tokens else cfg.max_combines(b, partitions)
    if combines:
        kernels.combine[cfg.combine_chunk(b, partitions, split_tokens)].launch(
            (tiles * h_kv * 32, min(combines, max(_COMBINE_CTAS // (tiles * h_kv * 32), 1)), 1),
            stream,
            tile_scheduler_metadata.data_ptr(),
            num_splits_ptr,
            cu_ptr,
            sink_ptr,
            out_ptr,
            lse_ptr,
            partial_out,
            partial_lse,
            b,
            s_q,
            heads_per_kv,
            h_q,
            total_q,
            ragged,
            attn_sink is not None,
            split_tokens == 0,
            combines,
            empty_lse,
        )


def _load(device: int, dtype: torch.dtype, page: int, stream: int) -> _Decode:
    name = _DTYPE_NAMES[dtype]
    kernels = _Decode(
        mla.decode_kernel(cfg.DecodeConfig(name, page), stream),
        {chunk: mla.combine_kernel(cfg.CombineConfig(name, chunk), stream) for chunk in (8, 16)},
    )
    if device not in _capture_tickets:
        _capture_tickets[device] = torch.zeros(_CAPTURE_TICKETS, dtype=torch.int32, device=torch.device("cuda", device)), 0
    _decode_kernels[device, dtype, page] = kernels
    return kernels


def _q_map(
    q: Tensor, h_kv: int, s_q: int, heads_per_kv: int, ragged: bool
) -> tuple[TensorMap, int, int, Tensor]:
    """Tensor map that gives a tile of 64 packed rows as one box per slab; q_group and q_kv_step of DecodeArgs; the q to keep.

    Packed rows (token, head) are one dimension if tokens follow each other like heads do, else a box spans heads and
    tokens. Where neither fits (several kv heads of an odd size, unusual strides) q is copied, kv head by kv head.
    """
    stride_s, stride_h = q.stride()[-3:-1]
    batch = 1 if ragged else q.shape[0]
    tokens = q.shape[0] if ragged else s_q
    h_q = q.shape[-2]
    stride_b = 0 if ragged else q.stride(0)
    aligned = q.data_ptr() % 16 == 0 and not (stride_h % 8 or stride_s % 8 or stride_b % 8)
    if aligned and (s_q == 1 and not ragged or (h_kv == 1 and stride_s == h_q * stride_h)):
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
    """Most partial results a plan can ask for: every cut between partitions adds a piece to a sequence that is split."""
    if split_tokens:
        return batch * -(-max_tokens // split_tokens)
    cuts = partitions - 1
    return cuts + min(cuts, batch)


def _workspace(device: int, stream: int, tiles: int) -> tuple[int, int, int]:
    """Addresses of the partial outputs, the partial lse and the tickets of so many row tiles.

    Calls on one stream run one after the other and share a workspace that only grows; a capture gets one of its own,
    because its replays may run on any stream. Tickets must be zero before the first launch; every launch leaves them so.
    """
    floats = tiles * cfg.TILE_M * (cfg.HEAD_DIM_V + 1)
    if torch.cuda.is_current_stream_capturing():
        buffer = torch.empty(floats, dtype=torch.float32, device=torch.device("cuda", device))
        tickets = _take_capture_tickets(device, tiles)
    else:
        cached = _workspaces.get((device, stream))
        if cached is None or cached[1].numel() < tiles:
            cuda = torch.device("cuda", device)
            cached = torch.empty(floats, dtype=torch.float32, device=cuda), torch.zeros(tiles, dtype=torch.int32, device=cuda)
            _workspaces[device, stream] = cached
        buffer, tickets = cached
    address = buffer.data_ptr()
    return address, address + tiles * cfg.TILE_M * cfg.HEAD_DIM_V * 4, tickets.data_ptr()


def _take_capture_tickets(device: int, count: int) -> Tensor:
    """Zeros that no other call uses, taken for good: nobody says when a graph is gone.

    They come from a stock that was zeroed before any capture; when it is used up, zeroing becomes part of the graph.
    """
    stock, taken = _capture_tickets[device]
    if taken + count > stock.numel():
        return torch.zeros(count, dtype=torch.int32, device=torch.device("cuda", device))
    _capture_tickets[device] = stock, taken + count
    return stock[taken : taken + count]
