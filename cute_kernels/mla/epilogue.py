"""The end of a piece in the decode kernel: normalize, merge with the other piece if there are two, store."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr

from ..sm90 import ptx
from ..sm90.address import ld_vector
from ..sm90.gmem import load_f32, store_f32
from .config import FAULT_MERGE, HEAD_DIM_V, MERGE_MAX, MERGE_NS, TILE_M, WARPS_OUT
from .cta import LN2, LOG2E, Place, Shared, sync_math
from .faults import Faults, lse_index, report_fault
from .work import Cut, DecodeArgs, Piece, get_cut, partial_tile

STORED = 4  # what a ticket says when both have come and the first has stored


class Epilogue(Faults):
    """Part of decode.MlaDecode.

    A thread has two rows, row and row + 8, and of the 16 vectors of 16 columns of its warpgroup's half `vectors`.
    """

    dtype: type
    vectors = 16

    def row_group(self, c: Place):
        """Which 16 rows of the tile a warp has."""
        return c.t // 32

    def vector(self, j, c: Place):
        """The warp's j-th vector among those of the half."""
        return j

    def column(self, g, lane, c: Place):
        """Of the half: the first of the 8 columns in the g-th pair of vectors that a lane of a quad stores."""
        return (4 * g + lane) * 8

    def share_top(self, s: Shared, top: Float32, h: cutlass.Constexpr[int], c: Place):
        """The largest of a row, from that of each quad of lanes that has some of it."""
        return top

    @cute.jit
    def epilogue(
        self, a: DecodeArgs, s: Shared, O: cute.Tensor, L: cute.Tensor, piece: Piece, end_req: Int32, req: Int32,
        split: Int32, c: Place,
    ):  # fmt: skip
        """Divide by the row sums, store straight from registers: Q and K of the next piece keep streaming in."""
        for h in cutlass.range_constexpr(2):
            total = L[h] + cute.arch.shuffle_sync_bfly(L[h], offset=1)
            total += cute.arch.shuffle_sync_bfly(total, offset=2)
            if c.t % 4 == 0:
                s.row_sum[c.wg * TILE_M + c.row + 8 * h] = total
        lse = cute.make_rmem_tensor(2, Float32)
        lse[0], lse[1] = s.row_max[c.row], s.row_max[c.row + 8]
        sync_math()
        cut = get_cut(a, s, piece, end_req, req, c)
        total0 = s.row_sum[c.row] + s.row_sum[c.row + TILE_M]
        total1 = s.row_sum[c.row + 8] + s.row_sum[c.row + 8 + TILE_M]
        sync_math()  # the next piece may overwrite the statistics
        scale = cute.make_rmem_tensor(2, Float32)
        self.normalize(s, O, lse, scale, total0, total1, cut, c)
        leader = (c.wg == 0) & (c.t == 0)
        report_fault(s.addresses[1], cut.fault, req, leader)
        poison = Float32.nan if cut.fault != 0 else Float32(0.0)
        for h in cutlass.range_constexpr(2):
            lse[h] = lse[h] + poison  # NaN makes the row NaN when it is merged or stored
        self.finish(a, s, O, lse, scale, piece, cut, req, split, leader, c)

    @cute.jit
    def finish(
        self, a: DecodeArgs, s: Shared, O: cute.Tensor, lse: cute.Tensor, scale: cute.Tensor, piece: Piece, cut: Cut,
        req: Int32, split: Int32, leader: Boolean, c: Place,
    ):  # fmt: skip
        """Store the result, or a piece of it for others to merge."""
        rows = piece.s_q * a.heads_per_kv - c.tile * TILE_M  # live rows of the tile
        mine = Boolean(True)
        if cut.pieces > MERGE_MAX:
            self.store_partial(a, O, lse, scale, partial_tile(a, cut.slot + split, c.tile, c.kv_head), rows, c)
            sync_math()
            self.announce(a, cut, rows, c)
            mine = Boolean(False)
        elif cut.pieces > 0:
            mine = self.merge(a, s, O, lse, scale, cut, req, split, rows, leader, c)
        if mine:
            for h in cutlass.range_constexpr(2):
                self.store_whole(a, O, h, lse[h], piece, req, rows, c)

    @cute.jit
    def normalize(
        self, s: Shared, O: cute.Tensor, lse: cute.Tensor, scale: cute.Tensor, total0: Float32, total1: Float32,
        cut: Cut, c: Place,
    ):  # fmt: skip
        """Divide by the row sums, or bring a piece into the range of fp16: O * scale is the result. The maxima become
        lse, base 2. 0 and -inf where nothing was visible."""
        for h in cutlass.range_constexpr(2):
            total = total0 if const_expr(h == 0) else total1
            seen = total > 0.0
            factor = cute.arch.rcp_approx(total) if seen else Float32(0.0)
            lse[h] = lse[h] + cute.math.log2(total, fastmath=True) if seen else -Float32.inf
            scale[h] = Float32(1.0)
            if cut.pieces > 0:
                unit, inverse = self.unit(s, O, h, c)
                scale[h], factor = factor * unit, inverse
            for j in cutlass.range_constexpr(4 * self.vectors):
                i = (j // 2) * 4 + 2 * h + j % 2
                O[i] = O[i] * factor

    @cute.jit
    def merge(
        self, a: DecodeArgs, s: Shared, O: cute.Tensor, lse: cute.Tensor, scale: cute.Tensor, cut: Cut, req: Int32,
        split: Int32, rows: Int32, leader: Boolean, c: Place,
    ):  # fmt: skip
        """Merge the two pieces of a sequence. True for the CTA that ends up with the result in its registers.

        The CTA that comes first stores its piece and goes on, the second adds it to its own. Both orders give the same
        bits, so the result does not depend on timing. The second waits only for a CTA that is already storing; nobody
        waits for a CTA that may not be running. The ticket counts 1 per arrival and 2 for "stored", and returns to 0:
        exactly two CTAs come to a boundary, fault or not (work.get_cut). Two pieces of one CTA need no ticket.
        """
        meets, change = cut.boundary >= 0, Int32(2)
        ticket = a.tickets + partial_tile(a, cut.boundary, c.tile, c.kv_head)
        if leader:
            s.ticket[0] = split
            if meets:
                s.ticket[0] = cute.arch.atomic_add(ticket, Int32(1), sem="acq_rel", scope="gpu")
        sync_math()
        second = cute.arch.make_warp_uniform(s.ticket[0]) != 0
        if second:
            if meets:
                change = self.await_first(s, ticket, lse, req, leader)
            self.add_partial(a, O, lse, scale, partial_tile(a, cut.slot + (split ^ 1), c.tile, c.kv_head), rows, c)
        else:
            self.store_partial(a, O, lse, scale, partial_tile(a, cut.slot + split, c.tile, c.kv_head), rows, c)
        sync_math()
        if leader & meets:
            cute.arch.fence_acq_rel_gpu()
            cute.arch.atomic_add(ticket, change, sem="release", scope="gpu")
        return second

    @cute.jit
    def await_first(self, s: Shared, ticket: cute.Pointer, lse: cute.Tensor, req: Int32, leader: Boolean):
        """Wait until the first CTA has stored; what then brings the ticket back to 0.

        Only a plan that is overwritten meanwhile can make that take too long: the result is NaN then.
        """
        start, state, late = cute.arch.globaltimer(), Int32(0), Int32(0)
        while (state != STORED) & (late == 0):
            state = cute.arch.make_warp_uniform(cute.arch.load(ticket, Int32, sem="acquire", scope="gpu"))
            late = cute.arch.make_warp_uniform(Int32(cute.arch.globaltimer() - start > MERGE_NS))
        if state != STORED:
            lse.fill(Float32.nan)
            report_fault(s.addresses[1], Int32(FAULT_MERGE), req, leader)
        return -state

    @cute.jit
    def add_partial(
        self, a: DecodeArgs, O: cute.Tensor, lse: cute.Tensor, scale: cute.Tensor, tile_index: Int32, rows: Int32,
        c: Place,
    ):  # fmt: skip
        """The softmax-weighted mean of this CTA's piece, rounded as if it had been stored, and a stored one."""
        if self.row_group(c) * 16 < rows:
            address = self.partial_address(a, tile_index, c)
            loaded = [ld_vector(address + self.vector(j, c) * 512) for j in range(self.vectors)]
            mine, theirs = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
            for h in cutlass.range_constexpr(2):
                other, other_scale = ptx.ld_global_v2_f32(self.partial_row_address(a, tile_index, c) + h * 64)
                top = cute.arch.fmax(lse[h], other)
                seen = top != -Float32.inf  # also NaN, from a fault
                top = top if seen else Float32(0.0)
                mine[h] = cute.math.exp2(lse[h] - top, fastmath=True)
                theirs[h] = cute.math.exp2(other - top, fastmath=True)
                both = mine[h] + theirs[h]
                factor = cute.arch.rcp_approx(both) if seen else Float32(0.0)
                mine[h] = mine[h] * factor * scale[h]
                theirs[h] = theirs[h] * factor * other_scale
                lse[h] = top + cute.math.log2(both, fastmath=True) if seen else -Float32.inf
            for k in cutlass.range_constexpr(4 * self.vectors):
                rounded = ptx.unpack_f16(ptx.pack_f16(O[2 * k], O[2 * k + 1]))
                for i, value in enumerate(ptx.unpack_f16(loaded[k // 4][k % 4])):
                    O[2 * k + i] = ptx.weighted_sum(rounded[i], mine[k % 2], value, theirs[k % 2])

    @cute.jit
    def store_whole(
        self, a: DecodeArgs, O: cute.Tensor, h: cutlass.Constexpr[int], lse: Float32, piece: Piece, req: Int32,
        rows: Int32, c: Place,
    ):  # fmt: skip
        """One row of the result, and its lse."""
        row = c.row + 8 * h
        packed = c.tile * TILE_M + row
        token = packed // a.heads_per_kv
        head = c.kv_head * a.heads_per_kv + packed % a.heads_per_kv
        factor = Float32(1.0) if lse == lse else Float32.nan
        if a.has_sink != 0:
            if (row < rows) & (lse > -Float32.inf):  # else O is 0 already
                sink = load_f32(a.attn_sink, head) * LOG2E
                factor = cute.arch.rcp_approx(1.0 + cute.math.exp2(sink - lse, fastmath=True))
        out_row = a.out.toint() + (Int64(piece.token0 + token) * a.h_q + head) * (HEAD_DIM_V * 2)
        self.store_row(O, h, factor, out_row, row < rows, c)
        if (c.wg == 0) & (c.t % 4 == 0) & (row < rows):
            index = lse_index(a, req, piece.token0, token, head)
            store_f32(a.lse, index, lse * LN2 if lse != -Float32.inf else a.empty_lse)

    @cute.jit
    def store_row(self, O: cute.Tensor, h, factor: Float32, out_row: Int64, live, c: Place):
        """One row to 16 bits. The four lanes of a row transpose 4x4 words, so that each stores 16 adjacent bytes."""
        lane = c.t % 4
        frag = cute.make_rmem_tensor(8, self.dtype)
        words = cute.recast_tensor(frag, Int32)
        for g in cutlass.range_constexpr(self.vectors // 2):
            for i in cutlass.range_constexpr(8):
                frag[i] = self.dtype(O[(4 * g + i // 2) * 4 + 2 * h + i % 2] * factor)
            x = [words[i] for i in range(4)]
            for step, pairs in ((1, ((0, 1), (2, 3))), (2, ((0, 2), (1, 3)))):
                odd = (lane & step) != 0
                for lo, hi in pairs:
                    other = cute.arch.shuffle_sync_bfly(x[lo] if odd else x[hi], offset=step)
                    x[lo], x[hi] = (other if odd else x[lo]), (x[hi] if odd else other)
            if live:
                ptx.st_global(out_row + (c.wg * 256 + self.column(g, lane, c)) * 2, x[0], x[1], x[2], x[3])

    @cute.jit
    def store_partial(
        self, a: DecodeArgs, O: cute.Tensor, lse: cute.Tensor, scale: cute.Tensor, tile_index: Int32, rows: Int32,
        c: Place,
    ):  # fmt: skip
        """A piece as it lies in the registers: each store of a warp fills 512 adjacent bytes."""
        if self.row_group(c) * 16 < rows:  # else the whole warp has nothing but padding
            address = self.partial_address(a, tile_index, c)
            for j in cutlass.range_constexpr(self.vectors):
                words = [ptx.pack_f16(O[8 * j + 2 * w], O[8 * j + 2 * w + 1]) for w in range(4)]
                ptx.st_global(address + self.vector(j, c) * 512, *words)
            if c.t % 4 == 0:
                for h in cutlass.range_constexpr(2):
                    ptx.st_global(self.partial_row_address(a, tile_index, c) + h * 64, lse[h], scale[h])

    @cute.jit
    def unit(self, s: Shared, O: cute.Tensor, h: cutlass.Constexpr[int], c: Place):
        """A power of two by which a row's values of this warp become smaller than 2**15, hardly so; its inverse.

        A row with an infinity gets 1: the others keep their digits if they are of ordinary size.
        """
        tops = [Float32(0.0)] * 4  # one would be a chain of 64
        for j in cutlass.range_constexpr(4 * self.vectors):
            tops[j % 4] = cute.arch.fmax(tops[j % 4], ptx.abs_f32(O[(j // 2) * 4 + 2 * h + j % 2]))
        top = cute.arch.fmax(cute.arch.fmax(tops[0], tops[1]), cute.arch.fmax(tops[2], tops[3]))
        top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, offset=1))
        top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, offset=2))
        top = self.share_top(s, top, h, c)
        exponent = top.bitcast(Int32) >> 23
        exponent = exponent if exponent < 255 else Int32(141)
        exponent = exponent if exponent > 15 else Int32(15)
        return ((exponent - 14) << 23).bitcast(Float32), ((268 - exponent) << 23).bitcast(Float32)

    @cute.jit
    def announce(self, a: DecodeArgs, cut: Cut, rows: Int32, c: Place):
        """Count this piece for the combine kernel, with one instruction: lane = math warp."""
        tile = partial_tile(a, cut.slot // (MERGE_MAX + 1), c.tile, c.kv_head)
        first_row = c.t % 4 * 16
        wanted = (c.wg == 0) & (c.t < WARPS_OUT) & (first_row < rows)
        ptx.red_release_gpu_if(a.arrivals + tile * WARPS_OUT + c.t, Int32(1), Int32(wanted))

    def partial_address(self, a: DecodeArgs, tile_index, c: Place):
        """Of the first 16 bytes of the thread's lane in the decode warp's part of partial_out."""
        warp = Int64(tile_index) * WARPS_OUT + c.wg * 4 + self.row_group(c)
        return a.partial_out.toint() + (warp * 512 + c.t % 32) * 16

    def partial_row_address(self, a: DecodeArgs, tile_index, c: Place):
        """Of the thread's first row in partial_rows. Each warp stores the lse of its rows, so it needs no other."""
        row = (Int64(tile_index) * WARPS_OUT + c.wg * 4 + self.row_group(c)) * 16 + (c.t % 32) // 4
        return a.partial_rows.toint() + row * 8
