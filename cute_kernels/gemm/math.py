"""The math warpgroups of the grouped GEMM: the same part of the rows of the tile each."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import warpgroup

from ..sm90.address import ld_f32
from .config import GROUP, UNIT
from .cta import Shared, get_order, next_stage, release
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
        stage, phase, index, number = Int32(0), Int32(0), c.cta, Int32(0)
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
            done, index = tile, get_order(s, number)
            number += 1
            after = index if index < total else total - 1
            tile = get_tile(a, s.tables, self.config.raster_tiles, after, c.lane)
            scales = self.first_scales(a, tile, c)
            if live:
                self.epilogue(a, acc, done, c)

    @cute.jit
    def skip(self, a: GemmArgs, s: Shared, stage: Int32, phase: Int32, c: Place):
        """Nothing to multiply in this warpgroup's rows of the tile: keep the pipeline going."""
        for _ in cutlass.range(a.k_blocks, unroll=1):
            cute.arch.mbarrier_wait(s.full + stage, phase)
            release(s, stage, c)
            stage, phase = next_stage(self.config.stages, stage, phase)
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
            stage, phase = next_stage(self.config.stages, stage, phase)
        warpgroup.wait_group(0)
        release(s, before, c)
        return stage, phase

    @cute.jit
    def multiply_fp8(
        self, a: GemmArgs, mma: cute.TiledMma, s: Shared, rA: cute.Tensor, rB: list, acc: cute.Tensor,
        part: cute.Tensor, tile: Tile, scales: list, stage: Int32, phase: Int32, c: Place,
    ):  # fmt: skip
        """acc = sum over blocks of (A B of the block) * scales. The next block's scales are loaded behind the first
        products, so that no addresses stand between products."""
        atom = cute.make_mma_atom(mma.op)
        acc.fill(0.0)
        at = self.scale_addresses(a, tile, c)
        for block in cutlass.range(a.k_blocks, unroll=1):
            next_scales = scales
            cute.arch.mbarrier_wait(s.full + stage, phase)
            for half in cutlass.range_constexpr(len(rB)):
                atom.set(warpgroup.Field.ACCUMULATE, False)
                warpgroup.fence()
                for k in cutlass.range_constexpr(K_STEPS):
                    cute.gemm(atom, part, rA[None, None, k, stage], rB[half][None, None, k, stage], part)
                    atom.set(warpgroup.Field.ACCUMULATE, True)
                warpgroup.commit_group()
                if const_expr(half == 0):
                    more = block + 1 < a.k_blocks
                    row_step, column_step = a.a_scale_k * 4 if more else Int64(0), Int64(4) if more else Int64(0)
                    at = [at[0] + row_step, at[1] + row_step, *[address + column_step for address in at[2:]]]
                    next_scales = [ld_f32(address) for address in at]
                warpgroup.wait_group(0)
                if const_expr(half == len(rB) - 1):
                    release(s, stage, c)
                factors = [[row * column for row in scales[:2]] for column in scales[2:]]
                for i in cutlass.range_constexpr(64):
                    value = half * 64 + i
                    side = value * len(factors) // (self.config.tile_n // 2)
                    acc[value] = acc[value] + part[i] * factors[side][(i // 2) % 2]
            scales = next_scales
            stage, phase = next_stage(self.config.stages, stage, phase)
        return stage, phase

    @cute.jit
    def first_scales(self, a: GemmArgs, tile: Tile, c: Place):
        """Of K block 0; nothing with bf16."""
        return [ld_f32(address) for address in self.scale_addresses(a, tile, c)] if const_expr(self.fp8) else []

    @cute.jit
    def scale_addresses(self, a: GemmArgs, tile: Tile, c: Place):
        """Of K block 0: the thread's two rows, then the weight rows: one scale, or one of each half of the tile's.
        Those of rows and columns that are not stored may be any."""
        base = Int64(tile.block) * a.a_scale_block + Int64(tile.row) * a.a_scale_row
        rows = [row if row < tile.live else Int32(0) for row in (c.row, c.row + 8)]
        columns = [tile.column * self.config.tile_out // GROUP]
        if const_expr(self.config.paired):
            columns.append(columns[0] + a.b_scale_rows // 2)
        elif const_expr(self.config.tile_n > GROUP):
            columns.append(columns[0] + 1 if columns[0] + 1 < a.b_scale_rows else columns[0])
        first = Int64(tile.expert) * a.b_scale_rows
        return [a.a_scales.toint() + (base + Int64(row) * a.a_scale_row) * 4 for row in rows] + [
            a.b_scales.toint() + (first + column) * a.k_blocks * 4 for column in columns
        ]
