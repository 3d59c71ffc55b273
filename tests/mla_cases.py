"""Cases of dense MLA decode shared by tests and benches: a frozen description, an input builder, and a comparator.

Inputs follow FlashMLA's tests: q and K ~ N(0, 1) / 10 clamped to +-1, pages in random order, and poison in everything
that must not be read: NaN in unused pages and in rows past a sequence's length, huge page ids past a sequence's last
page. They are built on the device they are for.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from cutehop.ref import mla as ref
from cutehop.ref import mla_plan as planner

HEAD_PAIRS = tuple(  # (h_q, h_kv), FlashMLA's 16
    (h_q, h_kv) for h_q in (1, 3, 9, 63, 64, 126, 128) for h_kv in (1, 2, 3, 8) if h_q % h_kv == 0
)
HUGE_PAGE = 2147480000
SPARE_PAGES = 3


@dataclass(frozen=True)
class MlaCase:
    """One call. Lengths are all s_k, or drawn if varlen, or given; tokens_q given makes the queries ragged."""

    b: int
    s_q: int
    s_k: int
    h_q: int
    h_kv: int = 1
    varlen: bool = False
    causal: bool = False
    page: int = 64
    dtype: torch.dtype = torch.bfloat16
    lengths: tuple[int, ...] | None = None
    tokens_q: tuple[int, ...] | None = None
    zero_fraction: float = 0.0  # of the sequences, made empty
    sink: bool = False  # attn_sink ~ N(0, 1) with a -inf and a +inf among its entries
    split_tokens: int = 0
    strided: bool = False  # q, k_cache and block_table are views into wider tensors
    score_scale: float = 1.0  # multiplies q: 3000 makes scores around 1e3
    empty_lse_neg_inf: bool = False
    seed: int = 0

    def __str__(self) -> str:
        """What differs from the defaults: a test id."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return "-".join(f"{name}={value}".replace(" ", "").replace("torch.", "") for name, value in changed.items())

    def drawn_lengths(self) -> list[int]:
        """Cached tokens per sequence; varlen as in FlashMLA's tests, with Python's generator."""
        if self.lengths is not None:
            return list(self.lengths)
        rng = random.Random(self.seed)
        lengths = [self.s_k] * self.b
        if self.varlen:
            lengths = [max(int(rng.normalvariate(self.s_k, self.s_k / 2)), self.s_q) for _ in range(self.b)]
        return [0 if rng.random() < self.zero_fraction else n for n in lengths] if self.zero_fraction else lengths


