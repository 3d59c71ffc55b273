"""How many pairs (token, choice) of each expert every CTA of the sort will find: sort.py's first kernel.

Grid of as many CTAs as the sort, of 1024 threads, which count the same pairs in shared memory. Bound by latency.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64
from cutlass.memory import SmemAllocator

from ..jit import Program
from ..sm90.address import ld_id, st_i32
from ..sm90.args import fake_args, param_kinds
from .config import MAX_EXPERTS, MAX_SORT_CTAS, SORT_THREADS, SORT_WARPS
from .sort import run_of


@dataclass(frozen=True)
class CountArgs:
    """Kernel parameters in launch order."""

    topk_idx: Int64  # int64 or int32 (pairs,); ids outside [0, experts) are no choice
    topk_idx_bytes: Int32
    pairs: Int32
    experts: Int32
    counts: Int64  # out, int32 (CTAs, experts)


class Count:
    def __init__(self):
        @cute.struct
        class Smem:
            counters: cute.struct.MemRange[Int32, MAX_EXPERTS]

        self.Smem = Smem

    @cute.jit
    def __call__(self, args: CountArgs, stream: cuda.CUstream):
        self.kernel(args).launch(
            grid=(MAX_SORT_CTAS, 1, 1),
            block=(SORT_THREADS, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, a: CountArgs):
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        counters = SmemAllocator().allocate(self.Smem).counters.data_ptr()
        if tid < a.experts:
            cute.arch.store(counters + tid, Int32(0))
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.sync_threads()
        run = run_of(a.pairs) * SORT_WARPS
        first = cta * run
        last = first + run if first + run < a.pairs else a.pairs
        for pair in cutlass.range(first + tid, last, SORT_THREADS, unroll=4):
            expert = ld_id(a.topk_idx, pair, a.topk_idx_bytes)
            if (expert >= 0) & (expert < a.experts):
                cute.arch.atomic_add(counters + expert, Int32(1), sem="relaxed", scope="cta")
        cute.arch.sync_threads()
        if tid < a.experts:
            st_i32(a.counts + (Int64(cta) * a.experts + tid) * 4, cute.arch.load(counters + tid, Int32))


def program(config) -> Program:
    """The host function and the fake arguments that compile it."""
    kernel = Count()
    kernel.kernel.set_name_prefix("cutehop_moe_count", remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(CountArgs), cuda.CUstream(0)),
        threads=SORT_THREADS,
        smem_bytes=kernel.Smem.size_in_bytes(),
        params=param_kinds(CountArgs),
        pdl=True,
    )
