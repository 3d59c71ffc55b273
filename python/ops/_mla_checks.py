"""Argument checks of the MLA ops. They read no tensor values (so they run on fake tensors and never wait for the GPU),
except `validate_values`, the debug mode of the friendly function.

A check costs a part of the call's 20 us of host time: attributes are read once and messages are built only on failure.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from cutehop.ref.mla import HEAD_DIM, HEAD_DIM_V
from cutehop.ref.mla_plan import BLOCK, METADATA_COLUMNS, num_partitions, plan_tensors

PAGE_SIZES = (16, 32, 64, 128)
MAX_HEADS = 128
MAX_SPLIT_TOKENS = 1 << 24  # the plan's CUT column has no room for many more
DTYPES = (torch.bfloat16, torch.float16)
INT32, FLOAT32 = torch.int32, torch.float32  # looked up once


def count_sms(device: torch.device) -> int:
    """SMs of a CUDA device; 132, an H100's, for any other device and on a machine without GPU."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132


sms_of = cache(count_sms)


def check_plan(cache_seqlens: Tensor, s_q: int, h_q: int, h_kv: int, num_sms: int, split_tokens: int) -> None:
    """Arguments of mla_plan."""
    _check_tensor("mla_plan", "cache_seqlens", cache_seqlens, INT32, (cache_seqlens.numel(),), cache_seqlens.device)
    if s_q < 1:
        raise ValueError(f"mla_plan: s_q {s_q}, at least 1; pass the query tokens per sequence")
    _check_heads("mla_plan", h_q, h_kv)
    if num_sms < 1:
        raise ValueError(f"mla_plan: num_sms {num_sms}, at least 1; pass the SMs that the call may fill")
    _check_split_tokens("mla_plan", split_tokens)


def check_decode(
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
) -> None:
    """Arguments of mla_decode, in the op's own order."""
    device = q.device
    b, s_q, h_q = _check_q(q, cu_seqlens_q is not None, max_seqlen_q)
    if cu_seqlens_q is not None:
        b = cache_seqlens.numel()
        _check_tensor("mla_decode", "cu_seqlens_q", cu_seqlens_q, INT32, (b + 1,), device)
    h_kv = _check_k_cache(k_cache, q.dtype, device)
    _check_heads("mla_decode", h_q, h_kv)
    _check_block_table(block_table, b, device)
    _check_tensor("mla_decode", "cache_seqlens", cache_seqlens, INT32, (b,), device)
    _check_tensor("mla_decode", "num_splits", num_splits, INT32, (b + 1,), device)
    _check_metadata(tile_scheduler_metadata, num_partitions(s_q, h_q, h_kv, sms_of(device)), device)
    if attn_sink is not None:
        _check_tensor("mla_decode", "attn_sink", attn_sink, FLOAT32, (h_q,), device)
    if not 0.0 < softmax_scale < math.inf:
        raise ValueError(f"mla_decode: softmax_scale {softmax_scale}, finite and positive; usual is {HEAD_DIM}**-0.5")
    _check_split_tokens("mla_decode", split_tokens)


def check_outputs(q: Tensor, out: Tensor, lse: Tensor, ragged: bool) -> None:
    """Outputs that the caller owns. q has passed check_decode."""
    out_shape, lse_shape = output_shapes(q, ragged)
    _check_tensor("mla_decode", "out", out, q.dtype, out_shape, q.device)
    _check_tensor("mla_decode", "lse", lse, FLOAT32, lse_shape, q.device)


def check_address(name: str, tensor: Tensor) -> None:
    """What TMA and 16-byte stores need. Fake tensors have no address."""
    if tensor.data_ptr() % 16:
        raise ValueError(
            f"mla_decode: {name} at address {tensor.data_ptr():#x}, no multiple of 16 bytes; call {name}.clone()"
        )


