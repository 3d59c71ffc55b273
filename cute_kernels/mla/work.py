"""What a CTA works on: the planner's records turned into pieces, the same iteration for every role of a kernel."""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64

from ..sm90 import ptx
from ..sm90.gmem import load_i32
from .config import (
    BLOCK,
    CUT,
    CUT_PIECES,
    CUT_SHIFT,
    FAULT_LENGTHS,
    FAULT_PIECES,
    MERGE_MAX,
    SEQLEN,
    TILE_M,
)
from .cta import Place, Shared


@dataclass(frozen=True)
class DecodeArgs:
    """Kernel parameters behind the tensor maps of Q and K, in launch order. Pointers are global."""

    block_table: cute.Pointer  # int32 (b, max_pages); entries at or past ceil(len / page) are never read
    block_table_stride: Int64  # elements
    cache_seqlens: cute.Pointer  # int32 (b,)
    cu_seqlens_q: cute.Pointer  # int32 (b + 1,), read only if ragged != 0
    plan: cute.Pointer  # int32 (partitions, 8)
    num_splits: cute.Pointer  # int32 (b + 1,): first partial slot of each sequence
    attn_sink: cute.Pointer  # float32 (h_q,), read only if has_sink != 0
    out: cute.Pointer  # (b, s_q, h_q, 512) or (total_q, h_q, 512)
    lse: cute.Pointer  # float32 (b, h_q, s_q) or (h_q, total_q)
    # fp16 (slots, tiles, 8 warps, 16, 32 lanes, 8): accumulators as they lie in registers, over a power of two that
    # keeps a warp's largest of a row below 2**15
    partial_out: cute.Pointer
    # float32 (slots, tiles, 8 warps, 16 rows, 2): lse, base 2, -inf for a piece without visible keys; what makes the
    # fp16 values of the row the piece's result, that is the power of two over the row sum
    partial_rows: cute.Pointer
    # Both are 0 between launches.
    tickets: cute.Pointer  # int32 (partitions, tiles): two pieces meet, see epilogue.Epilogue.merge
    arrivals: cute.Pointer  # int32 (slots / 3, tiles, 8 warps): pieces stored, see epilogue.Epilogue.announce
    report: cute.Pointer  # int32 in host memory: what was wrong with the plan, see config.FAULT_*
    batch: Int32
    slots: Int32  # of the partial results
    q_group: Int32  # packed rows of a tile per token coordinate of the Q map; 1 << 30 if packed rows are one dimension
    q_kv_step: Int32  # head coordinates from one kv head to the next
    s_q: Int32  # tokens per sequence; with cu_seqlens_q their upper bound
    heads_per_kv: Int32
    h_q: Int32
    total_q: Int32
    ragged: Int32
    causal: Int32
    has_sink: Int32
    split_blocks: Int32  # 0, or cut every sequence each split_blocks blocks (batch-invariant mode)
    scale_log2: Float32  # softmax_scale * log2(e)
    empty_lse: Float32  # what lse becomes where nothing is visible


@dataclass(frozen=True)
class Record:
    """One partition of the plan: from (req, block) up to, not including, (end_req, end_block)."""

    req: Int32
    block: Int32
    end_req: Int32
    end_block: Int32
    split: Int32  # index of the first piece within its sequence
    seqlen: Int32  # of the first sequence: saves the first loads a round trip


@cute.jit
def load_record(a: DecodeArgs, part: Int32, belongs: Boolean):
    """The record of a partition; empty if the plan is not of this call."""
    req, block, end_req, end_block, split, seqlen = [load_i32(a.plan, part * 8 + i) for i in (0, 1, 2, 3, 4, SEQLEN)]
    end_req = end_req if belongs else req
    end_block = end_block if belongs else block
    return Record(req, block, end_req, end_block, split, seqlen)


def plan_belongs(plan: cute.Pointer, partitions, batch, split_blocks):
    """Whether a plan is of this batch size and these fixed cuts. All CTAs look at its last row, so all agree."""
    end_req, end_block, cut = (load_i32(plan, (partitions - 1) * 8 + i) for i in (2, 3, CUT))
    return (end_req == batch) & (end_block == 0) & (cut >> CUT_SHIFT == split_blocks)


@dataclass(frozen=True)
class Piece:
    """One piece of one sequence as one row tile sees it. Blocks run from `first` up to, not including, `end`."""

    seqlen: Int32
    stop: Int32  # where the piece ends for every tile; `end` may lie before it under the causal mask
    first: Int32
    end: Int32
    n: Int32  # end - first, or 0 if the tile has no row or sees no key here
    token0: Int32  # index of the sequence's first token
    s_q: Int32  # tokens of this sequence
    min_visible: Int32  # visible keys of the tile's first row: columns at or past it need a mask


@cute.jit
def num_blocks(seqlen: Int32):
    """Blocks of a sequence; an empty one counts as one, so that somebody writes its zero rows."""
    blocks = (seqlen + (BLOCK - 1)) // BLOCK
    return blocks if blocks > 1 else Int32(1)


