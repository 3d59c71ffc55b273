"""Dispatch, sender's side: counts and lists for every peer, the tokens into the memory that peers pull from.

Grid (g, 1, 1), 1024 threads. CTA 0 makes the lists, sends the counts, and last waits for those of all peers; all CTAs
(all but the first, if there are several and it has lists to make) copy. The last CTA to be done sends `dispatch_ready`.

    send_row[t, r] = number of my tokens before t that go to r, or -1      list[r][send_row[t, r]] = t

What a call does not need is left out: lists and counts in a cached dispatch (lists == 0), copies of what the caller
wrote in place (x == 0). Bound by the copies; the lists take about 2 us per 1024 tokens.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64
from cutlass.memory import SmemAllocator

from ...cute_kernels.jit import Program
from ...cute_kernels.sm90.address import ld_i32, ld_id, ld_u8, st_i32, st_i64
from ...cute_kernels.sm90.args import fake_args, param_kinds
from ..config import LINE, MAX_RANKS
from .config import SEND_THREADS
from .verbs import (
    ARRIVALS,
    COUNTS,
    DISPATCH_ACK,
    DISPATCH_READY,
    PHASE,
    Group,
    aborted,
    copy_vectors,
    in_batches,
    last_to_arrive,
    may_proceed,
    peer_base,
    read_epoch,
    report,
    send_count,
    signal_peers,
    start_next_kernel,
    wait_count,
    wait_flag,
)

WARPS = SEND_THREADS // 32


@dataclass(frozen=True)
class SendArgs:
    """Kernel parameters in launch order. Addresses of 0 stand for what a call does not have."""

    lists: Int32  # 1: make lists and counts; 0: cached dispatch
    tokens: Int32
    is_token_in_rank: Int64  # bool (tokens, ranks)
    per_expert: Int64  # int32 (ranks * experts_per_rank,): my choices of every expert
    experts_per_rank: Int32
    x: Int64  # (tokens, row_bytes), contiguous, 16-byte aligned
    row_bytes: Int32
    scales: Int64  # 32-bit words (tokens, scale_words) of any strides
    scale_words: Int32
    scale_row_stride: Int64  # words
    scale_column_stride: Int64
    topk_idx: Int64  # int64 or int32 (tokens, topk)
    topk_idx_bytes: Int32
    topk_weights: Int64  # f32 (tokens, topk)
    topk: Int32
    send_row: Int64  # out, int32 (tokens, ranks)
    matrix: Int64  # out, int32 (ranks, ranks): [s, r] = tokens that ranks 0..s send to r
    recv_per_expert: Int64  # out, int32 (experts_per_rank,)
    recv_counts: Int64  # out, host memory: {ticket, rows}, then {ticket, choices} per expert
    ticket: Int32  # 0: the host does not want them
    out_rows: Int32  # rows that fit into my output; 0: it is made when the count is known
    max_recv_rows: Int32  # rows that fit into the combine memory of every rank
    max_topk: Int32
    expert_counts_offset: Int64  # regions of the layout
    expert_counts_bytes: Int32
    lists_offset: Int64
    list_bytes: Int32
    topk_offset: Int64
    topk_row_bytes: Int32
    scales_offset: Int64
    scale_row_bytes: Int32
    x_offset: Int64


class Send:
    def __init__(self):
        @cute.struct
        class Smem:
            flag: cute.struct.MemRange[Int32, 4]
            totals: cute.struct.MemRange[Int32, WARPS * MAX_RANKS]  # tokens of this warp for rank r
            starts: cute.struct.MemRange[Int32, WARPS * MAX_RANKS]  # tokens of all before
            counts: cute.struct.MemRange[Int32, MAX_RANKS * MAX_RANKS]

        self.Smem = Smem

    @cute.jit
    def __call__(self, g: Group, args: SendArgs, stream: cuda.CUstream):
        self.kernel(g, args).launch(grid=(1, 1, 1), block=(SEND_THREADS, 1, 1), stream=stream, min_blocks_per_mp=1)

    @cute.kernel
    def kernel(self, g: Group, a: SendArgs):
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        sm = SmemAllocator().allocate(self.Smem)
        flag = sm.flag.data_ptr()
        epoch = read_epoch(g, "dispatch")
        reached = Boolean(True)
        if tid < g.ranks:
            reached = wait_flag(g, g.own + DISPATCH_ACK + tid * LINE, epoch - 1, tid, PHASE["dispatch_ack"])
        go = may_proceed(g, reached)
        if go:
            helpers = ctas - 1 if (a.lists != 0) & (ctas > 1) else ctas
            first = cta - 1 if (a.lists != 0) & (ctas > 1) else cta
            if (a.lists != 0) & (cta == 0):
                self.make_lists(g, a, sm, epoch)
            if first >= 0:
                self.copy_in(g, a, first * SEND_THREADS + tid, helpers * SEND_THREADS)
        start_next_kernel()
        if last_to_arrive(g, ARRIVALS["dispatch_send"], flag):
            if not aborted(g):
                signal_peers(g, Int64(DISPATCH_READY), epoch)
        if go & (a.lists != 0) & (cta == 0):
            self.gather_counts(g, a, sm, epoch)

    @cute.jit
    def make_lists(self, g: Group, a: SendArgs, sm, epoch: Int32):
        """send_row, the list of every peer, and the counts that all peers are told."""
        tid, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(tid // 32), tid % 32
        totals = sm.totals.get_tensor(cute.make_layout((WARPS, MAX_RANKS), stride=(MAX_RANKS, 1)))
        starts = sm.starts.get_tensor(cute.make_layout((WARPS, MAX_RANKS), stride=(MAX_RANKS, 1)))
        counts = sm.counts.get_tensor(cute.make_layout(MAX_RANKS * MAX_RANKS))
        below = Int32(cute.arch.lanemask_lt())
        running = Int32(0)  # warp r: tokens for rank r so far
        for begin in cutlass.range(0, a.tokens, SEND_THREADS, unroll=1):
            token = begin + tid
            ballots = []
            for r in cutlass.range_constexpr(MAX_RANKS):
                goes = Int32(0)
                if r < g.ranks:
                    if token < a.tokens:
                        goes = ld_u8(a.is_token_in_rank + Int64(token) * g.ranks + r)
                ballots.append(cute.arch.vote_ballot_sync(goes != 0))
                if lane == r:
                    totals[warp, r] = Int32(cute.arch.popc(ballots[r]))
            cute.arch.sync_threads()
            if warp < MAX_RANKS:
                own = totals[lane, warp]
                summed = own
                for i in cutlass.range_constexpr(5):
                    before = cute.arch.shuffle_sync_up(summed, 1 << i, mask_and_clamp=0)
                    if lane >= (1 << i):
                        summed += before
                starts[lane, warp] = running + summed - own
                running += cute.arch.shuffle_sync(summed, 31)
            cute.arch.sync_threads()
            for r in cutlass.range_constexpr(MAX_RANKS):
                if r < g.ranks:
                    if token < a.tokens:
                        row = Int32(-1)
                        if (ballots[r] >> lane) & 1 != 0:
                            row = starts[warp, r] + Int32(cute.arch.popc(ballots[r] & below))
                            st_i32(g.own + a.lists_offset + Int64(r) * a.list_bytes + Int64(row) * 4, token)
                        st_i32(a.send_row + (Int64(token) * g.ranks + r) * 4, row)
        if (warp < MAX_RANKS) & (lane == 0):
            counts[warp] = running
        cute.arch.sync_threads()
        if tid < g.ranks * g.ranks:
            peer, r = tid // g.ranks, tid % g.ranks
            send_count(peer_base(g, peer) + COUNTS + g.rank * LINE + r * 8, epoch, counts[r])
        for i in cutlass.range(tid, g.ranks * a.experts_per_rank, SEND_THREADS, unroll=1):
            owner, expert = i // a.experts_per_rank, i % a.experts_per_rank
            words = peer_base(g, owner) + a.expert_counts_offset + Int64(g.rank) * a.expert_counts_bytes
            send_count(words + expert * 8, epoch, ld_i32(a.per_expert + Int64(i) * 4))

    @cute.jit
    def copy_in(self, g: Group, a: SendArgs, thread: Int32, threads: Int32):
        """Tokens, scales, expert ids and weights into my memory."""
        if a.x != 0:
            copy_vectors(g.own + a.x_offset, a.x, Int64(a.tokens) * a.row_bytes // 16, thread, threads)
        if a.scales != 0:
            words = a.scale_words
            in_batches(
                thread,
                a.tokens * words,
                threads,
                lambda i: ld_i32(a.scales + (i // words * a.scale_row_stride + i % words * a.scale_column_stride) * 4),
                lambda i, word: st_i32(
                    g.own + a.scales_offset + Int64(i // words) * a.scale_row_bytes + i % words * 4, word
                ),
            )
        if a.topk_idx != 0:

            def load(i):
                return ld_id(a.topk_idx, i, a.topk_idx_bytes), ld_i32(a.topk_weights + Int64(i) * 4)

            def store(i, choice):
                record = g.own + a.topk_offset + Int64(i // a.topk) * a.topk_row_bytes + i % a.topk * 4
                st_i32(record, choice[0])
                st_i32(record + a.max_topk * 4, choice[1])

            in_batches(thread, a.tokens * a.topk, threads, load, store)

    @cute.jit
    def gather_counts(self, g: Group, a: SendArgs, sm, epoch: Int32):
        """Wait for all peers' counts; the matrix and the totals of my experts, for the device and for the host."""
        tid, _, _ = cute.arch.thread_idx()
        counts = sm.counts.get_tensor(cute.make_layout(MAX_RANKS * MAX_RANKS))
        if tid < g.ranks * g.ranks:
            source, r = tid // g.ranks, tid % g.ranks
            counts[tid] = wait_count(g, g.own + COUNTS + source * LINE + r * 8, epoch, source, PHASE["counts"])
        cute.arch.sync_threads()
        rows = Int32(0)
        if tid < g.ranks:
            for source in cutlass.range(g.ranks, unroll=1):
                rows += counts[source * g.ranks + tid]
                st_i32(a.matrix + Int64(source * g.ranks + tid) * 4, rows)
            if rows > a.max_recv_rows:
                report(g, tid, PHASE["rows"], rows, a.max_recv_rows, Int64(0))
            if (tid == g.rank) & (a.out_rows > 0) & (rows > a.out_rows):
                report(g, tid, PHASE["rows"], rows, a.out_rows, Int64(0))
        cute.arch.sync_threads()  # what one thread has reported keeps all from telling the host
        for expert in cutlass.range(tid, a.experts_per_rank, SEND_THREADS, unroll=1):
            choices = Int32(0)
            for source in cutlass.range(g.ranks, unroll=1):
                words = g.own + a.expert_counts_offset + Int64(source) * a.expert_counts_bytes
                choices += wait_count(g, words + expert * 8, epoch, source, PHASE["counts"])
            st_i32(a.recv_per_expert + Int64(expert) * 4, choices)
            if (a.ticket != 0) & (not aborted(g)):
                st_i64(a.recv_counts + (1 + Int64(expert)) * 8, (Int64(a.ticket) << 32) | Int64(choices))
        if (tid == g.rank) & (a.ticket != 0):
            if not aborted(g):
                st_i64(a.recv_counts, (Int64(a.ticket) << 32) | Int64(rows))


def program(config) -> Program:
    """The host function and the fake arguments that compile it."""
    kernel = Send()
    kernel.kernel.set_name_prefix("cutehop_ep_send", remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(Group), fake_args(SendArgs), cuda.CUstream(0)),
        threads=SEND_THREADS,
        smem_bytes=kernel.Smem.size_in_bytes(),
        params=param_kinds(Group) + param_kinds(SendArgs),
    )
