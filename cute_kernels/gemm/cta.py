"""What the roles of the grouped GEMM share: shared memory and barriers."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ..sm90.experts import Tables
from .config import ORDERS
from .tiles import Place

WG = 128  # threads of a warpgroup


@dataclass(frozen=True)
class Shared:
    """Views of the CTA's shared memory."""

    a: cute.Pointer
    b: cute.Pointer
    sA: cute.Tensor  # (tile_m, block_k, stages)
    sB: cute.Tensor  # (tile_n, block_k, stages)
    tables: Tables
    full: cute.Pointer  # by stage: the boxes of a stage have landed
    order: cute.Tensor  # int32 (ORDERS,): tile numbers, in turn
    ordered: cute.Pointer  # by place in order: a tile number is there
    empty: cute.Pointer  # by stage: all math warps have multiplied it


@cute.jit
def next_stage(stages: cutlass.Constexpr[int], stage: Int32, phase: Int32):
    """The place and barrier parity of the next K block."""
    wraps = stage == stages - 1
    return Int32(0) if wraps else stage + 1, phase ^ Int32(wraps)


@cute.jit
def release(s: Shared, stage: Int32, c: Place):
    """This warp has multiplied what lies in a stage, or has seen it arrive and has no use for it."""
    if c.lane == 0:
        cute.arch.mbarrier_arrive(s.empty + stage)


@cute.jit
def put_order(s: Shared, number: Int32, index: Int32):
    """By one thread of the loader: the tile behind `number` others of this CTA's; all of them done where there is none
    of that index."""
    slot = number % ORDERS
    s.order[slot] = index
    cute.arch.mbarrier_arrive(s.ordered + slot)


@cute.jit
def get_order(s: Shared, number: Int32):
    """What put_order has put, as soon as it is there."""
    slot = number % ORDERS
    cute.arch.mbarrier_wait(s.ordered + slot, number // ORDERS % 2)
    return cute.arch.make_warp_uniform(s.order[slot])
