"""MLA decode attention over a paged cache in plain fp32 torch: the specification, and the CPU implementation of the op.

For query token t of a sequence with s query tokens and n cached tokens, and every head h of kv head g:

    score[j] = softmax_scale * (q[t, h] . k[j, g])        j < n, or j < n - (s - 1 - t) when causal
    lse      = ln sum_j exp(score[j])
    out      = sum_j exp(score[j] - lse) * k[j, g, :512]  * exp(lse) / (exp(lse) + exp(attn_sink[h]))

A token that sees no key has out = 0 and lse = +inf (-inf if asked for, the neutral element when ranks merge).
Source of behaviour: FlashMLA's dense decode; sinks, ragged queries and other page sizes are additions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HEAD_DIM = 576  # columns of q and of a cached token: 512 NoPE, 64 RoPE
HEAD_DIM_V = 512  # V is the first 512 columns of K


def mla_decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    softmax_scale: float,
    causal: bool = False,
    attn_sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    empty_lse_neg_inf: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of the new tokens of every sequence over its cached tokens, on any device.

    q: (b, s_q, h_q, 576), or (total_q, h_q, 576) with cu_seqlens_q.
    k_cache: (num_pages, page, h_kv, 576); query head h reads kv head h // (h_q / h_kv).
    block_table: int32 (b, max_pages), page ids in order; entries past ceil(length / page) are never read.
    cache_seqlens: int32 (b,), cached tokens per sequence; rows of the cache past them are never used.
    attn_sink: float32 (h_q,).  cu_seqlens_q: int32 (b + 1,), sequence i owns rows [cu[i], cu[i + 1]) of q.

    Returns out, as q but with 512 columns, and lse float32 (b, h_q, s_q), ragged (h_q, total_q).
    Rows of a ragged q that belong to no sequence give out 0 and lse +inf (or -inf).
    ValueError if a sequence is longer than its row of the block table.
    """
    page = k_cache.shape[1]
    rows = q if cu_seqlens_q is not None else q.flatten(0, 1)
    out = torch.zeros((*rows.shape[:-1], HEAD_DIM_V), dtype=q.dtype, device=q.device)
    lse = torch.full(rows.shape[:-1], -math.inf, device=q.device)
    lengths = cache_seqlens.tolist()
    starts = cu_seqlens_q.tolist() if cu_seqlens_q is not None else range(0, rows.shape[0] + 1, q.shape[1])
    for i, length in enumerate(lengths):
        if length > block_table.shape[1] * page:
            raise ValueError(
                f"mla_decode: cache_seqlens[{i}] is {length}, the block table holds {block_table.shape[1]} pages of "
                f"{page} tokens; pass a block table with at least {-(-length // page)} columns"
            )
        own = slice(starts[i], starts[i + 1])
        if length > 0 and own.start < own.stop:
            pages = block_table[i, : -(-length // page)].long()
            keys = k_cache[pages].flatten(0, 1)[:length]
            out[own], lse[own] = _attend(rows[own], keys, softmax_scale, causal, attn_sink)
    if not empty_lse_neg_inf:
        lse = torch.where(lse == -math.inf, math.inf, lse)
    if cu_seqlens_q is not None:
        return out, lse.t().contiguous()
    return out.view(*q.shape[:-1], HEAD_DIM_V), lse.view(q.shape[:-1]).transpose(1, 2).contiguous()


def _attend(q: Tensor, k: Tensor, scale: float, causal: bool, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """One sequence: q (s, h_q, 576), k (n, h_kv, 576). Returns fp32 (s, h_q, 512) and (s, h_q), -inf for no key."""
    (s, h_q, _), (n, h_kv, _) = q.shape, k.shape
    k = k.float().transpose(0, 1)
    grouped = q.float().view(s, h_kv, h_q // h_kv, HEAD_DIM).transpose(0, 1).flatten(1, 2)
    scores = (grouped @ k.transpose(1, 2)).mul_(scale).view(h_kv, s, h_q // h_kv, n)
    if causal:
        visible = n - (s - 1) + torch.arange(s, device=q.device)
        hidden = torch.arange(n, device=q.device) >= visible[:, None]
        scores.masked_fill_(hidden[None, :, None, :], -math.inf)
    lse = scores.logsumexp(-1)
    empty = lse == -math.inf
    weights = scores.sub_(torch.where(empty, 0.0, lse)[..., None]).exp_()
    out = (weights.flatten(1, 2) @ k[..., :HEAD_DIM_V]).view(h_kv, s, h_q // h_kv, HEAD_DIM_V)
    out, lse = out.transpose(0, 1).flatten(1, 2), lse.transpose(0, 1).flatten(1, 2)
    if sink is not None:
        share = torch.sigmoid(lse - sink)
        out *= torch.where(lse == -math.inf, 0.0, share)[..., None]
    return out, lse
