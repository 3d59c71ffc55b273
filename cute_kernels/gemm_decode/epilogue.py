"""The end of a piece: merge with the other pieces of its tile if there are any, SwiGLU, cast to FP8, store.

A thread's accumulators of a half (64 of 128 weight rows in each warpgroup) are, for every group of 8 rows of
activations, two of them (columns 2 * (lane % 4) and the next) in each of two weight rows (`row` and 8 further).
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, const_expr

from ..sm90 import ptx
from ..sm90.gmem import store_f32, store_i32
from .config import BOX_N, FP8_MAX, FP8_MIN_AMAX, GROUP, HALF_ROWS, WG_ROWS, GemmDecodeConfig
from .cta import MATH_WARPS, WG, Place, Shared, sync_math
from .work import GemmDecodeArgs, Piece

LOG2E = 1.4426950408889634


def value_index(group: int, h: int, i: int) -> int:
    """Accumulator, within a half, of the thread's weight row h (0, or 1 for 8 further) and of row 8 * group +
    2 * (lane % 4) + i of the activations."""
    return 4 * group + 2 * h + i


class Epilogue:
    """Part of kernel.GemmDecode."""

    config: GemmDecodeConfig

    # ------------------------------------------------------------------------------------------------ pieces

    @cute.jit
    def merge(self, a: GemmDecodeArgs, s: Shared, acc: cute.Tensor, p: Piece, c: Place):
        """Store the piece. The CTA that is the last to do so adds all of them up in the order of K, so that the bits do
        not depend on which one it is; True for it. Nobody waits for another CTA."""
        self.store_partial(a, acc, p, c.cta * 2 + Int32(p.k0 == 0), c)
        sync_math()
        leader = (c.wg == 0) & (c.t == 0)
        if leader:
            s.ticket[0] = cute.arch.atomic_add(a.tickets + p.first_cta, Int32(1), sem="acq_rel", scope="gpu")
        sync_math()
        last = cute.arch.make_warp_uniform(s.ticket[0]) == p.pieces - 1
        if last:
            if leader:
                store_i32(a.tickets, p.first_cta, Int32(0))
            acc.fill(0.0)
            for i in cutlass.range(p.pieces, unroll=1):
                self.add_partial(a, acc, p, (p.first_cta + i) * 2 + Int32(i == 0), c)
        return last

    def partial_place(self, a: GemmDecodeArgs, slot, c: Place):
        """Address of a thread's first four accumulators in a slot: each CTA has one for the piece that it begins with
        and one for a tile that it begins."""
        return a.partials.toint() + Int64(slot) * self.config.partial_bytes + (c.wg * WG + c.t) * 16

    @cute.jit
    def store_partial(self, a: GemmDecodeArgs, acc: cute.Tensor, p: Piece, slot: Int32, c: Place):
        place, groups = self.partial_place(a, slot, c), self.config.tile_n // BOX_N
        for g in cutlass.range_constexpr(groups):
            if g * BOX_N < p.live:
                for half in cutlass.range_constexpr(2):
                    j = half * groups + g
                    ptx.st_global(place + j * (2 * WG * 16), *(acc[4 * j + i] for i in range(4)))

    @cute.jit
    def add_partial(self, a: GemmDecodeArgs, acc: cute.Tensor, p: Piece, slot: Int32, c: Place):
        place, groups = self.partial_place(a, slot, c), self.config.tile_n // BOX_N
        for g in cutlass.range_constexpr(groups):
            if g * BOX_N < p.live:
                for half in cutlass.range_constexpr(2):
                    j = half * groups + g
                    x = ptx.ld_global_v4_f32(place + j * (2 * WG * 16))
                    for i in cutlass.range_constexpr(4):
                        acc[4 * j + i] = acc[4 * j + i] + x[i]

    # ------------------------------------------------------------------------------------------------ results

    @cute.jit
    def epilogue(self, a: GemmDecodeArgs, s: Shared, acc: cute.Tensor, p: Piece, c: Place):
        """Store a whole tile; the loads of the next one are under way."""
        values = self.config.tile_n // 2  # of a half
        if const_expr(self.config.paired):
            for i in cutlass.range_constexpr(values):
                gate = acc[i]
                sigmoid = cute.arch.rcp_approx(1.0 + cute.math.exp2(gate * -LOG2E, fastmath=True))
                acc[i] = gate * acc[values + i] * sigmoid
        if const_expr(self.config.epilogue == "swiglu_fp8"):
            self.scale_rows(a, s, acc, p, c)
        for half in cutlass.range_constexpr(self.config.tile_out // HALF_ROWS):
            for h in cutlass.range_constexpr(2):
                self.store_rows(a, acc, half, h, p, c)

    @cute.jit
    def store_rows(
        self, a: GemmDecodeArgs, acc: cute.Tensor, half: cutlass.Constexpr[int], h: cutlass.Constexpr[int], p: Piece,
        c: Place,
    ):  # fmt: skip
        """One weight row of the thread. Threads with neighbouring ones swap, so that the even one has both values of
        the first row of activations and the odd one those of the second."""
        fp8 = self.config.epilogue == "swiglu_fp8"
        odd = (c.row & 1) != 0
        column = p.column * self.config.tile_out + half * HALF_ROWS + c.wg * WG_ROWS + (c.row | 1) + 8 * h - 1
        row = (c.lane % 4) * 2 + Int32(odd)
        to = (Int64(p.block) * a.block_rows + p.row + row) * a.columns + column
        for g in cutlass.range_constexpr(self.config.tile_n // BOX_N):
            first = acc[half * (self.config.tile_n // 2) + value_index(g, h, 0)]
            second = acc[half * (self.config.tile_n // 2) + value_index(g, h, 1)]
            other = cute.arch.shuffle_sync_bfly(first if odd else second, offset=4)
            low, high = (other, second) if odd else (first, other)
            if (g * BOX_N + row < p.live) & (column < a.columns):
                place = to + Int64(g * BOX_N) * a.columns
                if const_expr(fp8):
                    store_e4m3x2(a.out.toint() + place, low, high)
                else:
                    store_bf16x2(a.out.toint() + place * 2, low, high)

    @cute.jit
    def scale_rows(self, a: GemmDecodeArgs, s: Shared, acc: cute.Tensor, p: Piece, c: Place):
        """Find the largest value of each row's 128 columns, which all math warps share, and divide by its scale."""
        groups, pair = self.config.tile_n // BOX_N, (c.lane % 4) * 2
        for g in cutlass.range_constexpr(groups):
            for i in cutlass.range_constexpr(2):
                values = [ptx.abs_f32(acc[value_index(g, h, i)]) for h in range(2)]
                amax = cute.arch.fmax(values[0], values[1])
                for offset in (4, 8, 16):
                    amax = cute.arch.fmax(amax, cute.arch.shuffle_sync_bfly(amax, offset=offset))
                if c.lane < 4:
                    s.amax[g * BOX_N + pair + i, c.wg * (MATH_WARPS // 2) + c.t // 32] = amax
        sync_math()
        for g in cutlass.range_constexpr(groups):
            for i in cutlass.range_constexpr(2):
                row = g * BOX_N + pair + i
                amax = Float32(FP8_MIN_AMAX)
                for warp in cutlass.range_constexpr(MATH_WARPS):
                    amax = cute.arch.fmax(amax, s.amax[row, warp])
                inverse = ptx.div_rn(Float32(FP8_MAX), amax)
                for h in cutlass.range_constexpr(2):
                    acc[value_index(g, h, i)] = acc[value_index(g, h, i)] * inverse
                if (c.wg == 0) & (c.t < 4) & (row < p.live):
                    place = (Int64(p.block) * a.block_rows + p.row + row) * (a.columns // GROUP) + p.column
                    store_f32(a.out_scales, place, ptx.div_rn(amax, Float32(FP8_MAX)))
        sync_math()  # the next tile may overwrite them


def store_bf16x2(address, low, high):
    """Two floats as bfloat16, to nearest even; low first."""
    frag = cute.make_rmem_tensor(2, BFloat16)
    frag[0], frag[1] = BFloat16(low), BFloat16(high)
    cute.arch.inline_ptx("st.global.b32 [{$r0}], {$r1};", read_only_args=[address, cute.recast_tensor(frag, Int32)[0]])


def store_e4m3x2(address, low, high):
    """Two floats as e4m3, to nearest even, saturating; low first."""
    cute.arch.inline_ptx(
        "{ .reg .b16 both; cvt.rn.satfinite.e4m3x2.f32 both, {$r2}, {$r1}; st.global.b16 [{$r0}], both; }",
        read_only_args=[address, low, high],
    )
