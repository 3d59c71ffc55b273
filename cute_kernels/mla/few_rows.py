"""The math of the decode kernel for up to 16 rows: the operands of both products change places.

    S^T = K Q^T    (64 keys x 16 rows a block)
    O^T = V^T P^T  (512 columns x 16 rows)

A wgmma has 64 rows at least. With keys and columns as those, and the few rows as its 16 columns, a block takes 1088
cycles of shared memory instead of 2304, and a warpgroup holds all 512 columns in 64 registers. So the warpgroups work
on every other block each, with a maximum of their own, and meet only at the end of a piece: each gives the other's
half of the columns away, and turns its own round, to where a thread has rows as in `math.py`.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hh
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from ..sm90 import ptx
from .config import BLOCK, FEW_ROWS, HEAD_DIM, HEAD_DIM_V, NUM_SLABS, RESCALE_LOG2
from .cta import BAR_WG, NEG_BIG, WG, Place, sync_math
from .decode import MlaDecode
from .faults import report_fault
from .work import DecodeArgs, Piece, get_cut, get_piece, load_record, next_position, not_done, put_cuts, visible_keys

WARPS = WG // 32
OWN = HEAD_DIM_V // 2 // 64  # 64-column tiles of a warpgroup's half
HALVES = ((0, 1), (1, 0))  # of the columns, by warpgroup, in the order in which the loader loads them


@dataclass(frozen=True)
class FewMmas:
    qk: cute.TiledMma  # 64 keys x 16 rows
    pv: cute.TiledMma  # 64 columns x 16 rows


@dataclass(frozen=True)
class FewShared:
    """Views of the CTA's shared memory; what is not here is as in cta.Shared."""

    q: cute.Pointer
    k: cute.Pointer
    sQ: cute.Tensor  # (16, 64, 9)
    sK: cute.Tensor  # (64, 64, 18)
    sP: cute.Tensor  # (16, 64, 2): P of both warpgroups
    vT: tuple  # by block and half: (256, 64), K the other way round
    most: cute.Tensor  # (2, 4, 16): a row's maximum in each warp's keys
    sums: cute.Tensor  # (2, 4, 16): a row's sum over each warp's keys
    tops: cute.Tensor  # (2, 16): running maxima of the warpgroups, scaled, base 2
    given: cute.Tensor  # (2, 8, 128, 4): half of the columns from each warpgroup for the other
    ticket: cute.Tensor
    cuts: cute.Tensor
    addresses: cute.Tensor
    q_full: cute.Pointer
    q_empty: cute.Pointer
    k_full: cute.Pointer
    k_empty: cute.Pointer


@dataclass(frozen=True)
class FewRegisters:
    """What a math thread holds. Its rows are 2 (lane % 4) + {0, 1}, and 8 further."""

    O: tuple  # by half of the columns: 32
    S: cute.Tensor  # 8
    L: cute.Tensor  # 4: sums over the thread's keys, by row
    top: cute.Tensor  # 4: running maximum of the warpgroup, scaled, base 2
    limit: cute.Tensor  # 4: visible keys of a row


