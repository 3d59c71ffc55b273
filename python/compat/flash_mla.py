"""FlashMLA's names and argument order for its dense decode path: `import cutehop.compat.flash_mla as flash_mla`.

FlashMLA has had two planner forms, both work here:

    metadata, num_splits = get_mla_metadata(cache_seqlens, s_q * h_q // h_kv, h_kv)   two tensors (older releases)
    sched_meta, _ = get_mla_metadata()                                                an object, planned on first use

Today's FlashMLA ignores the arguments of get_mla_metadata and always returns the object. Callers that still pass them
get tensors here, and may then drop num_splits: the plan is made again in that case.
Beyond FlashMLA: attn_sink and pages of 16, 32 and 128 tokens on the dense path. Sparse and FP8 arguments raise.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

from torch import Tensor

from cutehop import mla
from cutehop.ref.mla import HEAD_DIM_V

__all__ = [
    "FlashMLASchedMeta",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]


@dataclasses.dataclass
class FlashMLASchedMeta:
    """A plan that the first attention call makes and later calls reuse.

    Reuse is legal while the shapes (checked) and the values of cache_seqlens (not checked) stay the same: one object
    per decode step, shared by its layers.
    """

    @dataclasses.dataclass
    class Config:
        """Shapes and options of the call that made the plan."""

        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int
        causal: bool
        is_fp8_kvcache: bool
        topk: int | None
        extra_page_block_size: int | None
        extra_topk: int | None

    have_initialized: bool = False
    config: Config | None = None
    tile_scheduler_metadata: Tensor | None = None
    num_splits: Tensor | None = None


def get_mla_metadata(
    cache_seqlens: Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[Tensor | FlashMLASchedMeta, Tensor | None]:
    """Plan for flash_mla_with_kvcache.

    With cache_seqlens (int32 (b,)), num_q_tokens_per_head_k (s_q * h_q / h_kv) and num_heads_k: the tensors
    (tile_scheduler_metadata int32 (partitions, 8), num_splits int32 (b + 1,)). Otherwise (FlashMLASchedMeta(), None).
    NotImplementedError for is_fp8_kvcache or topk.
    """
    _refuse_sparse(is_fp8_kvcache=is_fp8_kvcache, topk=topk)
    if cache_seqlens is None or num_q_tokens_per_head_k is None or num_heads_k is None:
        return FlashMLASchedMeta(), None
    return mla.get_mla_metadata(cache_seqlens, num_q_tokens_per_head_k, num_heads_k, num_heads_q)


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | Tensor,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense decode. Tensors and limits are those of cutehop.flash_mla_with_kvcache; returns (out, lse).

    tile_scheduler_metadata, num_splits: either pair of get_mla_metadata.
    NotImplementedError for sparse or FP8 arguments; ValueError for a FlashMLASchedMeta of another call.
    """
    _refuse_sparse(
        is_fp8_kvcache=is_fp8_kvcache,
        indices=indices,
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices_in_kvcache,
        topk_length=topk_length,
        extra_topk_length=extra_topk_length,
    )
    if block_table is None or cache_seqlens is None:
        raise ValueError(
            "flash_mla_with_kvcache: block_table or cache_seqlens is None, both needed for dense attention; pass them"
        )
    if isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
        if num_splits is not None:
            raise ValueError("flash_mla_with_kvcache: num_splits with a FlashMLASchedMeta, None expected; leave it out")
        plan = _plan_once(tile_scheduler_metadata, q, k_cache, cache_seqlens, causal)
    elif num_splits is None:
        plan = _plan(q, k_cache, cache_seqlens)
    else:
        plan = tile_scheduler_metadata, num_splits
    return mla.flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, head_dim_v, *plan, softmax_scale, causal, attn_sink=attn_sink
    )


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = HEAD_DIM_V,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> NoReturn:
    """FlashMLA's sparse prefill. NotImplementedError."""
    raise NotImplementedError("flash_mla_sparse_fwd: sparse prefill is not available in cutehop; use FlashMLA for it")


def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> NoReturn:
    """FlashMLA's dense prefill for SM100. NotImplementedError."""
    raise NotImplementedError(
        "flash_attn_varlen_func: prefill is not part of cutehop; use flash-attention for it on SM90"
    )


flash_attn_varlen_qkvpacked_func = flash_attn_varlen_kvpacked_func = flash_attn_varlen_func


def _plan(q: Tensor, k_cache: Tensor, cache_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    h_q, h_k = q.shape[2], k_cache.shape[2]
    return mla.get_mla_metadata(cache_seqlens, q.shape[1] * h_q // h_k, h_k, h_q)


def _plan_once(
    meta: FlashMLASchedMeta, q: Tensor, k_cache: Tensor, cache_seqlens: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """The plan in `meta`, made now if there is none."""
    b, s_q, h_q, _ = q.shape
    config = meta.Config(b, s_q, h_q, k_cache.shape[1], k_cache.shape[2], causal, False, None, None, None)
    if not meta.have_initialized:
        meta.tile_scheduler_metadata, meta.num_splits = _plan(q, k_cache, cache_seqlens)
        meta.config, meta.have_initialized = config, True
    elif meta.config != config:
        raise ValueError(
            f"flash_mla_with_kvcache: tile_scheduler_metadata was planned for {meta.config}, this call is {config}; "
            "take a new one from get_mla_metadata()"
        )
    assert meta.tile_scheduler_metadata is not None
    assert meta.num_splits is not None
    return meta.tile_scheduler_metadata, meta.num_splits


def _refuse_sparse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{name}: sparse and FP8 attention are not available in cutehop; leave it out")
