"""Dense MLA decode for people: FlashMLA's two functions with this package's options. Thin: no state, no caching."""

from __future__ import annotations

import torch
from torch import Tensor

from cutehop.ops._mla_checks import count_sms, output_shapes, validate_values
from cutehop.ref.mla import HEAD_DIM, HEAD_DIM_V


def get_mla_metadata(
    cache_seqlens: Tensor,
    num_q_tokens_per_head_k: int,
    num_heads_k: int,
    num_heads_q: int | None = None,
    *,
    num_sms: int | None = None,
    split_tokens: int = 0,
) -> tuple[Tensor, Tensor]:
    """Plan a decode step: how the cached tokens of a batch are dealt to the SMs. Runs on the device, without a sync.

    Valid as long as the values of cache_seqlens are, that is for all layers of one decode step. Capturable.

    cache_seqlens: int32 (b,), cached tokens per sequence.
    num_q_tokens_per_head_k: s_q * h_q / h_kv (with cu_seqlens_q: max_seqlen_q * h_q / h_kv).
    num_heads_k: h_kv.  num_heads_q: h_q, used to check the other two; may be left out.
    num_sms: SMs the call may fill, by default all of the device.
    split_tokens: 0, or cut every sequence each so many tokens (a multiple of 64), which makes a sequence's result
        independent of the rest of the batch; pass the same value to flash_mla_with_kvcache.

    Returns (tile_scheduler_metadata int32 (partitions, 8), num_splits int32 (b + 1,)).
    ValueError or TypeError for arguments outside these limits.
    """
    if num_heads_q is not None and (
        num_heads_q % num_heads_k or num_q_tokens_per_head_k % (num_heads_q // num_heads_k)
    ):
        raise ValueError(
            f"get_mla_metadata: num_q_tokens_per_head_k {num_q_tokens_per_head_k}, a multiple of num_heads_q / "
            f"num_heads_k = {num_heads_q} / {num_heads_k}; pass s_q * h_q // h_kv"
        )
    sms = count_sms(cache_seqlens.device) if num_sms is None else num_sms
    # The planner only needs the number of rows per kv head, so each row may pass for a query token with one head.
    return torch.ops.cutehop.mla_plan(
        cache_seqlens, num_q_tokens_per_head_k, num_heads_k, num_heads_k, sms, split_tokens
    )


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: Tensor,
    num_splits: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    attn_sink: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    split_tokens: int = 0,
    empty_lse_neg_inf: bool = False,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """MLA decode attention over a paged cache; shapes and limits of every tensor are those of `cutehop.ops.mla`.

    q (b, s_q, h_q, 576) bf16 | fp16, or (total_q, h_q, 576) with cu_seqlens_q and max_seqlen_q;
    k_cache (num_pages, page, h_kv, 576); block_table int32 (b, max_pages); cache_seqlens int32 (b,); head_dim_v 512;
    tile_scheduler_metadata, num_splits: the plan of get_mla_metadata.
    softmax_scale: by default 576**-0.5.  causal: bottom-right aligned.  attn_sink: float32 (h_q,).
    out, lse: contiguous tensors to write into; the one that is left out is allocated.
    split_tokens: the value given to get_mla_metadata.
    empty_lse_neg_inf: tokens that see no key get lse -inf (for merging across ranks) instead of FlashMLA's +inf.
    validate: check values too: lengths, page ids, cu_seqlens_q, and that the plan belongs to them. Waits for the GPU.

    Returns out (b, s_q, h_q, 512) in q's dtype and lse float32 (b, h_q, s_q), natural logarithm;
    ragged: (total_q, h_q, 512) and (h_q, total_q).
    ValueError or TypeError with value, limit and cure.
    """
    if head_dim_v != HEAD_DIM_V:
        raise ValueError(
            f"flash_mla_with_kvcache: head_dim_v {head_dim_v}, supported {HEAD_DIM_V}; V is K's first 512 columns"
        )
    ragged = cu_seqlens_q is not None
    # By position: the dispatcher takes half as long for that as for keywords.
    arguments = (
        q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits,
        HEAD_DIM**-0.5 if softmax_scale is None else softmax_scale, causal, attn_sink, cu_seqlens_q, max_seqlen_q or 0,
        split_tokens, empty_lse_neg_inf,
    )  # fmt: skip
    if validate:
        validate_values(*arguments)
    if out is None and lse is None:
        return torch.ops.cutehop.mla_decode(*arguments)
    out_shape, lse_shape = output_shapes(q, ragged)
    if out is None:
        out = q.new_empty(out_shape)
    if lse is None:
        lse = q.new_empty(lse_shape, dtype=torch.float32)
    torch.ops.cutehop.mla_decode_out(*arguments, out=out, lse=lse)
    return out, lse
