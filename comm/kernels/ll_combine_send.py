"""Low-latency combine, expert side: push every row of my experts' outputs to its home rank.

    place = slot of the epoch, row {token, choice} there, as send_slot of the dispatch says

The first lane of each of 8 warps keeps a ring of pieces in flight (ring.py), straight from the
caller's tensor. The last CTA to be done sends `ready`.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, const_expr

from ...cute_kernels.sm90.address import ld_i32, st_i32
from ..config import MAX_LOCAL_EXPERTS, MAX_RANKS
from .config import MAX_STAGES, RINGS, SEND_RING_BYTES
from .ll_combine_coded import CodedSender
from .ll_remote import RemoteGroup, put
from .ll_verbs import (
    READY,
    base_of,
    finish,
    has_home,
    next_epoch,
    outbox_of,
    slot_of,
)
from .ll_waits import note_receivers, peek_acks, wait_ack
from .ring import EMPTY, drain, make_ring, move_row
from .verbs import Group, copy_vectors, may_proceed, start_next_kernel

THREADS = 32 * RINGS


@dataclass(frozen=True)
class LlCombineSendArgs:
    """Kernel parameters in launch order."""

    y: Int64  # bf16 (experts_per_rank, rows, row_bytes / 2)
    recv_count: Int64  # int32 (experts_per_rank,)
    send_slot: Int64  # int32 (experts_per_rank, rows)
    row_bytes: Int32
    chunk: Int32  # columns of a row that are encoded together, if rows are (ll_logfmt.py)
    limits_bytes: Int32  # of a row
    piece_bytes: Int32  # a ring: see config.ring
    stages: Int32
    epoch: Int64  # out, int32 (1,)
    experts_per_rank: Int32
    max_tokens: Int32
    max_topk: Int32
    slot_bytes: Int64
    data_offset: Int64


class CombineSender(CodedSender):
    """Part of ll_combine.LlCombine. sm: has ring, full, targets, sizes, ends, bases and flag."""

    receives: bool
    coded: bool

    @cute.jit
    def send(self, g: Group, a: LlCombineSendArgs, sm):
        """By all threads; returns the epoch."""
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        warp, lane = cute.arch.make_warp_uniform(tid // 32), tid % 32
        acks = peek_acks(g, tid - 32)
        epoch, base = next_epoch(g), base_of(g, tid)
        if tid < g.ranks:
            sm.bases.get_tensor(cute.make_layout(MAX_RANKS))[tid] = base
        if (cta == 0) & (tid == 0):
            st_i32(a.epoch, epoch)
        if tid < RINGS * MAX_STAGES:
            cute.arch.mbarrier_init(sm.full.data_ptr() + tid, 1)
        cute.arch.mbarrier_init_fence()
        reached = Boolean(True)
        if warp == 0:
            self.add_counts(g, a, sm, lane)
        elif warp == 1:
            if lane < g.ranks:
                reached = wait_ack(g, epoch, lane, acks)
            note_receivers(g, sm.flag.data_ptr(), reached)
        go = may_proceed(g, reached)
        if const_expr(not self.receives):
            start_next_kernel()
        if const_expr(self.coded):
            if go & (warp < RINGS):
                self.send_coded(g, a, sm, epoch, warp, lane)
        else:
            if go & (warp < RINGS) & (lane == 0):
                self.push_rows(g, a, sm, epoch, warp)
            if const_expr(g.remote):
                if go & (warp < RINGS):
                    self.put_rows(g, a, sm, epoch, warp, lane)
        finish(g, READY, "combine_send", epoch, True, go, base, sm.flag.data_ptr())
        return epoch

    @cute.jit
    def add_counts(self, g: Group, a: LlCombineSendArgs, sm, lane: Int32):
        """By one warp: inclusive sums of recv_count, which is the caller's and may be anything."""
        ends = sm.ends.get_tensor(cute.make_layout(MAX_LOCAL_EXPERTS))
        before, rows = Int32(0), g.ranks * a.max_tokens
        for first in cutlass.range(0, a.experts_per_rank, 32, unroll=1):
            count = Int32(0)
            if first + lane < a.experts_per_rank:
                count = ld_i32(a.recv_count + Int64(first + lane) * 4)
                count = max(min(count, rows), 0)
            for i in cutlass.range_constexpr(5):
                left = cute.arch.shuffle_sync_up(count, 1 << i, mask_and_clamp=0)
                if lane >= (1 << i):
                    count += left
            if first + lane < a.experts_per_rank:
                ends[first + lane] = before + count
            before += cute.arch.shuffle_sync(count, 31)

    @cute.jit
    def push_rows(self, g: Group, a: LlCombineSendArgs, sm, epoch: Int32, warp: Int32):
        """By one thread."""
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        ends = sm.ends.get_tensor(cute.make_layout(MAX_LOCAL_EXPERTS))
        slot = a.data_offset + Int64(slot_of(epoch)) * a.slot_bytes
        rows, choices = g.ranks * a.max_tokens, a.max_tokens * a.max_topk
        ring = make_ring(sm, warp, SEND_RING_BYTES, a.piece_bytes, a.stages)
        held, into, oldest, phase = (Int32(i) for i in EMPTY)
        expert, begin = Int32(0), Int32(0)
        for i in cutlass.range(warp * ctas + cta, ends[a.experts_per_rank - 1], RINGS * ctas, unroll=1):
            while i >= ends[expert]:
                begin = ends[expert]
                expert += 1
            row = Int64(expert) * rows + (i - begin)
            place = ld_i32(a.send_slot + row * 4)
            base = Int64(0)
            if has_home(g, sm.flag.data_ptr(), place, choices):
                base = sm.bases.get_tensor(cute.make_layout(MAX_RANKS))[place // choices]
            if base != 0:
                target = base + slot + Int64(place % choices) * a.row_bytes
                held, into, oldest, phase = move_row(
                    ring, a.y + row * a.row_bytes, target, a.row_bytes, held, into, oldest, phase
                )
        drain(ring, held, oldest, phase)

    @cute.jit
    def put_rows(self, g: RemoteGroup, a: LlCombineSendArgs, sm, epoch: Int32, warp: Int32, lane: Int32):
        """By one warp: the rows of ranks that only NVSHMEM reaches, by way of the outbox; row i of all my experts' lies
        there at i."""
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        ends = sm.ends.get_tensor(cute.make_layout(MAX_LOCAL_EXPERTS))
        bases = sm.bases.get_tensor(cute.make_layout(MAX_RANKS))
        rows, choices = g.ranks * a.max_tokens, a.max_tokens * a.max_topk
        total, most = ends[a.experts_per_rank - 1], self.outbox_rows(g, a)
        total = total if total < most else most  # no dispatch counts more
        expert, begin = Int32(0), Int32(0)
        cute.arch.sync_warp()
        for i in cutlass.range(warp * ctas + cta, total, RINGS * ctas, unroll=1):
            while i >= ends[expert]:
                begin = ends[expert]
                expert += 1
            row = Int64(expert) * rows + (i - begin)
            place = ld_i32(a.send_slot + row * 4)
            home = place // choices
            beyond = Boolean(False)
            if has_home(g, sm.flag.data_ptr(), place, choices):
                beyond = bases[home] == 0
            if beyond:
                copy = outbox_of(g, epoch) + Int64(i) * a.row_bytes
                copy_vectors(copy, a.y + row * a.row_bytes, Int64(a.row_bytes // 16), lane, 32)
                target = a.data_offset + Int64(slot_of(epoch)) * a.slot_bytes + Int64(place % choices) * a.row_bytes
                put(g, target, copy, a.row_bytes, home)
