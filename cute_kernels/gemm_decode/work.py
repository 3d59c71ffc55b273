"""What a CTA works on: the kernel's parameters, and the walk over pieces of every role."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from ..sm90.experts import Tables, find_expert


@dataclass(frozen=True)
class GemmDecodeArgs:
    """Kernel parameters behind the tensor maps of activations and weights, in launch order. Pointers are global."""

    rows: cute.Pointer  # int32 (E,): ends of the experts' rows, or with block_rows > 0 how many rows each has
    x_scales: cute.Pointer  # float32, FP8 only: of row r of block g and K block k at g * x_scale_block + r * .. + k ..
    w_scales: cute.Pointer  # float32 (E, w_scale_rows, k_blocks), FP8 only
    out: cute.Pointer  # bfloat16 or e4m3 (rows, columns)
    out_scales: cute.Pointer  # float32 (rows, columns / 128), swiglu_fp8 only
    partials: cute.Pointer  # float32 (CTAs, 2, 2 halves, tile_n / 8, 256 threads, 4): accumulators as in the registers
    tickets: cute.Pointer  # int32 (CTAs,), 0 between launches: pieces stored of the tile whose first piece a CTA has
    x_scale_block: Int64  # elements from one expert's block of rows to the next
    x_scale_row: Int64
    x_scale_k: Int64
    experts: Int32
    limit: Int32  # rows of all experts together, or with block_rows > 0 of each
    block_rows: Int32  # rows of the block that every expert has, 0 if their rows follow each other
    columns: Int32  # of the output
    column_tiles: Int32
    k_blocks: Int32
    w_scale_rows: Int32  # ceil(weight rows / 128)


@dataclass(frozen=True)
class Span:
    """A CTA's units, consecutive. A unit is one K block of one tile; tiles are those of expert after expert, in it
    column after column."""

    begin: Int32
    stop: Int32
    share: Int32  # units of a CTA, one more in the first `extra`
    extra: Int32


@dataclass(frozen=True)
class Piece:
    """The part of one tile that one CTA has: K blocks k0 up to, not including, k1."""

    expert: Int32
    block: Int32  # block of rows of the activations: the expert's own, or 0
    row: Int32  # first row, within the block
    live: Int32  # rows of the tile that are the expert's, at least 1
    column: Int32  # index of the column tile
    k0: Int32
    k1: Int32
    first_cta: Int32  # that has the tile's first K block
    pieces: Int32  # of the tile, in as many CTAs


@cute.jit
def get_span(a: GemmDecodeArgs, tables: Tables, cta: Int32, ctas: Int32):
    """The CTA's share of all units."""
    units = tables.tiles[a.experts - 1] * a.column_tiles * a.k_blocks
    return Span(*(cute.arch.make_warp_uniform(value) for value in cut(units, cta, ctas)))


@cute.jit
def cut(units: Int32, cta: Int32, ctas: Int32):
    """The fields of a Span: equal shares in the order of the CTAs, the first ones one larger."""
    share = units // ctas
    extra = units - share * ctas
    begin = cta * share + (cta if cta < extra else extra)
    stop = begin + share + Int32(cta < extra)
    return begin, stop, share, extra


@cute.jit
def cta_of(share: Int32, extra: Int32, unit: Int32):
    """Which CTA has a unit."""
    larger = extra * (share + 1)  # units of the CTAs that have one more
    return unit // (share + 1) if unit < larger else extra + (unit - larger) // share


@cute.jit
def get_piece(a: GemmDecodeArgs, tables: Tables, span: Span, tile_n: cutlass.Constexpr[int], unit: Int32, lane: Int32):
    """The piece that begins with `unit`. By a whole warp."""
    tile = unit // a.k_blocks
    k0 = unit - tile * a.k_blocks
    k1 = k0 + span.stop - unit
    k1 = k1 if k1 < a.k_blocks else a.k_blocks
    expert, before = find_expert(a, tables, tile, lane)
    row_tiles = tables.tiles[expert] - before
    local = tile - before * a.column_tiles
    column = local // row_tiles
    row = tables.first[expert] + (local - column * row_tiles) * tile_n
    live = tables.stop[expert] - row
    live = live if live < tile_n else Int32(tile_n)
    first_cta = cta_of(span.share, span.extra, unit - k0)
    pieces = cta_of(span.share, span.extra, unit - k0 + a.k_blocks - 1) - first_cta + 1
    uniform = cute.arch.make_warp_uniform
    return Piece(
        expert=expert,
        block=expert if a.block_rows > 0 else Int32(0),
        row=uniform(row),
        live=uniform(live),
        column=uniform(column),
        k0=uniform(k0),
        k1=uniform(k1),
        first_cta=uniform(first_cta),
        pieces=uniform(pieces),
    )