def output_shapes(q: Tensor, ragged: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of out and lse. ValueError if q has another number of dimensions."""
    shape = q.shape
    if len(shape) != (3 if ragged else 4):
        wanted = f"(total_q, h_q, {HEAD_DIM}) with" if ragged else f"(b, s_q, h_q, {HEAD_DIM}) without"
        raise ValueError(f"mla_decode: q shape {tuple(shape)}, {wanted} cu_seqlens_q; reshape q")
    if ragged:
        total_q, h_q, _ = shape
        return (total_q, h_q, HEAD_DIM_V), (h_q, total_q)
    b, s_q, h_q, _ = shape
    return (b, s_q, h_q, HEAD_DIM_V), (b, h_q, s_q)


def _check_q(q: Tensor, ragged: bool, max_seqlen_q: int) -> tuple[int, int, int]:
    """Returns (b or total_q, query tokens per sequence or their bound, h_q)."""
    if q.dtype not in DTYPES:
        raise TypeError(f"mla_decode: q dtype {q.dtype}, supported bfloat16|float16; cast q and the cache")
    out_shape, _ = output_shapes(q, ragged)
    if q.shape[-1] != HEAD_DIM:
        raise ValueError(
            f"mla_decode: q head_dim {q.shape[-1]}, supported {HEAD_DIM} (512 NoPE + 64 RoPE); "
            f"pass the absorbed query of DeepSeek's MLA"
        )
    if q.stride()[-1] != 1:
        raise ValueError(f"mla_decode: q strides {q.stride()}, supported 1 in the last dimension; call q.contiguous()")
    if ragged:
        if max_seqlen_q < 1:
            raise ValueError(
                f"mla_decode: max_seqlen_q {max_seqlen_q} with cu_seqlens_q, at least 1; "
                f"pass a bound of the query tokens per sequence"
            )
        return out_shape[0], max_seqlen_q, out_shape[1]
    if max_seqlen_q:
        raise ValueError(
            f"mla_decode: max_seqlen_q {max_seqlen_q} without cu_seqlens_q; leave it out, q has s_q tokens"
        )
    if out_shape[1] < 1:
        raise ValueError("mla_decode: q has s_q 0, at least 1; skip the call when there is no new token")
    return out_shape[0], out_shape[1], out_shape[2]


def _check_k_cache(k_cache: Tensor, dtype: torch.dtype, device: torch.device) -> int:
    """Returns h_kv."""
    if k_cache.dtype != dtype:
        raise TypeError(f"mla_decode: k_cache dtype {k_cache.dtype}, q has {dtype}; cast one of them")
    if k_cache.device != device:
        raise ValueError(f"mla_decode: k_cache on {k_cache.device}, q on {device}; move all arguments to one device")
    shape = k_cache.shape
    if len(shape) != 4:
        raise ValueError(
            f"mla_decode: k_cache shape {tuple(shape)}, (num_pages, page, h_kv, {HEAD_DIM}); "
            f"a cache without a head dimension needs unsqueeze(2)"
        )
    pages, page, h_kv, head_dim = shape
    if head_dim != HEAD_DIM:
        raise ValueError(
            f"mla_decode: k_cache head_dim {head_dim}, supported {HEAD_DIM}; store 512 NoPE + 64 RoPE columns"
        )
    if page not in PAGE_SIZES:
        raise ValueError(
            f"mla_decode: k_cache page size {page}, supported 16|32|64|128; allocate the cache with 64-token pages"
        )
    if pages < 1:
        raise ValueError("mla_decode: k_cache has no pages, at least 1; allocate the cache first")
    strides = k_cache.stride()
    if strides[3] != 1 or strides[0] % 8 or strides[1] % 8 or strides[2] % 8:
        raise ValueError(
            f"mla_decode: k_cache strides {strides}, the last 1 and the others multiples of 8 elements; "
            f"pad the rows of the cache to a multiple of 8 or call k_cache.contiguous()"
        )
    return h_kv


def _check_heads(op: str, h_q: int, h_kv: int) -> None:
    if not 1 <= h_q <= MAX_HEADS:
        raise ValueError(f"{op}: h_q {h_q}, supported 1..{MAX_HEADS}; call once per group of {MAX_HEADS} heads")
    if h_kv < 1 or h_q % h_kv:
        raise ValueError(f"{op}: h_kv {h_kv} does not divide h_q {h_q}; every kv head serves equally many query heads")


def _check_split_tokens(op: str, split_tokens: int) -> None:
    if not 0 <= split_tokens <= MAX_SPLIT_TOKENS or split_tokens % BLOCK:
        raise ValueError(
            f"{op}: split_tokens {split_tokens}, 0 or a multiple of {BLOCK} up to {MAX_SPLIT_TOKENS}; "
            f"0 leaves the cuts to the planner"
        )


def _check_tensor(
    op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """A contiguous tensor of known dtype, shape and device."""
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name} dtype {tensor.dtype}, supported {dtype}; call {name}.to({dtype})")
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} shape {tuple(tensor.shape)}, {shape} expected from the other arguments; fix it")
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} strides {tensor.stride()}, supported contiguous; call {name}.contiguous()")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} on {tensor.device}, q on {device}; move all arguments to one device")


def _check_block_table(table: Tensor, b: int, device: torch.device) -> None:
    if table.dtype != INT32:
        raise TypeError(f"mla_decode: block_table dtype {table.dtype}, supported torch.int32; call .to(torch.int32)")
    shape = table.shape
    if len(shape) != 2 or shape[0] != b:
        raise ValueError(f"mla_decode: block_table shape {tuple(shape)}, ({b}, max_pages); pass one row per sequence")
    if table.stride()[1] != 1 and shape[1] > 1:
        raise ValueError(
            f"mla_decode: block_table strides {table.stride()}, supported 1 in the last dimension; "
            f"call block_table.contiguous()"
        )
    if table.device != device:
        raise ValueError(f"mla_decode: block_table on {table.device}, q on {device}; move all arguments to one device")


def _check_metadata(metadata: Tensor, most: int, device: torch.device) -> None:
    partitions = metadata.shape[0] if metadata.dim() == 2 else 0
    _check_tensor("mla_decode", "tile_scheduler_metadata", metadata, INT32, (partitions, METADATA_COLUMNS), device)
    if not 1 <= partitions <= most:
        # Fewer partitions than fit are legal: a plan for fewer SMs leaves room for other work on the GPU.
        raise ValueError(
            f"mla_decode: tile_scheduler_metadata has {partitions} partitions, 1..{most} for these shapes and GPU; "
            f"call mla_plan with this s_q, h_q, h_kv and the GPU's num_sms"
        )


def validate_values(
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
) -> None:
    """Debug mode: check_decode, then the values that the kernels trust. Copies to the host, so it waits for the GPU."""
    check_decode(
        q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, softmax_scale, causal, attn_sink,
        cu_seqlens_q, max_seqlen_q, split_tokens, empty_lse_neg_inf,
    )  # fmt: skip
    num_pages, page, h_kv, _ = k_cache.shape
    capacity = block_table.shape[1] * page
    table = block_table.cpu()
    for i, length in enumerate(cache_seqlens.tolist()):
        if not 0 <= length <= capacity:
            raise ValueError(
                f"mla_decode: cache_seqlens[{i}] is {length}, 0..{capacity} with {block_table.shape[1]} block table "
                f"entries of {page} tokens; pass a wider block table or a correct length"
            )
        used = table[i, : -(-length // page)]
        wrong = used[(used < 0) | (used >= num_pages)].tolist()
        if wrong:
            raise ValueError(
                f"mla_decode: block_table[{i}] holds page {wrong[0]}, the cache has {num_pages}; fix the table"
            )
    if cu_seqlens_q is not None:
        _validate_ragged(cu_seqlens_q.tolist(), q.shape[0], max_seqlen_q)
    s_q, h_q = (q.shape[1], q.shape[2]) if cu_seqlens_q is None else (max_seqlen_q, q.shape[1])
    partitions = tile_scheduler_metadata.shape[0]
    expected = plan_tensors(cache_seqlens.tolist(), partitions, s_q * (h_q // h_kv), split_tokens, h_kv)
    if not (torch.equal(expected[0], tile_scheduler_metadata.cpu()) and torch.equal(expected[1], num_splits.cpu())):
        raise ValueError(
            "mla_decode: tile_scheduler_metadata and num_splits belong to other lengths, shapes or split_tokens; "
            "call mla_plan again after cache_seqlens changed"
        )


def _validate_ragged(starts: list[int], total_q: int, max_seqlen_q: int) -> None:
    if starts[0] != 0 or starts[-1] > total_q:
        raise ValueError(
            f"mla_decode: cu_seqlens_q runs from {starts[0]} to {starts[-1]}, 0..{total_q}; pass a prefix sum"
        )
    for i, (begin, end) in enumerate(pairwise(starts)):
        if not 0 <= end - begin <= max_seqlen_q:
            raise ValueError(
                f"mla_decode: cu_seqlens_q gives sequence {i} {end - begin} query tokens, 0..{max_seqlen_q}; "
                f"raise max_seqlen_q"
            )
