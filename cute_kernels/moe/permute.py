"""Copy every token's row, and its scales, once for each of its choices that has a row.

    rows[pair_row[t, j]] = x[t]        row_scales likewise

Grid (SMs, 1, 1), 256 threads: two kinds of warps work side by side, each on tokens of its own.

    mover   takes pieces of rows in turn: bulk load into a ring in shared memory, then lane j stores it as choice j
    side    takes the scales of a token, by ordinary loads and stores; idle where there are none

A ring has `stages` pieces: stages - 2 loads are in flight while the stores of two pieces read. A lane waits for its own
stores only, so the warp comes together before a piece is loaded over. Shared memory: 4 rings of 48 KiB, 512 bytes of
mbarriers. Bound by memory: each row is read once and written k times.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8
from cutlass.experimental import primitives as prims
from cutlass.memory import SmemAllocator

from ..jit import Program
from ..sm90.address import bytes_at, ld_i32, st_i32
from ..sm90.args import fake_args, param_kinds
from .config import MAX_STAGES, MOVERS, RING_BYTES, SIDE_WARPS, WARP

THREADS = WARP * (MOVERS + SIDE_WARPS)


@dataclass(frozen=True)
class PermuteArgs:
    """Kernel parameters in launch order."""

    x: Int64  # (tokens, row_bytes), rows side by side
    rows: Int64  # out, (num_rows, row_bytes)
    pair_row: Int64  # int32 (tokens, topk), -1 for none
    tokens: Int32
    topk: Int32
    row_bytes: Int32
    piece_bytes: Int32
    pieces: Int32  # of a row
    stages: Int32  # of a ring, at least 3
    scales: Int64  # 32-bit words (tokens, scale_words) or 0
    scale_words: Int32
    scale_row_stride: Int64  # words
    scale_stride: Int64  # words
    row_scales: Int64  # out, (num_rows, scale_words)


class Permute:
    def __init__(self):
        @cute.struct
        class Smem:
            ring: cute.struct.Align[cute.struct.MemRange[Uint8, MOVERS * RING_BYTES], 128]
            full: cute.struct.MemRange[Int64, MOVERS * MAX_STAGES]

        self.Smem = Smem

    @cute.jit
    def __call__(self, args: PermuteArgs, stream: cuda.CUstream):
        self.kernel(args).launch(
            grid=(1, 1, 1), block=(THREADS, 1, 1), stream=stream, min_blocks_per_mp=1, use_pdl=True
        )

    @cute.kernel
    def kernel(self, a: PermuteArgs):
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        warp, lane = cute.arch.make_warp_uniform(tid // WARP), tid % WARP
        sm = SmemAllocator().allocate(self.Smem)
        if tid < MOVERS * MAX_STAGES:
            cute.arch.mbarrier_init(sm.full.data_ptr() + tid, 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        if warp < MOVERS:
            ring = sm.ring.data_ptr() + warp * RING_BYTES
            self.move(a, ring, sm.full.data_ptr() + warp * MAX_STAGES, warp * ctas + cta, MOVERS * ctas, lane)
        elif a.scales != 0:
            for token in cutlass.range((warp - MOVERS) * ctas + cta, a.tokens, SIDE_WARPS * ctas, unroll=1):
                self.copy_scales(a, token, lane)

    @cute.jit
    def move(self, a: PermuteArgs, ring: cute.Pointer, full: cute.Pointer, first: Int32, step: Int32, lane: Int32):
        """By one warp: items first, first + step, ...; item i is piece i % pieces of token i // pieces."""
        items = a.tokens * a.pieces
        ahead = first  # the next item to load
        into = Int32(0)
        for _ in cutlass.range(a.stages - 2, unroll=1):
            if ahead < items:
                self.load(a, ring, full, ahead, into, lane)
            ahead += step
            into += 1
        stage, phase = Int32(0), Int32(0)
        for item in cutlass.range(first, items, step, unroll=1):
            if ahead < items:
                self.load(a, ring, full, ahead, into, lane)
            ahead += step
            into = into + 1 if into + 1 < a.stages else Int32(0)
            token, piece = item // a.pieces, item % a.pieces
            row = Int32(-1)
            if lane < a.topk:
                row = ld_i32(a.pair_row + (Int64(token) * a.topk + lane) * 4)
            cute.arch.mbarrier_wait(full + stage, phase)
            if row >= 0:
                prims.cp_async_bulk_global_shared_cta(
                    bytes_at(a.rows + Int64(row) * a.row_bytes + piece * a.piece_bytes),
                    ring + stage * a.piece_bytes,
                    self.size(a, piece),
                )
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(1, read=True)  # the stage before this one is loaded next
            cute.arch.sync_warp()
            stage += 1
            if stage == a.stages:
                stage, phase = Int32(0), phase ^ 1
        cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def load(self, a: PermuteArgs, ring: cute.Pointer, full: cute.Pointer, item: Int32, stage: Int32, lane: Int32):
        if lane == 0:
            token, piece = item // a.pieces, item % a.pieces
            size = self.size(a, piece)
            cute.arch.mbarrier_arrive_and_expect_tx(full + stage, size)
            prims.cp_async_bulk_shared_cluster_global(
                ring + stage * a.piece_bytes,
                bytes_at(a.x + Int64(token) * a.row_bytes + piece * a.piece_bytes),
                full + stage,
                size,
            )

    @cute.jit
    def size(self, a: PermuteArgs, piece: Int32):
        left = a.row_bytes - piece * a.piece_bytes
        return left if left < a.piece_bytes else a.piece_bytes

    @cute.jit
    def copy_scales(self, a: PermuteArgs, token: Int32, lane: Int32):
        own = Int32(-1)
        if lane < a.topk:
            own = ld_i32(a.pair_row + (Int64(token) * a.topk + lane) * 4)
        for first in cutlass.range(0, a.scale_words, WARP, unroll=1):
            word, value = first + lane, Int32(0)
            if word < a.scale_words:
                value = ld_i32(a.scales + (Int64(token) * a.scale_row_stride + Int64(word) * a.scale_stride) * 4)
            for j in cutlass.range(a.topk, unroll=1):
                row = cute.arch.shuffle_sync(own, j)
                if (row >= 0) & (word < a.scale_words):
                    st_i32(a.row_scales + (Int64(row) * a.scale_words + word) * 4, value)


def program(config) -> Program:
    """The host function and the fake arguments that compile it."""
    kernel = Permute()
    kernel.kernel.set_name_prefix("cutehop_moe_permute", remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(PermuteArgs), cuda.CUstream(0)),
        threads=THREADS,
        smem_bytes=kernel.Smem.size_in_bytes(),
        params=param_kinds(PermuteArgs),
        pdl=True,
    )
