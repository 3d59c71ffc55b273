"""The two math warpgroups of the decode kernel: scores, online softmax and P V, alternating on one output tile."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hh
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.cute.nvgpu import warp, warpgroup
from cutlass.utils import LayoutEnum

from ..sm90 import ptx
from .config import BLOCK, HEAD_DIM_V, NUM_SLABS, RESCALE_LOG2, SLAB_BYTES, TILE_M
from .cta import BAR_MAX0, BAR_P0, BAR_P1, K0L, K0R, K1L, K1R, NEG_BIG, WG, Place, Shared, sync_math
from .epilogue import Epilogue
from .work import DecodeArgs, Piece, get_piece, load_record, next_position, not_done, put_cuts, visible_keys


@dataclass(frozen=True)
class Mmas:
    qk: cute.TiledMma  # 64x64, both operands in shared memory
    qk_rs: cute.TiledMma  # the same with Q in registers
    pv_rs: cute.TiledMma  # 64x256, P in registers
    pv: cute.TiledMma  # 64x256, P in shared memory


@dataclass(frozen=True)
class Registers:
    """What a math thread holds, in 32-bit registers."""

    O: cute.Tensor  # 128: one half of the output columns
    S: cute.Tensor  # 32: scores of one block
    P: cute.Tensor  # 16: P in 16 bits
    Q8: cute.Tensor  # 16: RoPE slab of Q
    L: cute.Tensor  # 2: row sums over this thread's columns


@dataclass(frozen=True)
class Views:
    """Operand descriptors of one warpgroup; own is the block whose scores it has, other the block of the other one."""

    rQ: cute.Tensor
    rK: cute.Tensor
    rV_own: cute.Tensor
    rV_other: cute.Tensor
    rP_other: cute.Tensor
    put: cute.TiledCopy  # P from registers to shared memory
    tPr: cute.Tensor
    tPs: cute.Tensor


@dataclass(frozen=True)
class Step:
    """One block of scores."""

    masked: Boolean  # some row of the tile must not see all of it
    cols0: Int32  # visible columns of the thread's first row
    cols1: Int32  # and of its second
    more: Boolean  # this warpgroup has a block in the next pair
    next_phase: Int32  # parity of that block's barriers


class Math(Epilogue):
    """Part of decode.MlaDecode."""

    def swizzle_atom(self):
        kind = hh.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, self.dtype, 64)
        return warpgroup.make_smem_layout_atom(kind, self.dtype)

    @cute.jit
    def math(self, a: DecodeArgs, mma: Mmas, s: Shared, c: Place):
        """All pieces of the partition."""
        r = Registers(
            O=cute.make_rmem_tensor(mma.pv_rs.partition_shape_C((TILE_M, 256)), Float32),
            S=cute.make_rmem_tensor(mma.qk.partition_shape_C((TILE_M, BLOCK)), Float32),
            P=mma.pv_rs.make_fragment_A(mma.pv_rs.partition_shape_A((TILE_M, BLOCK))),
            Q8=mma.qk_rs.make_fragment_A(mma.qk_rs.partition_shape_A((TILE_M, BLOCK))),
            L=cute.make_rmem_tensor(2, Float32),
        )
        get = cute.make_tiled_copy_A(cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), self.dtype), mma.qk_rs)
        v_half = cute.tile_to_shape(self.swizzle_atom(), (64, 256), order=(0, 1))
        tQs, tQr = get.get_slice(c.t).partition_S(s.sP1), get.get_slice(c.t).retile(r.Q8)
        if not c.belongs:
            self.refuse(a, c)
        record = load_record(a, c.part, c.belongs)
        if (c.wg == 0) & (c.t == 0):
            put_cuts(a, s, record, c)
        req, block, split, seqlen = record.req, record.block, record.split, record.seqlen
        q_phase, phase0, phase1 = Int32(0), Int32(0), Int32(0)
        while not_done(req, block, record):
            piece = get_piece(a, record, c.tile, req, block, seqlen)
            # Also what the loops below overwrite is cleared, or the compiler keeps the last piece's values alive
            # through the epilogue: it cannot know that what a short piece leaves unwritten is not read either.
            for registers in (r.O, r.S, r.P, r.Q8, r.L):
                registers.fill(0.0)
            if (c.wg == 0) & (c.t % 4 == 0):
                s.row_max[c.row] = Float32(NEG_BIG)
                s.row_max[c.row + 8] = Float32(NEG_BIG)
            cute.arch.sync_warp()
            if piece.n > 0:
                limit0 = visible_keys(a, piece.seqlen, piece.s_q, c.tile * TILE_M + c.row)
                limit1 = visible_keys(a, piece.seqlen, piece.s_q, c.tile * TILE_M + c.row + 8)
                cute.arch.mbarrier_wait(s.q_full, q_phase)
                q_phase ^= 1
                cute.copy(get, tQs, tQr)
                self.zero_unused_rows(s, piece, phase0, c)
                if c.wg == 0:
                    self.blocks(0, a, mma, s, v_half, r, piece, limit0, limit1, phase0, phase1, c)
                else:
                    self.blocks(1, a, mma, s, v_half, r, piece, limit0, limit1, phase0, phase1, c)
                phase0 ^= ((piece.n + 1) // 2) & 1
                phase1 ^= (piece.n // 2) & 1
                if c.t == 0:
                    cute.arch.mbarrier_arrive(s.q_empty)
            self.epilogue(a, s, r.O, r.L, piece, record.end_req, req, split, c)
            req, block, split, seqlen = next_position(a, record, piece, req, split)

    @cute.jit
    def blocks(
        self, w: cutlass.Constexpr[int], a: DecodeArgs, mma: Mmas, s: Shared, v_half: cute.ComposedLayout, r: Registers,
        piece: Piece, limit0: Int32, limit1: Int32, phase0: Int32, phase1: Int32, c: Place,
    ):  # fmt: skip
        """All blocks of a piece, the newest first, as warpgroup w."""
        v = self.views(w, mma, s, v_half, r, c)
        phase = phase0 if const_expr(w == 0) else phase1
        if piece.n > w:
            self.first_scores(w, mma, s, r, v, phase)
        for pair in cutlass.range(piece.n // 2, unroll=1):
            block = piece.end - 1 - 2 * pair - w
            phase ^= 1
            k = self.step(piece, block, limit0, limit1, 2 * pair + 2 + w < piece.n, phase)
            if const_expr(w == 0):
                self.pair0(mma, s, r, v, k, a.scale_log2, c)
            else:
                self.pair1(mma, s, r, v, k, a.scale_log2, c)
        if piece.n % 2 == 1:
            if const_expr(w == 0):
                k = self.step(piece, piece.first, limit0, limit1, Boolean(False), phase)
                self.even_block(mma, s, r, v, k, a.scale_log2, c)
            else:
                self.last1(mma, s, r, v, c)

    def step(self, piece, block, limit0, limit1, more, next_phase):
        masked = (block + 1) * BLOCK > piece.min_visible
        return Step(masked, limit0 - block * BLOCK, limit1 - block * BLOCK, more, next_phase)

    def views(self, w, mma, s, v_half, r, c):
        qk, pv_rs, pv = mma.qk.get_slice(c.t), mma.pv_rs.get_slice(c.t), mma.pv.get_slice(c.t)
        own, other = (s.sP0, s.sP1) if w == 0 else (s.sP1, s.sP0)
        put = cute.make_tiled_copy_C(cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype), mma.qk)
        return Views(
            rQ=qk.make_fragment_A(qk.partition_A(s.sQ)),
            rK=qk.make_fragment_B(qk.partition_B(s.sK)),
            rV_own=pv_rs.make_fragment_B(pv_rs.partition_B(self.v_columns(s.sK, v_half, w, w))),
            rV_other=pv.make_fragment_B(pv.partition_B(self.v_columns(s.sK, v_half, 1 - w, w))),
            rP_other=pv.make_fragment_A(pv.partition_A(other)),
            put=put,
            tPr=put.get_slice(c.t).retile(cute.make_tensor(r.P.iterator, r.S.layout)),
            tPs=put.get_slice(c.t).partition_D(own),
        )

    def v_columns(self, sK, v_half, stage, half):
        """V^T of one stage's block, columns [256 * half, 256 * half + 256): the K slabs read the other way round."""
        start = sK.iterator + (stage * NUM_SLABS + half * 4) * (BLOCK * 64)
        return cute.make_tensor(start, cute.select(v_half.outer, mode=[1, 0]))

    @cute.jit
    def zero_unused_rows(self, s: Shared, piece: Piece, phase: Int32, c: Place):
        """Rows past the sequence's end may hold NaN, and 0 * NaN would reach O: clear them before the first block."""
        first_unused = piece.seqlen - (piece.end - 1) * BLOCK
        if first_unused < BLOCK:
            for slab in cutlass.range_constexpr(HEAD_DIM_V // 64):
                cute.arch.mbarrier_wait(s.k_full + slab, phase)
            base = s.sK.iterator.toint() + (c.wg * 4 + (c.t % 32) // 8) * SLAB_BYTES + (c.t % 8) * 16
            for row in cutlass.range(first_unused + c.t // 32, BLOCK, 4, unroll=1):
                ptx.st_shared_zero16(base + row * 128)
            cute.arch.fence_view_async_shared()
            sync_math()

    def issue_pv(self, tiled_mma, O, rP, rV):
        """O += P V over four k16 steps, as one wgmma group."""
        atom = cute.make_mma_atom(tiled_mma.op)
        atom.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.fence()
        for k in range(BLOCK // 16):
            cute.gemm(atom, O, rP[None, None, k], rV[None, None, k], O)
        warpgroup.commit_group()

    def issue_qk(self, mma, s, r, v, stage, slabs, phase, first):
        """S (+)= Q K^T, each 64-column slab as it lands and as a wgmma group of its own: a group that spans a wait is
        serialised by ptxas. The RoPE slab of Q comes from registers."""
        atom, atom8 = cute.make_mma_atom(mma.qk.op), cute.make_mma_atom(mma.qk_rs.op)
        atom.set(warpgroup.Field.ACCUMULATE, not first)
        atom8.set(warpgroup.Field.ACCUMULATE, True)
        for slab in slabs:
            cute.arch.mbarrier_wait(s.k_full + stage * NUM_SLABS + slab, phase)
            warpgroup.fence()
            for k in range(4):
                b = v.rK[None, None, k, stage * NUM_SLABS + slab]
                if slab == NUM_SLABS - 1:
                    cute.gemm(atom8, r.S, r.Q8[None, None, k], b, r.S)
                else:
                    cute.gemm(atom, r.S, v.rQ[None, None, k, slab], b, r.S)
                    atom.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()

    def first_scores(self, w, mma, s, r, v, phase):
        """S of a block of warpgroup w from its start, in the order in which its halves came free."""
        halves = (range(0, 4), range(4, NUM_SLABS))
        for i, slabs in enumerate(halves if w == 0 else halves[::-1]):
            self.issue_qk(mma, s, r, v, w, slabs, phase, i == 0)
        warpgroup.wait_group(0)

    @cute.jit
    def row_maximum(self, S: cute.Tensor, k: Step, t: Int32):
        """Mask what the rows must not see, then the maximum of both rows over the four lanes that share them."""
        if k.masked:
            for j in cutlass.range_constexpr(32):
                col = (t % 4) * 2 + (j % 2) + 8 * (j // 4)
                if col >= (k.cols0 if const_expr((j % 4) // 2 == 0) else k.cols1):
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
    def update_max(self, s: Shared, scale_out: cute.Tensor, mx: cute.Tensor, scale_log2: Float32, c: Place):
        """Raise the shared running maximum if it grew by more than 2**8; publish it and the factor for older sums."""
        new_max = cute.make_rmem_tensor(2, Float32)
        factor = cute.make_rmem_tensor(2, Float32)
        for h in cutlass.range_constexpr(2):
            old = s.row_max[c.row + 8 * h]
            new = mx[h] * scale_log2
            new = new if new > old + RESCALE_LOG2 else old
            new_max[h] = new
            factor[h] = cute.math.exp2(old - new, fastmath=True)
        cute.arch.sync_warp()
        if c.t % 4 == 0:
            for h in cutlass.range_constexpr(2):
                s.row_max[c.row + 8 * h] = new_max[h]
                scale_out[c.row + 8 * h] = factor[h]
        return new_max, factor

    @cute.jit
    def exponentials(self, r: Registers, new_max: cute.Tensor, factor: cute.Tensor, scale_log2: Float32):
        """P = 2^(S - m), rounded, and its row sums on top of the older ones times `factor`."""
        for h in cutlass.range_constexpr(2):
            total = Float32(0.0)
            for j in cutlass.range_constexpr(32):
                if const_expr((j % 4) // 2 == h):
                    # into S, which nobody reads again: with a variable of its own the compiler crashes
                    r.S[j] = cute.math.exp2(r.S[j] * scale_log2 - new_max[h], fastmath=True)
                    r.P[j] = self.dtype(r.S[j])
                    total += r.S[j]
            r.L[h] = r.L[h] * factor[h] + total

    @cute.jit
    def rescale(self, O: cute.Tensor, f0: Float32, f1: Float32, in_flight: cutlass.Constexpr[bool] = False):
        """O times the rows' factors, which are exactly 1 for nearly every block after the first."""
        if cute.arch.vote_any_sync((f0 != 1.0) | (f1 != 1.0)):
            if const_expr(in_flight):
                warpgroup.wait_group(0)
            for j in cutlass.range_constexpr(128):
                O[j] = O[j] * (f0 if const_expr(j % 4 < 2) else f1)

    @cute.jit
    def follow(self, r: Registers, factors: cute.Tensor, c: Place):
        """O and L times what the other warpgroup's block does to them."""
        f0, f1 = factors[c.row], factors[c.row + 8]
        r.L[0], r.L[1] = r.L[0] * f0, r.L[1] * f1
        self.rescale(r.O, f0, f1)

    @cute.jit
    def even_block(self, mma: Mmas, s: Shared, r: Registers, v: Views, k: Step, scale_log2: Float32, c: Place):
        """O_L += P0 V0_L by WG0, whose S is ready. WG1 may have the maximum and P0 as soon as they are known."""
        mx = self.row_maximum(r.S, k, c.t)
        new_max, factor = self.update_max(s, s.scale0, mx, scale_log2, c)
        cute.arch.barrier_arrive(barrier_id=BAR_MAX0, number_of_threads=2 * WG)
        self.rescale(r.O, factor[0], factor[1])
        self.exponentials(r, new_max, factor, scale_log2)
        cute.copy(v.put, v.tPr, v.tPs)
        ptx.pin_registers(cute.recast_tensor(r.P, Int32))
        self.issue_pv(mma.pv_rs, r.O, r.P, v.rV_own)
        cute.arch.fence_view_async_shared()
        cute.arch.barrier_arrive(barrier_id=BAR_P0, number_of_threads=2 * WG)
        warpgroup.wait_group(0)
        if c.t == 0:
            cute.arch.mbarrier_arrive(s.k_empty + K0L)

    @cute.jit
    def pair0(self, mma: Mmas, s: Shared, r: Registers, v: Views, k: Step, scale_log2: Float32, c: Place):
        """WG0's share of one pair of blocks; S of the even block is ready on entry and, if there is more, on return."""
        self.even_block(mma, s, r, v, k, scale_log2, c)
        cute.arch.barrier(barrier_id=BAR_P1, number_of_threads=2 * WG)
        self.follow(r, s.scale1, c)
        self.issue_pv(mma.pv, r.O, v.rP_other, v.rV_other)  # O_L += P1 V1_L
        if k.more:
            self.issue_qk(mma, s, r, v, 0, range(0, 4), k.next_phase, True)
            warpgroup.wait_group(4)  # all but the four slabs: P1 V1_L is done
            if c.t == 0:
                cute.arch.mbarrier_arrive(s.k_empty + K1L)
            self.issue_qk(mma, s, r, v, 0, range(4, NUM_SLABS), k.next_phase, False)
            warpgroup.wait_group(0)
        else:
            warpgroup.wait_group(0)
            if c.t == 0:
                cute.arch.mbarrier_arrive(s.k_empty + K1L)

    @cute.jit
    def pair1(self, mma: Mmas, s: Shared, r: Registers, v: Views, k: Step, scale_log2: Float32, c: Place):
        """WG1's share of one pair of blocks; S of the odd block is ready on entry and, if there is more, on return.

        P0 comes first though P1 is ready: its half of V is the first that WG0 needs back, for the next scores.
        """
        mx = self.row_maximum(r.S, k, c.t)
        cute.arch.barrier(barrier_id=BAR_MAX0, number_of_threads=2 * WG)
        self.follow(r, s.scale0, c)
        new_max, factor = self.update_max(s, s.scale1, mx, scale_log2, c)
        self.exponentials(r, new_max, factor, scale_log2)
        cute.copy(v.put, v.tPr, v.tPs)
        cute.arch.fence_view_async_shared()
        ptx.pin_registers(cute.recast_tensor(r.P, Int32))
        cute.arch.barrier(barrier_id=BAR_P0, number_of_threads=2 * WG)
        self.issue_pv(mma.pv, r.O, v.rP_other, v.rV_other)  # O_R += P0 V0_R
        self.rescale(r.O, factor[0], factor[1], in_flight=True)
        self.issue_pv(mma.pv_rs, r.O, r.P, v.rV_own)  # O_R += P1 V1_R
        cute.arch.barrier_arrive(barrier_id=BAR_P1, number_of_threads=2 * WG)
        warpgroup.wait_group(1)
        if c.t == 0:
            cute.arch.mbarrier_arrive(s.k_empty + K0R)
        warpgroup.wait_group(0)
        if c.t == 0:
            cute.arch.mbarrier_arrive(s.k_empty + K1R)
        if k.more:
            self.first_scores(1, mma, s, r, v, k.next_phase)

    @cute.jit
    def last1(self, mma: Mmas, s: Shared, r: Registers, v: Views, c: Place):
        """O_R += P0 V0_R for the block at the end of a piece that has no partner."""
        cute.arch.barrier(barrier_id=BAR_MAX0, number_of_threads=2 * WG)
        self.follow(r, s.scale0, c)
        cute.arch.barrier(barrier_id=BAR_P0, number_of_threads=2 * WG)
        self.issue_pv(mma.pv, r.O, v.rP_other, v.rV_other)
        warpgroup.wait_group(0)
        if c.t == 0:
            cute.arch.mbarrier_arrive(s.k_empty + K0R)
