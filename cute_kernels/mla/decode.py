"""Dense MLA decode, split over the keys (sm_90a).

    S = scale * Q K^T        (64 rows x 64 keys a block, rows = packed (token, head) of one kv head)
    O = softmax(S) V         V = first 512 columns of K

Grid (row tiles, kv heads, partitions), one CTA per SM, persistent over the pieces the planner gave its partition.

Roles (384 threads)
    warps 0-3   WG0   scores of even blocks, output columns 0-255     240 registers
    warps 4-7   WG1   scores of odd blocks, output columns 256-511    240 registers
    warp  8     K loader (TMA), runs ahead of the math across pieces   24 registers
    warp  9     Q loader (TMA), as soon as the piece before is done with Q; warps 10, 11 fill up the warpgroup

A full 64x512 fp32 output takes half the register file, so one CTA holds one output tile, cut in columns, and the two
warpgroups alternate on the softmax instead of on output tiles. One pair of blocks, the newest key block first:

    WG0  max S0, publish m, a0 | P0 = exp | O_L += P0 V0_L | P0 *= a1 -> smem          | O_L *= a1; O_L += P1 V1_L | S0' = Q K0'
    WG1         max S1         | publish m, a1 | P1 = exp -> smem; O_R += P1 V1_R      | O_R += P0 V0_R            | S1' = Q K1'

Going from the newest block down puts the causal mask and the unused tail rows into the first blocks, before the loop.

Pipelines (mbarriers; L = columns 0-255, R = 256-575)
    k_full[4], k_empty[4]   K0L K0R K1L K1R; full: bytes of the boxes; empty: one arrive of the warpgroup that multiplies that V half
    q_full   bytes of the slabs               q_empty  one arrive of each warpgroup
Named barriers (256 threads, one side arrives, the other waits)
    MAX0 a0 and m ready | MAX1 a1 and m ready | P0 in smem | P1 in smem and V0_R issued | SYNC both

Shared memory (bytes): Q 73728, K 2 x 73728, P0 8192, row statistics 1024+512, mbarriers 80. P1 overlays the RoPE slab of Q,
which both warpgroups keep in registers.

Bounds: 2176 tensor cycles and 2304 shared-memory cycles per block and CTA; 73,728 B of DRAM per block.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hh
from cutlass import BFloat16, Boolean, Float16, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.cute.runtime import make_fake_compact_tensor
from cutlass.memory import SmemAllocator
from cutlass.utils import LayoutEnum

from ..jit import Program
from ..sm90 import ptx
from ..sm90.args import fake_args, param_kinds
from ..sm90.gmem import load_f32, load_i32, store_f32
from .config import BLOCK, HEAD_DIM, HEAD_DIM_V, MERGE_MAX, NUM_SLABS, RESCALE_LOG2, SLAB_BYTES, TILE_M, DecodeConfig
from .work import DecodeArgs, Piece, get_piece, load_record, next_position, not_done, partial_tile, visible_keys

WG = 128
BAR_MAX0, BAR_MAX1, BAR_P0, BAR_P1, BAR_SYNC = 1, 2, 3, 4, 5
K0L, K0R, K1L, K1R = 0, 1, 2, 3
THREADS = 3 * WG
EVICT_FIRST = 0x12F0000000000000
LN2 = 0.6931471805599453
LOG2E = 1.4426950408889634
NEG_BIG = -1e30  # finite start of the running maximum: inf - inf never happens


@dataclass(frozen=True)
class Mmas:
    qk: cute.TiledMma  # 64x64, both operands in shared memory
    qk_rs: cute.TiledMma  # the same with Q in registers
    pv_rs: cute.TiledMma  # 64x256, P in registers
    pv: cute.TiledMma  # 64x256, P in shared memory


@dataclass(frozen=True)
class Shared:
    """Views of the CTA's shared memory."""

    sQ: cute.Tensor  # (64, 64, 9)
    sK: cute.Tensor  # (64, 64, 18): slabs of K0, then of K1
    sP0: cute.Tensor  # (64, 64)
    row_max: cute.Tensor  # (64,) running maximum, scaled, base 2
    scale0: cute.Tensor  # (64,) what WG0's step does to sums and outputs
    scale1: cute.Tensor  # (64,) the same for WG1
    row_sum: cute.Tensor  # (128,)
    ticket: cute.Tensor  # (1,) this CTA's turn at a merge
    q_full: cute.Pointer
    q_empty: cute.Pointer
    k_full: cute.Pointer
    k_empty: cute.Pointer


