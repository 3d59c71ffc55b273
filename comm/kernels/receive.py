"""Dispatch, receiver's side: pull my rows out of the peers' memory, straight into the output.

    out[base[s] + i] = x of peer s [list_s[i]]          base[s] = rows that sources before s send me

Grid (SMs, 1, 1), 256 threads. Once all peers' inputs stand, two kinds of warps work side by side:

    mover   takes chunks of 8 rows, sources in rotation; one lane keeps a ring of pieces of rows in flight: bulk load
            from the peer into shared memory, bulk store into the output
    side    takes chunks of 32 rows: source index, expert ids (local numbering), weights, scales, by ordinary loads

Shared memory: 4 rings of 48 KiB, 768 bytes of mbarriers and places. Bound by memory or the link: each row is read once
and written once. The last CTA to be done acknowledges to all peers and ends the epoch.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, Uint8
from cutlass.memory import SmemAllocator

from ...cute_kernels.jit import Program
from ...cute_kernels.sm90 import ptx
from ...cute_kernels.sm90.address import ld_i32, ld_vector, st_i32, st_i64
from ...cute_kernels.sm90.args import fake_args, param_kinds
from ..config import LINE, MAX_RANKS
from .config import CHUNK, MAX_STAGES, MOVERS, RING_BYTES, SIDE_CHUNK, SIDE_WARPS
from .ring import EMPTY, drain, make_ring, move_row
from .verbs import (
    ARRIVALS,
    DISPATCH_ACK,
    DISPATCH_READY,
    EPOCH,
    PHASE,
    Group,
    aborted,
    in_batches,
    last_to_arrive,
    may_proceed,
    peer_base,
    read_epoch,
    signal_peers,
    wait_flag,
)

THREADS = 32 * (MOVERS + SIDE_WARPS)


@dataclass(frozen=True)
class ReceiveArgs:
    """Kernel parameters in launch order. Addresses of 0 stand for what a call does not have."""

    lists: Int32  # 1: sources are in the peers' lists, write them to src_idx; 0: they are in src_idx (cached dispatch)
    matrix: Int64  # int32 (ranks, ranks)
    src_idx: Int64  # int32 (rows,)
    out_rows: Int32  # rows of the output; expert ids past the received ones become -1
    x: Int64  # out (rows, row_bytes)
    row_bytes: Int32
    piece_bytes: Int32  # a mover's ring: see config.ring
    stages: Int32
    scales: Int64  # out, 32-bit words (rows, scale_words)
    scale_words: Int32
    topk_idx: Int64  # out, int64 or int32 (rows, topk)
    topk_idx_bytes: Int32
    topk_weights: Int64  # out, f32 (rows, topk)
    topk: Int32
    experts_per_rank: Int32
    max_topk: Int32
    lists_offset: Int64  # regions of the layout
    list_bytes: Int32
    topk_offset: Int64
    topk_row_bytes: Int32
    scales_offset: Int64
    scale_row_bytes: Int32
    x_offset: Int64


class Receive:
    def __init__(self):
        @cute.struct
        class Smem:
            ring: cute.struct.Align[cute.struct.MemRange[Uint8, MOVERS * RING_BYTES], 128]
            full: cute.struct.MemRange[Int64, MOVERS * MAX_STAGES]
            targets: cute.struct.MemRange[Int64, MOVERS * MAX_STAGES]
            sizes: cute.struct.MemRange[Int32, MOVERS * MAX_STAGES]
            sources: cute.struct.MemRange[Int32, MOVERS * CHUNK + SIDE_WARPS * SIDE_CHUNK]
            peers: cute.struct.MemRange[Int64, MAX_RANKS]  # base of their memory
            begins: cute.struct.MemRange[Int32, MAX_RANKS]  # my first row from each source
            counts: cute.struct.MemRange[Int32, MAX_RANKS]
            flag: cute.struct.MemRange[Int32, 4]

        self.Smem = Smem

    @cute.jit
    def __call__(self, g: Group, args: ReceiveArgs, stream: cuda.CUstream):
        self.kernel(g, args).launch(
            grid=(1, 1, 1), block=(THREADS, 1, 1), stream=stream, min_blocks_per_mp=1, use_pdl=True
        )

    @cute.kernel
    def kernel(self, g: Group, a: ReceiveArgs):
        tid, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(tid // 32), tid % 32
        sm = SmemAllocator().allocate(self.Smem)
        flag = sm.flag.data_ptr()
        peers = sm.peers.get_tensor(cute.make_layout(MAX_RANKS))
        begins = sm.begins.get_tensor(cute.make_layout(MAX_RANKS))
        counts = sm.counts.get_tensor(cute.make_layout(MAX_RANKS))
        cute.arch.griddepcontrol_wait()  # the sending launch of this rank ends with the matrix
        epoch = read_epoch(g, "dispatch")
        reached = Boolean(True)
        if tid < g.ranks:
            peers[tid] = peer_base(g, tid)
            reached = wait_flag(g, g.own + DISPATCH_READY + tid * LINE, epoch, tid, PHASE["dispatch_ready"])
            # after the wait: a call that was given up may have left no matrix
            end = ld_i32(a.matrix + Int64(tid * g.ranks + g.rank) * 4)
            begin = Int32(0)
            if tid > 0:
                begin = ld_i32(a.matrix + Int64((tid - 1) * g.ranks + g.rank) * 4)
            begins[tid], counts[tid] = begin, end - begin
        if tid < MOVERS * MAX_STAGES:
            cute.arch.mbarrier_init(sm.full.data_ptr() + tid, 1)
        cute.arch.mbarrier_init_fence()
        if may_proceed(g, reached):
            # What peers stored in the generic proxy is read by bulk copies, in the async proxy.
            cute.arch.fence_proxy("async.global")
            longest, total = Int32(0), Int32(0)
            for s in cutlass.range(g.ranks, unroll=1):
                longest = counts[s] if counts[s] > longest else longest
                total += counts[s]
            if warp < MOVERS:
                self.move_rows(g, a, sm, longest, warp, lane)
            else:
                self.copy_sides(g, a, sm, longest, total, warp - MOVERS, lane)
        if last_to_arrive(g, ARRIVALS["dispatch_receive"], flag, wrote=False):
            if not aborted(g):
                signal_peers(g, Int64(DISPATCH_ACK), epoch, wrote=False)
                if tid == 0:
                    st_i32(g.own + EPOCH["dispatch"], epoch)

    @cute.jit
    def chunk(self, g: Group, a: ReceiveArgs, sm, index: Int32, workers: Int32, rows: cutlass.Constexpr[int]):
        """(source rank, first of its rows, how many) of a chunk; rotated so that a worker meets all sources in turn."""
        counts = sm.counts.get_tensor(cute.make_layout(MAX_RANKS))
        turn = index // g.ranks
        source = (g.rank + 1 + index % g.ranks + turn * g.ranks // workers) % g.ranks
        left = counts[source] - turn * rows
        return source, turn * rows, left if left < rows else Int32(rows)

    @cute.jit
    def source_of(self, g: Group, a: ReceiveArgs, sm, source: Int32, row: Int32):
        """Index of a token on its source rank. row: among those that the source sends me."""
        begins = sm.begins.get_tensor(cute.make_layout(MAX_RANKS))
        peers = sm.peers.get_tensor(cute.make_layout(MAX_RANKS))
        address = a.src_idx + Int64(begins[source] + row) * 4
        if a.lists != 0:
            address = peers[source] + a.lists_offset + Int64(g.rank) * a.list_bytes + Int64(row) * 4
        return ld_i32(address)

    @cute.jit
    def move_rows(self, g: Group, a: ReceiveArgs, sm, longest: Int32, warp: Int32, lane: Int32):
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        peers = sm.peers.get_tensor(cute.make_layout(MAX_RANKS))
        begins = sm.begins.get_tensor(cute.make_layout(MAX_RANKS))
        sources = sm.sources.get_tensor(cute.make_layout(MOVERS * CHUNK))
        worker, workers = warp * ctas + cta, MOVERS * ctas
        chunks = (longest + CHUNK - 1) // CHUNK * g.ranks
        ring = make_ring(sm, warp, RING_BYTES, a.piece_bytes, a.stages)
        held, into, oldest, phase = (Int32(i) for i in EMPTY)
        # Source indices are fetched a chunk ahead: from a peer they take longer than the ring is deep.
        ahead = self.fetch(g, a, sm, worker, workers, chunks, lane)
        for index in cutlass.range(worker, chunks, workers, unroll=1):
            source, first, rows = self.chunk(g, a, sm, index, workers, CHUNK)
            if lane < CHUNK:
                sources[warp * CHUNK + lane] = ahead
            ahead = self.fetch(g, a, sm, index + workers, workers, chunks, lane)
            cute.arch.sync_warp()
            if lane == 0:
                x = peers[source] + a.x_offset
                out = a.x + Int64(begins[source] + first) * a.row_bytes
                for row in cutlass.range(rows, unroll=1):
                    begin = x + Int64(sources[warp * CHUNK + row]) * a.row_bytes
                    held, into, oldest, phase = move_row(ring, begin, out, a.row_bytes, held, into, oldest, phase)
                    out += a.row_bytes
            cute.arch.sync_warp()
        if lane == 0:
            drain(ring, held, oldest, phase)

    @cute.jit
    def fetch(self, g: Group, a: ReceiveArgs, sm, index: Int32, workers: Int32, chunks: Int32, lane: Int32):
        """Lane i: token of row i of a chunk."""
        token = Int32(0)
        if index < chunks:
            source, first, rows = self.chunk(g, a, sm, index, workers, CHUNK)
            if lane < rows:
                token = self.source_of(g, a, sm, source, first + lane)
        return token

    @cute.jit
    def copy_sides(self, g: Group, a: ReceiveArgs, sm, longest: Int32, total: Int32, warp: Int32, lane: Int32):
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        peers = sm.peers.get_tensor(cute.make_layout(MAX_RANKS))
        begins = sm.begins.get_tensor(cute.make_layout(MAX_RANKS))
        sources = cute.make_tensor(
            sm.sources.data_ptr() + MOVERS * CHUNK + warp * SIDE_CHUNK, cute.make_layout(SIDE_CHUNK)
        )
        worker, workers = warp * ctas + cta, SIDE_WARPS * ctas
        chunks = (longest + SIDE_CHUNK - 1) // SIDE_CHUNK * g.ranks
        for index in cutlass.range(worker, chunks, workers, unroll=1):
            source, first, rows = self.chunk(g, a, sm, index, workers, SIDE_CHUNK)
            row = begins[source] + first
            if lane < rows:
                token = self.source_of(g, a, sm, source, first + lane)
                sources[lane] = token
                if a.lists != 0:
                    st_i32(a.src_idx + Int64(row + lane) * 4, token)
            cute.arch.sync_warp()
            if a.scale_words != 0:
                self.copy_scales(a, peers[source] + a.scales_offset, sources, row, rows, lane)
            if a.topk_idx != 0:
                self.copy_choices(g, a, peers[source] + a.topk_offset, sources, row, rows, lane)
            cute.arch.sync_warp()
        if a.topk_idx != 0:
            begin, end = Int64(total) * a.topk, Int64(a.out_rows) * a.topk
            i = begin + worker * 32 + lane
            while i < end:
                self.put_choice(a, i, Int32(-1), Int32(0))
                i += Int64(workers) * 32

    @cute.jit
    def copy_scales(self, a: ReceiveArgs, records: Int64, sources: cute.Tensor, row: Int32, rows: Int32, lane: Int32):
        out = a.scales + Int64(row) * a.scale_words * 4
        if a.scale_words % 4 == 0:
            vectors = a.scale_words // 4
            in_batches(
                lane,
                rows * vectors,
                Int32(32),
                lambda i: ld_vector(records + Int64(sources[i // vectors]) * a.scale_row_bytes + i % vectors * 16),
                lambda i, words: ptx.st_global(out + i * 16, *words),
            )
        else:
            words = a.scale_words
            in_batches(
                lane,
                rows * words,
                Int32(32),
                lambda i: ld_i32(records + Int64(sources[i // words]) * a.scale_row_bytes + i % words * 4),
                lambda i, word: st_i32(out + i * 4, word),
            )

    @cute.jit
    def copy_choices(
        self, g: Group, a: ReceiveArgs, records: Int64, sources: cute.Tensor, row: Int32, rows: Int32, lane: Int32
    ):
        first_expert = g.rank * a.experts_per_rank

        def load(i):
            record = records + Int64(sources[i // a.topk]) * a.topk_row_bytes + i % a.topk * 4
            return ld_i32(record), ld_i32(record + a.max_topk * 4)

        def store(i, choice):
            expert, weight = choice[0] - first_expert, choice[1]
            here = (expert >= 0) & (expert < a.experts_per_rank)
            self.put_choice(a, Int64(row) * a.topk + i, expert if here else Int32(-1), weight if here else Int32(0))

        in_batches(lane, rows * a.topk, Int32(32), load, store)

    @cute.jit
    def put_choice(self, a: ReceiveArgs, i: Int64, expert: Int32, weight: Int32):
        if a.topk_idx_bytes == 8:
            st_i64(a.topk_idx + i * 8, Int64(expert))
        else:
            st_i32(a.topk_idx + i * 4, expert)
        st_i32(a.topk_weights + i * 4, weight)


def program(config) -> Program:
    """The host function and the fake arguments that compile it."""
    kernel = Receive()
    kernel.kernel.set_name_prefix("cutehop_ep_receive", remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(Group), fake_args(ReceiveArgs), cuda.CUstream(0)),
        threads=THREADS,
        smem_bytes=kernel.Smem.size_in_bytes(),
        pdl=True,
        params=param_kinds(Group) + param_kinds(ReceiveArgs),
    )
