"""Inputs of the grouped GEMM ops and what their results are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cutehop.ref import moe as ref
from cutehop.ref.quant import dequantize_fp8, quantize_blocks, quantize_fp8

# Relative error of a row: a value is rounded once, by at most 2^-8 (bf16) or 2^-4 (e4m3) of itself and by half of
# that in the mean. FP8 products add what the tensor cores drop, below 2^-13.
LIMITS = {torch.bfloat16: 4.2e-3, torch.float8_e4m3fn: 4.5e-2}
SENTINEL = 7.0  # what outputs hold before a call: exact in both dtypes


@dataclass(frozen=True)
class Case:
    """counts: rows per expert; masked: block_rows rows for each expert, else rows behind the last expert's."""

    counts: tuple[int, ...]
    n: int
    k: int
    fp8: bool = False
    epilogue: str = "store"
    block_rows: int | None = None
    tail: int = 5

    @property
    def masked(self) -> bool:
        return self.block_rows is not None


@dataclass(frozen=True)
class Inputs:
    case: Case
    a: Tensor
    b: Tensor
    rows: Tensor  # ends or counts
    a_scales: Tensor | None
    b_scales: Tensor | None

    @property
    def args(self) -> tuple[Any, ...]:
        return self.a, self.b, self.rows, self.a_scales, self.b_scales, self.case.epilogue

    @property
    def op(self) -> Any:
        return torch.ops.cutehop.masked_grouped_gemm if self.case.masked else torch.ops.cutehop.grouped_gemm

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Outputs as the op allocates them, filled with SENTINEL."""
        shape, fp8 = self.a.shape[:-1], self.case.epilogue == "swiglu_fp8"
        columns = self.case.n if self.case.epilogue == "store" else self.case.n // 2
        out = torch.full((*shape, columns), SENTINEL, device=self.a.device)
        scales = torch.full((*shape, columns // 128) if fp8 else (0,), SENTINEL, device=self.a.device)
        return out.to(torch.float8_e4m3fn if fp8 else torch.bfloat16), scales


def build(case: Case, device: str, seed: int = 0) -> Inputs:
    """Random operands; rows without an expert and the weights of experts without rows are NaN."""
    generator = torch.Generator(device).manual_seed(seed)
    experts = len(case.counts)
    counts = torch.tensor(case.counts, dtype=torch.int32, device=device)
    shape = (experts, case.block_rows) if case.block_rows is not None else (sum(case.counts) + case.tail,)
    a = torch.randn(*shape, case.k, generator=generator, device=device)
    b = torch.randn(experts, case.n, case.k, generator=generator, device=device) / case.k**0.5
    rows = counts if case.masked else counts.cumsum(0).int()
    unused = ~owned(rows, a)
    if case.fp8:
        qa, a_scales = quantize_fp8(a.bfloat16())
        qb, b_scales = quantize_blocks(b)
        a_scales[unused] = torch.nan
        qa.view(torch.uint8)[unused] = 0x7F
        b_scales[counts <= 0] = torch.nan
        return Inputs(case, qa, qb, rows, a_scales, b_scales)
    a[unused] = torch.nan
    b[counts <= 0] = torch.nan
    return Inputs(case, a.bfloat16(), b.bfloat16(), rows, None, None)


def owned(rows: Tensor, a: Tensor) -> Tensor:
    """Which rows of a belong to an expert."""
    if a.dim() == 3:
        return torch.arange(a.shape[1], device=a.device) < rows[:, None]
    return torch.arange(len(a), device=a.device) < max(rows.clamp(0, len(a)).tolist())


def failures(x: Inputs, out: Tensor, out_scales: Tensor) -> list[str]:
    """What is wrong with a result; outputs held SENTINEL before the call."""
    function = ref.masked_grouped_gemm if x.case.masked else ref.grouped_gemm
    # Exact until the last rounding: the reference's product in fp32, then its epilogue without the cast.
    operands = (x.a, x.b, x.rows, x.a_scales, x.b_scales)
    exact = _exact(function, operands, x.case.epilogue)
    got = dequantize_fp8(out, out_scales) if x.case.epilogue == "swiglu_fp8" else out.float()
    mine = owned(x.rows, x.a)
    found = []
    error = (got - exact)[mine].norm(dim=-1) / exact[mine].norm(dim=-1).clamp_min(1e-6)
    limit = LIMITS[out.dtype]
    if mine.any() and not bool((error <= limit).all()):
        worst = error.nan_to_num(torch.inf).argmax()
        place = mine.nonzero()[worst].tolist()
        found.append(f"{x.case}: row {place} is off by {error[worst]:.2e} (limit {limit:g})")
    if not bool((out[~mine].float() == SENTINEL).all()):
        found.append(f"{x.case}: wrote to rows of no expert")
    if out_scales.numel() and not bool((out_scales[~mine] == SENTINEL).all()):
        found.append(f"{x.case}: wrote to scales of rows of no expert")
    return found


def _exact(function: Any, operands: tuple[Any, ...], epilogue: str) -> Tensor:
    """float32 result of the epilogue before its rounding."""
    kept: list[Tensor] = []
    original = ref.finish

    def keep(product: Tensor, _: str) -> tuple[Tensor, Tensor]:
        kept.append(product)
        return product, product

    ref.finish = keep
    try:
        function(*operands)
    finally:
        ref.finish = original
    (product,) = kept
    if epilogue == "store":
        return product
    gate, up = product.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up
