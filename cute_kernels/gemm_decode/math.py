"""The two math warpgroups: 64 weight rows of each half of a tile, times all rows of activations."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.cute.nvgpu import warpgroup

from .config import WG_ROWS
from .cta import Place, Shared, next_stage
from .epilogue import Epilogue
from .work import GemmDecodeArgs, get_piece, get_span

K_STEPS = 4  # instructions that a block of 128 bytes takes: 16 bf16 or 32 FP8 columns each


class Math(Epilogue):
    """Part of kernel.GemmDecode."""

    fp8: bool

    @cute.jit
    def math(self, a: GemmDecodeArgs, mma: cute.TiledMma, s: Shared, c: Place):
        """All pieces of the CTA. acc[tile_n / 2 * half ...]: see `epilogue.value_index`."""
        tile_n = self.config.tile_n
        thread = mma.get_slice(0)
        rows = [cute.local_tile(s.sW, (WG_ROWS, self.config.block_k), (2 * half + c.wg, 0, None)) for half in range(2)]
        rW = [thread.make_fragment_A(thread.partition_A(part)) for part in rows]
        rX = thread.make_fragment_B(thread.partition_B(s.sX))
        acc = cute.make_rmem_tensor(tile_n, Float32)
        shape = mma.partition_shape_C((WG_ROWS, tile_n))
        halves = [cute.make_tensor(acc.iterator + half * (tile_n // 2), cute.make_layout(shape)) for half in range(2)]
        stage, phase = Int32(0), Int32(0)
        span = get_span(a, s.tables, c.cta, c.ctas)
        unit = span.begin
        while unit < span.stop:
            p = get_piece(a, s.tables, span, tile_n, unit, c.lane)
            acc.fill(0.0)
            blocks = p.k1 - p.k0
            if const_expr(self.fp8):
                stage, phase = self.multiply_fp8(mma, s, rW, rX, acc, shape, blocks, stage, phase, c)
            else:
                stage, phase = self.multiply_bf16(mma, s, rW, rX, halves, blocks, stage, phase, c)
            whole = Boolean(True)
            if p.pieces > 1:
                whole = self.merge(a, s, acc, p, c)
            if whole:
                self.epilogue(a, s, acc, p, c)
            unit += blocks

    @cute.jit
    def multiply_bf16(
        self, mma: cute.TiledMma, s: Shared, rW: list, rX: cute.Tensor, acc: list, blocks: Int32, stage: Int32,
        phase: Int32, c: Place,
    ):  # fmt: skip
        """acc += W X, one block in flight while the next one's instructions are issued."""
        atom = cute.make_mma_atom(mma.op)
        atom.set(warpgroup.Field.ACCUMULATE, True)
        before = stage
        for block in cutlass.range(blocks, unroll=1):
            cute.arch.mbarrier_wait(s.full + stage, phase)
            warpgroup.fence()
            for half in cutlass.range_constexpr(2):
                for k in cutlass.range_constexpr(K_STEPS):
                    a, b = rW[half][None, None, k, stage], rX[None, None, k, stage]
                    cute.gemm(atom, acc[half], a, b, acc[half])
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            if (c.lane == 0) & (block > 0):
                cute.arch.mbarrier_arrive(s.empty + before)
            before = stage
            stage, phase = next_stage(stage, phase, self.config.stages)
        warpgroup.wait_group(0)
        if c.lane == 0:
            cute.arch.mbarrier_arrive(s.empty + before)
        return stage, phase

    @cute.jit
    def multiply_fp8(
        self, mma: cute.TiledMma, s: Shared, rW: list, rX: cute.Tensor, acc: cute.Tensor, shape: cute.Shape,
        blocks: Int32, stage: Int32, phase: Int32, c: Place,
    ):  # fmt: skip
        """acc += sum over blocks of (W X of the block) * factors, one half of the weight rows after the other."""
        tile_n = self.config.tile_n
        atom = cute.make_mma_atom(mma.op)
        part = cute.make_rmem_tensor(shape, Float32)
        for _ in cutlass.range(blocks, unroll=1):
            cute.arch.mbarrier_wait(s.full + stage, phase)
            for half in cutlass.range_constexpr(2):
                atom.set(warpgroup.Field.ACCUMULATE, False)
                warpgroup.fence()
                for k in cutlass.range_constexpr(K_STEPS):
                    cute.gemm(atom, part, rW[half][None, None, k, stage], rX[None, None, k, stage], part)
                    atom.set(warpgroup.Field.ACCUMULATE, True)
                warpgroup.commit_group()
                warpgroup.wait_group(0)
                factors = [s.factors[(i // 2) * 8 + (c.lane % 4) * 2 + i % 2, half, stage] for i in range(tile_n // 4)]
                for i in cutlass.range_constexpr(tile_n // 2):
                    j = half * (tile_n // 2) + i
                    acc[j] = acc[j] + part[i] * factors[i // 4 * 2 + i % 2]
            cute.arch.sync_warp()  # all lanes have read their factors
            if c.lane == 0:
                cute.arch.mbarrier_arrive(s.empty + stage)
            stage, phase = next_stage(stage, phase, self.config.stages)
        return stage, phase
