"""What a CTA works on: the kernel's parameters, and the walk over tiles of every role."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from ..sm90.experts import Tables, find_expert
from .config import UNIT


@dataclass(frozen=True)
class GemmArgs:
    """Kernel parameters behind the tensor maps of activations and weights, in launch order. Pointers are global."""

    rows: cute.Pointer  # int32 (E,): ends of the experts' rows, or with block_rows > 0 how many rows each has
    a_scales: cute.Pointer  # float32 (blocks, rows, k_blocks), FP8 only
    b_scales: cute.Pointer  # float32 (E, ceil(weight rows / 128), k_blocks), FP8 only
    out: cute.Pointer  # bfloat16 or e4m3 (rows, columns)
    out_scales: cute.Pointer  # float32 (rows, columns / 128), swiglu_fp8 only
    taken: cute.Pointer  # int32, 0 between launches: how often CTAs have asked for another tile
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
    row: Int32  # a math thread's rows of the tile are row and row + 8, and with tall tiles 64 rows further


@dataclass(frozen=True)
class Tile:
    """One output tile. CTAs take them by number: config.raster_tiles row tiles times all column tiles,
    row tiles first, so that what they load at a time comes from DRAM once. An expert's row tiles share its rows as
    equally as units of UNIT rows allow: all of a short tile's weights would be loaded for few products."""

    expert: Int32
    block: Int32  # block of rows of the activations: the expert's own, or 0
    row: Int32  # first row, within the block
    live: Int32  # rows that it has
    column: Int32  # index of the column tile


@cute.jit
def num_tiles(a: GemmArgs, tables: Tables):
    """Output tiles of the call."""
    return tables.tiles[a.experts - 1] * a.column_tiles


@cute.jit
def get_tile(a: GemmArgs, tables: Tables, raster: cutlass.Constexpr[int], index: Int32, lane: Int32):
    """The tile numbered `index`, less than num_tiles. By a whole warp."""
    expert, before = find_expert(a, tables, index, lane)
    row_tiles = tables.tiles[expert] - before
    local = index - before * a.column_tiles
    band = local // (raster * a.column_tiles)
    height = row_tiles - band * raster
    height = height if height < raster else Int32(raster)
    local -= band * (raster * a.column_tiles)
    column = local // height
    row_tile = band * raster + local - column * height
    units = (tables.stop[expert] - tables.first[expert] + (UNIT - 1)) // UNIT
    share = units // row_tiles
    longer = units - share * row_tiles  # tiles that have a unit more, the first ones
    row = tables.first[expert] + (row_tile * share + (row_tile if row_tile < longer else longer)) * UNIT
    rows = (share + Int32(row_tile < longer)) * UNIT
    left = tables.stop[expert] - row
    block = expert if a.block_rows > 0 else Int32(0)
    return Tile(expert, block, row, rows if rows < left else left, column)
