"""The loader warps of the decode kernel: K pages and Q tiles by TMA."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.experimental import primitives as prims

from ..sm90.gmem import load_i32
from .config import BLOCK, NUM_SLABS, TILE_M
from .cta import EVICT_FIRST, K0L, K0R, K1L, K1R, Place, Shared
from .work import DecodeArgs, Piece, get_piece, load_record, next_position, not_done


class Loaders:
    """Part of decode.MlaDecode."""

    page: int  # tokens
    box_rows: int  # rows of one TMA box
    boxes: int  # boxes of a block, one page each
    q_rows: int  # of a tile of Q

    @cute.jit
    def load_k(self, desc, a: DecodeArgs, s: Shared, c: Place, lane: Int32):
        """All halves of all blocks, as soon as the math frees their place; runs ahead into the next piece."""
        c = c.in_registers()
        record = load_record(a, c.part, c.belongs)
        req, block, seqlen = record.req, record.block, record.seqlen
        phase0, phase1 = Int32(1), Int32(1)
        while not_done(req, block, record):
            piece = get_piece(a, record, c.tile, req, block, seqlen)
            ids = self.page_ids(a, piece, req, Int32(0), lane)
            for pair in cutlass.range((piece.n + 1) // 2, unroll=1):
                newest = piece.end - 1 - 2 * pair
                pages = ids
                ids = self.page_ids(a, piece, req, pair + 1, lane)
                both = 2 * pair + 1 < piece.n
                # the order in which the math frees the halves
                self.load_half(desc, a, s, c, K0L, phase0, pages, newest, piece.seqlen)
                self.load_half(desc, a, s, c, K0R, phase0, pages, newest, piece.seqlen)
                phase0 ^= 1
                if both:
                    self.load_half(desc, a, s, c, K1R, phase1, pages, newest - 1, piece.seqlen)
                    self.load_half(desc, a, s, c, K1L, phase1, pages, newest - 1, piece.seqlen)
                    phase1 ^= 1
            req, block, _, seqlen = next_position(a, record, piece, req, Int32(0))

    @cute.jit
    def page_ids(self, a: DecodeArgs, piece: Piece, req: Int32, pair: Int32, lane: Int32):
        """Lane l holds the page of box l % boxes of the pair's newer (l < boxes) or older block; 0 for none."""
        block = piece.end - 1 - 2 * pair - lane // self.boxes
        index = block * self.boxes + lane % self.boxes
        if const_expr(self.page > BLOCK):
            index = block // (self.page // BLOCK)
        page = Int32(0)
        wanted = (lane < 2 * self.boxes) & (block >= piece.first) & (index * self.page < piece.seqlen)
        if wanted:
            page = load_i32(a.block_table, Int64(req) * a.block_table_stride + index)
        return page

    @cute.jit
    def load_half(
        self, desc, a: DecodeArgs, s: Shared, c: Place, slot: cutlass.Constexpr[int], phase: Int32, pages: Int32,
        block: Int32, seqlen: Int32,
    ):  # fmt: skip
        """Load columns 0-255 (L) or 256-575 (R) of one block, only the pages that hold live rows."""
        stage = slot // 2
        slabs = range(0, 4) if slot % 2 == 0 else range(4, NUM_SLABS)
        live = (seqlen - block * BLOCK + self.box_rows - 1) // self.box_rows
        live = live if live < self.boxes else Int32(self.boxes)
        ids = [cute.arch.shuffle_sync(pages, stage * self.boxes + box) for box in range(self.boxes)]
        row = (block % (self.page // BLOCK)) * BLOCK if const_expr(self.page > BLOCK) else Int32(0)
        cute.arch.mbarrier_wait(s.k_empty + slot, phase)
        with cute.arch.elect_one():
            for slab in cutlass.range_constexpr(slabs.start, slabs.stop):
                full = s.k_full + stage * NUM_SLABS + slab
                cute.arch.mbarrier_arrive_and_expect_tx(full, live * (self.box_rows * 128))
                for box in cutlass.range_constexpr(self.boxes):
                    if box < live:
                        prims.cp_async_bulk_tensor_shared_cta_global(
                            s.k + ((stage * NUM_SLABS + slab) * BLOCK + box * self.box_rows) * 64,
                            desc.get_ptr(),
                            [Int32(slab * 64), row, c.kv_head, ids[box]],
                            full,
                            l2_cache_hint=Int64(EVICT_FIRST),
                        )

    @cute.jit
    def load_q(self, desc, a: DecodeArgs, s: Shared, c: Place):
        """Rows past the tile's last are whatever lies there, or zeros: rows don't mix, and theirs are not stored."""
        c = c.in_registers()
        record = load_record(a, c.part, c.belongs)
        req, block, seqlen = record.req, record.block, record.seqlen
        phase = Int32(1)
        while not_done(req, block, record):
            piece = get_piece(a, record, c.tile, req, block, seqlen)
            if piece.n > 0:
                head = c.kv_head * a.q_kv_step + (c.tile * TILE_M) % a.q_group
                token, batch = (c.tile * TILE_M) // a.q_group, req
                if a.ragged != 0:
                    batch = Int32(0)
                    if a.q_group > a.heads_per_kv:
                        head += piece.token0 * a.heads_per_kv
                    else:
                        token += piece.token0
                cute.arch.mbarrier_wait(s.q_empty, phase)
                phase ^= 1
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(s.q_full, NUM_SLABS * self.q_rows * 128)
                    prims.cp_async_bulk_tensor_shared_cta_global(
                        s.q,
                        desc.get_ptr(),
                        [Int32(0), head, token, Int32(0), batch],
                        s.q_full,
                        l2_cache_hint=Int64(EVICT_FIRST),
                    )
            req, block, _, seqlen = next_position(a, record, piece, req, Int32(0))
