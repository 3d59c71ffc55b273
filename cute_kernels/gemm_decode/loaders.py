"""The loader warps: weights and activations by TMA, and with FP8 the products of their scales."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.experimental import primitives as prims

from ..sm90.experts import WARP
from ..sm90.gmem import load_f32
from .config import BLOCK_BYTES, BOX_N, HALF_ROWS, TILE_W, GemmDecodeConfig
from .cta import Place, Shared, next_stage
from .work import GemmDecodeArgs, Piece, get_piece, get_span

EVICT_NORMAL = 0x1000000000000000  # L2 policies of CUTLASS
EVICT_FIRST = 0x12F0000000000000  # data that is read once


class Loaders:
    """Part of kernel.GemmDecode."""

    config: GemmDecodeConfig

    @cute.jit
    def load(self, x_map, w_map, a: GemmDecodeArgs, s: Shared, c: Place):
        """All K blocks of all pieces, as soon as the math frees their place. Of the activations only boxes with rows
        of the expert: what else is in shared memory may be anything, its products are not stored."""
        block_k, tile_n = self.config.block_k, self.config.tile_n
        second = a.columns if const_expr(self.config.paired) else Int32(HALF_ROWS)
        stage, phase = Int32(0), Int32(1)
        span = get_span(a, s.tables, c.cta, c.ctas)
        unit = span.begin
        while unit < span.stop:
            p = get_piece(a, s.tables, span, tile_n, unit, c.lane)
            boxes = (p.live + (BOX_N - 1)) // BOX_N
            row = p.column * self.config.tile_out
            for block in cutlass.range(p.k0, p.k1, unroll=1):
                full, k = s.full + stage, block * block_k
                cute.arch.mbarrier_wait(s.empty + stage, phase)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(full, (TILE_W + boxes * BOX_N) * BLOCK_BYTES)
                    for half in cutlass.range_constexpr(2):
                        to = s.w + (stage * TILE_W + half * HALF_ROWS) * block_k
                        copy_box(to, w_map, [k, row + half * second, p.expert], full, EVICT_FIRST)
                    for box in cutlass.range(boxes, unroll=1):
                        to = s.x + (stage * tile_n + box * BOX_N) * block_k
                        copy_box(to, x_map, [k, p.row + box * BOX_N, p.block], full, EVICT_NORMAL)
                stage, phase = next_stage(stage, phase, self.config.stages)
            unit += p.k1 - p.k0

    @cute.jit
    def load_factors(self, a: GemmDecodeArgs, s: Shared, c: Place):
        """FP8: what each product of a K block is multiplied by, for every row and both halves of the weight rows."""
        tile_n = self.config.tile_n
        stage, phase = Int32(0), Int32(1)
        span = get_span(a, s.tables, c.cta, c.ctas)
        unit = span.begin
        while unit < span.stop:
            p = get_piece(a, s.tables, span, tile_n, unit, c.lane)
            places = self.scale_places(a, p, c)
            scales = self.read_scales(a, places, p.k0)
            for block in cutlass.range(p.k0, p.k1, unroll=1):
                after = block + 1 if block + 1 < p.k1 else block
                coming = self.read_scales(a, places, after)
                cute.arch.mbarrier_wait(s.empty + stage, phase)
                for i in cutlass.range_constexpr(len(scales) - 2):
                    row = c.lane + i * WARP
                    if row < tile_n:
                        for half in cutlass.range_constexpr(2):
                            s.factors[row, half, stage] = scales[half] * scales[2 + i]
                cute.arch.mbarrier_arrive(s.full + stage)
                scales = coming
                stage, phase = next_stage(stage, phase, self.config.stages)
            unit += p.k1 - p.k0

    @cute.jit
    def scale_places(self, a: GemmDecodeArgs, p: Piece, c: Place):
        """Element indices of the scales of K block 0: two of weights, then one for each row of this lane. Rows that are
        not stored may have any."""
        left = p.column if const_expr(self.config.paired) else p.column * 2
        right = left + (a.w_scale_rows // 2 if const_expr(self.config.paired) else 1)
        right = right if right < a.w_scale_rows else left
        places = [(Int64(p.expert) * a.w_scale_rows + half) * a.k_blocks for half in (left, right)]
        for i in cutlass.range_constexpr(max(self.config.tile_n // WARP, 1)):
            row = c.lane + i * WARP
            row = row if row < p.live else Int32(0)
            places.append(Int64(p.block) * a.x_scale_block + Int64(p.row + row) * a.x_scale_row)
        return places

    def read_scales(self, a: GemmDecodeArgs, places, block):
        """Of one K block, in the order of the places."""
        weights = [load_f32(a.w_scales, place + block) for place in places[:2]]
        return weights + [load_f32(a.x_scales, place + Int64(block) * a.x_scale_k) for place in places[2:]]


def copy_box(to, tensor_map, coordinates, full, policy):
    prims.cp_async_bulk_tensor_shared_cta_global(
        to, tensor_map.get_ptr(), coordinates, full, l2_cache_hint=Int64(policy)
    )
