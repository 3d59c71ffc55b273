"""Where the row of every choice goes: a stable counting sort of the pairs (token, choice) by expert.

    pair_row[p] = start[expert of p] + pairs before p of the same expert        ends[e] = start[e] + pairs of e

Grid of up to 32 CTAs (config.sort_ctas) of 1024 threads. Each of a CTA's 32 warps owns a run of consecutive pairs:

    count   a warp counts its pairs per expert, 32 at a time: lanes of one expert find each other and the first adds
    sum     a thread per expert adds up its CTA's warps, then the CTAs before its own, then the experts before its own
    place   a warp walks its pairs once more; a lane's row is the counter of its expert, plus the equal lanes before it

What the other CTAs count comes from a kernel before (count.py), which a single CTA does not need. They could tell each
other in a cluster, but one of eight did not start on a GPU that other ranks share: README.md, "No clusters".

Shared memory: 4 bytes for each warp and expert (34 KB for 256 experts, 135 KB for 1024) as the launch asks for it.
Nothing is zeroed or added in global memory. Bound by latency: two reads of the ids and about 60 cycles per 32 pairs.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64
from cutlass.memory import SmemAllocator

from ..jit import Program
from ..sm90.address import ld_i32, ld_id, st_i32
from ..sm90.args import fake_args, param_kinds
from .config import MAX_EXPERTS, MAX_SORT_CTAS, SORT_THREADS, SORT_WARPS, WARP, sort_smem_bytes


@dataclass(frozen=True)
class SortArgs:
    """Kernel parameters in launch order."""

    topk_idx: Int64  # int64 or int32 (pairs,); ids outside [0, experts) are no choice
    topk_idx_bytes: Int32
    pairs: Int32
    experts: Int32
    num_rows: Int32
    counts: Int64  # int32 (CTAs, experts) of count.py, not read by a grid of one
    ends: Int64  # out, int32 (experts,)
    pair_row: Int64  # out, int32 (pairs,)


@cute.jit
def run_of(pairs: Int32):
    """Pairs that each warp of the grid owns, a multiple of 32."""
    ctas, _, _ = cute.arch.grid_dim()
    step = ctas * (SORT_WARPS * WARP)
    return (pairs + step - 1) // step * WARP


class Sort:
    def __init__(self):
        @cute.struct
        class Smem:
            words: cute.struct.MemRange[Int32, sort_smem_bytes(MAX_EXPERTS) // 4]

        self.Smem = Smem

    @cute.jit
    def __call__(self, args: SortArgs, stream: cuda.CUstream):
        self.kernel(args).launch(
            grid=(MAX_SORT_CTAS, 1, 1),
            block=(SORT_THREADS, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, a: SortArgs):
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        warp, lane = cute.arch.make_warp_uniform(tid // WARP), tid % WARP
        sm = SmemAllocator().allocate(self.Smem)
        bases = sm.words.data_ptr()  # (experts,): first row of this CTA
        warp_sums = bases + a.experts
        counters = warp_sums + SORT_WARPS  # (warps, experts)
        for i in cutlass.range(tid, SORT_WARPS * a.experts, SORT_THREADS, unroll=1):
            cute.arch.store(counters + i, Int32(0))
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.sync_threads()
        run = run_of(a.pairs)
        first = (cta * SORT_WARPS + warp) * run
        mine = counters + warp * a.experts
        self.walk(False, a, mine, bases, first, run, lane)
        cute.arch.sync_threads()
        total = self.sum_warps(a, counters, tid)
        self.find_bases(a, total, bases, warp_sums, cta, tid)
        cute.arch.sync_threads()
        self.walk(True, a, mine, bases, first, run, lane)

    @cute.jit
    def walk(
        self, place: cutlass.Constexpr[bool], a: SortArgs, mine: cute.Pointer, bases: cute.Pointer, first: Int32,
        run: Int32, lane: Int32,
    ):  # fmt: skip
        """By one warp: count the pairs of its run, or place them."""
        last = first + run if first + run < a.pairs else a.pairs
        for begin in cutlass.range(first, last, WARP, unroll=1):
            pair = begin + lane
            expert = Int32(-1)
            if pair < last:
                expert = ld_id(a.topk_idx, pair, a.topk_idx_bytes)
            chosen = (expert >= 0) & (expert < a.experts)
            expert = expert if chosen else Int32(-1)
            equal = Int32(cute.arch.match_sync(-1, expert))
            before = cute.arch.popc(equal & ((Int32(1) << lane) - 1))
            counted = Int32(0)
            if chosen:
                counted = cute.arch.load(mine + expert, Int32)
            cute.arch.sync_warp()  # all have read before the first of them adds
            if chosen & (before == 0):
                cute.arch.store(mine + expert, counted + cute.arch.popc(equal))
            cute.arch.sync_warp()
            if cutlass.const_expr(place):
                row = Int32(-1)
                if chosen:
                    row = cute.arch.load(bases + expert, Int32) + counted + before
                    row = row if row < a.num_rows else Int32(-1)
                if pair < last:
                    st_i32(a.pair_row + Int64(pair) * 4, row)

    @cute.jit
    def sum_warps(self, a: SortArgs, counters: cute.Pointer, tid: Int32):
        """A thread per expert: each warp's count becomes the count of the warps before it. All of this CTA's pairs."""
        total = Int32(0)
        if tid < a.experts:
            for w in cutlass.range(SORT_WARPS, unroll=8):
                counter = counters + w * a.experts + tid
                count = cute.arch.load(counter, Int32)
                cute.arch.store(counter, total)
                total += count
        return total

    @cute.jit
    def find_bases(
        self, a: SortArgs, total: Int32, bases: cute.Pointer, warp_sums: cute.Pointer, cta: Int32, tid: Int32
    ):
        """A thread per expert: where the expert's rows begin, and those of this CTA among them. total: its pairs of the
        expert."""
        lane, warp = tid % WARP, tid // WARP
        ctas, _, _ = cute.arch.grid_dim()
        earlier = Int32(0)
        if (tid < a.experts) & (ctas > 1):
            total = Int32(0)
            for other in cutlass.range(ctas, unroll=8):
                count = ld_i32(a.counts + (Int64(other) * a.experts + tid) * 4)
                total += count
                earlier += count if other < cta else Int32(0)
        through = total  # of this expert and those before it, of a warp's experts, then of all
        for i in cutlass.range_constexpr(5):
            below = cute.arch.shuffle_sync_up(through, 1 << i, mask_and_clamp=0)
            if lane >= 1 << i:
                through += below
        if lane == WARP - 1:
            cute.arch.store(warp_sums + warp, through)
        cute.arch.sync_threads()
        sums = cute.arch.load(warp_sums + lane, Int32)
        through += cute.arch.warp_redux_sync(sums if lane < warp else Int32(0), "add")
        if tid < a.experts:
            cute.arch.store(bases + tid, through - total + earlier)
            if cta == 0:
                st_i32(a.ends + Int64(tid) * 4, through if through < a.num_rows else a.num_rows)


def program(config) -> Program:
    """The host function and the fake arguments that compile it."""
    kernel = Sort()
    kernel.kernel.set_name_prefix("cutehop_moe_sort", remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(SortArgs), cuda.CUstream(0)),
        threads=SORT_THREADS,
        smem_bytes=kernel.Smem.size_in_bytes(),
        params=param_kinds(SortArgs),
        pdl=True,
    )