@dataclass(frozen=True)
class MlaInputs:
    """Tensors of one call, in the terms of `cutehop.ops.mla`."""

    case: MlaCase
    q: Tensor
    k_cache: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    attn_sink: Tensor | None
    cu_seqlens_q: Tensor | None
    softmax_scale: float = field(default=ref.HEAD_DIM**-0.5)

    def plan(self) -> tuple[Tensor, Tensor]:
        c = self.case
        return torch.ops.cutehop.mla_plan(self.cache_seqlens, c.s_q, c.h_q, c.h_kv, split_tokens=c.split_tokens)

    def arguments(self, plan: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
        """Positional arguments of mla_decode."""
        return self.q, self.k_cache, self.block_table, self.cache_seqlens, *(plan or self.plan())

    def options(self) -> dict:
        """Keyword arguments of mla_decode."""
        return {
            "softmax_scale": self.softmax_scale,
            "causal": self.case.causal,
            "attn_sink": self.attn_sink,
            "cu_seqlens_q": self.cu_seqlens_q,
            "max_seqlen_q": self.case.s_q if self.cu_seqlens_q is not None else 0,
            "split_tokens": self.case.split_tokens,
            "empty_lse_neg_inf": self.case.empty_lse_neg_inf,
        }

    def decode(self, plan: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return torch.ops.cutehop.mla_decode(*self.arguments(plan), **self.options())

    def reference(self) -> tuple[Tensor, Tensor]:
        options = self.options()
        del options["max_seqlen_q"], options["split_tokens"]
        return ref.mla_decode(self.q, self.k_cache, self.block_table, self.cache_seqlens, **options)


def build_inputs(case: MlaCase, device: str | torch.device = "cpu") -> MlaInputs:
    """Inputs of a case on a device; the same on every call."""
    generator = torch.Generator(device).manual_seed(case.seed)
    lengths = torch.tensor(case.drawn_lengths(), dtype=torch.int32, device=device)
    cu_seqlens_q = None
    q_shape: tuple[int, ...] = (case.b, case.s_q, case.h_q)
    if case.tokens_q is not None:
        starts = list(itertools.accumulate(case.tokens_q, initial=0))
        cu_seqlens_q = torch.tensor(starts, dtype=torch.int32, device=device)
        q_shape = (starts[-1], case.h_q)
    q = _random(q_shape, case, generator).mul_(case.score_scale)
    k_cache, block_table = _build_cache(case, lengths, generator)
    sink = None
    if case.sink:
        sink = torch.randn(case.h_q, generator=generator, device=device)
        sink[0], sink[-1] = -math.inf, math.inf
    return MlaInputs(case, q, k_cache, block_table, lengths, sink, cu_seqlens_q)


def _random(shape: tuple[int, ...], case: MlaCase, generator: torch.Generator) -> Tensor:
    """(*shape, 576) of the case's dtype; if strided, a view of a tensor larger in every dimension."""
    if not case.strided:
        values = torch.randn((*shape, ref.HEAD_DIM), generator=generator, device=generator.device, dtype=case.dtype)
        return values.mul_(0.1).clamp_(-1, 1)
    wide = torch.full((*(n + 1 for n in shape), ref.HEAD_DIM + 64), math.nan, device=generator.device, dtype=case.dtype)
    view = wide[tuple(slice(n) for n in shape)][..., 64:]
    view.copy_(_random(shape, replace(case, strided=False), generator))
    return view


def _build_cache(case: MlaCase, lengths: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cache and block table of `lengths`, poisoned."""
    device, page = lengths.device, case.page
    pages = (lengths + page - 1) // page
    num_used = int(pages.sum())
    max_pages = int(pages.max()) + 2 if case.b else 1
    k_cache = _random((num_used + SPARE_PAGES, page, case.h_kv), case, generator)
    ids = torch.randperm(num_used + SPARE_PAGES, generator=generator, device=device, dtype=torch.int32)
    k_cache[ids[num_used:].long()] = math.nan

    columns = torch.arange(max_pages, device=device)
    table = torch.full((case.b, max_pages), HUGE_PAGE, dtype=torch.int32, device=device)
    table[columns < pages[:, None]] = ids[:num_used]
    partial = torch.where(lengths % page != 0)[0]
    last = table[partial, (pages[partial] - 1).long()].long()
    which, row = torch.where(torch.arange(page, device=device) >= (lengths[partial] % page)[:, None])
    k_cache[last[which], row] = math.nan
    if case.strided:
        wide = torch.full((case.b, max_pages + 5), HUGE_PAGE, dtype=torch.int32, device=device)
        wide[:, 3 : 3 + max_pages] = table
        table = wide[:, 3 : 3 + max_pages]
    return k_cache, table


def blocks_by_pieces(h_q: int) -> dict[int, int]:
    """The shortest sequence, in blocks, that a plan for it alone on 132 SMs cuts into so many pieces."""
    found: dict[int, int] = {}
    partitions = planner.num_partitions(1, h_q, 1, 132)
    for blocks in range(1, 1200):
        (pieces,) = planner.schedule([64 * blocks], partitions, h_q)[2]
        found.setdefault(pieces, blocks)
    return found


def matrix(
    batches: tuple[int, ...] = (1, 2, 6, 64),
    tokens: tuple[int, ...] = (1, 2, 4),
    lengths: tuple[int, ...] = (20, 140, 4096),
    pairs: tuple[tuple[int, int], ...] = HEAD_PAIRS,
) -> Iterator[MlaCase]:
    """FlashMLA's correctness matrix; the defaults give its 2304 cases. Neighbours differ in `causal` only."""
    for b, s_q, s_k, (h_q, h_kv), varlen, causal in itertools.product(
        batches, tokens, lengths, pairs, (False, True), (False, True)
    ):
        yield MlaCase(b, s_q, s_k, h_q, h_kv, varlen, causal)


@dataclass(frozen=True)
class Tolerance:
    """|a - r| < absolute or |a - r| / (|r| + 1e-6) < relative everywhere, and a cosine distance of at most cosine."""

    absolute: float
    relative: float
    cosine: float


OUT_TOLERANCE = Tolerance(8e-4, 2.01 / 128, 5e-6)
LSE_TOLERANCE = Tolerance(1e-6, 8.01 / 65536, 1e-7)


def mismatch(name: str, actual: Tensor, expected: Tensor, tolerance: Tolerance) -> str:
    """What differs, or "". Shape, dtype and the positions of NaN, +inf and -inf have to be the same."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"{name}: {actual.dtype} {tuple(actual.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
    a, r = actual.double(), expected.double()
    special = ~(a.isfinite() & r.isfinite())
    same = (a == r) | (a.isnan() & r.isnan())  # infinities of one sign compare equal
    wrong_special = special & ~same
    a, r = a.masked_fill(special, 0.0), r.masked_fill(special, 0.0)
    error = (a - r).abs()
    beyond = (error >= tolerance.absolute) & (error >= tolerance.relative * (r.abs() + 1e-6))
    norm = (r * r).sum()
    distance = torch.where(norm < 1e-12, 0.0, 1 - 2 * (a * r).sum() / (norm + (a * a).sum()))
    worst = error.max() if error.numel() else norm
    counts = torch.stack([wrong_special.sum(), beyond.sum(), distance, worst]).tolist()  # one copy to the host
    if counts[0] or counts[1] or counts[2] > tolerance.cosine:
        where = (wrong_special | beyond).nonzero()
        first = f", first at {where[0].tolist()}" if len(where) else ""
        return (
            f"{name}: {counts[0]:.0f} NaN/inf and {counts[1]:.0f} of {a.numel()} values wrong{first}; "
            f"largest error {counts[3]:.3g}, cosine distance {counts[2]:.3g}"
        )
    return ""


def failures(
    inputs: MlaInputs, actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor] | None = None
) -> list[str]:
    """Mismatches of (out, lse) with the reference, each with the case; empty if all is well."""
    out, lse = expected or inputs.reference()
    # lse may be near 0 while the fp32 error of the scores grows with the products they add up: for q of size 0.1 times
    # score_scale about 2**-23 * 576 * mean(|q k|) * softmax_scale = 1.8e-8 * score_scale; 5 times that is allowed.
    lse_tolerance = replace(LSE_TOLERANCE, absolute=LSE_TOLERANCE.absolute * max(1.0, inputs.case.score_scale / 10))
    found = (mismatch("out", actual[0], out, OUT_TOLERANCE), mismatch("lse", actual[1], lse, lse_tolerance))
    return [f"{text} in {inputs.case}" for text in found if text]
