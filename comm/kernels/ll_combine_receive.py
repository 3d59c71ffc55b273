"""Low-latency combine, home side: weighted sum of the rows that the experts' ranks have pushed into my memory.

    sum[r] = sum over choices j on rank r ascending of w[t, j] * row {t, j}      f32, product and sum each rounded
    out[t] = sum over ranks r ascending of sum[r]                                then to bf16

A warp takes 256 columns of a token, 8 per lane, four rows in flight: one token keeps many
warps busy. The last CTA to be done acknowledges to all peers.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr

from ...cute_kernels.sm90.address import ld_f32, ld_id, ld_vector
from ..config import MAX_RANKS
from .config import REDUCE_WARPS
from .ll_combine_coded import CodedReceiver
from .ll_sums import COLUMNS, add_row, end_rank, lowest_bit, place_in_order, store_total
from .ll_verbs import (
    ACK,
    RECEIVE_LIVE,
    add_wait,
    base_of,
    finish,
    is_live,
    note_live,
    slot_of,
)
from .ll_waits import wait_data
from .verbs import Group, may_proceed, start_next_kernel

THREADS = 32 * REDUCE_WARPS
BATCH = 4  # rows whose loads are in flight together


@dataclass(frozen=True)
class LlCombineReceiveArgs:
    """Kernel parameters in launch order. Addresses of 0 stand for what a call does not have."""

    epoch: Int64  # int32 (1,), of the send; not read in a kernel that has just sent
    topk_idx: Int64  # int64 or int32 (tokens, topk)
    topk_idx_bytes: Int32
    topk_weights: Int64  # f32 (tokens, topk)
    tokens: Int32
    topk: Int32
    hidden: Int32
    chunk: Int32  # as sent: LlCombineSendArgs
    limits_bytes: Int32
    limits_offset: Int64  # in the slot, of the first row's
    out: Int64  # out, bf16 (tokens, hidden)
    wait_stats: Int64  # int64 (ranks,), ns waited for each rank, added to
    experts: Int32
    experts_per_rank: Int32
    max_topk: Int32
    slot_bytes: Int64
    data_offset: Int64


class CombineReceiver(CodedReceiver):
    """Part of ll_combine.LlCombine. sm: has flag."""

    coded: bool

    @cute.jit
    def receive(self, g: Group, a: LlCombineReceiveArgs, sm, epoch: Int32):
        """By all threads."""
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        warp, lane = cute.arch.make_warp_uniform(tid // 32), tid % 32
        base = base_of(g, tid)
        reached = Boolean(True)
        if tid < g.ranks:
            start = cute.arch.globaltimer()
            reached = wait_data(g, epoch, tid)
            add_wait(a.wait_stats, tid, start)
        if const_expr(g.elastic):
            if tid < 32:
                note_live(g, sm.flag.data_ptr(), RECEIVE_LIVE, reached)
        go = may_proceed(g, reached)
        if go:
            start_next_kernel()
            pieces = (a.hidden + 255) // 256
            memory = g.own + a.data_offset + Int64(slot_of(epoch)) * a.slot_bytes
            for i in cutlass.range(warp * ctas + cta, a.tokens * pieces, REDUCE_WARPS * ctas, unroll=1):
                self.reduce(g, a, sm, memory, i // pieces, i % pieces * 256 + lane * 8, lane)
        finish(g, ACK, "combine_receive", epoch, False, go, base, sm.flag.data_ptr())

    @cute.jit
    def reduce(self, g: Group, a: LlCombineReceiveArgs, sm, memory: Int64, token: Int32, column: Int32, lane: Int32):
        """8 columns of a token. A choice that is none, or on a rank that is left out, has the row -1."""
        total, acc = (cute.make_rmem_tensor(COLUMNS, Float32) for _ in range(2))
        total.fill(0.0)
        acc.fill(0.0)
        rank, row, weight = Int32(MAX_RANKS), Int32(-1), Float32(0.0)  # lane j: choice j
        if lane < a.topk:
            rank, row, weight = self.choice(g, a, sm, token, lane)
        place, adding = place_in_order(rank, a.topk), Int32(0)  # the rank whose rows are being added
        for first in cutlass.range(0, a.topk, BATCH, unroll=1):
            loaded, ranks, rows, weights, limits = [], [], [], [], []
            for u in cutlass.range_constexpr(BATCH):
                at = lowest_bit(cute.arch.vote_ballot_sync((place == first + u) & (lane < a.topk)))
                at = at if at < 32 else Int32(31)  # lane 31 has none: topk is 16 at most
                ranks.append(cute.arch.shuffle_sync(rank, at))
                rows.append(cute.arch.shuffle_sync(row, at))
                weights.append(cute.arch.shuffle_sync(weight, at))
                words, limit = (Int32(0), Int32(0), Int32(0), Int32(0)), Int32(0)
                if (rows[u] >= 0) & (column < a.hidden):
                    if const_expr(self.coded):
                        limit, words = self.load_coded(a, memory, rows[u], column)
                    else:
                        words = ld_vector(memory + Int64(rows[u]) * a.hidden * 2 + column * 2)
                loaded.append(words)
                limits.append(limit)
            for u in cutlass.range_constexpr(BATCH):
                if ranks[u] != adding:
                    end_rank(total, acc)
                    adding = ranks[u]
                if rows[u] >= 0:
                    if const_expr(self.coded):
                        self.add_coded(acc, weights[u], limits[u], loaded[u])
                    else:
                        add_row(acc, weights[u], loaded[u])
        end_rank(total, acc)
        if column < a.hidden:
            store_total(a.out + (Int64(token) * a.hidden + column) * 2, total)

    @cute.jit
    def choice(self, g: Group, a: LlCombineReceiveArgs, sm, token: Int32, choice: Int32):
        """The rank of a choice, where its row lies, and its weight."""
        i = token * a.topk + choice
        expert = ld_id(a.topk_idx, i, a.topk_idx_bytes)
        rank, row = Int32(MAX_RANKS), Int32(-1)
        if (expert >= 0) & (expert < a.experts):
            rank = expert // a.experts_per_rank
            if is_live(g, sm.flag.data_ptr(), RECEIVE_LIVE, rank):
                row = token * a.max_topk + choice
        return rank, row, ld_f32(a.topk_weights + Int64(i) * 4)
