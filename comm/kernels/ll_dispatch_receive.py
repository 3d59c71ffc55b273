"""Low-latency dispatch, receiver's side: from my memory, where peers have pushed records, into the experts' blocks.

    out[e, base[e, s] + row] = record of source s      for each of its choices {e, row} that is mine
    base[e, s] = rows of expert e from sources before s

Every CTA waits for the counts, which arrive by themselves, adds them up and waits for the
data; then each warp takes records: one bulk load into shared memory, one bulk store per choice, scales column by
column. Of a source with few tokens a warp takes 512 bytes of a record, as its words come (ll_words.py). CTA 0 writes
the counts. The last CTA to be done acknowledges to all peers.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, Uint8, const_expr
from cutlass.experimental import primitives as prims

from ...cute_kernels.sm90 import ptx
from ...cute_kernels.sm90.address import ld_i32, st_i32, st_i64
from ..config import MAX_RANKS
from ..ll_config import FEW_TOKENS
from .config import COPY_WARPS, MAX_EXPERTS, RECORD_PIECE
from .ll_records import FEW_COUNT
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
)
from .ll_waits import wait_data
from .ll_words import load_words, uses_words, wait_words
from .verbs import GMEM, PHASE, Group, aborted, may_proceed, start_next_kernel, wait_count

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
    choice_rows: Int64  # out, int32 (rows, max_topk)
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
    words_bytes: Int64  # of a slot
    words_offset: Int64


class DispatchReceiver:
    """Part of ll_dispatch.LlDispatch. sm: has firsts, arrived, full, flag and data, the rows."""

    @cute.jit
    def receive(self, g: Group, a: LlDispatchReceiveArgs, sm, epoch: Int32, count_epoch):
        """By all threads. count_epoch: whether the operation counts here."""
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
            some_are_few = self.any_few(g, sm)
            if not some_are_few:
                start_next_kernel()
            # Peers pushed in the async proxy, and their flags were acquired in the generic one.
            cute.arch.fence_proxy("async.global")
            self.number_rows(g, a, sm)
            cute.arch.sync_threads()
            if some_are_few:
                go = may_proceed(g, self.copy_words(g, a, sm, epoch, warp, lane))
                start_next_kernel()
            if warp < a.warps:
                self.copy_records(g, a, sm, epoch, warp, lane)
        finish(g, ACK, "dispatch_receive", epoch, count_epoch, go, base, sm.flag.data_ptr())

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
                few = Boolean(False)
                if const_expr(uses_words(g)):
                    at = self.count_at(g, a, epoch, source, 0)
                    few = wait_count(g, at, epoch, source, PHASE["ll_counts"]) & FEW_COUNT != 0
                if not few:
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
        memory = g.own + a.data_offset + Int64(slot_of(epoch)) * a.slot_bytes
        size = a.row_bytes + (a.scale_words * 4 + 15) // 16 * 16
        place = sm.data.data_ptr() + warp * size
        full, phase = sm.full.data_ptr() + warp, Int32(0)
        source, skipped = Int32(0), Int32(0)  # sources before this one have `skipped` records
        total = Int32(0)
        for s in cutlass.range(g.ranks, unroll=1):
            total += self.records_of(g, sm, s, False)
        for i in cutlass.range(warp * ctas + cta, total, a.warps * ctas, unroll=1):
            while i - skipped >= self.records_of(g, sm, source, False):
                skipped += self.records_of(g, sm, source, False)
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
                choice = record + 8 + lane * 8
                row = self.row_of(g, a, sm, source, ld_i32(choice), ld_i32(choice + 4))
            cute.arch.mbarrier_wait(full, phase)
            phase ^= 1
            self.note_rows(a, row, source, token, lane)
            if row >= 0:
                prims.cp_async_bulk_global_shared_cta(
                    cute.make_ptr(Uint8, a.x + Int64(row) * a.row_bytes, GMEM, assumed_align=16), place, a.row_bytes
                )
                self.note_source(a, row, source, token, lane)
            cute.arch.cp_async_bulk_commit_group()
            if a.scale_words != 0:
                self.copy_scales(g, a, place + a.row_bytes, row, lane)
        cute.arch.cp_async_bulk_wait_group(0, read=True)  # the end of the kernel waits for the rest

    @cute.jit
    def records_of(self, g: Group, sm, source: Int32, few: cutlass.Constexpr[bool]):
        """Records of a source if they are words (few), or if they are not."""
        count = sm.arrived.get_tensor(cute.make_layout(MAX_RANKS))[source]
        are_few = count & FEW_COUNT != 0
        return count & (FEW_COUNT - 1) if are_few == few else Int32(0)

    @cute.jit
    def any_few(self, g: Group, sm):
        """Whether a source has sent words."""
        total = Int32(0)
        if const_expr(uses_words(g)):
            for s in cutlass.range(g.ranks, unroll=1):
                total += self.records_of(g, sm, s, True)
        return total > 0

    @cute.jit
    def copy_words(self, g: Group, a: LlDispatchReceiveArgs, sm, epoch: Int32, warp: Int32, lane: Int32):
        """Pieces of the records that are words, a warp each. Whether they came."""
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        threads, _, _ = cute.arch.block_dim()
        few = a.max_tokens if a.max_tokens < FEW_TOKENS else Int32(FEW_TOKENS)
        memory = g.own + a.words_offset + Int64(slot_of(epoch)) * a.words_bytes
        of_columns = (a.row_bytes + (RECORD_PIECE - 1)) // RECORD_PIECE
        pieces = of_columns + (a.scale_words * 4 + (RECORD_PIECE - 1)) // RECORD_PIECE
        source, skipped, total, came = Int32(0), Int32(0), Int32(0), Boolean(True)
        for s in cutlass.range(g.ranks, unroll=1):
            total += self.records_of(g, sm, s, True)
        for item in cutlass.range(cta + warp * ctas, total * pieces, threads // 32 * ctas, unroll=1):
            i, piece = item // pieces, item % pieces
            while i - skipped >= self.records_of(g, sm, source, True):
                skipped += self.records_of(g, sm, source, True)
                source += 1
            record = memory + Int64(source * few + i - skipped) * a.record_bytes * 2
            size, begin = a.row_bytes, piece * RECORD_PIECE
            if piece >= of_columns:  # scales, behind the columns
                begin = (piece - of_columns) * RECORD_PIECE
                size = a.scale_words * 4
            at = begin + lane * 16  # of the columns or the scales
            behind = a.head_bytes + (a.row_bytes if piece >= of_columns else Int32(0))
            vector = record + Int64(behind + at) * 2
            if at >= size:
                vector = record
            choice = record + 16 * (1 + (lane if lane < a.topk else Int32(0)))
            found = [load_words(address) for address in (record, choice, vector, vector + 16)]
            token, _, here = wait_words(g, record, found[0], epoch, source)
            expert, number, there = wait_words(g, choice, found[1], epoch, source)
            one, other, first = wait_words(g, vector, found[2], epoch, source)
            third, last, second = wait_words(g, vector + 16, found[3], epoch, source)
            came = came & here & there & first & second
            row = Int32(-1)
            if (lane < a.topk) & here & there:
                row = self.row_of(g, a, sm, source, expert, number)
            if here & (piece == 0):
                self.note_rows(a, row, source, token, lane)
                if row >= 0:
                    self.note_source(a, row, source, token, lane)
            self.store_piece(g, a, row, piece >= of_columns, at, size, (one, other, third, last))
        return came

    @cute.jit
    def store_piece(self, g: Group, a: LlDispatchReceiveArgs, row: Int32, scales, at: Int32, size: Int32, words):
        """A lane's 16 bytes at `at` of the columns or the scales, to the rows of all choices."""
        rows = g.ranks * a.max_tokens
        for choice in cutlass.range(a.topk, unroll=1):
            to = cute.arch.shuffle_sync(row, choice)
            if (to >= 0) & (at < size):
                if scales:
                    block = a.scales + (Int64(to // rows) * a.scale_words * rows + to % rows) * 4
                    for i in cutlass.range_constexpr(4):
                        if at + 4 * i < size:
                            st_i32(block + Int64(at // 4 + i) * rows * 4, words[i])
                else:
                    ptx.st_global(a.x + Int64(to) * a.row_bytes + at, *words)

    @cute.jit
    def note_source(self, a: LlDispatchReceiveArgs, row: Int32, source: Int32, token: Int32, choice: Int32):
        """Where a row comes from, and where it goes."""
        st_i32(a.src_info + Int64(row) * 4, token)
        st_i32(a.send_slot + Int64(row) * 4, (source * a.max_tokens + token) * a.max_topk + choice)

    @cute.jit
    def note_rows(self, a: LlDispatchReceiveArgs, row: Int32, source: Int32, token: Int32, choice: Int32):
        """Where the rows of a token's choices are, a lane each; -1: not here."""
        if choice < a.max_topk:
            place = Int64(source * a.max_tokens + token) * a.max_topk + choice
            st_i32(a.choice_rows + place * 4, row)

    @cute.jit
    def row_of(self, g: Group, a: LlDispatchReceiveArgs, sm, source: Int32, expert: Int32, number: Int32):
        """Row of a choice in the blocks of all my experts together, -1 if the expert is not mine. number: of the row
        among the source's for the expert."""
        base = sm.firsts.get_tensor(cute.make_layout(MAX_EXPERTS))
        expert -= g.rank * a.experts_per_rank
        row = Int32(-1)
        if (expert >= 0) & (expert < a.experts_per_rank):
            most = g.ranks * a.max_tokens
            at = base[expert * g.ranks + source] + number
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
