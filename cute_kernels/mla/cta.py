"""What the roles of the decode kernel share: shared memory, barriers, and where a thread stands."""

from dataclasses import dataclass, replace

import cutlass.cute as cute
from cutlass import Boolean, Int32

WG = 128  # threads of a warpgroup
BAR_MAX0, BAR_P0, BAR_P1, BAR_SYNC = 1, 2, 3, 4  # named barriers of both math warpgroups
BAR_WG = 5  # and of each alone: 5, 6
K0L, K0R, K1L, K1R = 0, 1, 2, 3  # halves of the two K blocks: columns 0-255 and 256-575
EVICT_FIRST = 0x12F0000000000000  # L2 policy of CUTLASS for data that is read once
LN2 = 0.6931471805599453
LOG2E = 1.4426950408889634
NEG_BIG = -1e30  # finite start of the running maximum: inf - inf never happens


@dataclass(frozen=True)
class Shared:
    """Views of the CTA's shared memory."""

    q: cute.Pointer
    k: cute.Pointer
    sQ: cute.Tensor  # (64, 64, 9)
    sK: cute.Tensor  # (64, 64, 18): slabs of K0, then of K1
    sP0: cute.Tensor  # (64, 64)
    row_max: cute.Tensor  # (64,) running maximum, scaled, base 2
    scale0: cute.Tensor  # (64,) what WG0's step does to sums and outputs
    scale1: cute.Tensor  # (64,) the same for WG1
    row_sum: cute.Tensor  # (128,)
    ticket: cute.Tensor  # (1,) this CTA's turn at a merge
    # What work.get_cut compares with. It looks here, as for more pointers ptxas would take uniform registers that then
    # lack in the main loop: R2UR before every wgmma.
    cuts: cute.Tensor  # (3,) sequence in whose middle the partition begins, or -1; CUT of this partition, of the next
    addresses: cute.Tensor  # (2,) of cache_seqlens and report
    q_full: cute.Pointer
    q_empty: cute.Pointer
    k_full: cute.Pointer  # 18: a slab of K0 or K1 has landed
    k_empty: cute.Pointer  # 4: a half of K0 or K1 may be overwritten

    @property
    def sP1(self):
        """P of WG1 overlays the RoPE slab of Q, which both warpgroups keep in registers."""
        return self.sQ[None, None, 8]


@dataclass(frozen=True)
class Place:
    """Which work a CTA has, and which rows of it a math thread has."""

    work: tuple | cute.Tensor  # row tile, kv head, partition; what is not block_idx takes registers or shared memory
    belongs: Boolean  # the plan is of this call; if not, there is no work
    wg: Int32  # 0 or 1, uniform in a warp
    t: Int32  # thread of the warpgroup
    row: Int32  # the thread's rows are row and row + 8

    def in_registers(self):
        """The same, read once: for loops that use it often and have registers to spare."""
        return replace(self, work=(self.tile, self.kv_head, self.part))

    @property
    def tile(self):
        return self.work[0]

    @property
    def kv_head(self):
        return self.work[1]

    @property
    def part(self):
        return self.work[2]


def sync_math():
    """Both math warpgroups."""
    cute.arch.barrier(barrier_id=BAR_SYNC, number_of_threads=2 * WG)
