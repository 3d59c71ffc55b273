"""The two math warpgroups of the grouped GEMM: half the rows of the tile each."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import warpgroup

from ..sm90.gmem import load_f32
from .config import UNIT
from .cta import Shared, next_stage, release
from .epilogue import Epilogue
from .tiles import GemmArgs, Place, Tile, get_tile, num_tiles

K_STEPS = 4  # instructions that a block of 128 bytes takes: 16 bf16 or 32 FP8 columns each


class Math(Epilogue):
    """Part of gemm.GroupedGemm."""

    fp8: bool
    block_k: int

    @cute.jit
    def math(self, a: GemmArgs, mma: cute.TiledMma, s: Shared, c: Place):
        """All tiles of the CTA, which has at least one. What a thread accumulates: see Epilogue.value."""
        thread = mma.get_slice(0)
        width = mma.shape_mnk[1]
        tile_n, wg_rows = self.config.tile_n, self.config.wg_rows
        units = range(wg_rows // UNIT)  # of the warpgroup's rows
        rows = [cute.local_tile(s.sA, (UNIT, self.block_k), (c.wg * len(units) + i, 0, None)) for i in units]
        rA = [thread.make_fragment_A(thread.partition_A(unit)) for unit in rows]
        halves = [cute.local_tile(s.sB, (width, self.block_k), (i, 0, None)) for i in range(tile_n // width)]
        rB = [thread.make_fragment_B(thread.partition_B(half)) for half in halves]
        product = [cute.make_rmem_tensor(mma.partition_shape_C((UNIT, width)), Float32) for _ in units]
        acc = [cute.make_rmem_tensor(tile_n // 2, Float32)] if const_expr(self.fp8) else product
        stage, phase, index = Int32(0), Int32(0), c.cta
        total = num_tiles(a, s.tables)
        tile = get_tile(a, s.tables, self.config.raster_tiles, index, c.lane)
        scales = self.first_scales(a, tile, c)
        while index < total:
            live = tile.live > c.wg * wg_rows
            if live:
                if const_expr(self.fp8):
                    stage, phase = self.multiply_fp8(
                        a, mma, s, rA[0], rB, acc[0], product[0], tile, scales, stage, phase, c
                    )
                elif const_expr(wg_rows == UNIT):
                    stage, phase = self.multiply_bf16(a, mma, s, rA[:1], rB[0], acc, stage, phase, c)
                elif tile.live > c.wg * wg_rows + UNIT:
                    stage, phase = self.multiply_bf16(a, mma, s, rA, rB[0], acc, stage, phase, c)
                else:
                    stage, phase = self.multiply_bf16(a, mma, s, rA[:1], rB[0], acc, stage, phase, c)
            else:
                stage, phase = self.skip(a, s, stage, phase, c)
            # Here, so that the first scales are there when the epilogue is over.
            done, index = tile, index + c.ctas
            after = index if index < total else total - 1
            tile = get_tile(a, s.tables, self.config.raster_tiles, after, c.lane)
            scales = self.first_scales(a, tile, c)
            if live:
                self.epilogue(a, acc, done, c)

    @cute.jit
    def skip(self, a: GemmArgs, s: Shared, stage: Int32, phase: Int32, c: Place):
        """Nothing to multiply in this warpgroup's half of the tile: keep the pipeline going."""
        for _ in cutlass.range(a.k_blocks, unroll=1):
            cute.arch.mbarrier_wait(s.full + stage, phase)
            release(s, stage, c)
            stage, phase = next_stage(stage, phase)
        return stage, phase

    @cute.jit
    def multiply_bf16(
        self, a: GemmArgs, mma: cute.TiledMma, s: Shared, rA: list, rB: cute.Tensor, acc: list,
        stage: Int32, phase: Int32, c: Place,
    ):  # fmt: skip
        """acc = A B of as many units of rows as rA has, one block in flight while the next one's instructions are
        issued."""
        atom = cute.make_mma_atom(mma.op)
        before = stage
        for block in cutlass.range(a.k_blocks, unroll=1):
            cute.arch.mbarrier_wait(s.full + stage, phase)
            atom.set(warpgroup.Field.ACCUMULATE, block > 0)
            warpgroup.fence()
            for k in cutlass.range_constexpr(K_STEPS):
                for unit, sums in zip(rA, acc):
                    cute.gemm(atom, sums, unit[None, None, k, stage], rB[None, None, k, stage], sums)
                atom.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            if block > 0:
                release(s, before, c)
            before = stage
            stage, phase = next_stage(stage, phase)
        warpgroup.wait_group(0)
        release(s, before, c)
        return stage, phase

    @cute.jit
    def multiply_fp8(
        self, a: GemmArgs, mma: cute.TiledMma, s: Shared, rA: cute.Tensor, rB: list, acc: cute.Tensor,
        part: cute.Tensor, tile: Tile, scales: list, stage: Int32, phase: Int32, c: Place,
    ):  # fmt: skip
        """acc = sum over blocks of (A B of the block) * scales."""
        atom = cute.make_mma_atom(mma.op)
        acc.fill(0.0)
        places = self.scale_places(a, tile, c)
        for block in cutlass.range(a.k_blocks, unroll=1):
            after = block + 1 if block + 1 < a.k_blocks else block
            next_scales = self.load_scales(a, places, after)
            cute.arch.mbarrier_wait(s.full + stage, phase)
            for half in cutlass.range_constexpr(2):
                atom.set(warpgroup.Field.ACCUMULATE, False)
                warpgroup.fence()
                for k in cutlass.range_constexpr(K_STEPS):
                    cute.gemm(atom, part, rA[None, None, k, stage], rB[half][None, None, k, stage], part)
                    atom.set(warpgroup.Field.ACCUMULATE, True)
                warpgroup.commit_group()
                warpgroup.wait_group(0)
                if const_expr(half == 1):
                    release(s, stage, c)
                factors = [scales[h] * scales[2 + half] for h in range(2)]  # of the thread's rows
                for i in cutlass.range_constexpr(64):
                    acc[half * 64 + i] = acc[half * 64 + i] + part[i] * factors[(i // 2) % 2]
            scales = next_scales
            stage, phase = next_stage(stage, phase)
        return stage, phase

    @cute.jit
    def first_scales(self, a: GemmArgs, tile: Tile, c: Place):
        """Of K block 0; nothing with bf16."""
        return self.load_scales(a, self.scale_places(a, tile, c), Int32(0)) if const_expr(self.fp8) else []

    @cute.jit
    def scale_places(self, a: GemmArgs, tile: Tile, c: Place):
        """Element indices of the scales of K block 0: the thread's two rows, the two halves of the columns. Those of
        rows and columns that are not stored may be any."""
        base = Int64(tile.block) * a.a_scale_block
        rows = [c.row, c.row + 8]
        for h in cutlass.range_constexpr(2):
            rows[h] = rows[h] if rows[h] < tile.live else Int32(0)
        left = tile.column if const_expr(self.config.paired) else tile.column * 2
        right = left + (a.b_scale_rows // 2 if const_expr(self.config.paired) else 1)
        right = right if right < a.b_scale_rows else left
        columns = [(Int64(tile.expert) * a.b_scale_rows + column) * a.k_blocks for column in (left, right)]
        return [base + Int64(tile.row + row) * a.a_scale_row for row in rows] + columns

    def load_scales(self, a: GemmArgs, places, block):
        """Of one K block: two of activations, two of weights."""
        offset = Int64(block) * a.a_scale_k
        rows = [load_f32(a.a_scales, place + offset) for place in places[:2]]
        return rows + [load_f32(a.b_scales, place + block) for place in places[2:]]
