"""Which rows and tiles each expert has, as tables in shared memory: for kernels whose tiles are of one expert each."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from .gmem import load_i32

WARP = 32
NEVER = 0x7FFFFFFF


@dataclass(frozen=True)
class Tables:
    """In shared memory, by expert."""

    first: cute.Tensor  # its first row
    stop: cute.Tensor  # the row after its last
    tiles: cute.Tensor  # row tiles of this expert and all before it


@cute.jit
def fill_tables(a, tables: Tables, tile_rows: cutlass.Constexpr[int], lane: Int32):
    """One warp. Ends are clamped to 0..limit, and an end before an earlier one leaves its expert without rows: no value
    makes experts overlap, or tiles more than the rows allow.

    a: kernel parameters with the fields rows (int32 pointer: ends of the experts' rows, or with block_rows > 0 how many
    rows each has), experts, limit (rows of all experts together, or with block_rows > 0 of each) and block_rows.
    """
    before, tiles = Int32(0), Int32(0)
    for chunk in cutlass.range((a.experts + (WARP - 1)) // WARP, unroll=1):
        expert = chunk * WARP + lane
        stop, first = Int32(0), Int32(0)
        if expert < a.experts:
            stop = load_i32(a.rows, expert)
        stop = stop if stop < a.limit else a.limit
        stop = stop if stop > 0 else Int32(0)
        if a.block_rows == 0:
            stop = stop if stop > before else before
            for i in cutlass.range_constexpr(5):
                lower = cute.arch.shuffle_sync_up(stop, 1 << i, mask_and_clamp=0)
                stop = lower if lower > stop else stop
            first = cute.arch.shuffle_sync_up(stop, 1, mask_and_clamp=0)
            first = first if lane > 0 else before
            before = cute.arch.shuffle_sync(stop, WARP - 1)
        total = (stop - first + (tile_rows - 1)) // tile_rows
        for i in cutlass.range_constexpr(5):
            lower = cute.arch.shuffle_sync_up(total, 1 << i, mask_and_clamp=0)
            total += lower if lane >= 1 << i else Int32(0)
        total += tiles
        tiles = cute.arch.shuffle_sync(total, WARP - 1)
        if expert < a.experts:
            tables.first[expert] = first
            tables.stop[expert] = stop
            tables.tiles[expert] = total


@cute.jit
def find_expert(a, tables: Tables, tile: Int32, lane: Int32):
    """The expert that has tile number `tile`, and how many row tiles there are before its own. Tiles are numbered
    expert after expert, a.column_tiles for every row tile. By a whole warp: its lanes look at 32 experts at a time."""
    expert = Int32(0)  # how many experts have all their tiles before this one
    for chunk in cutlass.range((a.experts + (WARP - 1)) // WARP, unroll=1):
        e = chunk * WARP + lane
        end = Int32(NEVER)
        if e < a.experts:
            end = tables.tiles[e] * a.column_tiles
        expert += cute.arch.popc(cute.arch.vote_ballot_sync(end <= tile))
    expert = cute.arch.make_warp_uniform(expert)
    before = Int32(0)
    if expert > 0:
        before = tables.tiles[expert - 1]
    return expert, before
