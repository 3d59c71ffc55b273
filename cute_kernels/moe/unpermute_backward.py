"""Gradients of unpermute.

    grad_y[pair_row[t, j]] = w[t, j] * grad[t]        grad_w[t, j] = sum over columns of grad[t] * y[pair_row[t, j]]
    grad_y = 0 in rows that no pair names

Grid (tokens + num_rows / 8, 1, 1), 256 threads. The first CTAs take a token each, choice by choice: its gradient
comes from L1 for all but the first. Sums over columns are taken in a fixed order: lane, warp, CTA. Each warp of
the other CTAs zeroes a row if nothing is there. Bound by memory: reads of y, writes of grad_y.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64
from cutlass.memory import SmemAllocator

from ..jit import Program
from ..sm90 import ptx
from ..sm90.address import ld_f32, ld_i32, ld_u8, ld_vector, st_f32, unpack_bf16
from ..sm90.args import fake_args, param_kinds
from .config import REDUCE_THREADS, WARP

WARPS = REDUCE_THREADS // WARP
MAX_TOPK = 32


@dataclass(frozen=True)
class UnpermuteBackwardArgs:
    """Kernel parameters in launch order."""

    grad: Int64  # bf16 (tokens, hidden)
    y: Int64  # bf16 (num_rows, hidden), not read without weights
    num_rows: Int32
    hidden: Int32
    pair_row: Int64  # int32 (tokens, topk); outside [0, num_rows) is none
    weights: Int64  # f32 (tokens, topk) or 0 for 1
    tokens: Int32
    topk: Int32
    named: Int64  # bool (num_rows,): rows that a pair names
    grad_y: Int64  # out, bf16 (num_rows, hidden)
    grad_weights: Int64  # out, f32 (tokens, topk)


class UnpermuteBackward:
    def __init__(self):
        @cute.struct
        class Smem:
            sums: cute.struct.MemRange[Float32, MAX_TOPK * WARPS]  # of each choice and warp

        self.Smem = Smem

    @cute.jit
    def __call__(self, args: UnpermuteBackwardArgs, stream: cuda.CUstream):
        self.kernel(args).launch(
            grid=(1, 1, 1), block=(REDUCE_THREADS, 1, 1), stream=stream, min_blocks_per_mp=4, preferred_smem_carveout=0
        )

    @cute.kernel
    def kernel(self, a: UnpermuteBackwardArgs):
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        warp, lane = tid // WARP, tid % WARP
        sm = SmemAllocator().allocate(self.Smem)
        sums = sm.sums.get_tensor(cute.make_layout((MAX_TOPK, WARPS), stride=(WARPS, 1)))
        if cta < a.tokens:
            for choice in cutlass.range(a.topk, unroll=1):
                total = cute.arch.warp_reduction_sum(self.spread(a, cta, choice, tid))
                if lane == 0:
                    sums[choice, warp] = total
            cute.arch.sync_threads()
            if (a.weights != 0) & (tid < a.topk):
                total = Float32(0.0)
                for w in cutlass.range_constexpr(WARPS):
                    total += sums[tid, w]
                st_f32(a.grad_weights + (Int64(cta) * a.topk + tid) * 4, total)
        else:
            self.clear(a, (cta - a.tokens) * WARPS + warp, lane)

    @cute.jit
    def spread(self, a: UnpermuteBackwardArgs, token: Int32, choice: Int32, tid: Int32):
        """Gradient of a choice's row; returns this thread's share of the sum over columns."""
        at = (Int64(token) * a.topk + choice) * 4
        row, weight, total = ld_i32(a.pair_row + at), Float32(1.0), Float32(0.0)
        if (row >= 0) & (row < a.num_rows):
            if a.weights != 0:
                weight = ld_f32(a.weights + at)
            target = Int64(row) * a.hidden
            packed = cute.make_rmem_tensor(8, BFloat16)
            words = cute.recast_tensor(packed, Int32)
            for column in cutlass.range(tid * 8, a.hidden, REDUCE_THREADS * 8, unroll=2):
                grads = unpack_bf16(ld_vector(a.grad + (Int64(token) * a.hidden + column) * 2))
                if a.weights != 0:
                    values = unpack_bf16(ld_vector(a.y + (target + column) * 2))
                    for i in cutlass.range_constexpr(8):
                        total += grads[i] * values[i]
                for i in cutlass.range_constexpr(8):
                    packed[i] = BFloat16(weight * grads[i])
                ptx.st_global(a.grad_y + (target + column) * 2, *(words[i] for i in range(4)))
        return total

    @cute.jit
    def clear(self, a: UnpermuteBackwardArgs, row: Int32, lane: Int32):
        if row < a.num_rows:
            if ld_u8(a.named + Int64(row)) == 0:
                for column in cutlass.range(lane * 8, a.hidden, WARP * 8, unroll=1):
                    zero = Int32(0)
                    ptx.st_global(a.grad_y + (Int64(row) * a.hidden + column) * 2, zero, zero, zero, zero)


def program(config) -> Program:
    """The host function and the fake arguments that compile it."""
    kernel = UnpermuteBackward()
    kernel.kernel.set_name_prefix("cutehop_moe_unpermute_backward", remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(UnpermuteBackwardArgs), cuda.CUstream(0)),
        threads=REDUCE_THREADS,
        smem_bytes=kernel.Smem.size_in_bytes(),
        params=param_kinds(UnpermuteBackwardArgs),
    )
