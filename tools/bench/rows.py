"""The rows of the MLA decode benchmark, what they cost, and their inputs. All rows: page 64, h_kv 1, d 576, dv 512."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

PAGE = 64  # tokens per page, the only page size every peer supports
HEAD_DIM = 576
HEAD_DIM_V = 512
SOFTMAX_SCALE = HEAD_DIM**-0.5
ELEMENT_BYTES = 2  # bf16 and fp16


@dataclass(frozen=True)
class Row:
    """One shape. s_k: every sequence's length, or the lengths' mean if varlen. limit_us: the project's goal, if any."""

    b: int
    s_q: int
    s_k: int
    h_q: int
    varlen: bool = False
    causal: bool = False
    limit_us: float | None = None

    @property
    def name(self) -> str:
        """For people and for --rows: b128-sq1-sk8192-hq128-varlen."""
        tags = ("-varlen" if self.varlen else "") + ("-causal" if self.causal else "")
        return f"b{self.b}-sq{self.s_q}-sk{self.s_k}-hq{self.h_q}{tags}"

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Cached tokens per sequence. varlen: max(normal(s_k, s_k / 2), s_q), seed 0, FlashMLA's distribution."""
        if not self.varlen:
            return (self.s_k,) * self.b
        generator = random.Random(0)
        return tuple(int(max(generator.normalvariate(self.s_k, self.s_k / 2), self.s_q)) for _ in range(self.b))

    @property
    def flops(self) -> int:
        """QK and PV of every cached token; a causal mask takes nothing off, as FlashMLA and FA3 count."""
        return 2 * self.s_q * self.h_q * sum(self.lengths) * (HEAD_DIM + HEAD_DIM_V)

    @property
    def bytes(self) -> int:
        """K, Q and O once each; partial results, lengths and the block table are not counted."""
        queries = self.b * self.s_q * self.h_q
        return ELEMENT_BYTES * (sum(self.lengths) * HEAD_DIM + queries * (HEAD_DIM + HEAD_DIM_V))


def _heads(b: int, s_k: int, limits: Sequence[float | None] = (None, None, None)) -> list[Row]:
    return [Row(b, 1, s_k, h_q, limit_us=limit) for h_q, limit in zip((16, 64, 128), limits)]


ROWS: tuple[Row, ...] = (
    *_heads(1, 1024),
    *_heads(4, 1024),
    *_heads(32, 1024),
    *_heads(128, 1024),
    *_heads(1, 4096, (18, 18, 18)),
    *_heads(16, 4096, (38, 42, 46)),
    *_heads(64, 4096, (116, 122, 130)),
    *_heads(128, 4096, (212, 215, 250)),
    Row(1, 1, 65536, 128, limit_us=50),
    Row(4, 1, 65536, 128),
    Row(128, 1, 8192, 128, varlen=True, limit_us=490),
    Row(128, 2, 8192, 128, varlen=True, limit_us=876),
    Row(128, 2, 8192, 128, varlen=True, causal=True),
    Row(64, 4, 4096, 16, causal=True),
    Row(32, 1, 32768, 128, varlen=True),
)


def select(pattern: str) -> tuple[Row, ...]:
    """Rows of ROWS whose name matches the regular expression. ValueError if none does."""
    rows = tuple(row for row in ROWS if re.search(pattern, row.name))
    if not rows:
        raise ValueError(f"--rows {pattern!r} matches none of the {len(ROWS)} rows; names look like {ROWS[0].name}")
    return rows


@dataclass(frozen=True)
class Inputs:
    """Of one call: q (b, s_q, h_q, 576), k_cache (pages, 64, 1, 576), int32 block_table (b, n), cache_seqlens (b,)."""

    q: Tensor
    k_cache: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    causal: bool

    @property
    def max_len(self) -> int:
        """Tokens the block table has room for per sequence: known to the host without reading the lengths."""
        return self.block_table.shape[1] * PAGE


def make_inputs(row: Row, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Fresh random inputs on `device`: standard normal q and k, every page used once, pages in random order."""
    generator = torch.Generator(device).manual_seed(0)
    pages = [-(-length // PAGE) for length in row.lengths]
    order = torch.randperm(sum(pages), generator=generator, device=device).int()
    table = torch.zeros(row.b, max(pages), dtype=torch.int32, device=device)
    for i, used in enumerate(order.split(pages)):
        table[i, : used.numel()] = used
    return Inputs(
        q=torch.randn(row.b, row.s_q, row.h_q, HEAD_DIM, generator=generator, device=device, dtype=dtype),
        k_cache=torch.randn(sum(pages), PAGE, 1, HEAD_DIM, generator=generator, device=device, dtype=dtype),
        block_table=table,
        cache_seqlens=torch.tensor(row.lengths, dtype=torch.int32, device=device),
        causal=row.causal,
    )
