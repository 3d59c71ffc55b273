"""Where the tokens of one rank go: a pure function of topk_idx.

    is_token_in_rank[t, r] = a choice of t is on r
    num_tokens_per_rank[r] = tokens with is_token_in_rank[t, r]        num_tokens_per_expert[e] = choices of e

One cluster of 8 CTAs of 256 threads. Each counts its share of the tokens in shared memory; then each adds up its share
of the counters of all eight. Nothing has to be zeroed in global memory, and nothing is added there. Bound by latency.
Small enough, in threads and with the shared memory that a launch asks for, to run beside CTAs that wait for peers.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64
from cutlass.memory import SmemAllocator

from ...cute_kernels.jit import Program
from ...cute_kernels.sm90 import ptx
from ...cute_kernels.sm90.address import ld_id, st_i32, st_u8
from ...cute_kernels.sm90.args import fake_args, param_kinds
from .config import LAYOUT_CLUSTER, LAYOUT_COUNTERS, LAYOUT_THREADS


@dataclass(frozen=True)
class LayoutArgs:
    """Kernel parameters in launch order."""

    topk_idx: Int64  # int64 or int32 (tokens, topk); ids outside [0, experts) are no choice
    topk_idx_bytes: Int32
    tokens: Int32
    topk: Int32
    experts: Int32
    experts_per_rank: Int32
    per_rank: Int64  # out, int32 (ranks,)
    per_expert: Int64  # out, int32 (experts,)
    is_token_in_rank: Int64  # out, bool (tokens, ranks)


class Layout:
    def __init__(self):
        @cute.struct
        class Smem:
            counters: cute.struct.MemRange[Int32, LAYOUT_COUNTERS]  # of experts, then of ranks

        self.Smem = Smem

    @cute.jit
    def __call__(self, args: LayoutArgs, stream: cuda.CUstream):
        self.kernel(args).launch(
            grid=(LAYOUT_CLUSTER, 1, 1),
            block=(LAYOUT_THREADS, 1, 1),
            cluster=(LAYOUT_CLUSTER, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(self, a: LayoutArgs):
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        sm = SmemAllocator().allocate(self.Smem)
        counters = sm.counters.data_ptr()
        ranks = a.experts // a.experts_per_rank
        used = a.experts + ranks
        for i in cutlass.range(tid, used, LAYOUT_THREADS, unroll=1):
            cute.arch.store(counters + i, Int32(0))
        cute.arch.sync_threads()
        stride = LAYOUT_CLUSTER * LAYOUT_THREADS
        for begin in cutlass.range(cta * LAYOUT_THREADS, a.tokens, stride, unroll=1):
            self.count(a, counters, begin + tid, ranks)
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        for i in cutlass.range(cta * LAYOUT_THREADS + tid, used, stride, unroll=1):
            total = Int32(0)
            for other in cutlass.range_constexpr(LAYOUT_CLUSTER):
                total += ptx.ld_shared_cluster(counters + i, Int32(other))
            target = a.per_expert + Int64(i) * 4
            if i >= a.experts:
                target = a.per_rank + Int64(i - a.experts) * 4
            st_i32(target, total)
        cute.arch.cluster_arrive()  # no CTA may end while others read its counters
        cute.arch.cluster_wait()

    @cute.jit
    def count(self, a: LayoutArgs, counters: cute.Pointer, token: Int32, ranks: Int32):
        """One token per thread; the whole warp comes here."""
        lane = cute.arch.lane_idx()
        mask = Int32(0)  # bit r: a choice is on rank r
        if token < a.tokens:
            for choice in cutlass.range(a.topk, unroll=4):
                at = Int64(token) * a.topk + choice
                expert = ld_id(a.topk_idx, at, a.topk_idx_bytes)
                if (expert >= 0) & (expert < a.experts):
                    mask |= Int32(1) << (expert // a.experts_per_rank)
                    cute.arch.atomic_add(counters + expert, Int32(1), sem="relaxed", scope="cta")
        for r in cutlass.range(ranks, unroll=1):
            there = (mask >> r) & 1
            votes = cute.arch.popc(cute.arch.vote_ballot_sync(there != 0))
            if lane == 0:
                cute.arch.atomic_add(counters + a.experts + r, Int32(votes), sem="relaxed", scope="cta")
            if token < a.tokens:
                st_u8(a.is_token_in_rank + Int64(token) * ranks + r, there)


def program(config) -> Program:
    """The host function and the fake arguments that compile it."""
    kernel = Layout()
    kernel.kernel.set_name_prefix("cutehop_ep_layout", remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(LayoutArgs), cuda.CUstream(0)),
        threads=LAYOUT_THREADS,
        smem_bytes=kernel.Smem.size_in_bytes(),
        params=param_kinds(LayoutArgs),
        cluster=LAYOUT_CLUSTER,
    )
