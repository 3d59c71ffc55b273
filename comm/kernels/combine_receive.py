"""Combine, home side: pull the rows of each of my tokens from the ranks that had it, and add them up.

    out[t] = (((bias_0 + bias_1) + y_a[row_a]) + y_b[row_b]) + ...      in f32, ranks ascending, rounded once to bf16
    row_r = rows that ranks before me send to r + send_row[t, r]

Grid (SMs, 1, 1), 608 threads. Once all peers' outputs stand:

    3 teams     4 warps each add up a token, piece by piece (at most 8 KiB of the row), 32 columns a lane
    3 loaders   one lane each: bulk loads for a team, a token at a time, piece by piece, ranks ascending
    4 others    add the top-k weights, by ordinary loads

A call whose outputs stand in the memory already, without weights, is this launch alone.

Pipelines, one per team, a stage per piece: `full` (the loader arrives once and expects the bytes), `empty` (each warp
of the team arrives once its lanes have read). Shared memory: 3 rings of 72 KiB. Bound by memory or the link: each row
is read once. The last CTA to be done acknowledges to all peers and ends the epoch.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint8
from cutlass.experimental import primitives as prims
from cutlass.memory import SmemAllocator

from ...cute_kernels.jit import Program
from ...cute_kernels.sm90 import ptx
from ...cute_kernels.sm90.address import ld_f32, ld_i32, ld_vector, st_i32, unpack_bf16
from ...cute_kernels.sm90.args import fake_args, param_kinds
from ..config import LINE, MAX_RANKS
from .combine_send import may_send
from .config import MAX_STAGES, PIECE_BYTES, TEAM_RING_BYTES, TEAM_WARPS, TEAMS, WEIGHT_WARPS
from .verbs import (
    ARRIVALS,
    COMBINE_ACK,
    COMBINE_READY,
    EPOCH,
    GMEM,
    PHASE,
    Group,
    aborted,
    last_to_arrive,
    may_proceed,
    peer_base,
    read_epoch,
    set_flag,
    signal_peers,
    wait_flag,
)

ADDERS = TEAMS * TEAM_WARPS
THREADS = 32 * (ADDERS + TEAMS + WEIGHT_WARPS)
STRIDE = TEAM_WARPS * 512  # bytes that a team reads at once
VECTORS = PIECE_BYTES // STRIDE  # 16-byte vectors of a piece per lane


@dataclass(frozen=True)
class CombineReceiveArgs:
    """Kernel parameters in launch order. Addresses of 0 stand for what a call does not have."""

    sends: Int32  # 1: my outputs stand in the memory already, and this launch says so; 0: one before it did
    max_recv_rows: Int32  # that fit into the memory
    matrix: Int64  # int32 (ranks, ranks)
    send_row: Int64  # int32 (tokens, ranks)
    tokens: Int32
    out: Int64  # out, bf16 (tokens, row_bytes / 2)
    row_bytes: Int32
    piece_bytes: Int32  # a team's ring: see config.ring
    stages: Int32
    bias_0: Int64  # bf16, as out
    bias_1: Int64
    weights: Int64  # out, f32 (tokens, topk)
    topk: Int32
    weights_offset: Int64  # regions of the layout
    weight_row_bytes: Int32
    y_offset: Int64


class CombineReceive:
    def __init__(self):
        @cute.struct
        class Smem:
            flag: cute.struct.MemRange[Int32, 4]
            y: cute.struct.MemRange[Int64, MAX_RANKS]  # address of my first row at each rank
            weights: cute.struct.MemRange[Int64, MAX_RANKS]  # and of its weights
            ring: cute.struct.Align[cute.struct.MemRange[Uint8, TEAMS * TEAM_RING_BYTES], 128]
            # Last, because racecheck takes their initialisation by some threads for one by all.
            full: cute.struct.MemRange[Int64, TEAMS * MAX_STAGES]
            empty: cute.struct.MemRange[Int64, TEAMS * MAX_STAGES]

        self.Smem = Smem

    @cute.jit
    def __call__(self, g: Group, args: CombineReceiveArgs, stream: cuda.CUstream):
        self.kernel(g, args).launch(
            grid=(1, 1, 1), block=(THREADS, 1, 1), stream=stream, min_blocks_per_mp=1, use_pdl=True
        )

    @cute.kernel
    def kernel(self, g: Group, a: CombineReceiveArgs):
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        warp, lane = cute.arch.make_warp_uniform(tid // 32), tid % 32
        sm = SmemAllocator().allocate(self.Smem)
        flag = sm.flag.data_ptr()
        y = sm.y.get_tensor(cute.make_layout(MAX_RANKS))
        weights = sm.weights.get_tensor(cute.make_layout(MAX_RANKS))
        if a.sends != 0:
            cute.arch.griddepcontrol_wait()
        epoch = read_epoch(g, "combine")
        fits, reached = may_send(g, a), Boolean(True)
        if (tid < g.ranks) & fits:
            before = Int32(0)
            if g.rank > 0:
                before = ld_i32(a.matrix + Int64((g.rank - 1) * g.ranks + tid) * 4)
            base = peer_base(g, tid)
            y[tid] = base + a.y_offset + Int64(before) * a.row_bytes
            weights[tid] = base + a.weights_offset + Int64(before) * a.weight_row_bytes
            if (a.sends != 0) & (cta == 0):
                set_flag(base + COMBINE_READY + g.rank * LINE, epoch)
            reached = wait_flag(g, g.own + COMBINE_READY + tid * LINE, epoch, tid, PHASE["combine_ready"])
        if tid < TEAMS * MAX_STAGES:
            cute.arch.mbarrier_init(sm.full.data_ptr() + tid, 1)
            cute.arch.mbarrier_init(sm.empty.data_ptr() + tid, TEAM_WARPS)
        cute.arch.mbarrier_init_fence()
        if may_proceed(g, reached & fits):
            # What peers stored in the generic proxy is read by bulk copies, in the async proxy.
            cute.arch.fence_proxy("async.global")
            if warp < ADDERS:
                team = warp // TEAM_WARPS
                self.reduce(g, a, sm, team * ctas + cta, TEAMS * ctas, team, warp % TEAM_WARPS * 32 + lane)
            elif warp < ADDERS + TEAMS:
                team = warp - ADDERS
                self.load(g, a, sm, team * ctas + cta, TEAMS * ctas, team, lane)
            elif a.weights != 0:
                first = (warp - ADDERS - TEAMS) * ctas + cta
                self.add_weights(g, a, sm, first * 32 + lane, WEIGHT_WARPS * ctas * 32)
        cute.arch.griddepcontrol_wait()  # not before: what the sending launch of this rank wrote has a flag, as others'
        if last_to_arrive(g, ARRIVALS["combine_receive"], flag, wrote=False):
            if not aborted(g):
                signal_peers(g, Int64(COMBINE_ACK), epoch, wrote=False)
                if tid == 0:
                    st_i32(g.own + EPOCH["combine"], epoch)

    @cute.jit
    def row_of(self, g: Group, a: CombineReceiveArgs, token: Int32, lane: Int32):
        """Lane r: row of the token among those I sent to rank r, or -1."""
        row = Int32(-1)
        if token < a.tokens:
            if lane < g.ranks:
                row = ld_i32(a.send_row + (Int64(token) * g.ranks + lane) * 4)
        return row

    @cute.jit
    def load(self, g: Group, a: CombineReceiveArgs, sm, first: Int32, step: Int32, team: Int32, lane: Int32):
        y = sm.y.get_tensor(cute.make_layout(MAX_RANKS))
        stage, phase = Int32(0), Int32(1)
        ahead = self.row_of(g, a, first, lane)
        for token in cutlass.range(first, a.tokens, step, unroll=1):
            row = ahead
            ahead = self.row_of(g, a, token + step, lane)
            begin = Int64(0)  # lane r: where the row lies at rank r
            if row >= 0:
                begin = y[lane] + Int64(row) * a.row_bytes
            for at in cutlass.range(0, a.row_bytes, a.piece_bytes, unroll=1):
                left = a.row_bytes - at
                size = left if left < a.piece_bytes else a.piece_bytes
                for r in cutlass.range(g.ranks, unroll=1):
                    source = cute.arch.shuffle_sync(begin, r)
                    if source != 0:
                        slot = team * MAX_STAGES + stage
                        full = sm.full.data_ptr() + slot
                        cute.arch.mbarrier_wait(sm.empty.data_ptr() + slot, phase)
                        if lane == 0:
                            cute.arch.mbarrier_arrive_and_expect_tx(full, size)
                            prims.cp_async_bulk_shared_cluster_global(
                                sm.ring.data_ptr() + team * TEAM_RING_BYTES + stage * a.piece_bytes,
                                cute.make_ptr(Uint8, source + at, GMEM, assumed_align=16),
                                full,
                                size,
                            )
                        stage += 1
                        if stage == a.stages:
                            stage, phase = Int32(0), phase ^ 1

    @cute.jit
    def reduce(self, g: Group, a: CombineReceiveArgs, sm, first: Int32, step: Int32, team: Int32, thread: Int32):
        """thread: of the team. It has the vectors thread, thread + 128, ... of each piece."""
        lane = thread % 32
        stage, phase = Int32(0), Int32(0)
        ahead = self.row_of(g, a, first, lane)
        for token in cutlass.range(first, a.tokens, step, unroll=1):
            rows = Int32(cute.arch.popc(cute.arch.vote_ballot_sync(ahead >= 0)))
            ahead = self.row_of(g, a, token + step, lane)
            row = Int64(token) * a.row_bytes + thread * 16
            for at in cutlass.range(0, a.row_bytes, a.piece_bytes, unroll=1):
                left = a.row_bytes - at
                left = (left if left < a.piece_bytes else a.piece_bytes) - thread * 16
                if (rows <= 2) & (a.bias_0 == 0) & (a.bias_1 == 0):
                    stage, phase = self.add_two(a, sm, rows, team, thread, row + at, left, stage, phase)
                else:
                    stage, phase = self.add_many(a, sm, rows, team, thread, row + at, left, stage, phase)

    @cute.jit
    def add_two(
        self, a: CombineReceiveArgs, sm, rows: Int32, team: Int32, thread: Int32, row: Int64, left: Int32, stage: Int32,
        phase: Int32,
    ):  # fmt: skip
        """A piece of at most two rows: two bf16 values added as such are what they are added in f32 and rounded, since
        24 bits are more than 2 * 8 + 1, and it takes a third of the instructions. The first is added to +0.0."""
        words = cute.make_rmem_tensor(4 * VECTORS, Int32)
        words.fill(0)
        for _ in cutlass.range(rows, unroll=1):
            piece = self.wait_piece(a, sm, team, stage, phase)
            for v in cutlass.range_constexpr(VECTORS):
                loaded = ptx.ld_shared_v4(piece + self.vector_of(v, thread, left))
                for i in cutlass.range_constexpr(4):
                    words[4 * v + i] = ptx.add_bf16x2(words[4 * v + i], loaded[i])
            stage, phase = self.release_piece(a, sm, team, stage, phase)
        self.store(a, row, left, words)
        return stage, phase

    @cute.jit
    def add_many(
        self, a: CombineReceiveArgs, sm, rows: Int32, team: Int32, thread: Int32, row: Int64, left: Int32, stage: Int32,
        phase: Int32,
    ):  # fmt: skip
        acc = cute.make_rmem_tensor(8 * VECTORS, Float32)
        acc.fill(0.0)
        if a.bias_0 != 0:
            self.add_bias(a.bias_0 + row, acc, left)
        if a.bias_1 != 0:
            self.add_bias(a.bias_1 + row, acc, left)
        for _ in cutlass.range(rows, unroll=1):
            piece = self.wait_piece(a, sm, team, stage, phase)
            for v in cutlass.range_constexpr(VECTORS):
                self.add_vector(acc, v, ptx.ld_shared_v4(piece + self.vector_of(v, thread, left)))
            stage, phase = self.release_piece(a, sm, team, stage, phase)
        packed = cute.make_rmem_tensor(8 * VECTORS, BFloat16)
        packed.store(acc.load().to(BFloat16))
        self.store(a, row, left, cute.recast_tensor(packed, Int32))
        return stage, phase

    @cute.jit
    def vector_of(self, v: cutlass.Constexpr[int], thread: Int32, left: Int32):
        """Where a thread's vector is in a piece. Past the end it is the first one again."""
        return thread * 16 + v * STRIDE if v * STRIDE < left else Int32(0)

    @cute.jit
    def wait_piece(self, a: CombineReceiveArgs, sm, team: Int32, stage: Int32, phase: Int32):
        cute.arch.mbarrier_wait(sm.full.data_ptr() + team * MAX_STAGES + stage, phase)
        return sm.ring.data_ptr() + team * TEAM_RING_BYTES + stage * a.piece_bytes

    @cute.jit
    def release_piece(self, a: CombineReceiveArgs, sm, team: Int32, stage: Int32, phase: Int32):
        """The next stage and its phase."""
        cute.arch.sync_warp()
        if cute.arch.lane_idx() == 0:
            cute.arch.mbarrier_arrive(sm.empty.data_ptr() + team * MAX_STAGES + stage)
        stage += 1
        if stage == a.stages:
            stage, phase = Int32(0), phase ^ 1
        return stage, phase

    @cute.jit
    def store(self, a: CombineReceiveArgs, row: Int64, left: Int32, words: cute.Tensor):
        for v in cutlass.range_constexpr(VECTORS):
            if v * STRIDE < left:
                ptx.st_global(a.out + row + v * STRIDE, *(words[4 * v + i] for i in range(4)))

    @cute.jit
    def add_bias(self, address: Int64, acc: cute.Tensor, left: Int32):
        for v in cutlass.range_constexpr(VECTORS):
            if v * STRIDE < left:
                self.add_vector(acc, v, ld_vector(address + v * STRIDE))

    @cute.jit
    def add_vector(self, acc: cute.Tensor, v: cutlass.Constexpr[int], words):
        for i, value in enumerate(unpack_bf16(words)):
            acc[8 * v + i] = acc[8 * v + i] + value

    @cute.jit
    def add_weights(self, g: Group, a: CombineReceiveArgs, sm, first: Int32, step: Int32):
        bases = sm.weights.get_tensor(cute.make_layout(MAX_RANKS))
        for i in cutlass.range(first, a.tokens * a.topk, step, unroll=1):
            token, choice = i // a.topk, i % a.topk
            loaded = []  # all loads are in flight before the first is added
            for r in cutlass.range_constexpr(MAX_RANKS):
                weight = Float32(0.0)
                if r < g.ranks:
                    row = ld_i32(a.send_row + (Int64(token) * g.ranks + r) * 4)
                    if row >= 0:
                        weight = ld_f32(bases[r] + Int64(row) * a.weight_row_bytes + choice * 4)
                loaded.append(weight)
            total = Float32(0.0)
            for r in cutlass.range_constexpr(MAX_RANKS):
                total += loaded[r]
            st_i32(a.weights + Int64(i) * 4, total.bitcast(Int32))


def program(config) -> Program:
    """The host function and the fake arguments that compile it."""
    kernel = CombineReceive()
    kernel.kernel.set_name_prefix("cutehop_ep_combine_receive", remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(Group), fake_args(CombineReceiveArgs), cuda.CUstream(0)),
        threads=THREADS,
        smem_bytes=kernel.Smem.size_in_bytes(),
        pdl=True,
        params=param_kinds(Group) + param_kinds(CombineReceiveArgs),
    )
