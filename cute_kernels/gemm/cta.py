"""What the roles of the grouped GEMM share: shared memory and barriers."""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Int32

from ..sm90.experts import Tables
from .config import STAGES
from .tiles import Place

WG = 128  # threads of a warpgroup
MATH_WARPS = 8


@dataclass(frozen=True)
class Shared:
    """Views of the CTA's shared memory."""

    a: cute.Pointer
    b: cute.Pointer
    sA: cute.Tensor  # (tile_m, block_k, STAGES)
    sB: cute.Tensor  # (tile_n, block_k, STAGES)
    tables: Tables
    full: cute.Pointer  # STAGES: the boxes of a stage have landed
    empty: cute.Pointer  # STAGES: all math warps have multiplied it


@cute.jit
def next_stage(stage: Int32, phase: Int32):
    """The place and barrier parity of the next K block."""
    wraps = stage == STAGES - 1
    return Int32(0) if wraps else stage + 1, phase ^ Int32(wraps)


@cute.jit
def release(s: Shared, stage: Int32, c: Place):
    """This warp has multiplied what lies in a stage, or has seen it arrive and has no use for it."""
    if c.lane == 0:
        cute.arch.mbarrier_arrive(s.empty + stage)
