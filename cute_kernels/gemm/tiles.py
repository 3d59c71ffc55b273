"""What a CTA works on: the kernel's parameters, and the walk over tiles of every role."""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Int32, Int64

from ..sm90.experts import Tables, find_expert
from .config import RASTER_ROWS, TILE_M


@dataclass(frozen=True)
class GemmArgs:
    """Kernel parameters behind the tensor maps of activations and weights, in launch order. Pointers are global."""

    rows: cute.Pointer  # int32 (E,): ends of the experts' rows, or with block_rows > 0 how many rows each has
    a_scales: cute.Pointer  # float32 (blocks, rows, k_blocks), FP8 only
    b_scales: cute.Pointer  # float32 (E, ceil(weight rows / 128), k_blocks), FP8 only
    out: cute.Pointer  # bfloat16 or e4m3 (rows, columns)
    out_scales: cute.Pointer  # float32 (rows, columns / 128), swiglu_fp8 only
    a_scale_block: Int64  # strides of a_scales in elements; this one is 0 if the experts' rows follow each other
    a_scale_row: Int64
    a_scale_k: Int64
    experts: Int32
    limit: Int32  # rows of all experts together, or with block_rows > 0 of each
    block_rows: Int32  # rows of the block that every expert has, 0 if their rows follow each other
    columns: Int32  # of the output
    column_tiles: Int32
    k_blocks: Int32
    b_scale_rows: Int32  # ceil(weight rows / 128)


@dataclass(frozen=True)
class Place:
    """Where a thread stands."""

    cta: Int32
    ctas: Int32
    lane: Int32
    wg: Int32  # 0 or 1 multiply, uniform in a warp
    row: Int32  # a math thread's rows of the tile are row and row + 8


@dataclass(frozen=True)
class Tile:
    """One output tile. Concurrent CTAs have consecutive tiles: RASTER_ROWS row tiles times all column tiles, row tiles
    first, so that what they load at a time comes from DRAM once."""

    expert: Int32
    block: Int32  # block of rows of the activations: the expert's own, or 0
    row: Int32  # first row, within the block
    live: Int32  # rows from there on that are the expert's; more than TILE_M unless it is the last tile
    column: Int32  # index of the column tile


@cute.jit
def num_tiles(a: GemmArgs, tables: Tables):
    """Output tiles of the call."""
    return tables.tiles[a.experts - 1] * a.column_tiles


@cute.jit
def get_tile(a: GemmArgs, tables: Tables, index: Int32, lane: Int32):
    """The tile numbered `index`, less than num_tiles. By a whole warp."""
    expert, before = find_expert(a, tables, index, lane)
    row_tiles = tables.tiles[expert] - before
    local = index - before * a.column_tiles
    band = local // (RASTER_ROWS * a.column_tiles)
    height = row_tiles - band * RASTER_ROWS
    height = height if height < RASTER_ROWS else Int32(RASTER_ROWS)
    local -= band * (RASTER_ROWS * a.column_tiles)
    column = local // height
    row = tables.first[expert] + (band * RASTER_ROWS + local - column * height) * TILE_M
    block = expert if a.block_rows > 0 else Int32(0)
    return Tile(expert, block, row, tables.stop[expert] - row, column)
