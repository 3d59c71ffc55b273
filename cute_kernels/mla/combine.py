"""Merge the pieces of split sequences, in slot order, so that results repeat bit for bit.

    M = max_j lse_j,  w_j = 2^(lse_j - M) / (sum_j 2^(lse_j - M) + 2^(sink - M)),  out = sum_j w_j O_j

Grid (row groups, sequences), 256 threads. A warp owns 512 or, where rows are few and pieces many, 128 columns of one row.
Sequences that were not split return at once: the decode kernel wrote them. Bound by reading the partial results.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64

from ..jit import Program
from ..sm90 import ptx
from ..sm90.args import fake_args, param_kinds
from ..sm90.gmem import load_f32, load_i32, store_f32
from .config import COMBINE_THREADS, HEAD_DIM_V, CombineConfig
from .decode import LN2, LOG2E


@dataclass(frozen=True)
class CombineArgs:
    """Kernel parameters in launch order; see work.DecodeArgs for the shapes."""

    num_splits: cute.Pointer
    cu_seqlens_q: cute.Pointer
    attn_sink: cute.Pointer
    out: cute.Pointer
    lse: cute.Pointer
    partial_out: cute.Pointer
    partial_lse: cute.Pointer
    s_q: Int32
    heads_per_kv: Int32
    h_q: Int32
    total_q: Int32
    ragged: Int32
    has_sink: Int32
    empty_lse: Float32


class MlaCombine:
    def __init__(self, config: CombineConfig):
        self.dtype = BFloat16 if config.dtype == "bf16" else Float16
        self.warps_per_row = config.warps_per_row
        self.vectors = 4 // config.warps_per_row  # 128-column vectors per warp
        self.in_flight = 8 // self.vectors if self.vectors > 1 else 8  # pieces loaded before the first use

    @cute.jit
    def __call__(self, args: CombineArgs, stream: cuda.CUstream):
        self.kernel(args).launch(
            grid=(1, 1, 1), block=(COMBINE_THREADS, 1, 1), stream=stream, min_blocks_per_mp=1, use_pdl=True
        )

    @cute.kernel
    def kernel(self, a: CombineArgs):
        tid, _, _ = cute.arch.thread_idx()
        group, req, _ = cute.arch.block_idx()
        warp, lane = cute.arch.make_warp_uniform(tid // 32), tid % 32
        row = group * (COMBINE_THREADS // 32 // self.warps_per_row) + warp // self.warps_per_row
        col = (warp % self.warps_per_row) * 128 + lane * 4
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        slot = load_i32(a.num_splits, req)
        pieces = load_i32(a.num_splits, req + 1) - slot
        token0, s_q = req * a.s_q, a.s_q
        if a.ragged != 0:
            token0 = load_i32(a.cu_seqlens_q, req)
            s_q = load_i32(a.cu_seqlens_q, req + 1) - token0
        # partial rows are numbered kv head by kv head with the largest s_q; out rows token by token
        per_head = a.s_q * a.heads_per_kv
        packed = row % per_head
        token = packed // a.heads_per_kv
        head = (row // per_head) * a.heads_per_kv + packed % a.heads_per_kv
        if (pieces > 0) & (row < a.h_q * a.s_q) & (token < s_q):
            self.merge(a, req, slot, pieces, row, token0, token, head, col, lane)

    @cute.jit
    def merge(
        self, a: CombineArgs, req: Int32, slot: Int32, pieces: Int32, row: Int32, token0: Int32, token: Int32,
        head: Int32, col: Int32, lane: Int32,
    ):  # fmt: skip
        rows = a.h_q * a.s_q
        top = -Float32.inf
        for first in cutlass.range(0, pieces, 32, unroll=1):
            top = cute.arch.fmax(top, self.piece_lse(a, slot, pieces, first + lane, rows, row))
        top = cute.arch.warp_reduction(top, cute.arch.fmax)
        seen = top > -Float32.inf
        top = top if seen else Float32(0.0)
        total = Float32(0.0)
        for first in cutlass.range(0, pieces, 32, unroll=1):
            total += cute.math.exp2(self.piece_lse(a, slot, pieces, first + lane, rows, row) - top, fastmath=True)
        total = cute.arch.warp_reduction(total, lambda x, y: x + y)
        denominator = total
        if a.has_sink != 0:
            sink = load_f32(a.attn_sink, head)
            denominator += cute.math.exp2(sink * LOG2E - top, fastmath=True)
        inverse = 1.0 / denominator if seen else Float32(0.0)

        acc = cute.make_rmem_tensor(4 * self.vectors, Float32)
        acc.fill(0.0)
        for first in cutlass.range(0, pieces, 32, unroll=1):
            lse = self.piece_lse(a, slot, pieces, first + lane, rows, row)
            weight = cute.math.exp2(lse - top, fastmath=True) * inverse
            here = pieces - first if pieces - first < 32 else Int32(32)
            for j in cutlass.range(0, here, self.in_flight, unroll=1):
                self.add_pieces(a, acc, slot + first, j, here, weight, rows, row, col)
        self.store(a, acc, req, token0, token, head, col)
        if (col == 0) & (lane == 0):
            index = (Int64(req) * a.h_q + head) * a.s_q + token
            if a.ragged != 0:
                index = Int64(head) * a.total_q + token0 + token
            value = (top + cute.math.log2(total, fastmath=True)) * LN2
            store_f32(a.lse, index, value if seen else a.empty_lse)

    @cute.jit
    def piece_lse(self, a: CombineArgs, slot: Int32, pieces: Int32, j: Int32, rows: Int32, row: Int32):
        value = -Float32.inf
        if j < pieces:
            value = load_f32(a.partial_lse, Int64(slot + j) * rows + row)
        return value

    @cute.jit
    def add_pieces(
        self, a: CombineArgs, acc: cute.Tensor, slot: Int32, j: Int32, here: Int32, weight: Float32, rows: Int32,
        row: Int32, col: Int32,
    ):  # fmt: skip
        """acc += weight_j * O_j for the next few pieces, all loads issued before the first use."""
        loaded = []
        for u in cutlass.range_constexpr(self.in_flight):
            piece = j + u if j + u < here else here - 1  # past the end: load the last one again, with weight 0
            base = a.partial_out.toint() + ((Int64(slot + piece) * rows + row) * HEAD_DIM_V + col) * 4
            for v in cutlass.range_constexpr(self.vectors):
                loaded.append(ptx.ld_global_v4_f32(base + v * 512))
        for u in cutlass.range_constexpr(self.in_flight):
            w = cute.arch.shuffle_sync(weight, j + u if j + u < here else here - 1)
            w = w if j + u < here else Float32(0.0)
            for v in cutlass.range_constexpr(self.vectors):
                for i in cutlass.range_constexpr(4):
                    acc[4 * v + i] = acc[4 * v + i] + w * loaded[u * self.vectors + v][i]

    @cute.jit
    def store(self, a: CombineArgs, acc: cute.Tensor, req: Int32, token0: Int32, token: Int32, head: Int32, col: Int32):
        frag = cute.make_rmem_tensor(4 * self.vectors, self.dtype)
        frag.store(acc.load().to(self.dtype))
        words = cute.recast_tensor(frag, Int32)
        base = a.out.toint() + ((Int64(token0 + token) * a.h_q + head) * HEAD_DIM_V + col) * 2
        for v in cutlass.range_constexpr(self.vectors):
            ptx.st_global_v2(base + v * 256, words[2 * v], words[2 * v + 1])


def program(config: CombineConfig) -> Program:
    """The host function and the fake arguments that compile one variant."""
    return Program(
        host=MlaCombine(config),
        args=(fake_args(CombineArgs), cuda.CUstream(0)),
        threads=COMBINE_THREADS,
        smem_bytes=0,
        params=param_kinds(CombineArgs),
        pdl=True,
    )
