"""Multi-head latent attention with absorbed projections over a paged cache of latents.

The published form projects the cached latent c (512) up to keys and values of each head. The projections are linear, so
    score = (q_nope W_UK) . c + q_rope . k_rope        and        out = (softmax(score) c) W_UV
give the same result with keys and values that all heads share: one row of 512 + 64 numbers per token (section 2.1.2 of
the DeepSeek-V2 paper). That row is what `cutehop::mla_decode` reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cutehop.layers.mla_cache import MlaStep, PagedMlaCache
from cutehop.ref.mla import HEAD_DIM, HEAD_DIM_V

LATENT_DIM = HEAD_DIM_V
ROPE_DIM = HEAD_DIM - HEAD_DIM_V


class MlaDecode(nn.Module):
    """MLA for prefill chunks and decode steps: writes the new tokens' latents, then attends to the whole sequence.

    The projections are modules of an existing attention, shared and not copied: weights may be loaded or moved later.
    query: hidden to num_heads * (qk_nope_head_dim + 64); q_proj, or q_a_proj, its norm and q_b_proj in turn.
    kv_a_proj: hidden to 512 latent + 64 rope. kv_a_layernorm: over the 512, applied before caching.
    kv_b_proj: 512 to num_heads * (qk_nope_head_dim + v_head_dim), no bias. o_proj: num_heads * v_head_dim to hidden.
    softmax_scale: factor on the scores, yarn's mscale included.
    rope_interleave: rotary pairs are (0, 1), (2, 3), ... in the projections' outputs instead of (0, 32), (1, 33), ...
    ValueError for a latent other than 512 + 64 and for sizes that do not fit together.
    """

    def __init__(
        self,
        query: nn.Module,
        kv_a_proj: nn.Linear,
        kv_a_layernorm: nn.Module,
        kv_b_proj: nn.Linear,
        o_proj: nn.Linear,
        *,
        num_heads: int,
        v_head_dim: int,
        softmax_scale: float,
        rope_interleave: bool = True,
    ) -> None:
        super().__init__()
        if kv_b_proj.in_features != LATENT_DIM or kv_a_proj.out_features != HEAD_DIM:
            raise ValueError(
                f"MlaDecode: latent {kv_b_proj.in_features} of {kv_a_proj.out_features} cached values per token, "
                f"supported {LATENT_DIM} of {HEAD_DIM}; use kv_lora_rank 512 and qk_rope_head_dim 64"
            )
        if kv_b_proj.out_features % num_heads or kv_b_proj.out_features <= num_heads * v_head_dim:
            raise ValueError(
                f"MlaDecode: kv_b_proj gives {kv_b_proj.out_features} values for {num_heads} heads with v_head_dim "
                f"{v_head_dim}; must be num_heads * (qk_nope_head_dim + v_head_dim)"
            )
        if o_proj.in_features != num_heads * v_head_dim:
            raise ValueError(f"MlaDecode: o_proj takes {o_proj.in_features} values, must be {num_heads} * {v_head_dim}")
        self.query = query
        self.kv_a_proj = kv_a_proj
        self.kv_a_layernorm = kv_a_layernorm
        self.kv_b_proj = kv_b_proj
        self.o_proj = o_proj
        self.num_heads = num_heads
        self.v_head_dim = v_head_dim
        self.qk_nope_head_dim = kv_b_proj.out_features // num_heads - v_head_dim
        self.softmax_scale = softmax_scale
        self.rope_interleave = rope_interleave

    @classmethod
    def from_attention(cls, attention: nn.Module) -> MlaDecode:
        """Share the weights of a transformers `DeepseekV3Attention` (or one with its attributes).

        Reads q_proj or q_a_proj, q_a_layernorm, q_b_proj; kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj, o_proj;
        num_heads, v_head_dim, scaling (which holds yarn's mscale) and config.rope_interleave.
        """
        a: Any = attention
        low_rank = a.q_proj is None
        return cls(
            nn.Sequential(a.q_a_proj, a.q_a_layernorm, a.q_b_proj) if low_rank else a.q_proj,
            a.kv_a_proj_with_mqa,
            a.kv_a_layernorm,
            a.kv_b_proj,
            a.o_proj,
            num_heads=a.num_heads,
            v_head_dim=a.v_head_dim,
            softmax_scale=a.scaling,
            rope_interleave=a.config.rope_interleave,
        )

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: PagedMlaCache, layer: int, step: MlaStep
    ) -> Tensor:
        """Attention output (b, s_q, hidden) of the tokens that `step` describes; their latents are in the cache then.

        hidden: (b, s_q, hidden), the cache's dtype. layer: index into the cache. step: from `cache.plan_step`.
        cos, sin: (b or 1, s_q, 64) at `step.positions`, the second half repeating the first, yarn's factor applied.
        """
        b, s_q = hidden.shape[:2]
        cos, sin = cos[..., : ROPE_DIM // 2], sin[..., : ROPE_DIM // 2]

        latent, k_rope = self.kv_a_proj(hidden).split([LATENT_DIM, ROPE_DIM], dim=-1)
        cache.write(layer, step, torch.cat([self.kv_a_layernorm(latent), self._rotate(k_rope, cos, sin)], dim=-1))

        q = self.query(hidden).view(b, s_q, self.num_heads, self.qk_nope_head_dim + ROPE_DIM)
        q_nope, q_rope = q.split([self.qk_nope_head_dim, ROPE_DIM], dim=-1)
        up = self.kv_b_proj.weight.view(self.num_heads, -1, LATENT_DIM)
        w_uk, w_uv = up.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        q_latent = torch.einsum("bshd,hdc->bshc", q_nope, w_uk)
        q_rope = self._rotate(q_rope, cos.unsqueeze(2), sin.unsqueeze(2))

        out, _ = torch.ops.cutehop.mla_decode(
            torch.cat([q_latent, q_rope], dim=-1),
            cache.pages[layer],
            step.block_table,
            step.cache_seqlens,
            step.tile_scheduler_metadata,
            step.num_splits,
            softmax_scale=self.softmax_scale,
            causal=s_q > 1,
        )
        return self.o_proj(torch.einsum("bshc,hvc->bshv", out, w_uv).flatten(2))

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # Interleaved pairs come out as two halves. Queries and keys are permuted alike, so the scores do not change.
        first, second = (x[..., 0::2], x[..., 1::2]) if self.rope_interleave else x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