@cute.jit
def visible_keys(a: DecodeArgs, seqlen: Int32, s_q: Int32, row: Int32):
    """Keys that packed row `row` may attend to (bottom-right aligned causal mask)."""
    hidden = (s_q - 1 - row // a.heads_per_kv) * a.causal
    keys = seqlen - hidden
    return keys if keys > 0 else Int32(0)


@cute.jit
def get_piece(a: DecodeArgs, record: Record, tile: Int32, req: Int32, block: Int32, seqlen: Int32):
    """The piece that starts at (req, block) of a sequence of seqlen keys."""
    token0 = req * a.s_q
    s_q = a.s_q
    if a.ragged != 0:
        token0 = load_i32(a.cu_seqlens_q, req)
        s_q = load_i32(a.cu_seqlens_q, req + 1) - token0
    stop = num_blocks(seqlen)
    if req == record.end_req:
        stop = record.end_block
    if a.split_blocks > 0:
        stop = stop if stop < block + a.split_blocks else block + a.split_blocks
    rows = s_q * a.heads_per_kv
    row0 = tile * TILE_M
    last = row0 + (TILE_M - 1) if row0 + (TILE_M - 1) < rows else rows - 1
    end = Int32(0)
    min_visible = Int32(0)
    if row0 < rows:
        end = (visible_keys(a, seqlen, s_q, last) + (BLOCK - 1)) // BLOCK
        min_visible = visible_keys(a, seqlen, s_q, row0)
    end = end if end < stop else stop
    n = end - block if end > block else Int32(0)
    return Piece(seqlen, stop, block, end, n, token0, s_q, min_visible)


@cute.jit
def next_position(a: DecodeArgs, record: Record, piece: Piece, req: Int32, split: Int32):
    """(req, block, split, seqlen) after a piece: the next cut of the same sequence, or the start of the next one."""
    next_req, block, next_split, seqlen = req, piece.stop, split + 1, piece.seqlen
    if piece.stop >= num_blocks(piece.seqlen):
        next_req, block, next_split = req + 1, Int32(0), Int32(0)
        if not_done(next_req, block, record):
            seqlen = load_i32(a.cache_seqlens, next_req)
    return next_req, block, next_split, seqlen


def not_done(req, block, record: Record):
    return (req < record.end_req) | ((req == record.end_req) & (block < record.end_block))


@dataclass(frozen=True)
class Cut:
    """How the sequence of a piece is cut."""

    slot: Int32  # of its first piece
    pieces: Int32  # 0 for a whole sequence, and where a fault leaves nothing to merge
    boundary: Int32  # the partition that begins with the second of two pieces, the one before has the first; else -1
    fault: Int32  # 0, FAULT_PIECES or FAULT_LENGTHS


@cute.jit
def put_cuts(a: DecodeArgs, s: Shared, record: Record, c: Place):
    """One thread: what get_cut compares with, into shared memory."""
    _, _, partitions = cute.arch.grid_dim()
    s.cuts[0] = record.req if record.split > 0 else Int32(-1)
    s.cuts[1] = load_i32(a.plan, c.part * 8 + CUT)
    s.cuts[2] = Int32(0)
    if c.part + 1 < partitions:
        s.cuts[2] = load_i32(a.plan, c.part * 8 + 8 + CUT)
    s.addresses[0] = a.cache_seqlens.toint()
    s.addresses[1] = a.report.toint()


@cute.jit
def get_cut(a: DecodeArgs, s: Shared, piece: Piece, end_req: Int32, req: Int32, c: Place):
    """What num_splits says about the cuts, and whether the plan's records and the lengths agree.

    Whether two CTAs meet at a boundary depends only on values that both of them read, and not on the lengths: each
    finds the other there whatever the plan is. Every CTA with a piece of a sequence compares, so a num_splits that
    passes everywhere is that of the records. A length is compared where the plan's is used.
    """
    slot = load_i32(a.num_splits, req)
    pieces = load_i32(a.num_splits, req + 1) - slot
    length = ptx.ld_global_i32(s.addresses[0] + Int64(req) * 4)
    after = req == end_req  # the next partition begins in the middle of this sequence, or this one does
    shared = after | (req == s.cuts[0])
    planned = (s.cuts[2] if after else s.cuts[1]) & CUT_PIECES
    planned = planned if shared else Int32(0)
    expected = planned
    if a.split_blocks > 0:
        expected = (num_blocks(piece.seqlen) + a.split_blocks - 1) // a.split_blocks
        expected = expected if expected > 1 else Int32(0)
    inside = (slot >= 0) & (pieces >= 0) & (pieces <= a.slots) & (slot <= a.slots - pieces)
    boundary = c.part + Int32(after) if inside & (pieces == MERGE_MAX) & (planned == MERGE_MAX) else Int32(-1)
    fault = Int32(0) if length == piece.seqlen else Int32(FAULT_LENGTHS)
    fault = fault if inside & (pieces == expected) else Int32(FAULT_PIECES)
    pieces = pieces if (fault == 0) | (boundary >= 0) else Int32(0)
    return Cut(slot, pieces, boundary, fault)


@cute.jit
def partial_tile(a: DecodeArgs, slot: Int32, tile: Int32, kv_head: Int32):
    """Index of a row tile's partial results: tiles of one slot lie together, kv head by kv head."""
    tiles = (a.s_q * a.heads_per_kv + (TILE_M - 1)) // TILE_M
    kv_heads = a.h_q // a.heads_per_kv
    return (slot * kv_heads + kv_head) * tiles + tile
