"""Merge the pieces of split sequences, in slot order, so that results repeat bit for bit.

    M = max_j lse_j,  w_j = 2^(lse_j - M),  out = sum_j w_j O_j / (sum_j w_j + 2^(sink - M))

Only for sequences in more pieces than the decode kernel merges itself. Grid (row tiles x 32, sequences), 256 threads.
A CTA owns 16 rows x 64 columns, a warp 8 of the columns: the piece of accumulator layout that one warp of the decode
kernel stored with one instruction. Pieces are taken a chunk at a time with all loads in flight, the running maximum as
in online softmax. Bound by reading the partial results from L2.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64
from cutlass.memory import SmemAllocator

from ..jit import Program
from ..sm90 import ptx
from ..sm90.args import fake_args, param_kinds
from ..sm90.gmem import load_f32, load_i32, store_f32
from .config import COMBINE_REQ, COMBINE_THREADS, HEAD_DIM_V, MERGE_MAX, TILE_M, CombineConfig
from .cta import LN2, LOG2E, NEG_BIG


@dataclass(frozen=True)
class CombineArgs:
    """Kernel parameters in launch order; see work.DecodeArgs for the shapes."""

    plan: cute.Pointer
    num_splits: cute.Pointer
    cu_seqlens_q: cute.Pointer
    attn_sink: cute.Pointer
    out: cute.Pointer
    lse: cute.Pointer
    partial_out: cute.Pointer
    partial_lse: cute.Pointer
    batch: Int32
    s_q: Int32
    heads_per_kv: Int32
    h_q: Int32
    total_q: Int32
    ragged: Int32
    has_sink: Int32
    listed: Int32  # 1: the plan lists the sequences to combine; 0: look at every sequence (fixed splits)
    count: Int32  # entries of the list, or sequences
    empty_lse: Float32


class MlaCombine:
    def __init__(self, config: CombineConfig):
        self.dtype = BFloat16 if config.dtype == "bf16" else Float16
        self.chunk = config.chunk

        @cute.struct
        class Smem:
            out: cute.struct.Align[cute.struct.MemRange[Int32, 16 * 32], 16]  # 16 rows x 64 columns of 16 bits

        self.Smem = Smem

    @cute.jit
    def __call__(self, args: CombineArgs, stream: cuda.CUstream):
        self.kernel(args).launch(
            grid=(1, 1, 1),
            block=(COMBINE_THREADS, 1, 1),
            stream=stream,
            min_blocks_per_mp=24 // self.chunk,  # latency bound: several CTAs per SM hide each other's loads
            preferred_smem_carveout=0,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, a: CombineArgs):
        group, index, _ = cute.arch.block_idx()
        sm = SmemAllocator().allocate(self.Smem)
        staged = sm.out.get_tensor(cute.make_layout((16, 32), stride=(32, 1)))
        # The plan was complete before the decode kernel, which this one may overlap, began to run.
        _, step, _ = cute.arch.grid_dim()
        while index < a.count:
            req = index
            if a.listed != 0:
                req = load_i32(a.plan, index * 8 + COMBINE_REQ)
            index += step
            if req < a.batch:
                slot = load_i32(a.num_splits, req)
                pieces = load_i32(a.num_splits, req + 1) - slot
                if pieces > MERGE_MAX:
                    self.merge(a, staged, req, slot, pieces, group)
            else:
                index = a.count

    @cute.jit
    def merge(self, a: CombineArgs, staged: cute.Tensor, req: Int32, slot: Int32, pieces: Int32, group: Int32):
        tid, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(tid // 32), tid % 32
        tiles = (a.s_q * a.heads_per_kv + (TILE_M - 1)) // TILE_M
        all_tiles = tiles * (a.h_q // a.heads_per_kv)
        # group = ((tile of a slot, warp of the decode CTA), 64 columns)
        slot_tile, decode_warp, columns = group // 32, (group // 4) % 8, group % 4
        kv_head, tile = slot_tile // tiles, slot_tile % tiles
        token0, s_q = req * a.s_q, a.s_q
        if a.ragged != 0:
            token0 = load_i32(a.cu_seqlens_q, req)
            s_q = load_i32(a.cu_seqlens_q, req + 1) - token0
        first_row = (decode_warp % 4) * 16
        rows = s_q * a.heads_per_kv - tile * TILE_M - first_row  # live ones of these 16 and below

        vector = ((slot * all_tiles + slot_tile) * 8 + decode_warp) * 32 + columns * 8 + warp
        values = a.partial_out.toint() + (Int64(vector) * 32 + lane) * 16
        values_step = Int64(all_tiles) * (TILE_M * HEAD_DIM_V * 4)
        lses = (Int64(slot) * all_tiles + slot_tile) * TILE_M + first_row + lane // 4
        lses_step = all_tiles * TILE_M

        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        if rows > 0:
            acc = cute.make_rmem_tensor(4, Float32)
            top = cute.make_rmem_tensor(2, Float32)
            total = cute.make_rmem_tensor(2, Float32)
            acc.fill(0.0)
            top.fill(NEG_BIG)
            total.fill(0.0)
            for first in cutlass.range(0, pieces, self.chunk, unroll=1):
                self.add_chunk(a, acc, top, total, values, values_step, lses, lses_step, first, pieces, lane)
            frag = cute.make_rmem_tensor(4, self.dtype)
            words = cute.recast_tensor(frag, Int32)
            for h in cutlass.range_constexpr(2):
                row = first_row + lane // 4 + 8 * h
                packed = tile * TILE_M + row
                token = packed // a.heads_per_kv
                head = kv_head * a.heads_per_kv + packed % a.heads_per_kv
                live = lane // 4 + 8 * h < rows
                denominator = total[h]
                if a.has_sink != 0:
                    if live:
                        denominator += cute.math.exp2(load_f32(a.attn_sink, head) * LOG2E - top[h], fastmath=True)
                seen = total[h] > 0.0
                factor = cute.arch.rcp_approx(denominator) if seen else Float32(0.0)
                frag[2 * h] = self.dtype(acc[2 * h] * factor)
                frag[2 * h + 1] = self.dtype(acc[2 * h + 1] * factor)
                staged[lane // 4 + 8 * h, warp * 4 + lane % 4] = words[h]
                if live & (warp == 0) & (lane % 4 == 0) & (columns == 0) & (decode_warp < 4):
                    index = (Int64(req) * a.h_q + head) * a.s_q + token
                    if a.ragged != 0:
                        index = Int64(head) * a.total_q + token0 + token
                    lse = (top[h] + cute.math.log2(total[h], fastmath=True)) * LN2
                    store_f32(a.lse, index, lse if seen else a.empty_lse)
            cute.arch.sync_threads()
            # 16 threads store the 128 bytes of one row
            r, word = tid // 16, (tid % 16) * 2
            if r < rows:
                packed = tile * TILE_M + first_row + r
                token = packed // a.heads_per_kv
                head = kv_head * a.heads_per_kv + packed % a.heads_per_kv
                column = (decode_warp // 4) * 256 + columns * 64 + word * 2
                address = a.out.toint() + ((Int64(token0 + token) * a.h_q + head) * HEAD_DIM_V + column) * 2
                ptx.st_global_v2(address, staged[r, word], staged[r, word + 1])
            cute.arch.sync_threads()  # before the next sequence is staged

    @cute.jit
    def add_chunk(
        self, a: CombineArgs, acc: cute.Tensor, top: cute.Tensor, total: cute.Tensor, values: Int64,
        values_step: Int64, lses: Int64, lses_step: Int32, first: Int32, pieces: Int32, lane: Int32,
    ):  # fmt: skip
        """Add pieces first .. first + chunk - 1. The four lanes of a row share the work on its lse values."""
        loaded = []
        for u in cutlass.range_constexpr(self.chunk):
            piece = first + u if first + u < pieces else pieces - 1  # past the end: the last one again, with weight 0
            loaded.append(ptx.ld_global_v4_f32(values + Int64(piece) * values_step))
        weights = [[None] * (self.chunk // 4) for _ in range(2)]
        for h in cutlass.range_constexpr(2):
            high = top[h]
            for i in cutlass.range_constexpr(self.chunk // 4):
                piece = first + 4 * i + lane % 4
                weights[h][i] = -Float32.inf
                if piece < pieces:
                    weights[h][i] = load_f32(a.partial_lse, lses + 8 * h + Int64(piece) * lses_step)
                high = cute.arch.fmax(high, weights[h][i])
            high = cute.arch.fmax(high, cute.arch.shuffle_sync_bfly(high, offset=1))
            high = cute.arch.fmax(high, cute.arch.shuffle_sync_bfly(high, offset=2))
            shrink = cute.math.exp2(top[h] - high, fastmath=True)
            top[h] = high
            added = Float32(0.0)
            for i in cutlass.range_constexpr(self.chunk // 4):
                weights[h][i] = cute.math.exp2(weights[h][i] - high, fastmath=True)
                added += weights[h][i]
            added += cute.arch.shuffle_sync_bfly(added, offset=1)
            added += cute.arch.shuffle_sync_bfly(added, offset=2)
            total[h] = total[h] * shrink + added
            acc[2 * h] = acc[2 * h] * shrink
            acc[2 * h + 1] = acc[2 * h + 1] * shrink
        for u in cutlass.range_constexpr(self.chunk):
            for h in cutlass.range_constexpr(2):
                weight = cute.arch.shuffle_sync(weights[h][u // 4], (lane // 4) * 4 + u % 4)
                acc[2 * h] = acc[2 * h] + weight * loaded[u][2 * h]
                acc[2 * h + 1] = acc[2 * h + 1] + weight * loaded[u][2 * h + 1]


def program(config: CombineConfig) -> Program:
    """The host function and the fake arguments that compile one variant."""
    kernel = MlaCombine(config)
    name = f"cutehop_mla_combine_{config.dtype}_chunk{config.chunk}"
    kernel.kernel.set_name_prefix(name, remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(CombineArgs), cuda.CUstream(0)),
        threads=COMBINE_THREADS,
        smem_bytes=kernel.Smem.size_in_bytes(),
        params=param_kinds(CombineArgs),
        pdl=True,
    )
