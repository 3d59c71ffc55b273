"""Merge the pieces of split sequences, in slot order, so that results repeat bit for bit.

    M = max_j lse_j,  w_j = 2^(lse_j - M),  out = sum_j w_j O_j / (sum_j w_j + 2^(sink - M))

Only for sequences in more pieces than the decode kernel merges itself. Grid (row tiles x 16-row groups x column
groups, sequences), 8 warps. The warps of a CTA are teams that share the pieces of 16 rows: each takes a chunk at a
time, all loads in flight, the running maximum as in online softmax. Then the teams' results are merged in their order.
A vector is 16 columns, the piece of accumulator layout that a warp of the decode kernel stores with one instruction.
With few sequences the kernel is bound by instructions and latency, hence many teams and CTAs; with many by reading
partial results from L2.

It is launched while the decode kernel still runs (programmatic dependent launch: when all CTAs of that have begun, so
waiting is safe) and takes the place of CTAs that have ended. The pieces that a CTA needs are counted as they arrive,
and when all are there it merges them; the last reader of a counter puts it back to 0. If they don't come it waits for
the decode kernel's end, after which the counter is final; if it is still wrong, so is the plan, and the result is NaN.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float16, Float32, Int32, Int64
from cutlass.memory import SmemAllocator

from ..jit import Program
from ..sm90 import ptx
from ..sm90.address import ld_vector_if
from ..sm90.args import fake_args, param_kinds
from ..sm90.gmem import load_f32, load_i32, store_f32
from .config import (
    COMBINE_REQ,
    COMBINE_THREADS,
    COMBINE_WARPS,
    FAULT_PIECES,
    HEAD_DIM_V,
    MERGE_MAX,
    POLL_NS,
    READER,
    TILE_M,
    WARPS_OUT,
    CombineConfig,
)
from .cta import LN2, LOG2E, NEG_BIG
from .faults import lse_index, report_fault
from .work import plan_belongs


@dataclass(frozen=True)
class CombineArgs:
    """Kernel parameters in launch order; see work.DecodeArgs for the shapes."""

    plan: cute.Pointer
    num_splits: cute.Pointer
    cu_seqlens_q: cute.Pointer
    attn_sink: cute.Pointer
    out: cute.Pointer
    lse: cute.Pointer
    partial_out: cute.Pointer
    partial_rows: cute.Pointer
    arrivals: cute.Pointer
    report: cute.Pointer
    batch: Int32
    slots: Int32
    s_q: Int32
    heads_per_kv: Int32
    h_q: Int32
    total_q: Int32
    ragged: Int32
    has_sink: Int32
    split_blocks: Int32  # 0: the plan lists the sequences to combine; else look at every sequence
    partitions: Int32
    count: Int32  # entries of the list, or sequences
    row_groups: Int32  # groups of 16 rows of a tile that are ever filled
    empty_lse: Float32


@dataclass(frozen=True)
class Staged:
    """Shared memory."""

    arrived: cute.Tensor
    rows: cute.Tensor  # (team, row, 2): the largest lse so far, base 2, and the sum of weights relative to it
    values: cute.Tensor  # (team, row, column): the weighted sum


@dataclass(frozen=True)
class Share:
    """What a CTA merges of every sequence, and a warp of that."""

    slot_tile: Int32
    tile: Int32
    kv_head: Int32
    all_tiles: Int32  # of a slot
    decode_warp: Int32  # which warp of the decode kernel stored it
    group: Int32  # of columns
    first_row: Int32
    team: Int32
    vector: Int32  # the warp's first of the decode warp's 16
    lane: Int32
    # What the thread stores in the end
    row: Int32  # of the 16
    place: Int32  # first column
    token: Int32
    head: Int32


class MlaCombine:
    def __init__(self, config: CombineConfig):
        self.dtype = BFloat16 if config.dtype == "bf16" else Float16
        self.chunk, self.teams, self.vectors = config.chunk, config.teams, config.vectors
        self.members = COMBINE_WARPS // config.teams  # warps of a team
        self.columns = 16 * self.members * config.vectors
        self.groups = HEAD_DIM_V // 2 // self.columns
        self.ctas_per_sm = config.ctas_per_sm
        # Threads store as many adjacent columns each as makes their number fit, at least a word of two.
        self.span = max(self.columns * 16 // COMBINE_THREADS // config.vectors, 2)

        @cute.struct
        class Smem:
            arrived: cute.struct.MemRange[Int32, 1]
            rows: cute.struct.Align[cute.struct.MemRange[Float32, 2 * 16 * config.teams], 8]
            # rows 8 floats longer than they need be, so that 4 of them fill all banks
            values: cute.struct.Align[cute.struct.MemRange[Float32, config.teams * 16 * (self.columns + 8)], 16]

        self.Smem = Smem

    @cute.jit
    def __call__(self, args: CombineArgs, stream: cuda.CUstream):
        self.kernel(args).launch(
            grid=(1, 1, 1),
            block=(COMBINE_THREADS, 1, 1),
            stream=stream,
            min_blocks_per_mp=self.ctas_per_sm,
            preferred_smem_carveout=0,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, a: CombineArgs):
        part, first, _ = cute.arch.block_idx()
        _, step, _ = cute.arch.grid_dim()
        sm = SmemAllocator().allocate(self.Smem)
        s = Staged(
            arrived=sm.arrived.get_tensor(cute.make_layout(1)),
            rows=sm.rows.get_tensor(cute.make_layout((self.teams, 16, 2), stride=(32, 2, 1))),
            values=sm.values.get_tensor(
                cute.make_layout((self.teams, 16, self.columns), stride=(16 * (self.columns + 8), self.columns + 8, 1))
            ),
        )
        cute.arch.griddepcontrol_launch_dependents()
        # The plan was complete before the decode kernel, which this one may overlap, began to run.
        if plan_belongs(a.plan, a.partitions, a.batch, a.split_blocks):
            share, index = self.share(a, part), first
            req, slot, pieces = self.entry(a, index)
            while req < a.batch:
                index += step
                next_req, next_slot, next_pieces = self.entry(a, index)
                if (pieces > MERGE_MAX) & (pieces <= a.slots) & (slot >= 0) & (slot <= a.slots - pieces):
                    self.merge(a, s, req, slot, pieces, share)
                req, slot, pieces = next_req, next_slot, next_pieces
        if (part == 0) & (first == 0):  # who waits for this kernel's end must wait for the decode kernel's too
            cute.arch.griddepcontrol_wait()

    @cute.jit
    def entry(self, a: CombineArgs, index: Int32):
        """A sequence to look at, its first slot and its pieces; the batch size behind the last."""
        req, slot, pieces = a.batch, Int32(0), Int32(0)
        if index < a.count:
            req = index
            if a.split_blocks == 0:
                req = load_i32(a.plan, index * 8 + COMBINE_REQ)
        if req < a.batch:
            slot = load_i32(a.num_splits, req)
            pieces = load_i32(a.num_splits, req + 1) - slot
        return req, slot, pieces

    @cute.jit
    def share(self, a: CombineArgs, part):
        tid, _, _ = cute.arch.thread_idx()
        tiles = (a.s_q * a.heads_per_kv + (TILE_M - 1)) // TILE_M
        # part = (tile of a slot, warpgroup of the decode CTA, 16 rows, columns)
        group, rest = part % self.groups, part // self.groups
        row_group, rest = rest % a.row_groups, rest // a.row_groups
        slot_tile = rest // 2
        warp = cute.arch.make_warp_uniform(tid // 32)
        threads = self.columns // self.vectors // self.span  # of a row
        tile, kv_head, row = slot_tile % tiles, slot_tile // tiles, tid // threads
        packed = tile * TILE_M + row_group * 16 + row
        head = kv_head * a.heads_per_kv + packed % a.heads_per_kv
        return Share(
            slot_tile=slot_tile,
            tile=tile,
            kv_head=kv_head,
            all_tiles=tiles * (a.h_q // a.heads_per_kv),
            decode_warp=rest % 2 * 4 + row_group,
            group=group,
            first_row=row_group * 16,
            team=warp // self.members,
            vector=(group * self.members + warp % self.members) * self.vectors,
            lane=tid % 32,
            row=row,
            place=tid % threads * self.span,
            token=packed // a.heads_per_kv,
            head=head,
        )

    @cute.jit
    def merge(self, a: CombineArgs, s: Staged, req: Int32, slot: Int32, pieces: Int32, c: Share):
        token0, s_q = req * a.s_q, a.s_q
        if a.ragged != 0:
            token0 = load_i32(a.cu_seqlens_q, req)
            s_q = load_i32(a.cu_seqlens_q, req + 1) - token0
        rows = s_q * a.heads_per_kv - c.tile * TILE_M - c.first_row  # live ones of these 16 and below
        if rows > 0:
            acc = cute.make_rmem_tensor((8, self.vectors), Float32)
            top = cute.make_rmem_tensor(2, Float32)
            total = cute.make_rmem_tensor(2, Float32)
            acc.fill(0.0)
            top.fill(NEG_BIG)
            total.fill(0.0)
            slot_row = ((Int64(slot) * c.all_tiles + c.slot_tile) * WARPS_OUT + c.decode_warp) * 16
            values = a.partial_out.toint() + ((slot_row + c.vector) * 32 + c.lane) * 16
            stats = a.partial_rows.toint() + (slot_row + c.lane // 4) * 8
            if self.await_pieces(a, s, req, slot, pieces, c):
                for first in cutlass.range(self.chunk * c.team, pieces, self.chunk * self.teams, unroll=1):
                    self.add_chunk(acc, top, total, values, stats, first, pieces, c)
            else:
                total.fill(Float32.nan)
            self.stage(s, acc, top, total, c)
            cute.arch.sync_threads()
            self.store(a, s, req, token0, rows, c)
            cute.arch.sync_threads()  # before the next sequence is staged

    @cute.jit
    def await_pieces(self, a: CombineArgs, s: Staged, req: Int32, slot: Int32, pieces: Int32, c: Share) -> Boolean:
        """Wait for all pieces. False if, with the decode kernel at its end, there are not as many as planned."""
        tid, _, _ = cute.arch.thread_idx()
        if tid == 0:
            tile = (slot // (MERGE_MAX + 1)) * c.all_tiles + c.slot_tile
            counter = a.arrivals + tile * WARPS_OUT + c.decode_warp
            count, start, polling = Int32(0), cute.arch.globaltimer(), Boolean(True)
            while polling:
                count = cute.arch.load(counter, Int32, sem="acquire", scope="gpu") & (READER - 1)
                polling = (count < pieces) & (cute.arch.globaltimer() - start < POLL_NS)
            if count < pieces:
                cute.arch.griddepcontrol_wait()
                count = cute.arch.load(counter, Int32, sem="acquire", scope="gpu") & (READER - 1)
            others = cute.arch.atomic_add(counter, Int32(READER), sem="relaxed", scope="gpu")
            if others >= READER * (self.groups - 1):
                cute.arch.store(counter, Int32(0), sem="relaxed", scope="gpu")
            if count != pieces:  # a decode CTA that found a fault has said what it is
                unsaid = cute.arch.load(a.report, Int32, sem="relaxed", scope="sys") == 0
                report_fault(a.report.toint(), Int32(FAULT_PIECES), req, unsaid)
            s.arrived[0] = count
        cute.arch.sync_threads()
        return s.arrived[0] == pieces

    @cute.jit
    def add_chunk(
        self, acc: cute.Tensor, top: cute.Tensor, total: cute.Tensor, values: Int64, stats: Int64, first: Int32,
        pieces: Int32, c: Share,
    ):  # fmt: skip
        """Add pieces first .. first + chunk - 1. The four lanes of a row share the work on their weights."""
        values_step = Int64(c.all_tiles) * (TILE_M * HEAD_DIM_V * 2)
        stats_step = Int64(c.all_tiles) * (WARPS_OUT * 16 * 8)
        loaded = []
        for u in cutlass.range_constexpr(self.chunk):
            there = Int32(first + u < pieces)
            for v in cutlass.range_constexpr(self.vectors):
                address = values + (first + u) * values_step + v * 512
                loaded.append(ld_vector_if(address, there))
        weights = [[None] * (self.chunk // 4) for _ in range(2)]
        scales = [[None] * (self.chunk // 4) for _ in range(2)]
        for h in cutlass.range_constexpr(2):
            high = top[h]
            for i in cutlass.range_constexpr(self.chunk // 4):
                piece = first + 4 * i + c.lane % 4
                weights[h][i], scales[h][i] = -Float32.inf, Float32(0.0)
                if piece < pieces:
                    weights[h][i], scales[h][i] = ptx.ld_global_v2_f32(stats + piece * stats_step + h * 64)
                high = cute.arch.fmax(high, weights[h][i])
            high = cute.arch.fmax(high, cute.arch.shuffle_sync_bfly(high, offset=1))
            high = cute.arch.fmax(high, cute.arch.shuffle_sync_bfly(high, offset=2))
            shrink = cute.math.exp2(top[h] - high, fastmath=True)
            top[h] = high
            added = Float32(0.0)
            for i in cutlass.range_constexpr(self.chunk // 4):
                weights[h][i] = cute.math.exp2(weights[h][i] - high, fastmath=True)
                added += weights[h][i]
                weights[h][i] = weights[h][i] * scales[h][i]
            added += cute.arch.shuffle_sync_bfly(added, offset=1)
            added += cute.arch.shuffle_sync_bfly(added, offset=2)
            total[h] = total[h] * shrink + added
            for v in cutlass.range_constexpr(self.vectors):
                for k in (2 * h, 2 * h + 1, 2 * h + 4, 2 * h + 5):
                    acc[k, v] = acc[k, v] * shrink
        for u in cutlass.range_constexpr(self.chunk):
            for h in cutlass.range_constexpr(2):
                weight = cute.arch.shuffle_sync(weights[h][u // 4], (c.lane // 4) * 4 + u % 4)
                for v in cutlass.range_constexpr(self.vectors):
                    for w in (h, h + 2):
                        for i, value in enumerate(ptx.unpack_f16(loaded[u * self.vectors + v][w])):
                            acc[2 * w + i, v] = acc[2 * w + i, v] + weight * value

    @cute.jit
    def stage(self, s: Staged, acc: cute.Tensor, top: cute.Tensor, total: cute.Tensor, c: Share):
        """A team's sums to shared memory, where every row is in one place."""
        column = (c.vector % (self.members * self.vectors)) * 16 + c.lane % 4 * 2
        for h in cutlass.range_constexpr(2):
            row = c.lane // 4 + 8 * h
            for v in cutlass.range_constexpr(self.vectors):
                for k in cutlass.range_constexpr(4):
                    s.values[c.team, row, column + v * 16 + k // 2 * 8 + k % 2] = acc[2 * h + k // 2 * 4 + k % 2, v]
            if (c.lane % 4 == 0) & (column < 16 * self.vectors):  # the first warp of the team
                s.rows[c.team, row, 0] = top[h]
                s.rows[c.team, row, 1] = total[h]

    @cute.jit
    def store(self, a: CombineArgs, s: Staged, req: Int32, token0: Int32, rows: Int32, c: Share):
        """Merge the teams, divide, and store whole lines."""
        row = c.row
        if (row < 16) & (row < rows):
            top, total = Float32(NEG_BIG), Float32(0.0)
            for t in cutlass.range_constexpr(self.teams):
                top = cute.arch.fmax(top, s.rows[t, row, 0])
            weights = [cute.math.exp2(s.rows[t, row, 0] - top, fastmath=True) for t in range(self.teams)]
            for t in cutlass.range_constexpr(self.teams):
                total += weights[t] * s.rows[t, row, 1]
            denominator = total
            if a.has_sink != 0:
                denominator += cute.math.exp2(load_f32(a.attn_sink, c.head) * LOG2E - top, fastmath=True)
            seen = total != 0.0  # also NaN, from a fault
            factor = cute.arch.rcp_approx(denominator) if seen else Float32(0.0)
            first = (c.decode_warp // 4) * 256 + c.group * self.columns
            address = a.out.toint() + ((Int64(token0 + c.token) * a.h_q + c.head) * HEAD_DIM_V + first) * 2
            frag = cute.make_rmem_tensor(self.span, self.dtype)
            words = cute.recast_tensor(frag, Int32)
            for v in cutlass.range_constexpr(self.vectors):
                column = v * (self.columns // self.vectors) + c.place
                for i in cutlass.range_constexpr(self.span):
                    value = Float32(0.0)
                    for t in cutlass.range_constexpr(self.teams):
                        value += weights[t] * s.values[t, row, column + i]
                    frag[i] = self.dtype(value * factor)
                ptx.st_global(address + column * 2, *(words[i] for i in range(self.span // 2)))
            if (c.place == 0) & (c.group == 0) & (c.decode_warp < 4):
                lse = (top + cute.math.log2(total, fastmath=True)) * LN2
                store_f32(a.lse, lse_index(a, req, token0, c.token, c.head), lse if seen else a.empty_lse)


def program(config: CombineConfig) -> Program:
    """The host function and the fake arguments that compile one variant."""
    kernel = MlaCombine(config)
    name = f"cutehop_mla_combine_{config.dtype}_{config.chunk}x{config.teams}x{config.vectors}"
    kernel.kernel.set_name_prefix(name, remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(CombineArgs), cuda.CUstream(0)),
        threads=COMBINE_THREADS,
        smem_bytes=kernel.Smem.size_in_bytes(),
        params=param_kinds(CombineArgs),
        pdl=True,
    )