class FewRowsDecode(MlaDecode):
    vectors = 4
    q_rows = FEW_ROWS

    def smem_struct(self):
        @cute.struct
        class Smem:
            q_full: cute.struct.MemRange[Int64, 1]
            q_empty: cute.struct.MemRange[Int64, 1]
            k_full: cute.struct.MemRange[Int64, 2 * NUM_SLABS]
            k_empty: cute.struct.MemRange[Int64, 4]
            most: cute.struct.MemRange[Float32, 2 * WARPS * FEW_ROWS]
            sums: cute.struct.MemRange[Float32, 2 * WARPS * FEW_ROWS]
            tops: cute.struct.MemRange[Float32, 2 * FEW_ROWS]
            ticket: cute.struct.MemRange[Int32, 1]
            cuts: cute.struct.MemRange[Int32, 3]
            addresses: cute.struct.MemRange[Int64, 2]
            work: cute.struct.MemRange[Int32, 3]
            given: cute.struct.Align[cute.struct.MemRange[Float32, 2 * 32 * WG], 16]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, FEW_ROWS * HEAD_DIM], 1024]
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, 2 * BLOCK * HEAD_DIM], 1024]
            p: cute.struct.Align[cute.struct.MemRange[self.dtype, 2 * FEW_ROWS * BLOCK], 1024]

        return Smem

    def views_of(self, sm):
        atom = self.swizzle_atom()
        q_slabs = cute.tile_to_shape(atom, (FEW_ROWS, 64, NUM_SLABS), order=(0, 1, 2))
        k_slabs = cute.tile_to_shape(atom, (64, 64, 2 * NUM_SLABS), order=(0, 1, 2))
        p_slabs = cute.tile_to_shape(atom, (FEW_ROWS, 64, 2), order=(0, 1, 2))
        sK = sm.k.get_tensor(k_slabs.outer, swizzle=k_slabs.inner)
        v = cute.select(cute.tile_to_shape(atom, (64, 64 * OWN), order=(0, 1)).outer, mode=[1, 0])
        by_warp = cute.make_layout((2, WARPS, FEW_ROWS), stride=(WARPS * FEW_ROWS, FEW_ROWS, 1))
        return FewShared(
            q=sm.q.data_ptr(),
            k=sm.k.data_ptr(),
            sQ=sm.q.get_tensor(q_slabs.outer, swizzle=q_slabs.inner),
            sK=sK,
            sP=sm.p.get_tensor(p_slabs.outer, swizzle=p_slabs.inner),
            vT=tuple(
                tuple(cute.make_tensor(sK.iterator + (w * NUM_SLABS + half * OWN) * BLOCK * 64, v) for half in range(2))
                for w in range(2)
            ),
            most=sm.most.get_tensor(by_warp),
            sums=sm.sums.get_tensor(by_warp),
            tops=sm.tops.get_tensor(cute.make_layout((2, FEW_ROWS), stride=(FEW_ROWS, 1))),
            given=sm.given.get_tensor(cute.make_layout((2, 8, WG, 4), stride=(32 * WG, 4 * WG, 4, 1))),
            ticket=sm.ticket.get_tensor(cute.make_layout(1)),
            cuts=sm.cuts.get_tensor(cute.make_layout(3)),
            addresses=sm.addresses.get_tensor(cute.make_layout(2)),
            q_full=sm.q_full.data_ptr(),
            q_empty=sm.q_empty.data_ptr(),
            k_full=sm.k_full.data_ptr(),
            k_empty=sm.k_empty.data_ptr(),
        )

    def make_mmas(self):
        def mma(a_major):
            return hh.make_trivial_tiled_mma(
                self.dtype, self.dtype, a_major, OperandMajorMode.K, Float32,
                atom_layout_mnk=(1, 1, 1), tiler_mn=(64, FEW_ROWS), a_source=warpgroup.OperandSource.SMEM,
            )  # fmt: skip

        return FewMmas(mma(OperandMajorMode.K), mma(OperandMajorMode.MN))

    def row_of(self, t):
        return (t % 32) // 4

    def row_group(self, c: Place):
        return Int32(0)

    def vector(self, j, c: Place):
        return j * WARPS + c.t // 32

    def column(self, g, lane, c: Place):
        return self.vector(2 * g + lane // 2, c) * 16 + lane % 2 * 8

    # ------------------------------------------------------------------------------------------------ blocks

    @cute.jit
    def math(self, a: DecodeArgs, mma: FewMmas, s: FewShared, c: Place):
        """All pieces of the partition."""
        r = FewRegisters(
            O=tuple(
                cute.make_rmem_tensor(mma.pv.partition_shape_C((64 * OWN, FEW_ROWS)), Float32) for half in range(2)
            ),
            S=cute.make_rmem_tensor(mma.qk.partition_shape_C((BLOCK, FEW_ROWS)), Float32),
            L=cute.make_rmem_tensor(4, Float32),
            top=cute.make_rmem_tensor(4, Float32),
            limit=cute.make_rmem_tensor(4, Int32),
        )
        if not c.belongs:
            self.refuse(a, c)
        record = load_record(a, c.part, c.belongs)
        if (c.wg == 0) & (c.t == 0):
            put_cuts(a, s, record, c)
        req, block, split, seqlen = record.req, record.block, record.split, record.seqlen
        q_phase, phase0, phase1 = Int32(0), Int32(0), Int32(0)
        while not_done(req, block, record):
            piece = get_piece(a, record, c.tile, req, block, seqlen)
            r.O[0].fill(0.0)
            r.O[1].fill(0.0)
            r.L.fill(0.0)
            r.top.fill(NEG_BIG)
            if piece.n > 0:
                for q in cutlass.range_constexpr(4):
                    r.limit[q] = visible_keys(a, piece.seqlen, piece.s_q, row_of_quad(q, c))
                cute.arch.mbarrier_wait(s.q_full, q_phase)
                q_phase ^= 1
                self.zero_unused_rows(s, piece, phase0, c)
                if c.wg == 0:
                    self.few_blocks(0, a, mma, s, r, piece, phase0, c)
                else:
                    self.few_blocks(1, a, mma, s, r, piece, phase1, c)
                phase0 ^= ((piece.n + 1) // 2) & 1
                phase1 ^= (piece.n // 2) & 1
                if c.t == 0:
                    cute.arch.mbarrier_arrive(s.q_empty)
            self.end_piece(a, s, r, piece, record.end_req, req, split, c)
            req, block, split, seqlen = next_position(a, record, piece, req, split)

    @cute.jit
    def few_blocks(
        self, w: cutlass.Constexpr[int], a: DecodeArgs, mma: FewMmas, s: FewShared, r: FewRegisters, piece: Piece,
        phase: Int32, c: Place,
    ):  # fmt: skip
        """Every other block of a piece, the newest first, by warpgroup w alone."""
        qk, pv = mma.qk.get_slice(c.t), mma.pv.get_slice(c.t)
        rK, rQ = qk.make_fragment_A(qk.partition_A(s.sK)), qk.make_fragment_B(qk.partition_B(s.sQ))
        rV = tuple(pv.make_fragment_A(pv.partition_A(v)) for v in s.vT[w])
        rP = pv.make_fragment_B(pv.partition_B(s.sP))
        for i in cutlass.range((piece.n + 1 - w) // 2, unroll=1):
            block = piece.end - 1 - 2 * i - w
            self.few_scores(w, mma, s, r, rK, rQ, phase)
            warpgroup.wait_group(0)
            phase ^= 1
            self.few_softmax(w, s, r, block, piece, a.scale_log2, c)
            self.few_values(w, mma, r, rV, rP)
            for done in cutlass.range_constexpr(2):
                warpgroup.wait_group(1 - done)
                if c.t == 0:
                    cute.arch.mbarrier_arrive(s.k_empty + 2 * w + HALVES[w][done])

    def few_scores(self, w, mma, s, r, rK, rQ, phase):
        """S^T of a block, slab by slab as they land."""
        atom = cute.make_mma_atom(mma.qk.op)
        atom.set(warpgroup.Field.ACCUMULATE, False)
        slabs = (range(0, 4), range(4, NUM_SLABS))
        for slab in (*slabs[HALVES[w][0]], *slabs[HALVES[w][1]]):
            cute.arch.mbarrier_wait(s.k_full + w * NUM_SLABS + slab, phase)
            warpgroup.fence()
            for k in range(4):
                cute.gemm(atom, r.S, rK[None, None, k, w * NUM_SLABS + slab], rQ[None, None, k, slab], r.S)
                atom.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()

    def few_values(self, w, mma, r, rV, rP):
        """O^T += V^T P^T, a group for each half of the columns."""
        atom = cute.make_mma_atom(mma.pv.op)
        atom.set(warpgroup.Field.ACCUMULATE, True)
        for half in HALVES[w]:
            warpgroup.fence()
            for k in range(BLOCK // 16):
                cute.gemm(atom, r.O[half], rV[half][None, None, k], rP[None, None, k, w], r.O[half])
            warpgroup.commit_group()

    @cute.jit
    def few_softmax(
        self, w: cutlass.Constexpr[int], s: FewShared, r: FewRegisters, block: Int32, piece: Piece, scale_log2: Float32,
        c: Place,
    ):  # fmt: skip
        """P to shared memory, O and the sums scaled to its maximum. All warps find the same maxima."""
        warp, lane = c.t // 32, c.t % 32
        if (block + 1) * BLOCK > piece.min_visible:
            for j in cutlass.range_constexpr(8):
                key = block * BLOCK + warp * 16 + lane // 4 + 8 * (j // 2 % 2)
                if key >= r.limit[j // 4 * 2 + j % 2]:
                    r.S[j] = -Float32.inf
        for q in cutlass.range_constexpr(4):
            most = over_lanes(cute.arch.fmax, cute.arch.fmax(r.S[first(q)], r.S[first(q) + 2]))
            if lane < 4:
                s.most[w, warp, row_of_quad(q, c)] = most
        cute.arch.barrier(barrier_id=BAR_WG + w, number_of_threads=WG)
        factor = cute.make_rmem_tensor(4, Float32)
        for q in cutlass.range_constexpr(4):
            most = s.most[w, 0, row_of_quad(q, c)]
            for i in cutlass.range_constexpr(1, WARPS):
                most = cute.arch.fmax(most, s.most[w, i, row_of_quad(q, c)])
            new = most * scale_log2
            new = new if new > r.top[q] + RESCALE_LOG2 else r.top[q]
            factor[q] = cute.math.exp2(r.top[q] - new, fastmath=True)
            r.top[q] = new
        raised = (factor[0] != 1.0) | (factor[1] != 1.0) | (factor[2] != 1.0) | (factor[3] != 1.0)
        if cute.arch.vote_any_sync(raised):
            for q in cutlass.range_constexpr(4):
                r.L[q] = r.L[q] * factor[q]
            for half in cutlass.range_constexpr(2):
                for j in cutlass.range_constexpr(8 * OWN):
                    r.O[half][j] = r.O[half][j] * factor[j // 4 % 2 * 2 + j % 2]
        p = cute.make_rmem_tensor(8, self.dtype)
        words = cute.recast_tensor(p, Int32)
        for q in cutlass.range_constexpr(4):
            for h in cutlass.range_constexpr(2):
                value = cute.math.exp2(r.S[first(q) + 2 * h] * scale_log2 - r.top[q], fastmath=True)
                r.L[q] = r.L[q] + value
                p[first(q) + 2 * h] = self.dtype(value)
        # lanes 8 g to 8 g + 7 say where the rows of matrix g lie: rows 8 (g / 2) .., keys 8 (g % 2) .. of the warp's
        row, chunk = lane // 16 * 8 + lane % 8, warp * 2 + lane // 8 % 2
        address = s.sP.iterator.toint() + w * (FEW_ROWS * BLOCK * 2) + row * (BLOCK * 2) + (chunk ^ (row % 8)) * 16
        ptx.stmatrix_x4_trans(address, *(words[i] for i in range(4)))
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=BAR_WG + w, number_of_threads=WG)

    # -------------------------------------------------------------------------------------------- end of a piece

    @cute.jit
    def end_piece(
        self, a: DecodeArgs, s: FewShared, r: FewRegisters, piece: Piece, end_req: Int32, req: Int32, split: Int32,
        c: Place,
    ):  # fmt: skip
        """Merge the two warpgroups, then as with any other number of rows."""
        lane = c.t % 32
        for q in cutlass.range_constexpr(4):
            total = over_lanes(lambda x, y: x + y, r.L[q])
            if lane < 4:
                s.sums[c.wg, c.t // 32, row_of_quad(q, c)] = total
                if c.t < 4:
                    s.tops[c.wg, row_of_quad(q, c)] = r.top[q]
        sync_math()
        weight = cute.make_rmem_tensor(4, Float32)
        for q in cutlass.range_constexpr(4):
            row = row_of_quad(q, c)
            weight[q] = cute.math.exp2(r.top[q] - cute.arch.fmax(s.tops[0, row], s.tops[1, row]), fastmath=True)
        O = cute.make_rmem_tensor(8 * OWN, Float32)
        if c.wg == 0:
            self.give(0, s, r, weight, O, c)
        else:
            self.give(1, s, r, weight, O, c)
        lse, totals = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
        for h in cutlass.range_constexpr(2):
            row = c.row + 8 * h
            lse[h], totals[h] = cute.arch.fmax(s.tops[0, row], s.tops[1, row]), Float32(0.0)
            for w in cutlass.range_constexpr(2):
                for i in cutlass.range_constexpr(WARPS):
                    part = s.sums[w, i, row] * cute.math.exp2(s.tops[w, row] - lse[h], fastmath=True)
                    totals[h] = totals[h] + part
        cut = get_cut(a, s, piece, end_req, req, c)
        sync_math()
        for k in cutlass.range_constexpr(8 * OWN):
            O[k] = O[k] + s.given[1 - c.wg, k // 4, c.t, k % 4]
        self.turn(O)
        sync_math()  # the next piece may overwrite the statistics
        scale = cute.make_rmem_tensor(2, Float32)
        self.normalize(s, O, lse, scale, totals[0], totals[1], cut, c)
        leader = (c.wg == 0) & (c.t == 0)
        report_fault(s.addresses[1], cut.fault, req, leader)
        poison = Float32.nan if cut.fault != 0 else Float32(0.0)
        for h in cutlass.range_constexpr(2):
            lse[h] = lse[h] + poison
        self.finish(a, s, O, lse, scale, piece, cut, req, split, leader, c)

    @cute.jit
    def give(
        self, w: cutlass.Constexpr[int], s: FewShared, r: FewRegisters, weight: cute.Tensor, O: cute.Tensor, c: Place
    ):
        """Relative to the larger maximum: the other warpgroup's half of the columns to it, this one's into O."""
        for k in cutlass.range_constexpr(8 * OWN):
            q = k // 4 % 2 * 2 + k % 2
            O[k] = r.O[w][k] * weight[q]
            s.given[w, k // 4, c.t, k % 4] = r.O[1 - w][k] * weight[q]

    def turn(self, O: cute.Tensor):
        """From columns lane / 4 and rows 2 (lane % 4) of 8 x 8 numbers to rows lane / 4 and columns 2 (lane % 4)."""
        turned = []
        for k in range(0, 8 * OWN, 2):
            low, high = ptx.halves_of(O[k], O[k + 1])
            turned.append(ptx.floats_of(ptx.movmatrix(low), ptx.movmatrix(high)))
        for m in range(OWN):
            for tn in range(2):
                for h in range(2):
                    for e in range(2):
                        O[(2 * m + h) * 4 + 2 * tn + e] = turned[m * 4 + tn * 2 + h][e]

    @cute.jit
    def share_top(self, s: FewShared, top: Float32, h: cutlass.Constexpr[int], c: Place):
        """Columns of a row are spread over the warps."""
        if c.t % 4 == 0:
            s.most[c.wg, c.t // 32, c.row + 8 * h] = top
        cute.arch.barrier(barrier_id=BAR_WG + c.wg, number_of_threads=WG)
        for i in cutlass.range_constexpr(WARPS):
            top = cute.arch.fmax(top, s.most[c.wg, i, c.row + 8 * h])
        return top


def row_of_quad(q, c: Place):
    """The q-th row of a thread."""
    return c.t % 4 * 2 + q % 2 + q // 2 * 8


def first(q: int) -> int:
    """Where a thread's q-th row begins among the 8 numbers of a 64 x 16 tile; its second key or column is 2 further."""
    return q // 2 * 4 + q % 2


def over_lanes(combine, x):
    """Over the lanes with the same rows."""
    for offset in (4, 8, 16):
        x = combine(x, cute.arch.shuffle_sync_bfly(x, offset=offset))
    return x