class MlaDecode:
    def __init__(self, config: DecodeConfig):
        self.dtype = BFloat16 if config.dtype == "bf16" else Float16
        self.page = config.page_size
        self.box_rows = config.box_rows
        self.boxes = BLOCK // self.box_rows

        @cute.struct
        class Smem:
            q_full: cute.struct.MemRange[Int64, 1]
            q_empty: cute.struct.MemRange[Int64, 1]
            k_full: cute.struct.MemRange[Int64, 4]
            k_empty: cute.struct.MemRange[Int64, 4]
            row_max: cute.struct.MemRange[Float32, TILE_M]
            scale0: cute.struct.MemRange[Float32, TILE_M]
            scale1: cute.struct.MemRange[Float32, TILE_M]
            row_sum: cute.struct.MemRange[Float32, 2 * TILE_M]
            ticket: cute.struct.MemRange[Int32, 1]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, TILE_M * HEAD_DIM], 1024]
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, 2 * BLOCK * HEAD_DIM], 1024]
            p0: cute.struct.Align[cute.struct.MemRange[self.dtype, TILE_M * BLOCK], 1024]

        self.Smem = Smem

    # ------------------------------------------------------------------------------------------------ host

    @cute.jit
    def __call__(self, mQ: cute.Tensor, mK: cute.Tensor, args: DecodeArgs, stream: cuda.CUstream):
        """mQ (heads, 576, tokens, b), mK (page rows, 576, h_kv, pages): only the ranks matter, the launcher encodes the maps."""
        slab = cute.tile_to_shape(self.swizzle_atom(), (TILE_M, 64), order=(0, 1))
        box = cute.tile_to_shape(self.swizzle_atom(), (self.box_rows, 64), order=(0, 1))
        load = cpasync.CopyBulkTensorTileG2SOp()
        tma_q, tQ = cpasync.make_tiled_tma_atom(load, mQ, slab, (TILE_M, 64))
        tma_k, tK = cpasync.make_tiled_tma_atom(load, mK, box, (self.box_rows, 64))
        self.kernel(tma_q, tQ, tma_k, tK, args).launch(
            grid=(1, 1, 1), block=(THREADS, 1, 1), stream=stream, min_blocks_per_mp=1, use_pdl=True
        )

    def swizzle_atom(self):
        kind = hh.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, self.dtype, 64)
        return warpgroup.make_smem_layout_atom(kind, self.dtype)

    def make_mmas(self):
        def mma(b_major, n, a_source):
            return hh.make_trivial_tiled_mma(
                self.dtype, self.dtype, OperandMajorMode.K, b_major, Float32,
                atom_layout_mnk=(1, 1, 1), tiler_mn=(TILE_M, n), a_source=a_source,
            )  # fmt: skip

        smem, rmem = warpgroup.OperandSource.SMEM, warpgroup.OperandSource.RMEM
        K, MN = OperandMajorMode.K, OperandMajorMode.MN
        return Mmas(mma(K, BLOCK, smem), mma(K, BLOCK, rmem), mma(MN, 256, rmem), mma(MN, 256, smem))

    # ---------------------------------------------------------------------------------------------- device

    @cute.kernel
    def kernel(
        self, tma_q: cute.CopyAtom, tQ: cute.Tensor, tma_k: cute.CopyAtom, tK: cute.Tensor, args: DecodeArgs
    ):
        tid, _, _ = cute.arch.thread_idx()
        tile, kv_head, part = cute.arch.block_idx()
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        sm = SmemAllocator().allocate(self.Smem)
        if tid == 0:
            cute.arch.mbarrier_init(sm.q_full.data_ptr(), 1)
            cute.arch.mbarrier_init(sm.q_empty.data_ptr(), 2)
            for i in cutlass.range_constexpr(4):
                cute.arch.mbarrier_init(sm.k_full.data_ptr() + i, 1)
                cute.arch.mbarrier_init(sm.k_empty.data_ptr() + i, 1)
        cute.arch.mbarrier_init_fence()
        atom = self.swizzle_atom()
        slab = cute.tile_to_shape(atom, (64, 64), order=(0, 1))
        q_slabs = cute.tile_to_shape(atom, (64, 64, NUM_SLABS), order=(0, 1, 2))
        k_slabs = cute.tile_to_shape(atom, (64, 64, 2 * NUM_SLABS), order=(0, 1, 2))
        shared = Shared(
            sQ=sm.q.get_tensor(q_slabs.outer, swizzle=q_slabs.inner),
            sK=sm.k.get_tensor(k_slabs.outer, swizzle=k_slabs.inner),
            sP0=sm.p0.get_tensor(slab.outer, swizzle=slab.inner),
            row_max=sm.row_max.get_tensor(cute.make_layout(TILE_M)),
            scale0=sm.scale0.get_tensor(cute.make_layout(TILE_M)),
            scale1=sm.scale1.get_tensor(cute.make_layout(TILE_M)),
            row_sum=sm.row_sum.get_tensor(cute.make_layout(2 * TILE_M)),
            ticket=sm.ticket.get_tensor(cute.make_layout(1)),
            q_full=sm.q_full.data_ptr(),
            q_empty=sm.q_empty.data_ptr(),
            k_full=sm.k_full.data_ptr(),
            k_empty=sm.k_empty.data_ptr(),
        )
        if warp_id == 8:
            cpasync.prefetch_descriptor(tma_k)
        if warp_id == 9:
            cpasync.prefetch_descriptor(tma_q)
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()

        if warp_id >= 8:
            cute.arch.setmaxregister_decrease(24)
            if warp_id == 8:
                k_boxes = cute.tile_to_shape(atom, (self.box_rows, 64, 2 * NUM_SLABS * self.boxes), order=(0, 1, 2))
                sK = sm.k.get_tensor(k_boxes.outer, swizzle=k_boxes.inner)
                self.load_k(tma_k, tK, sK, args, shared, tile, kv_head, part, tid % 32)
            if warp_id == 9:
                self.load_q(tma_q, tQ, args, shared, tile, kv_head, part)
        else:
            cute.arch.setmaxregister_increase(240)
            mmas = self.make_mmas()
            v_half = cute.tile_to_shape(atom, (64, 256), order=(0, 1))
            if warp_id < 4:
                self.math(0, args, mmas, shared, v_half, tile, kv_head, part, tid)
            else:
                self.math(1, args, mmas, shared, v_half, tile, kv_head, part, tid - WG)

    # ------------------------------------------------------------------------------------------- K loader

    @cute.jit
    def load_k(
        self,
        tma: cute.CopyAtom,
        tK: cute.Tensor,
        sK: cute.Tensor,
        a: DecodeArgs,
        s: Shared,
        tile: Int32,
        kv_head: Int32,
        part: Int32,
        lane: Int32,
    ):
        # (row block in page, column slab, kv head, page)
        gK = cute.local_tile(tK, (self.box_rows, 64), (None, None, None, None))
        tSs, tSg = cpasync.tma_partition(
            tma, 0, cute.make_layout(1), cute.group_modes(sK, 0, 2), cute.group_modes(gK, 0, 2)
        )
        full, empty = s.k_full, s.k_empty
        record = load_record(a, part)
        req, block, seqlen = record.req, record.block, record.seqlen
        phase0, phase1 = Int32(1), Int32(1)
        while not_done(req, block, record):
            piece = get_piece(a, record, tile, req, block, seqlen)
            ids = self.page_ids(a, piece, req, Int32(0), lane)
            for pair in cutlass.range((piece.n + 1) // 2, unroll=1):
                newest = piece.end - 1 - 2 * pair
                pages = ids
                ids = self.page_ids(a, piece, req, pair + 1, lane)
                both = 2 * pair + 1 < piece.n
                # the order in which the math frees the halves
                self.load_half(tma, tSs, tSg, full, empty, K0L, phase0, pages, newest, piece.seqlen, kv_head)
                if both:
                    self.load_half(tma, tSs, tSg, full, empty, K1R, phase1, pages, newest - 1, piece.seqlen, kv_head)
                self.load_half(tma, tSs, tSg, full, empty, K0R, phase0, pages, newest, piece.seqlen, kv_head)
                phase0 ^= 1
                if both:
                    self.load_half(tma, tSs, tSg, full, empty, K1L, phase1, pages, newest - 1, piece.seqlen, kv_head)
                    phase1 ^= 1
            req, block, _, seqlen = next_position(a, record, piece, req, Int32(0))

    @cute.jit
    def page_ids(self, a: DecodeArgs, piece: Piece, req: Int32, pair: Int32, lane: Int32):
        """Lane l holds the page of box l % boxes of the pair's newer (l < boxes) or older block; 0 where there is none."""
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
        self,
        tma: cute.CopyAtom,
        tSs: cute.Tensor,
        tSg: cute.Tensor,
        full: cute.Pointer,
        empty: cute.Pointer,
        slot: cutlass.Constexpr[int],
        phase: Int32,
        pages: Int32,
        block: Int32,
        seqlen: Int32,
        kv_head: Int32,
    ):
        """Load columns 0-255 (L) or 256-575 (R) of one block, only the pages that hold live rows."""
        stage = slot // 2
        slabs = range(0, 4) if slot % 2 == 0 else range(4, NUM_SLABS)
        live = (seqlen - block * BLOCK + self.box_rows - 1) // self.box_rows
        live = live if live < self.boxes else Int32(self.boxes)
        cute.arch.mbarrier_wait(empty + slot, phase)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(full + slot, live * (len(slabs) * self.box_rows * 128))
        for box in cutlass.range_constexpr(self.boxes):
            page = cute.arch.shuffle_sync(pages, stage * self.boxes + box)
            row_block = block % (self.page // BLOCK) if const_expr(self.page > BLOCK) else Int32(0)
            if box < live:
                for s in cutlass.range_constexpr(slabs[0], slabs[-1] + 1):
                    cute.copy(
                        tma,
                        tSg[None, row_block, s, kv_head, page],
                        tSs[None, (stage * NUM_SLABS + s) * self.boxes + box],
                        tma_bar_ptr=full + slot,
                        cache_policy=Int64(EVICT_FIRST),
                    )

    # ------------------------------------------------------------------------------------------- Q loader

    @cute.jit
    def load_q(
        self, tma: cute.CopyAtom, tQ: cute.Tensor, a: DecodeArgs, s: Shared, tile: Int32, kv_head: Int32, part: Int32
    ):
        """Rows past the tile's last are whatever lies there, or zeros: rows don't mix, and theirs are not stored."""
        record = load_record(a, part)
        req, block, seqlen = record.req, record.block, record.seqlen
        phase = Int32(1)
        while not_done(req, block, record):
            piece = get_piece(a, record, tile, req, block, seqlen)
            if piece.n > 0:
                head = kv_head * a.q_kv_step + (tile * TILE_M) % a.q_group
                token, batch = (tile * TILE_M) // a.q_group, req
                if a.ragged != 0:
                    batch = Int32(0)
                    if a.q_group > a.heads_per_kv:
                        head += piece.token0 * a.heads_per_kv
                    else:
                        token += piece.token0
                gQ = cute.local_tile(cute.domain_offset((head, 0, token, batch), tQ), (TILE_M, 64), (0, None, 0, 0))
                tSs, tSg = cpasync.tma_partition(
                    tma, 0, cute.make_layout(1), cute.group_modes(s.sQ, 0, 2), cute.group_modes(gQ, 0, 2)
                )
                cute.arch.mbarrier_wait(s.q_empty, phase)
                phase ^= 1
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(s.q_full, NUM_SLABS * SLAB_BYTES)
                for i in cutlass.range_constexpr(NUM_SLABS):
                    cute.copy(tma, tSg[None, i], tSs[None, i], tma_bar_ptr=s.q_full, cache_policy=Int64(EVICT_FIRST))
            req, block, _, seqlen = next_position(a, record, piece, req, Int32(0))

    # ----------------------------------------------------------------------------------------------- math

    @cute.jit
    def math(
        self,
        w: cutlass.Constexpr[int],
        a: DecodeArgs,
        mma: Mmas,
        s: Shared,
        v_half: cute.ComposedLayout,
        tile: Int32,
        kv_head: Int32,
        part: Int32,
        t: Int32,
    ):
        # registers: O 128, S 32, P 16, RoPE slab of Q 16
        qk, pv_rs, pv = mma.qk.get_slice(t), mma.pv_rs.get_slice(t), mma.pv.get_slice(t)
        S = cute.make_rmem_tensor(mma.qk.partition_shape_C((TILE_M, BLOCK)), Float32)
        O = cute.make_rmem_tensor(mma.pv_rs.partition_shape_C((TILE_M, 256)), Float32)
        P = mma.pv_rs.make_fragment_A(mma.pv_rs.partition_shape_A((TILE_M, BLOCK)))
        L = cute.make_rmem_tensor(2, Float32)
        Q8 = mma.qk_rs.make_fragment_A(mma.qk_rs.partition_shape_A((TILE_M, BLOCK)))
        rQ, rK = qk.make_fragment_A(qk.partition_A(s.sQ)), qk.make_fragment_B(qk.partition_B(s.sK))
        sP1 = s.sQ[None, None, NUM_SLABS - 1]
        sP_own, sP_other = (s.sP0, sP1) if const_expr(w == 0) else (sP1, s.sP0)
        rV_own = pv_rs.make_fragment_B(pv_rs.partition_B(self.v_columns(s.sK, v_half, w, w)))
        rV_other = pv.make_fragment_B(pv.partition_B(self.v_columns(s.sK, v_half, 1 - w, w)))
        rP_other = pv.make_fragment_A(pv.partition_A(sP_other))
        put = cute.make_tiled_copy_C(cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype), mma.qk)
        tPs = put.get_slice(t).partition_D(sP_own)
        tPr = put.get_slice(t).retile(cute.make_tensor(P.iterator, S.layout))
        get = cute.make_tiled_copy_A(cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), self.dtype), mma.qk_rs)

        row = (t // 32) * 16 + (t % 32) // 4  # this thread's rows are row and row + 8
        record = load_record(a, part)
        req, block, split, seqlen = record.req, record.block, record.split, record.seqlen
        q_phase, phase0, phase1 = Int32(0), Int32(0), Int32(0)
        while not_done(req, block, record):
            piece = get_piece(a, record, tile, req, block, seqlen)
            O.fill(0.0)
            L.fill(0.0)
            # Without these the compiler keeps last piece's values alive through the epilogue, which then spills: it
            # cannot know that what a short piece leaves unwritten is not read either.
            S.fill(0.0)
            P.fill(0.0)
            Q8.fill(0.0)
            if const_expr(w == 0):
                if t % 4 == 0:
                    s.row_max[row] = Float32(NEG_BIG)
                    s.row_max[row + 8] = Float32(NEG_BIG)
                cute.arch.sync_warp()
            if piece.n > 0:
                cute.arch.mbarrier_wait(s.q_full, q_phase)
                q_phase ^= 1
                cute.copy(get, get.get_slice(t).partition_S(sP1), get.get_slice(t).retile(Q8))
                self.zero_unused_rows(w, s, piece, phase0, t)
                if const_expr(w == 0):
                    self.first_scores(w, mma, s, S, rQ, Q8, rK, phase0)
                else:
                    if piece.n > 1:
                        self.first_scores(w, mma, s, S, rQ, Q8, rK, phase1)
                for pair in cutlass.range(piece.n // 2, unroll=1):
                    newest = piece.end - 1 - 2 * pair
                    if const_expr(w == 0):
                        masked = (newest + 1) * BLOCK > piece.min_visible
                        key = newest * BLOCK
                        more = 2 * pair + 2 < piece.n
                        self.pair0(
                            mma, s, S, O, P, L, Q8, rQ, rK, rV_own, rV_other, rP_other, put, tPs, tPr,
                            a, piece, tile, key, masked, more, phase0 ^ 1, row, t,
                        )  # fmt: skip
                    else:
                        masked = newest * BLOCK > piece.min_visible
                        key = (newest - 1) * BLOCK
                        more = 2 * pair + 3 < piece.n
                        self.pair1(
                            mma, s, S, O, P, L, Q8, rQ, rK, rV_own, rV_other, rP_other, put, tPs, tPr,
                            a, piece, tile, key, masked, more, phase1 ^ 1, row, t,
                        )  # fmt: skip
                    phase0 ^= 1
                    phase1 ^= 1
                if piece.n % 2 == 1:
                    oldest = piece.first
                    masked = (oldest + 1) * BLOCK > piece.min_visible
                    if const_expr(w == 0):
                        self.last0(mma, s, S, O, P, L, rV_own, put, tPs, tPr, a, piece, tile, oldest * BLOCK, masked, row, t)
                    else:
                        self.last1(mma, s, O, L, rP_other, rV_other, row, t)
                    phase0 ^= 1
                if t == 0:
                    cute.arch.mbarrier_arrive(s.q_empty)
            self.epilogue(w, a, s, O, L, piece, req, split, tile, kv_head, row, t)
            req, block, split, seqlen = next_position(a, record, piece, req, split)

    def v_columns(self, sK, v_half, stage, half):
        """V^T of one stage's block, columns [256 * half, 256 * half + 256): the K slabs read the other way round."""
        start = sK.iterator + (stage * NUM_SLABS + half * 4) * (BLOCK * 64)
        return cute.make_tensor(start, cute.select(v_half.outer, mode=[1, 0]))

    @cute.jit
    def zero_unused_rows(self, w: cutlass.Constexpr[int], s: Shared, piece: Piece, phase: Int32, t: Int32):
        """Rows past the sequence's end may hold NaN, and 0 * NaN would reach O: clear them in V before the first block."""
        first_unused = piece.seqlen - (piece.end - 1) * BLOCK
        if first_unused < BLOCK:
            cute.arch.mbarrier_wait(s.k_full + K0L, phase)
            cute.arch.mbarrier_wait(s.k_full + K0R, phase)
            base = s.sK.iterator.toint() + (w * 4 + (t % 32) // 8) * SLAB_BYTES + (t % 8) * 16
            for r in cutlass.range(first_unused + t // 32, BLOCK, 4, unroll=1):
                ptx.st_shared_zero16(base + r * 128)
            cute.arch.fence_view_async_shared()
            cute.arch.barrier(barrier_id=BAR_SYNC, number_of_threads=2 * WG)

    def issue_pv(self, tiled_mma, O, rP, rV):
        """O += P V over four k16 steps, as one wgmma group."""
        atom = cute.make_mma_atom(tiled_mma.op)
        atom.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.fence()
        for k in range(BLOCK // 16):
            cute.gemm(atom, O, rP[None, None, k], rV[None, None, k], O)
        warpgroup.commit_group()

    def issue_qk(self, mma, S, rQ, Q8, rK, stage, slabs, first):
        """S (+)= Q K^T over some 64-column slabs, as one wgmma group; the RoPE slab of Q comes from registers."""
        atom, atom8 = cute.make_mma_atom(mma.qk.op), cute.make_mma_atom(mma.qk_rs.op)
        atom.set(warpgroup.Field.ACCUMULATE, not first)
        atom8.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.fence()
        for slab in slabs:
            for k in range(4):
                b = rK[None, None, k, stage * NUM_SLABS + slab]
                if slab == NUM_SLABS - 1:
                    cute.gemm(atom8, S, Q8[None, None, k], b, S)
                else:
                    cute.gemm(atom, S, rQ[None, None, k, slab], b, S)
                    atom.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()

    def first_scores(self, w, mma, s, S, rQ, Q8, rK, phase):
        """S of the piece's first block of this warpgroup, each half as soon as it is there."""
        left, right = (K0L, K0R) if w == 0 else (K1L, K1R)
        halves = ((left, range(0, 4)), (right, range(4, NUM_SLABS)))
        for i, (slot, slabs) in enumerate(halves if w == 0 else halves[::-1]):
            cute.arch.mbarrier_wait(s.k_full + slot, phase)
            self.issue_qk(mma, S, rQ, Q8, rK, w, slabs, i == 0)
        warpgroup.wait_group(0)

    @cute.jit
    def row_maximum(
        self, S: cute.Tensor, a: DecodeArgs, piece: Piece, tile: Int32, key: Int32, masked, row: Int32, t: Int32
    ):
        """Mask what the rows must not see, then the maximum of both rows over the four lanes that share them.

        key: index of the block's first key. masked: whether any row of the tile has a key in the block that it must not see.
        """
        if masked:
            cols0 = visible_keys(a, piece.seqlen, piece.s_q, tile * TILE_M + row) - key
            cols1 = visible_keys(a, piece.seqlen, piece.s_q, tile * TILE_M + row + 8) - key
            for j in cutlass.range_constexpr(32):
                col = (t % 4) * 2 + (j % 2) + 8 * (j // 4)
                if col >= (cols0 if const_expr((j % 4) // 2 == 0) else cols1):
                    S[j] = -Float32.inf
        mx = cute.make_rmem_tensor(2, Float32)
        for h in cutlass.range_constexpr(2):
            m = S[2 * h]
            for j in cutlass.range_constexpr(32):
                if const_expr((j % 4) // 2 == h):
                    m = cute.arch.fmax(m, S[j])
            m = cute.arch.fmax(m, cute.arch.shuffle_sync_bfly(m, offset=1))
            mx[h] = cute.arch.fmax(m, cute.arch.shuffle_sync_bfly(m, offset=2))
        return mx

    @cute.jit
    def update_max(self, s: Shared, scale_out: cute.Tensor, mx: cute.Tensor, scale_log2: Float32, row: Int32, t: Int32):
        """Raise the shared running maximum if it grew by more than 2**8; publish it and the factor for what came before."""
        new_max = cute.make_rmem_tensor(2, Float32)
        factor = cute.make_rmem_tensor(2, Float32)
        for h in cutlass.range_constexpr(2):
            old = s.row_max[row + 8 * h]
            new = mx[h] * scale_log2
            new = new if new > old + RESCALE_LOG2 else old
            new_max[h] = new
            factor[h] = cute.math.exp2(old - new, fastmath=True)
        cute.arch.sync_warp()
        if t % 4 == 0:
            for h in cutlass.range_constexpr(2):
                s.row_max[row + 8 * h] = new_max[h]
                scale_out[row + 8 * h] = factor[h]
        return new_max, factor

    @cute.jit
    def exponentials(self, S: cute.Tensor, P: cute.Tensor, L: cute.Tensor, new_max: cute.Tensor, scale_log2: Float32):
        for h in cutlass.range_constexpr(2):
            total = Float32(0.0)
            for j in cutlass.range_constexpr(32):
                if const_expr((j % 4) // 2 == h):
                    S[j] = cute.math.exp2(S[j] * scale_log2 - new_max[h], fastmath=True)
                    P[j] = self.dtype(S[j])
                    total += S[j]
            L[h] = L[h] + total

    @cute.jit
    def rescale(self, O: cute.Tensor, L: cute.Tensor, f0: Float32, f1: Float32):
        """O and L times the rows' factors, which are exactly 1 for nearly every block after the first."""
        if cute.arch.vote_any_sync((f0 != 1.0) | (f1 != 1.0)):
            L[0] = L[0] * f0
            L[1] = L[1] * f1
            for j in cutlass.range_constexpr(128):
                O[j] = O[j] * (f0 if const_expr(j % 4 < 2) else f1)

    def release(self, s, slot, t):
        if t == 0:
            cute.arch.mbarrier_arrive(s.k_empty + slot)

    @cute.jit
    def pair0(
        self, mma: Mmas, s: Shared, S: cute.Tensor, O: cute.Tensor, P: cute.Tensor, L: cute.Tensor, Q8: cute.Tensor,
        rQ: cute.Tensor, rK: cute.Tensor, rV_own: cute.Tensor, rV_other: cute.Tensor, rP_other: cute.Tensor,
        put: cute.TiledCopy, tPs: cute.Tensor, tPr: cute.Tensor, a: DecodeArgs, piece: Piece, tile: Int32,
        key: Int32, masked, more, next_phase: Int32, row: Int32, t: Int32,
    ):  # fmt: skip
        """WG0's share of one pair of blocks; S of the even block is ready on entry and, if there is more, on return."""
        mx = self.row_maximum(S, a, piece, tile, key, masked, row, t)
        new_max, factor = self.update_max(s, s.scale0, mx, a.scale_log2, row, t)
        cute.arch.barrier_arrive(barrier_id=BAR_MAX0, number_of_threads=2 * WG)
        self.rescale(O, L, factor[0], factor[1])
        self.exponentials(S, P, L, new_max, a.scale_log2)
        ptx.pin_registers(cute.recast_tensor(P, Int32))
        self.issue_pv(mma.pv_rs, O, P, rV_own)  # O_L += P0 V0_L
        warpgroup.wait_group(0)
        if t == 0:
            cute.arch.mbarrier_arrive(s.k_empty + K0L)
        cute.arch.barrier(barrier_id=BAR_MAX1, number_of_threads=2 * WG)
        f0, f1 = s.scale1[row], s.scale1[row + 8]
        for j in cutlass.range_constexpr(32):
            P[j] = self.dtype(S[j] * (f0 if const_expr(j % 4 < 2) else f1))
        cute.copy(put, tPr, tPs)
        cute.arch.fence_view_async_shared()
        cute.arch.barrier_arrive(barrier_id=BAR_P0, number_of_threads=2 * WG)
        self.rescale(O, L, f0, f1)
        cute.arch.barrier(barrier_id=BAR_P1, number_of_threads=2 * WG)
        self.issue_pv(mma.pv, O, rP_other, rV_other)  # O_L += P1 V1_L
        if more:
            cute.arch.mbarrier_wait(s.k_full + K0L, next_phase)
            self.issue_qk(mma, S, rQ, Q8, rK, 0, range(0, 4), True)
            warpgroup.wait_group(1)
            if t == 0:
                cute.arch.mbarrier_arrive(s.k_empty + K1L)
            cute.arch.mbarrier_wait(s.k_full + K0R, next_phase)
            self.issue_qk(mma, S, rQ, Q8, rK, 0, range(4, NUM_SLABS), False)
            warpgroup.wait_group(0)
        else:
            warpgroup.wait_group(0)
            if t == 0:
                cute.arch.mbarrier_arrive(s.k_empty + K1L)

    @cute.jit
    def pair1(
        self, mma: Mmas, s: Shared, S: cute.Tensor, O: cute.Tensor, P: cute.Tensor, L: cute.Tensor, Q8: cute.Tensor,
        rQ: cute.Tensor, rK: cute.Tensor, rV_own: cute.Tensor, rV_other: cute.Tensor, rP_other: cute.Tensor,
        put: cute.TiledCopy, tPs: cute.Tensor, tPr: cute.Tensor, a: DecodeArgs, piece: Piece, tile: Int32,
        key: Int32, masked, more, next_phase: Int32, row: Int32, t: Int32,
    ):  # fmt: skip
        """WG1's share of one pair of blocks; S of the odd block is ready on entry and, if there is more, on return."""
        mx = self.row_maximum(S, a, piece, tile, key, masked, row, t)
        cute.arch.barrier(barrier_id=BAR_MAX0, number_of_threads=2 * WG)
        before0, before1 = s.scale0[row], s.scale0[row + 8]
        new_max, factor = self.update_max(s, s.scale1, mx, a.scale_log2, row, t)
        cute.arch.barrier_arrive(barrier_id=BAR_MAX1, number_of_threads=2 * WG)
        self.rescale(O, L, before0 * factor[0], before1 * factor[1])
        self.exponentials(S, P, L, new_max, a.scale_log2)
        cute.copy(put, tPr, tPs)
        ptx.pin_registers(cute.recast_tensor(P, Int32))
        self.issue_pv(mma.pv_rs, O, P, rV_own)  # O_R += P1 V1_R
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=BAR_P0, number_of_threads=2 * WG)
        self.issue_pv(mma.pv, O, rP_other, rV_other)  # O_R += P0 V0_R
        cute.arch.barrier_arrive(barrier_id=BAR_P1, number_of_threads=2 * WG)
        warpgroup.wait_group(1)
        if t == 0:
            cute.arch.mbarrier_arrive(s.k_empty + K1R)
        warpgroup.wait_group(0)
        if t == 0:
            cute.arch.mbarrier_arrive(s.k_empty + K0R)
        if more:
            self.first_scores(1, mma, s, S, rQ, Q8, rK, next_phase)

    @cute.jit
    def last0(
        self, mma: Mmas, s: Shared, S: cute.Tensor, O: cute.Tensor, P: cute.Tensor, L: cute.Tensor, rV_own: cute.Tensor,
        put: cute.TiledCopy, tPs: cute.Tensor, tPr: cute.Tensor, a: DecodeArgs, piece: Piece, tile: Int32,
        key: Int32, masked, row: Int32, t: Int32,
    ):  # fmt: skip
        """The odd block at the end of a piece: WG0 alone owns its scores, WG1 only multiplies."""
        mx = self.row_maximum(S, a, piece, tile, key, masked, row, t)
        new_max, factor = self.update_max(s, s.scale0, mx, a.scale_log2, row, t)
        cute.arch.barrier_arrive(barrier_id=BAR_MAX0, number_of_threads=2 * WG)
        self.rescale(O, L, factor[0], factor[1])
        self.exponentials(S, P, L, new_max, a.scale_log2)
        cute.copy(put, tPr, tPs)
        cute.arch.fence_view_async_shared()
        cute.arch.barrier_arrive(barrier_id=BAR_P0, number_of_threads=2 * WG)
        ptx.pin_registers(cute.recast_tensor(P, Int32))
        self.issue_pv(mma.pv_rs, O, P, rV_own)
        warpgroup.wait_group(0)
        if t == 0:
            cute.arch.mbarrier_arrive(s.k_empty + K0L)

    @cute.jit
    def last1(
        self, mma: Mmas, s: Shared, O: cute.Tensor, L: cute.Tensor, rP_other: cute.Tensor, rV_other: cute.Tensor,
        row: Int32, t: Int32,
    ):  # fmt: skip
        cute.arch.barrier(barrier_id=BAR_MAX0, number_of_threads=2 * WG)
        self.rescale(O, L, s.scale0[row], s.scale0[row + 8])
        cute.arch.barrier(barrier_id=BAR_P0, number_of_threads=2 * WG)
        self.issue_pv(mma.pv, O, rP_other, rV_other)
        warpgroup.wait_group(0)
        if t == 0:
            cute.arch.mbarrier_arrive(s.k_empty + K0R)

    # ------------------------------------------------------------------------------------------- epilogue

    @cute.jit
    def epilogue(
        self, w: cutlass.Constexpr[int], a: DecodeArgs, s: Shared, O: cute.Tensor, L: cute.Tensor, piece: Piece,
        req: Int32, split: Int32, tile: Int32, kv_head: Int32, row: Int32, t: Int32,
    ):  # fmt: skip
        """Divide by the row sums and store straight from registers, so that Q and K of the next piece keep streaming in."""
        slot = load_i32(a.num_splits, req)
        pieces = load_i32(a.num_splits, req + 1) - slot
        for h in cutlass.range_constexpr(2):
            total = L[h] + cute.arch.shuffle_sync_bfly(L[h], offset=1)
            total += cute.arch.shuffle_sync_bfly(total, offset=2)
            if t % 4 == 0:
                s.row_sum[w * TILE_M + row + 8 * h] = total
        m = cute.make_rmem_tensor(2, Float32)
        total = cute.make_rmem_tensor(2, Float32)
        m[0], m[1] = s.row_max[row], s.row_max[row + 8]
        cute.arch.barrier(barrier_id=BAR_SYNC, number_of_threads=2 * WG)
        total[0] = s.row_sum[row] + s.row_sum[row + TILE_M]
        total[1] = s.row_sum[row + 8] + s.row_sum[row + 8 + TILE_M]
        cute.arch.barrier(barrier_id=BAR_SYNC, number_of_threads=2 * WG)  # the next piece may overwrite the statistics
        rows = piece.s_q * a.heads_per_kv - tile * TILE_M
        whole = pieces == 0
        if pieces > 0:
            self.normalize(O, m, total)
            if pieces > MERGE_MAX:
                self.store_partial(w, a, O, m, partial_tile(a, slot + split, tile, kv_head), row, rows, t)
            else:
                whole = self.merge(w, a, s, O, m, total, slot, split, pieces, tile, kv_head, row, rows, t)
        if whole:
            for h in cutlass.range_constexpr(2):
                self.store_whole(w, a, O, h, m[h], total[h], piece, req, tile, kv_head, row + 8 * h, rows, t)

    @cute.jit
    def normalize(self, O: cute.Tensor, m: cute.Tensor, total: cute.Tensor):
        """Divide by the row sums: from here on m is the lse in base 2 and the sum is 1, or 0 where nothing was visible."""
        for h in cutlass.range_constexpr(2):
            seen = total[h] > 0.0
            factor = cute.arch.rcp_approx(total[h]) if seen else Float32(0.0)
            m[h] = m[h] + cute.math.log2(total[h], fastmath=True) if seen else -Float32.inf
            total[h] = Float32(1.0) if seen else Float32(0.0)
            for j in cutlass.range_constexpr(64):
                i = (j // 2) * 4 + 2 * h + j % 2
                O[i] = O[i] * factor

    @cute.jit
    def merge(
        self, w: cutlass.Constexpr[int], a: DecodeArgs, s: Shared, O: cute.Tensor, m: cute.Tensor, total: cute.Tensor,
        slot: Int32, split: Int32, pieces: Int32, tile: Int32, kv_head: Int32, row: Int32, rows: Int32, t: Int32,
    ):  # fmt: skip
        """Climb the binary tree over a sequence's pieces. True for the CTA that ends up with all of it in its registers.

        At every node the CTA that comes first stores its half and leaves, the second adds it to its own. Both orders give
        the same bits, so the result does not depend on timing. The second waits only for a CTA that is already storing;
        nobody waits for a CTA that may not be running. A node's ticket counts 1 per arrival and 2 for "stored", and is
        put back to 0 by the second.
        """
        index, level, width = split, Int32(0), pieces
        alive = Boolean(True)
        while alive & (width > 1):
            if (index ^ 1) < width:
                right = (index | 1) << level  # the first piece of the right half names the node
                ticket = a.tickets + partial_tile(a, slot + right, tile, kv_head)
                leader = (t == 0) if const_expr(w == 0) else Boolean(False)
                if leader:
                    s.ticket[0] = cute.arch.atomic_add(ticket, Int32(1), sem="acq_rel", scope="gpu")
                cute.arch.barrier(barrier_id=BAR_SYNC, number_of_threads=2 * WG)
                first = s.ticket[0] == 0
                if first:
                    own = partial_tile(a, slot + (index << level), tile, kv_head)
                    self.store_partial(w, a, O, m, own, row, rows, t)
                    cute.arch.barrier(barrier_id=BAR_SYNC, number_of_threads=2 * WG)
                    if leader:
                        cute.arch.fence_acq_rel_gpu()
                        cute.arch.atomic_add(ticket, Int32(2), sem="release", scope="gpu")
                    alive = Boolean(False)
                else:
                    if leader:
                        while cute.arch.load(ticket, Int32, sem="acquire", scope="gpu") != 4:
                            pass
                        cute.arch.store(ticket, Int32(0), sem="relaxed", scope="gpu")
                    cute.arch.barrier(barrier_id=BAR_SYNC, number_of_threads=2 * WG)
                    other = partial_tile(a, slot + ((index ^ 1) << level), tile, kv_head)
                    self.add_partial(w, a, O, m, total, other, row, rows, t)
            index, level, width = index >> 1, level + 1, (width + 1) >> 1
        return alive

    @cute.jit
    def add_partial(
        self, w: cutlass.Constexpr[int], a: DecodeArgs, O: cute.Tensor, m: cute.Tensor, total: cute.Tensor, tile_index: Int32,
        row: Int32, rows: Int32, t: Int32,
    ):  # fmt: skip
        """The softmax-weighted mean of this CTA's normalized result and a stored one."""
        if (t // 32) * 16 < rows:
            base = a.partial_out.toint() + ((Int64(tile_index) * 8 + w * 4 + t // 32) * 32 * 32 + t % 32) * 16
            mine, theirs = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
            for h in cutlass.range_constexpr(2):
                lse = load_f32(a.partial_lse, Int64(tile_index) * TILE_M + row + 8 * h)
                top = cute.arch.fmax(m[h], lse)
                seen = top > -Float32.inf
                top = top if seen else Float32(0.0)
                mine[h] = cute.math.exp2(m[h] - top, fastmath=True)
                theirs[h] = cute.math.exp2(lse - top, fastmath=True)
                both = mine[h] + theirs[h]
                factor = cute.arch.rcp_approx(both) if seen else Float32(0.0)
                mine[h] = mine[h] * factor
                theirs[h] = theirs[h] * factor
                m[h] = top + cute.math.log2(both, fastmath=True) if seen else -Float32.inf
                total[h] = Float32(1.0) if seen else Float32(0.0)
            for part in cutlass.range_constexpr(4):
                cute.arch.sync_warp()  # ptxas would move all the loads up here, and spill
                loaded = [ptx.ld_global_v4_f32(base + (part * 8 + j) * 512) for j in range(8)]
                for j in cutlass.range_constexpr(8):
                    for i in cutlass.range_constexpr(4):
                        k = (part * 8 + j) * 4 + i
                        O[k] = ptx.weighted_sum(O[k], mine[i // 2], loaded[j][i], theirs[i // 2])

    @cute.jit
    def store_whole(
        self, w: cutlass.Constexpr[int], a: DecodeArgs, O: cute.Tensor, h: cutlass.Constexpr[int], m: Float32,
        total: Float32, piece: Piece, req: Int32, tile: Int32, kv_head: Int32, row: Int32, rows: Int32, t: Int32,
    ):  # fmt: skip
        """One row of the result, and its lse."""
        packed = tile * TILE_M + row
        token = packed // a.heads_per_kv
        head = kv_head * a.heads_per_kv + packed % a.heads_per_kv
        seen = total > 0.0
        denominator = total
        if a.has_sink != 0:
            if row < rows:
                denominator += cute.math.exp2(load_f32(a.attn_sink, head) * LOG2E - m, fastmath=True)
        factor = cute.arch.rcp_approx(denominator) if seen else Float32(0.0)
        out_row = a.out.toint() + (Int64(piece.token0 + token) * a.h_q + head) * (HEAD_DIM_V * 2)
        self.store_row(w, O, h, factor, out_row, row < rows, t)
        if const_expr(w == 0):
            if (t % 4 == 0) & (row < rows):
                index = (Int64(req) * a.h_q + head) * a.s_q + token
                if a.ragged != 0:
                    index = Int64(head) * a.total_q + piece.token0 + token
                lse = (m + cute.math.log2(total, fastmath=True)) * LN2
                store_f32(a.lse, index, lse if seen else a.empty_lse)

    @cute.jit
    def store_row(self, w, O: cute.Tensor, h, factor: Float32, out_row: Int64, live, t: Int32):
        """One row to 16 bits. The four lanes of a row transpose 4x4 words, so that each stores 16 adjacent bytes."""
        lane = t % 4
        frag = cute.make_rmem_tensor(8, self.dtype)
        words = cute.recast_tensor(frag, Int32)
        for g in cutlass.range_constexpr(8):  # 32 columns
            for i in cutlass.range_constexpr(8):
                frag[i] = self.dtype(O[(4 * g + i // 2) * 4 + 2 * h + i % 2] * factor)
            x = [words[i] for i in range(4)]
            for step, pairs in ((1, ((0, 1), (2, 3))), (2, ((0, 2), (1, 3)))):
                odd = (lane & step) != 0
                for lo, hi in pairs:
                    other = cute.arch.shuffle_sync_bfly(x[lo] if odd else x[hi], offset=step)
                    x[lo], x[hi] = (other if odd else x[lo]), (x[hi] if odd else other)
            if live:
                ptx.st_global_v4(out_row + (w * 256 + (4 * g + lane) * 8) * 2, x[0], x[1], x[2], x[3])

    @cute.jit
    def store_partial(
        self, w: cutlass.Constexpr[int], a: DecodeArgs, O: cute.Tensor, lse: cute.Tensor, tile_index: Int32, row: Int32,
        rows: Int32, t: Int32,
    ):  # fmt: skip
        """A normalized result as it lies in the registers: each store of a warp fills 512 adjacent bytes."""
        if (t // 32) * 16 < rows:  # else the whole warp has nothing but padding
            base = a.partial_out.toint() + ((Int64(tile_index) * 8 + w * 4 + t // 32) * 32 * 32 + t % 32) * 16
            for j in cutlass.range_constexpr(32):
                ptx.st_global_v4_f32(base + j * 512, O[4 * j], O[4 * j + 1], O[4 * j + 2], O[4 * j + 3])
            if const_expr(w == 0):
                if t % 4 == 0:
                    store_f32(a.partial_lse, Int64(tile_index) * TILE_M + row, lse[0])
                    store_f32(a.partial_lse, Int64(tile_index) * TILE_M + row + 8, lse[1])


def program(config: DecodeConfig) -> Program:
    """The host function and the fake arguments that compile one variant."""
    kernel = MlaDecode(config)

    def fake(rows):  # the extents only shape the coordinates: any head, token or page is addressed alike
        return make_fake_compact_tensor(kernel.dtype, (rows, HEAD_DIM, 2, 2), stride_order=(1, 0, 2, 3), assumed_align=16)

    return Program(
        host=kernel,
        args=(fake(TILE_M), fake(config.page_size), fake_args(DecodeArgs), cuda.CUstream(0)),
        threads=THREADS,
        smem_bytes=kernel.Smem.size_in_bytes(),
        params=("map", "map", *param_kinds(DecodeArgs)),
        pdl=True,
    )
