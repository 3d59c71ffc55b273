"""Low-latency combine in one launch: the ranks that hold a token's experts add up its rows before they travel.

    sum[r] = sum over choices j on rank r ascending of w[t, j] * row {t, j}      f32, product and sum each rounded
    out[t] = sum over ranks r ascending of sum[r]                                then to bf16

    home        asks every rank for its tokens' sums: {weight, expert} of each choice, as words with their epoch
    expert side of each token that is asked for: its rows here, to one sum of f32, into the home's memory; a row that is
                alone goes as it is
    home        own rows of a token, then the others' sums as they come (ll_sums.py)

So a token takes the bytes of two rows of each rank, not one for each choice, no rank waits for the data of another to
arrive before it says so, and nothing is copied on its way to the home's own sums. A sum of f32 takes the places of the
token's first two choices on that rank. The memory of sums needs no slots: it is asked for when it is free.

Grid (g, 1, 1), 512 threads. A warp takes 256 columns of a token, 8 per lane, eight rows or four ranks in flight. A
CTA takes pieces that lie side by side, so that a warp seldom has to look up a token. All CTAs have to be on the GPU at
once. The last one that has answered acknowledges the asking to all peers.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64
from cutlass.memory import SmemAllocator

from ...cute_kernels.jit import Program
from ...cute_kernels.sm90.address import ld_i32, ld_id, st_i32
from ...cute_kernels.sm90.args import fake_args, param_kinds
from ..config import MAX_RANKS
from .config import REDUCE_WARPS, Parts
from .ll_combine_add_up import Adder
from .ll_combine_answer import Answerer
from .ll_verbs import ACK, ARRIVALS, EPOCH, base_of, line, next_epoch
from .ll_waits import peek_acks, wait_ack
from .ll_words import store_words
from .verbs import GMEM, Group, aborted, may_proceed, send_count, set_flag, start_next_kernel

THREADS = 32 * REDUCE_WARPS
ANSWERED_BARRIER = 1


@dataclass(frozen=True)
class LlCombineWholeArgs:
    """Kernel parameters in launch order. Addresses of 0 stand for what a call does not have."""

    y: Int64  # bf16 (experts_per_rank, rows, hidden)
    choice_rows: Int64  # int32 (rows, max_topk): rows of y of each source's tokens' choices
    topk_idx: Int64  # int64 or int32 (tokens, topk)
    topk_idx_bytes: Int32
    topk_weights: Int64  # f32 (tokens, topk)
    tokens: Int32
    topk: Int32
    hidden: Int32
    out: Int64  # out, bf16 (tokens, hidden)
    wait_stats: Int64  # int64 (ranks,), ns waited for each rank to ask, added to
    shares_gpu: Int32  # 1: other ranks are on this GPU
    experts: Int32
    experts_per_rank: Int32
    max_tokens: Int32
    max_topk: Int32
    counts_bytes: Int32  # of one source in the counts region
    asks_bytes: Int64  # of a slot
    asks_offset: Int64
    sums_offset: Int64


class LlCombineWhole(Answerer, Adder):
    def __init__(self) -> None:
        @cute.struct
        class Smem:
            flag: cute.struct.MemRange[Int32, 4]
            bases: cute.struct.MemRange[Int64, MAX_RANKS]

        self.Smem = Smem

    @cute.jit
    def __call__(self, g: Group, a: LlCombineWholeArgs, stream: cuda.CUstream):
        self.kernel(g, a).launch(
            grid=(1, 1, 1), block=(THREADS, 1, 1), stream=stream, min_blocks_per_mp=1, use_pdl=True
        )

    @cute.kernel
    def kernel(self, g: Group, a: LlCombineWholeArgs):
        sm = SmemAllocator().allocate(self.Smem)
        cute.arch.griddepcontrol_wait()
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        warp, lane = cute.arch.make_warp_uniform(tid // 32), tid % 32
        acks = peek_acks(g, tid)
        epoch, base = next_epoch(g), base_of(g, tid)
        mine = cta * THREADS + tid  # choice that this thread asks for first
        expert, weight = self.choice(a, mine)
        reached = Boolean(True)
        if tid < g.ranks:
            sm.bases.get_tensor(cute.make_layout(MAX_RANKS))[tid] = base
            reached = wait_ack(g, epoch, tid, acks)
        go = may_proceed(g, reached)
        if go:
            if (cta == 0) & (tid < g.ranks):
                send_count(base + self.count_at(g, a, epoch, g.rank), epoch, a.tokens)
            self.ask(g, a, sm, epoch, mine, expert, weight)
            go = self.answer(g, a, sm, epoch, warp, lane)
            self.acknowledge(g, epoch, base, warp, lane)
            if go:
                self.add_up(g, a, epoch, warp, lane)
        if a.shares_gpu != 0:  # then no warp may let the next kernel come while others wait for peers
            cute.arch.sync_threads()
        start_next_kernel()

    @cute.jit
    def acknowledge(self, g: Group, epoch: Int32, base: Int64, warp: Int32, lane: Int32):
        """By all warps of the CTA; the first one waits for the others, and in the last CTA tells all peers that they
        may ask again. The sums, for which this rank waits yet, are its own matter."""
        if warp != 0:
            cute.arch.barrier_arrive(barrier_id=ANSWERED_BARRIER, number_of_threads=THREADS)
        else:
            cute.arch.barrier(barrier_id=ANSWERED_BARRIER, number_of_threads=THREADS)
            ctas, _, _ = cute.arch.grid_dim()
            # The counter of the receiving half, which never runs beside this kernel.
            counter, last = cute.make_ptr(Int32, g.own + ARRIVALS["combine_receive"], GMEM, assumed_align=4), Int32(1)
            if lane == 0:
                last = Int32(cute.arch.atomic_add(counter, Int32(1), sem="relaxed", scope="gpu") == ctas - 1)
            if cute.arch.shuffle_sync(last, 0) != 0:
                if lane == 0:
                    cute.arch.store(counter, Int32(0), sem="relaxed", scope="gpu")
                if not aborted(g):
                    if lane < g.ranks:
                        set_flag(base + line(ACK, epoch, g.rank), epoch, False)
                    if lane == 0:
                        st_i32(g.own + EPOCH, epoch)

    @cute.jit
    def choice(self, a: LlCombineWholeArgs, i: Int32):
        """Expert, -1 for none, and the bits of the weight of choice i of all my tokens."""
        expert, weight = Int32(-1), Int32(0)
        if i < a.tokens * a.topk:
            expert, weight = ld_id(a.topk_idx, i, a.topk_idx_bytes), ld_i32(a.topk_weights + Int64(i) * 4)
            expert = expert if (expert >= 0) & (expert < a.experts) else Int32(-1)
        return expert, weight

    @cute.jit
    def ask(self, g: Group, a: LlCombineWholeArgs, sm, epoch: Int32, mine: Int32, expert: Int32, weight: Int32):
        """By all threads: tell all peers of my tokens' choices."""
        ctas, _, _ = cute.arch.grid_dim()
        bases = sm.bases.get_tensor(cute.make_layout(MAX_RANKS))
        i, choices = mine, a.tokens * a.topk
        while i < choices:
            offset = self.ask_at(a, epoch, g.rank, i // a.topk, i % a.topk)
            for r in cutlass.range(g.ranks, unroll=1):
                if r != g.rank:
                    store_words(bases[r] + offset, weight, expert, epoch)
            i += ctas * THREADS
            expert, weight = self.choice(a, i)


def program(config: Parts) -> Program:
    """The host function and the fake arguments that compile it. config: both parts, and no more."""
    assert config == Parts(True, True)
    kernel = LlCombineWhole()
    kernel.kernel.set_name_prefix("cutehop_ep_ll_combine_whole", remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(Group), fake_args(LlCombineWholeArgs), cuda.CUstream(0)),
        threads=THREADS,
        smem_bytes=kernel.Smem.size_in_bytes(),
        pdl=True,
        params=param_kinds(Group) + param_kinds(LlCombineWholeArgs),
    )
