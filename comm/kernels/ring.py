"""A ring of pieces of rows in flight: bulk load from global memory, a peer's or mine, bulk store to global memory.

One thread drives a ring, since bulk copies are waited for by the thread that issued them. A stage is stored as soon as
it has landed and all others hold loads; it is loaded again once that store has read it.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8
from cutlass.experimental import primitives as prims

from .config import MAX_STAGES
from .verbs import GMEM


@dataclass(frozen=True)
class Ring:
    """One thread's ring."""

    data: cute.Pointer  # stages * piece_bytes bytes
    full: cute.Pointer  # MAX_STAGES mbarriers of one arrival: a piece has landed
    targets: cute.Tensor  # Int64 (MAX_STAGES,): where the piece of a stage goes
    sizes: cute.Tensor  # Int32 (MAX_STAGES,): its bytes
    piece_bytes: Int32
    stages: Int32


def make_ring(sm, index, ring_bytes: int, piece_bytes, stages) -> Ring:
    """The ring of the CTA's warp `index`. sm: has ring, full, targets and sizes, each of all warps together."""
    first, layout = index * MAX_STAGES, cute.make_layout(MAX_STAGES)
    return Ring(
        sm.ring.data_ptr() + index * ring_bytes,
        sm.full.data_ptr() + first,
        cute.make_tensor(sm.targets.data_ptr() + first, layout),
        cute.make_tensor(sm.sizes.data_ptr() + first, layout),
        piece_bytes,
        stages,
    )


EMPTY = (0, 0, 0, 0)
"""State of a ring: pieces held, stage of the next load, stage of the next store, phase of that."""


@cute.jit
def move_row(ring: Ring, begin: Int64, target: Int64, row_bytes: Int32, held, into, out, phase):
    """Put a row's pieces on their way; returns the ring's new state. All addresses and sizes are multiples of 16."""
    for at in cutlass.range(0, row_bytes, ring.piece_bytes, unroll=1):
        if held >= ring.stages - 1:
            held, out, phase = store_oldest(ring, held, out, phase)
        cute.arch.cp_async_bulk_wait_group(1, read=True)  # the stage's last store has read it
        left = row_bytes - at
        size = left if left < ring.piece_bytes else ring.piece_bytes
        ring.targets[into] = target + at
        ring.sizes[into] = size
        cute.arch.mbarrier_arrive_and_expect_tx(ring.full + into, size)
        prims.cp_async_bulk_shared_cluster_global(
            ring.data + into * ring.piece_bytes,
            cute.make_ptr(Uint8, begin + at, GMEM, assumed_align=16),
            ring.full + into,
            size,
        )
        held += 1
        into = into + 1 if into + 1 < ring.stages else Int32(0)
    return held, into, out, phase


@cute.jit
def store_oldest(ring: Ring, held, out, phase):
    """Wait for the oldest piece and store it."""
    cute.arch.mbarrier_wait(ring.full + out, phase)
    target = cute.make_ptr(Uint8, ring.targets[out], GMEM, assumed_align=16)
    prims.cp_async_bulk_global_shared_cta(target, ring.data + out * ring.piece_bytes, ring.sizes[out])
    cute.arch.cp_async_bulk_commit_group()
    wraps = out + 1 == ring.stages
    return held - 1, Int32(0) if wraps else out + 1, phase ^ 1 if wraps else phase


@cute.jit
def drain(ring: Ring, held, out, phase):
    """Store what is left and wait until all of it is written."""
    while held > 0:
        held, out, phase = store_oldest(ring, held, out, phase)
    cute.arch.cp_async_bulk_wait_group(0)
