"""Low-latency dispatch, receiver's side: from my memory, where peers have pushed records, into the experts' blocks.

    out[e, base[e, s] + row] = record of source s      for each of its choices {e, row} that is mine
    base[e, s] = rows of expert e from sources before s

Every CTA waits for the counts, which arrive by themselves, adds them up and waits for the
data; then each warp takes records: one bulk load into shared memory, one bulk store per choice, scales column by
column. CTA 0 writes the counts. The last CTA to be done acknowledges to all peers.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, Uint8, const_expr
from cutlass.experimental import primitives as prims

from ...cute_kernels.sm90.address import ld_i32, st_i32, st_i64
from ..config import MAX_RANKS
from .config import COPY_WARPS, MAX_EXPERTS
from .ll_verbs import (
    ACK,
    COUNTS,
    RECEIVE_LIVE,
    add_wait,
    base_of,
    finish,
    is_live,
    note_live,
    slot_of,
    start_next_kernel,
)
from .ll_waits import wait_data
from .verbs import GMEM, PHASE, Group, aborted, may_proceed, wait_count

THREADS = 32 * COPY_WARPS  # of a CTA that only receives; more may be there
COUNT_THREADS = THREADS - 32


@dataclass(frozen=True)
class LlDispatchReceiveArgs:
    """Kernel parameters in launch order. Addresses of 0 stand for what a call does not have."""

    epoch: Int64  # int32 (1,), of the send; not read in a kernel that has just sent
    topk: Int32
    row_bytes: Int32  # columns of a row
    scale_words: Int32  # 32-bit words of scales per row
    warps: Int32  # that copy, per CTA: a record's data per warp fits into the shared memory
    x: Int64  # out (experts_per_rank, rows, row_bytes)
    scales: Int64  # out, 32-bit words (experts_per_rank, scale_words, rows)
    recv_count: Int64  # out, int32 (experts_per_rank,)
    layout_range: Int64  # out, int64 (experts_per_rank, ranks): {first row, rows}
    src_info: Int64  # out, int32 (experts_per_rank, rows)
    send_slot: Int64  # out, int32 (experts_per_rank, rows)
    recv_stats: Int64  # int32 (experts_per_rank,), added to
    wait_stats: Int64  # int64 (ranks,), ns waited for each source, added to
    experts_per_rank: Int32
    max_tokens: Int32
    max_topk: Int32
    counts_bytes: Int32
    head_bytes: Int32
    record_bytes: Int32
    slot_bytes: Int64
    data_offset: Int64


class DispatchReceiver:
    """Part of ll_dispatch.LlDispatch. sm: has firsts, arrived, full, flag and data, the rows."""

    @cute.jit
    def receive(self, g: Group, a: LlDispatchReceiveArgs, sm, epoch: Int32):
        """By all threads."""
        tid, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(tid // 32), tid % 32
        base = base_of(g, tid)
        if tid < COPY_WARPS:
            cute.arch.mbarrier_init(sm.full.data_ptr() + tid, 1)
        cute.arch.mbarrier_init_fence()
        go = Boolean(True)
        if const_expr(g.elastic):
            self.wait_for_some(g, a, sm, epoch)
        else:
            go = self.wait(g, a, sm, epoch)
        if go:
            start_next_kernel()
            # Peers pushed in the async proxy, and their flags were acquired in the generic one.
            cute.arch.fence_proxy("async.global")
            self.number_rows(g, a, sm)
            cute.arch.sync_threads()
            if warp < a.warps:
                self.copy_records(g, a, sm, epoch, warp, lane)
        finish(g, ACK, "dispatch_receive", epoch, False, go, base, sm.flag.data_ptr())

    @cute.jit
    def wait(self, g: Group, a: LlDispatchReceiveArgs, sm, epoch: Int32):
        """Counts into shared memory, and the data. False: it did not come."""
        tid, _, _ = cute.arch.thread_idx()
        rows = sm.firsts.get_tensor(cute.make_layout(MAX_EXPERTS))
        records = sm.arrived.get_tensor(cute.make_layout(MAX_RANKS))
        words = 1 + a.experts_per_rank
        start = cute.arch.globaltimer()
        reached = Boolean(True)
        if (tid >= COUNT_THREADS) & (tid < THREADS):  # one warp waits for the data meanwhile
            source = tid - COUNT_THREADS
            if source < g.ranks:
                reached = wait_data(g, epoch, source)
                add_wait(a.wait_stats, source, start)
        elif tid < COUNT_THREADS:
            for i in cutlass.range(tid, g.ranks * words, COUNT_THREADS, unroll=1):
                source, word = i // words, i % words
                if const_expr(g.remote):  # before the flag behind them, words that were put may be there in part
                    wait_data(g, epoch, source)
                count = wait_count(g, self.count_at(g, a, epoch, source, word), epoch, source, PHASE["ll_counts"])
                if word == 0:
                    records[source] = count
                else:
                    rows[(word - 1) * g.ranks + source] = count
            reached = not aborted(g)
        return may_proceed(g, reached)

    @cute.jit
    def wait_for_some(self, g: Group, a: LlDispatchReceiveArgs, sm, epoch: Int32):
        """The same where sources may be left out: first for the data of each, then the counts of those that are here.
        Others have sent nothing."""
        tid, _, _ = cute.arch.thread_idx()
        threads, _, _ = cute.arch.block_dim()
        rows = sm.firsts.get_tensor(cute.make_layout(MAX_EXPERTS))
        records = sm.arrived.get_tensor(cute.make_layout(MAX_RANKS))
        words = 1 + a.experts_per_rank
        if tid < 32:
            here, start = Boolean(False), cute.arch.globaltimer()
            if tid < g.ranks:
                here = wait_data(g, epoch, tid)
                add_wait(a.wait_stats, tid, start)
            note_live(g, sm.flag.data_ptr(), RECEIVE_LIVE, here)
        cute.arch.sync_threads()
        for i in cutlass.range(tid, g.ranks * words, threads, unroll=1):
            source, word, count = i // words, i % words, Int32(0)
            if is_live(g, sm.flag.data_ptr(), RECEIVE_LIVE, source):
                count = ld_i32(self.count_at(g, a, epoch, source, word))  # the low half, without the epoch
            if word == 0:
                records[source] = count
            else:
                rows[(word - 1) * g.ranks + source] = count
        cute.arch.sync_threads()

    def count_at(self, g: Group, a: LlDispatchReceiveArgs, epoch, source, word):
        """Address of a count word in my memory."""
        return g.own + Int64(slot_of(epoch) * g.ranks + source) * a.counts_bytes + COUNTS + word * 8

    @cute.jit
    def number_rows(self, g: Group, a: LlDispatchReceiveArgs, sm):
        """First row of each (expert, source) in shared memory; CTA 0 writes what the host and combine get of it."""
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        base = sm.firsts.get_tensor(cute.make_layout(MAX_EXPERTS))
        most = g.ranks * a.max_tokens
        threads, _, _ = cute.arch.block_dim()
        for expert in cutlass.range(tid, a.experts_per_rank, threads, unroll=1):
            total = Int32(0)
            for source in cutlass.range(g.ranks, unroll=1):
                i = expert * g.ranks + source
                count = base[i]
                base[i] = total
                if cta == 0:
                    st_i64(a.layout_range + Int64(i) * 8, (Int64(total) << 32) | Int64(count))
                total += count
            total = total if total < most else most  # more if tokens name an expert twice
            if cta == 0:
                st_i32(a.recv_count + Int64(expert) * 4, total)
                if a.recv_stats != 0:
                    place = a.recv_stats + Int64(expert) * 4
                    st_i32(place, ld_i32(place) + total)

    @cute.jit
    def copy_records(self, g: Group, a: LlDispatchReceiveArgs, sm, epoch: Int32, warp: Int32, lane: Int32):
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        records = sm.arrived.get_tensor(cute.make_layout(MAX_RANKS))
        memory = g.own + a.data_offset + Int64(slot_of(epoch)) * a.slot_bytes
        size = a.row_bytes + (a.scale_words * 4 + 15) // 16 * 16
        place = sm.data.data_ptr() + warp * size
        full, phase = sm.full.data_ptr() + warp, Int32(0)
        source, skipped = Int32(0), Int32(0)  # sources before this one have `skipped` records
        total = Int32(0)
        for s in cutlass.range(g.ranks, unroll=1):
            total += records[s]
        for i in cutlass.range(warp * ctas + cta, total, a.warps * ctas, unroll=1):
            while i - skipped >= records[source]:
                skipped += records[source]
                source += 1
            record = memory + Int64(source * a.max_tokens + i - skipped) * a.record_bytes
            cute.arch.cp_async_bulk_wait_group(0, read=True)  # each lane: its stores have read the last record
            cute.arch.sync_warp()
            if lane == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(full, size)
                prims.cp_async_bulk_shared_cluster_global(
                    place, cute.make_ptr(Uint8, record + a.head_bytes, GMEM, assumed_align=16), full, size
                )
            token, row = ld_i32(record), Int32(-1)  # lane j: row of choice j among all of this rank
            if lane < a.topk:
                row = self.row_of(g, a, sm, record, source, lane)
            cute.arch.mbarrier_wait(full, phase)
            phase ^= 1
            if row >= 0:
                prims.cp_async_bulk_global_shared_cta(
                    cute.make_ptr(Uint8, a.x + Int64(row) * a.row_bytes, GMEM, assumed_align=16), place, a.row_bytes
                )
                st_i32(a.src_info + Int64(row) * 4, token)
                st_i32(a.send_slot + Int64(row) * 4, (source * a.max_tokens + token) * a.max_topk + lane)
            cute.arch.cp_async_bulk_commit_group()
            if a.scale_words != 0:
                self.copy_scales(g, a, place + a.row_bytes, row, lane)
        cute.arch.cp_async_bulk_wait_group(0, read=True)  # the end of the kernel waits for the rest

    @cute.jit
    def row_of(self, g: Group, a: LlDispatchReceiveArgs, sm, record: Int64, source: Int32, choice: Int32):
        """Row of a choice in the blocks of all my experts together, -1 if the expert is not mine."""
        base = sm.firsts.get_tensor(cute.make_layout(MAX_EXPERTS))
        expert = ld_i32(record + 8 + choice * 8) - g.rank * a.experts_per_rank
        row = Int32(-1)
        if (expert >= 0) & (expert < a.experts_per_rank):
            most = g.ranks * a.max_tokens
            at = base[expert * g.ranks + source] + ld_i32(record + 12 + choice * 8)
            row = expert * most + at if at < most else Int32(-1)
        return row

    @cute.jit
    def copy_scales(self, g: Group, a: LlDispatchReceiveArgs, scales: cute.Pointer, row: Int32, lane: Int32):
        """Word w of a row goes to column w of its expert's block, in which rows are contiguous."""
        words = cute.make_tensor(cute.recast_ptr(scales, dtype=Int32), cute.make_layout(1 << 16))
        rows = g.ranks * a.max_tokens
        for choice in cutlass.range(a.topk, unroll=1):
            to = cute.arch.shuffle_sync(row, choice)
            if to >= 0:
                block = a.scales + (Int64(to // rows) * a.scale_words * rows + to % rows) * 4
                for w in cutlass.range(lane, a.scale_words, 32, unroll=1):
                    st_i32(block + Int64(w) * rows * 4, words[w])
