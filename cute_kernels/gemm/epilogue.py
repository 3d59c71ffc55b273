"""The end of a tile: SwiGLU and the cast to FP8 where they are asked for, then 16-byte stores from registers."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, const_expr

from ..sm90 import ptx
from ..sm90.gmem import store_f32
from .config import FP8_MAX, FP8_MIN_AMAX, GROUP, UNIT, GemmConfig
from .tiles import GemmArgs, Place, Tile

LOG2E = 1.4426950408889634


class Epilogue:
    """Part of gemm.GroupedGemm."""

    config: GemmConfig

    @cute.jit
    def epilogue(self, a: GemmArgs, acc: list, tile: Tile, c: Place):
        """Store the thread's rows of the tile; the loads of the next one are under way."""
        for h in cutlass.range_constexpr(2 * self.config.wg_rows // UNIT):
            row = c.row + h // 2 * UNIT + h % 2 * 8
            live = row < tile.live
            out_row = Int64(tile.block) * a.block_rows + tile.row + row
            if const_expr(self.config.epilogue == "swiglu_fp8"):
                self.store_row_fp8(a, acc, h, out_row, live, tile.column, c)
            else:
                self.store_row(a, acc, h, out_row, live, tile.column * self.config.tile_out, c)

    def value(self, acc: list, h: int, group: int, i: int):
        """Output in column 8 * group + 2 * (lane % 4) + i (i 0 or 1) of the thread's row h (8 rows further if odd, and
        a unit further for each two).

        SwiGLU is not written over the sums: registers that more than wgmma writes make ptxas serialise the next tile
        (C7515).
        """
        sums, index = acc[h // 2], 4 * group + h % 2 * 2 + i
        if not self.config.paired:
            return sums[index]
        gate, up = sums[index], sums[index + self.config.tile_n // 4]
        sigmoid = cute.arch.rcp_approx(1.0 + cute.math.exp2(gate * -LOG2E, fastmath=True))
        return gate * sigmoid * up

    @cute.jit
    def store_row(
        self, a: GemmArgs, acc: list, h: cutlass.Constexpr[int], out_row: Int64, live, column: Int32, c: Place
    ):
        """One row as bf16, four groups of 8 columns at a time, a group in each lane."""
        base = a.out.toint() + (out_row * a.columns + column) * 2
        frag = cute.make_rmem_tensor(8, BFloat16)
        words = cute.recast_tensor(frag, Int32)
        for part in cutlass.range_constexpr(self.config.tile_out // 32):
            for g in cutlass.range_constexpr(4):
                for i in cutlass.range_constexpr(2):
                    frag[2 * g + i] = BFloat16(self.value(acc, h, 4 * part + g, i))
            x = transpose([words[g] for g in range(4)], c.lane)
            offset = part * 32 + (c.lane % 4) * 8
            if live & (column + offset < a.columns):
                ptx.st_global(base + offset * 2, x[0], x[1], x[2], x[3])

    @cute.jit
    def store_row_fp8(
        self, a: GemmArgs, acc: list, h: cutlass.Constexpr[int], out_row: Int64, live, column: Int32, c: Place
    ):
        """One row as e4m3 and its scale. A word holds a lane's columns of two groups of 8."""
        values = [self.value(acc, h, g, i) for g in range(GROUP // 8) for i in range(2)]
        amax = Float32(FP8_MIN_AMAX)
        for g in cutlass.range_constexpr(GROUP // 4):
            amax = cute.arch.fmax(amax, ptx.abs_f32(values[g]))
        amax = cute.arch.fmax(amax, cute.arch.shuffle_sync_bfly(amax, offset=1))
        amax = cute.arch.fmax(amax, cute.arch.shuffle_sync_bfly(amax, offset=2))
        scale, inverse = ptx.div_rn(amax, Float32(FP8_MAX)), ptx.div_rn(Float32(FP8_MAX), amax)
        base = a.out.toint() + out_row * a.columns + column * GROUP
        for part in cutlass.range_constexpr(2):
            words = []
            for pair in cutlass.range_constexpr(4):
                first = 16 * part + 4 * pair
                words.append(ptx.cvt_e4m3x4(*[value * inverse for value in values[first : first + 4]]))
            x = transpose(words, c.lane)
            low = [cute.arch.prmt(x[i], x[i + 1], 0x5410) for i in (0, 2)]
            high = [cute.arch.prmt(x[i], x[i + 1], 0x7632) for i in (0, 2)]
            if live:
                ptx.st_global(base + part * 64 + (c.lane % 4) * 16, low[0], low[1], high[0], high[1])
        if live & (c.lane % 4 == 0):
            store_f32(a.out_scales, out_row * (a.columns // GROUP) + column, scale)


def transpose(x, lane):
    """Words x[0] to x[3] of four neighbouring lanes: word i of lane j becomes word j of lane i."""
    for step, pairs in ((1, ((0, 1), (2, 3))), (2, ((0, 2), (1, 3)))):
        odd = (lane & step) != 0
        for low, high in pairs:
            other = cute.arch.shuffle_sync_bfly(pick(odd, x[low], x[high]), offset=step)
            x[low], x[high] = pick(odd, other, x[low]), pick(odd, x[high], other)
    return x


@cute.jit
def pick(condition, yes, no):
    return yes if condition else no
