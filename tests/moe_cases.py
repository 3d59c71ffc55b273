"""Inputs of the MoE ops for tests on any device; rows that must not be read are poisoned."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cutehop.ref import quant


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bf16(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).bfloat16()


def logits_with_ties(n: int, experts: int, seed: int = 0) -> Tensor:
    """float32 (n, experts) out of a few values, so that almost every choice is a tie."""
    return torch.randint(-3, 4, (n, experts), generator=generator(seed)).float()


def choices(n: int, k: int, experts: int, seed: int = 0, none: float = 0.2, outside: bool = False) -> Tensor:
    """int64 (n, k): distinct experts per token if there are enough, some -1, with `outside` some out of range."""
    g = generator(seed)
    order = torch.rand((n, max(experts, k)), generator=g).argsort(1)[:, :k] % experts
    order[torch.rand((n, k), generator=g) < none] = -1
    if outside:
        order[torch.rand((n, k), generator=g) < 0.1] = experts
        order[torch.rand((n, k), generator=g) < 0.1] = 2**40
        order[torch.rand((n, k), generator=g) < 0.1] = -(2**33)
    return order


def ends_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)


def poison(rows: Tensor, begin: int) -> Tensor:
    """A copy whose rows from `begin` on are NaN."""
    rows = rows.clone()
    rows[begin:] = math.nan
    return rows


def fp8_pair(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return quant.quantize_fp8(bf16(*shape, seed=seed))


def fp8_weights(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return quant.quantize_blocks(bf16(*shape, seed=seed))
