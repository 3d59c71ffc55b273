"""A paged cache of MLA latents for several sequences and layers, and the tensors that one decode step shares.

State is changed on the host by `append` and `release`; `plan_step` is a pure function of device tensors that keep their
addresses. So a captured CUDA graph holds `plan_step` and the layers, and `append` runs between replays.

Page 0 belongs to nobody: rows that a step computes but no sequence owns (idle sequences, left padding) are written
there, which keeps a step's shapes static without a branch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cutehop.mla import get_mla_metadata
from cutehop.ref.mla import HEAD_DIM


class OutOfPagesError(ValueError):
    """The cache has too few free pages for the tokens asked for; nothing was changed."""


@dataclass(frozen=True)
class MlaStep:
    """What all MLA layers of one forward pass share; b sequences, s_q tokens each, the newest token last.

    positions: (b, s_q) int64, position of each token in its sequence, for the rotary embedding. Padding has 0.
    rows: (b * s_q,) int64, row of `pages[layer].view(-1, 576)` that each token's latent goes to.
    block_table: (b, max_pages) int32. cache_seqlens: (b,) int32, lengths including this step's tokens.
    tile_scheduler_metadata, num_splits: what `mla_plan` made of them.
    """

    positions: Tensor
    rows: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    tile_scheduler_metadata: Tensor
    num_splits: Tensor


class PagedMlaCache:
    """Latent rows (512 NoPE after kv_a_layernorm, then 64 RoPE after rotation) of up to `max_seqs` sequences.

    num_layers: layers that share one block table, each with its own pages.
    num_pages: pages per layer; one of them is the spare page 0, so `num_pages - 1` can be handed out.
    max_seqs: sequences, addressed by 0 .. max_seqs-1.
    max_seq_tokens: limit of one sequence, sets the block table's width.
    page_size: tokens per page, whatever `mla_decode` supports.
    dtype: dtype of the model's activations. device: where pages and tables live.

    pages: (num_layers, num_pages, page_size, 1, 576); a layer's `k_cache` argument is `pages[layer]`.
    Sizes below 1 (2 for num_pages) raise ValueError. Not thread-safe.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        max_seqs: int,
        max_seq_tokens: int,
        *,
        page_size: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {
            "num_layers": num_layers,
            "max_seqs": max_seqs,
            "max_seq_tokens": max_seq_tokens,
            "page_size": page_size,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"PagedMlaCache: {name} {value}, must be at least 1")
        if num_pages < 2:
            raise ValueError(f"PagedMlaCache: num_pages {num_pages}, must be at least 2; page 0 is never handed out")
        self.page_size = page_size
        self.max_seq_tokens = max_seq_tokens
        self.pages = torch.empty(num_layers, num_pages, page_size, 1, HEAD_DIM, dtype=dtype, device=device)
        self._free = list(range(num_pages - 1, 0, -1))  # a stack: pages just released are still warm in L2
        self._owned: list[list[int]] = [[] for _ in range(max_seqs)]
        # The host copies are the truth, `append` and `release` bring them to the device.
        self._host_table = torch.zeros(max_seqs, -(-max_seq_tokens // page_size), dtype=torch.int32)
        self._host_state = torch.zeros(2, max_seqs, dtype=torch.int32)  # lengths, tokens of the current step
        self._table = self._host_table.to(self.pages.device, copy=True)
        self._state = self._host_state.to(self.pages.device, copy=True)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, from the host's copy; no synchronisation."""
        return self._host_state[0].tolist()

    @property
    def num_free_pages(self) -> int:
        """Pages that can still be handed out."""
        return len(self._free)

    def append(self, tokens: Mapping[int, int]) -> None:
        """Make room for the next step: sequence -> how many tokens it gains. The others gain none.

        Takes pages where needed and moves lengths and block table to the device, on the current stream. The step that
        follows writes exactly these tokens. Raises ValueError for a sequence that does not exist, a count below 1 or
        one past max_seq_tokens, OutOfPagesError if pages run out; all before anything changes.
        """
        lengths = self.lengths
        needed: dict[int, int] = {}
        for seq, count in tokens.items():
            self._check_seq(seq)
            if count < 1:
                raise ValueError(f"PagedMlaCache.append: {count} tokens for sequence {seq}, must be at least 1")
            if lengths[seq] + count > self.max_seq_tokens:
                raise ValueError(
                    f"PagedMlaCache.append: sequence {seq} would have {lengths[seq] + count} tokens, "
                    f"max_seq_tokens is {self.max_seq_tokens}; create the cache with more"
                )
            needed[seq] = -(-(lengths[seq] + count) // self.page_size) - len(self._owned[seq])
        if sum(needed.values()) > len(self._free):
            raise OutOfPagesError(
                f"PagedMlaCache.append: {sum(needed.values())} pages needed, {len(self._free)} free; "
                "release a sequence or create the cache with more pages"
            )
        self._host_state[1] = 0
        for seq, count in tokens.items():
            for _ in range(needed[seq]):
                page = self._free.pop()
                self._host_table[seq, len(self._owned[seq])] = page
                self._owned[seq].append(page)
            self._host_state[0, seq] += count
            self._host_state[1, seq] = count
        self._upload(table=any(needed.values()))

    def release(self, seq: int) -> None:
        """Forget a sequence: its length becomes 0, its pages can be handed out again. An empty one may be released."""
        self._check_seq(seq)
        self._free.extend(reversed(self._owned[seq]))
        self._owned[seq].clear()
        self._host_state[:, seq] = 0
        self._upload(table=False)  # the op reads no table entry past a sequence's length

    def plan_step(self, num_heads: int, tokens: int = 1, seqs: Sequence[int] | None = None) -> MlaStep:
        """The step that the last `append` prepared, with one planner call for all layers.

        num_heads: query heads of a layer.
        tokens: s_q, at least the largest count given to `append`. A sequence that gains fewer has its tokens last (left
            padding); what the padding computes is to be ignored.
        seqs: the sequences in the batch, in this order; default all.
        Only device work, no synchronisation; with seqs=None it can be captured into a CUDA graph.
        ValueError if the step leaves out tokens that `append` counted: their latents would never be written.
        """
        for seq, count in enumerate(self._host_state[1].tolist()):
            if count > tokens or (count and seqs is not None and seq not in seqs):
                raise ValueError(
                    f"PagedMlaCache.plan_step: sequence {seq} gained {count} tokens, the step has {tokens} for "
                    f"sequences {'all' if seqs is None else list(seqs)}; plan the step for what was appended"
                )
        table, state = self._table, self._state
        if seqs is not None:
            index = torch.tensor(seqs, dtype=torch.int64, device=table.device)
            table, state = table[index], state[:, index]
        lengths, gained = state
        slot = torch.arange(tokens, device=table.device) - tokens  # -tokens .. -1, counted from the sequence's end
        positions = (lengths[:, None] + slot).clamp_(min=0)
        page = table.gather(1, positions // self.page_size)
        rows = page.long() * self.page_size + positions % self.page_size
        rows = torch.where(slot >= -gained[:, None], rows, 0)
        metadata, num_splits = get_mla_metadata(lengths, tokens * num_heads, 1)
        return MlaStep(positions, rows.flatten(), table, lengths, metadata, num_splits)

    def write(self, layer: int, step: MlaStep, latents: Tensor) -> None:
        """Store a step's latents (b, s_q, 576) of one layer in their pages."""
        if latents.dtype != self.pages.dtype:
            raise TypeError(
                f"PagedMlaCache.write: latents are {latents.dtype}, pages {self.pages.dtype}; "
                "create the cache with the model's dtype"
            )
        self.pages[layer].view(-1, HEAD_DIM).index_copy_(0, step.rows, latents.reshape(-1, HEAD_DIM))

    def _check_seq(self, seq: int) -> None:
        if not 0 <= seq < len(self._owned):
            raise ValueError(f"PagedMlaCache: sequence {seq}, valid 0..{len(self._owned) - 1}; see max_seqs")

    def _upload(self, *, table: bool) -> None:
        # From pageable memory the driver has read the source when the call returns, so the host may change it at once.
        self._state.copy_(self._host_state, non_blocking=True)
        if table:
            self._table.copy_(self._host_table, non_blocking=True)
