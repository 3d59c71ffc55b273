"""What the roles of the kernel share: shared memory, barriers, and where a thread stands."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ..sm90.experts import Tables

WG = 128  # threads of a warpgroup
MATH_WARPS = 8
BAR_MATH = 1  # named barrier of both math warpgroups


@dataclass(frozen=True)
class Shared:
    """Views of the CTA's shared memory."""

    w: cute.Pointer
    x: cute.Pointer
    sW: cute.Tensor  # (256, block_k, stages) weights
    sX: cute.Tensor  # (tile_n, block_k, stages) activations
    factors: cute.Tensor  # (tile_n, 2, stages) FP8: scale of the row times scale of each half of the weight rows
    amax: cute.Tensor  # (tile_n, 8 warps) swiglu_fp8: over the output columns of a warp
    ticket: cute.Tensor  # (1,)
    tables: Tables
    full: cute.Pointer  # stages: boxes, and with FP8 factors, have landed
    empty: cute.Pointer  # stages: both warpgroups have multiplied it


@dataclass(frozen=True)
class Place:
    """Where a thread stands."""

    cta: Int32
    ctas: Int32
    lane: Int32
    wg: Int32  # 0 or 1 multiply, uniform in a warp
    t: Int32  # thread of the warpgroup
    row: Int32  # a math thread's weight rows in its 64 of a half are row and row + 8


def sync_math():
    """Both math warpgroups."""
    cute.arch.barrier(barrier_id=BAR_MATH, number_of_threads=2 * WG)


@cute.jit
def next_stage(stage: Int32, phase: Int32, stages: cutlass.Constexpr[int]):
    """The place and barrier parity of the next K block."""
    wraps = stage == stages - 1
    return Int32(0) if wraps else stage + 1, phase ^ Int32(wraps)
