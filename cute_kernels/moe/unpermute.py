"""Each token's weighted sum over the rows of its choices.

    out[t] = sum over choices j ascending of w[t, j] * y[pair_row[t, j]]     f32, each step rounded, then bf16

Grid (tokens * pieces of 256 columns / 8, 1, 1), 256 threads: a warp takes a piece of a token, 8 columns per lane, eight
rows in flight. CTAs are many and short: those that wait for indices overlap with those that read rows. Bound by memory.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64

from ..jit import Program
from ..sm90 import ptx
from ..sm90.address import ld_f32, ld_i32, ld_vector_if, unpack_bf16
from ..sm90.args import fake_args, param_kinds
from .config import REDUCE_COLUMNS, REDUCE_THREADS, WARP

BATCH = 8  # rows whose loads are in flight together


@dataclass(frozen=True)
class UnpermuteArgs:
    """Kernel parameters in launch order."""

    y: Int64  # bf16 (num_rows, hidden)
    num_rows: Int32
    hidden: Int32
    pair_row: Int64  # int32 (tokens, topk); outside [0, num_rows) is none
    weights: Int64  # f32 (tokens, topk) or 0 for 1
    tokens: Int32
    topk: Int32
    pieces: Int32  # of a token
    out: Int64  # out, bf16 (tokens, hidden)


class Unpermute:
    @cute.jit
    def __call__(self, args: UnpermuteArgs, stream: cuda.CUstream):
        self.kernel(args).launch(
            grid=(1, 1, 1), block=(REDUCE_THREADS, 1, 1), stream=stream, min_blocks_per_mp=4, preferred_smem_carveout=0
        )

    @cute.kernel
    def kernel(self, a: UnpermuteArgs):
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        item, lane = cta * (REDUCE_THREADS // WARP) + tid // WARP, tid % WARP
        token = item // a.pieces
        if token < a.tokens:
            self.reduce(a, token, item % a.pieces * REDUCE_COLUMNS + lane * 8, lane)

    @cute.jit
    def reduce(self, a: UnpermuteArgs, token: Int32, column: Int32, lane: Int32):
        acc = cute.make_rmem_tensor(8, Float32)
        acc.fill(0.0)
        own, own_weight = Int32(-1), Float32(1.0)  # lane j: choice j
        if lane < a.topk:
            at = (Int64(token) * a.topk + lane) * 4
            own = ld_i32(a.pair_row + at)
            own = own if own < a.num_rows else Int32(-1)
            if a.weights != 0:
                own_weight = ld_f32(a.weights + at)
        for first in cutlass.range(0, a.topk, BATCH, unroll=1):
            rows, loaded = [], []
            for u in cutlass.range_constexpr(BATCH):
                place = first + u if first + u < a.topk else WARP - 1
                row = cute.arch.shuffle_sync(own, place)
                row = row if first + u < a.topk else Int32(-1)
                rows.append(row)
                wanted = Int32((row >= 0) & (column < a.hidden))
                loaded.append(ld_vector_if(a.y + (Int64(row) * a.hidden + column) * 2, wanted))
            for u in cutlass.range_constexpr(BATCH):
                weight = cute.arch.shuffle_sync(own_weight, (first + u) % WARP)
                if rows[u] >= 0:
                    for i, value in enumerate(unpack_bf16(loaded[u])):
                        acc[i] = ptx.add_product(acc[i], weight, value)
        packed = cute.make_rmem_tensor(8, BFloat16)
        packed.store(acc.load().to(BFloat16))
        words = cute.recast_tensor(packed, Int32)
        if column < a.hidden:
            ptx.st_global(a.out + (Int64(token) * a.hidden + column) * 2, *(words[i] for i in range(4)))


def program(config) -> Program:
    """The host function and the fake arguments that compile it."""
    kernel = Unpermute()
    kernel.kernel.set_name_prefix("cutehop_moe_unpermute", remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(UnpermuteArgs), cuda.CUstream(0)),
        threads=REDUCE_THREADS,
        smem_bytes=0,
        params=param_kinds(UnpermuteArgs),
    )
