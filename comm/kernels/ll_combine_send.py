"""Low-latency combine, expert side: push every row of my experts' outputs to its home rank.

    place = slot of the epoch, row {token, choice} there, as send_slot of the dispatch says

Grid (g, 1, 1), 256 threads. Each warp's first lane keeps a ring of pieces in flight (ring.py), straight from the
caller's tensor. The last CTA to be done sends `ready`.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, Uint8
from cutlass.memory import SmemAllocator

from ...cute_kernels.jit import Program
from ...cute_kernels.sm90.args import fake_args, param_kinds
from ..config import MAX_LOCAL_EXPERTS, MAX_RANKS
from ..ll_config import SLOTS
from .config import LL_RING_BYTES, LL_RINGS, MAX_STAGES
from .ll_verbs import (
    ACK,
    READY,
    base_of,
    finish,
    line,
    mask_of,
    next_epoch,
    slot_of,
    start_next_kernel,
)
from .ring import EMPTY, drain, make_ring, move_row
from .verbs import PHASE, Group, is_masked, ld_i32, may_proceed, st_i32, wait_flag

THREADS = 32 * LL_RINGS


@dataclass(frozen=True)
class LlCombineSendArgs:
    """Kernel parameters in launch order."""

    y: Int64  # bf16 (experts_per_rank, rows, row_bytes / 2)
    recv_count: Int64  # int32 (experts_per_rank,)
    send_slot: Int64  # int32 (experts_per_rank, rows)
    row_bytes: Int32
    piece_bytes: Int32  # a ring: see config.ring
    stages: Int32
    epoch: Int64  # out, int32 (1,)
    elastic: Int32
    experts_per_rank: Int32
    max_tokens: Int32
    max_topk: Int32
    slot_bytes: Int64
    data_offset: Int64


class LlCombineSend:
    def __init__(self):
        @cute.struct
        class Smem:
            full: cute.struct.MemRange[Int64, LL_RINGS * MAX_STAGES]
            targets: cute.struct.MemRange[Int64, LL_RINGS * MAX_STAGES]
            sizes: cute.struct.MemRange[Int32, LL_RINGS * MAX_STAGES]
            ends: cute.struct.MemRange[Int32, MAX_LOCAL_EXPERTS]  # rows of this expert and all before it
            bases: cute.struct.MemRange[Int64, MAX_RANKS]
            flag: cute.struct.MemRange[Int32, 4]
            ring: cute.struct.Align[cute.struct.MemRange[Uint8, LL_RINGS * LL_RING_BYTES], 128]

        self.Smem = Smem

    @cute.jit
    def __call__(self, g: Group, args: LlCombineSendArgs, stream: cuda.CUstream):
        self.kernel(g, args).launch(
            grid=(1, 1, 1), block=(THREADS, 1, 1), stream=stream, min_blocks_per_mp=1, use_pdl=True
        )

    @cute.kernel
    def kernel(self, g: Group, a: LlCombineSendArgs):
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        warp, lane = cute.arch.make_warp_uniform(tid // 32), tid % 32
        sm = SmemAllocator().allocate(self.Smem)
        flag = sm.flag.data_ptr()
        cute.arch.griddepcontrol_wait()
        epoch, mask, base = next_epoch(g), mask_of(g, a.elastic), base_of(g, tid)
        bases = sm.bases.get_tensor(cute.make_layout(MAX_RANKS))
        if tid < g.ranks:
            bases[tid] = base
        if (cta == 0) & (tid == 0):
            st_i32(a.epoch, epoch)
        if tid < LL_RINGS * MAX_STAGES:
            cute.arch.mbarrier_init(sm.full.data_ptr() + tid, 1)
        cute.arch.mbarrier_init_fence()
        reached = Boolean(True)
        if warp == 0:
            self.add_counts(a, sm, lane)
        elif tid - 32 < g.ranks:
            peer = tid - 32
            reached = wait_flag(g, g.own + line(ACK, epoch, peer), epoch - SLOTS, peer, PHASE["ll_ack"], mask)
        go = may_proceed(g, reached)
        if go:
            start_next_kernel()
            if lane == 0:
                self.push_rows(g, a, sm, epoch, mask, warp)
        finish(g, READY, "combine_send", epoch, mask, True, go, base, flag)

    @cute.jit
    def add_counts(self, a: LlCombineSendArgs, sm, lane: Int32):
        """By one warp: inclusive sums of recv_count."""
        ends = sm.ends.get_tensor(cute.make_layout(MAX_LOCAL_EXPERTS))
        before = Int32(0)
        for first in cutlass.range(0, a.experts_per_rank, 32, unroll=1):
            count = Int32(0)
            if first + lane < a.experts_per_rank:
                count = ld_i32(a.recv_count + Int64(first + lane) * 4)
            for i in cutlass.range_constexpr(5):
                left = cute.arch.shuffle_sync_up(count, 1 << i, mask_and_clamp=0)
                if lane >= (1 << i):
                    count += left
            if first + lane < a.experts_per_rank:
                ends[first + lane] = before + count
            before += cute.arch.shuffle_sync(count, 31)

    @cute.jit
    def push_rows(self, g: Group, a: LlCombineSendArgs, sm, epoch: Int32, mask: Int64, warp: Int32):
        """By one thread."""
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        ends = sm.ends.get_tensor(cute.make_layout(MAX_LOCAL_EXPERTS))
        slot = a.data_offset + Int64(slot_of(epoch)) * a.slot_bytes
        rows, choices = g.ranks * a.max_tokens, a.max_tokens * a.max_topk
        ring = make_ring(sm, warp, LL_RING_BYTES, a.piece_bytes, a.stages)
        held, into, oldest, phase = (Int32(i) for i in EMPTY)
        expert, begin = Int32(0), Int32(0)
        for i in cutlass.range(warp * ctas + cta, ends[a.experts_per_rank - 1], LL_RINGS * ctas, unroll=1):
            while i >= ends[expert]:
                begin = ends[expert]
                expert += 1
            row = Int64(expert) * rows + (i - begin)
            place = ld_i32(a.send_slot + row * 4)
            home = place // choices
            if not is_masked(mask, home):
                target = (
                    sm.bases.get_tensor(cute.make_layout(MAX_RANKS))[home] + slot + Int64(place % choices) * a.row_bytes
                )
                held, into, oldest, phase = move_row(
                    ring, a.y + row * a.row_bytes, target, a.row_bytes, held, into, oldest, phase
                )
        drain(ring, held, oldest, phase)


def program(config) -> Program:
    """The host function and the fake arguments that compile it."""
    kernel = LlCombineSend()
    kernel.kernel.set_name_prefix("cutehop_ep_ll_combine_send", remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(Group), fake_args(LlCombineSendArgs), cuda.CUstream(0)),
        threads=THREADS,
        smem_bytes=kernel.Smem.size_in_bytes(),
        pdl=True,
        params=param_kinds(Group) + param_kinds(LlCombineSendArgs),
    )
