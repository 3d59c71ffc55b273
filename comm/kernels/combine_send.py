"""Combine, expert side: the expert outputs into the memory that their home ranks pull from, then `combine_ready`.

Grid (g, 1, 1), 1024 threads. With y written in place (y == 0) and no weights nothing is copied, and one CTA does.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64
from cutlass.memory import SmemAllocator

from ...cute_kernels.jit import Program
from ...cute_kernels.sm90.address import ld_i32, st_i32
from ...cute_kernels.sm90.args import fake_args, param_kinds
from ..config import LINE
from .config import SEND_THREADS
from .verbs import (
    ARRIVALS,
    COMBINE_ACK,
    COMBINE_READY,
    PHASE,
    Group,
    aborted,
    copy_vectors,
    in_batches,
    last_to_arrive,
    may_proceed,
    read_epoch,
    report,
    signal_peers,
    start_next_kernel,
    wait_flag,
)


@dataclass(frozen=True)
class CombineSendArgs:
    """Kernel parameters in launch order. Addresses of 0 stand for what a call does not have."""

    matrix: Int64  # int32 (ranks, ranks)
    y: Int64  # (rows, row_bytes), contiguous, 16-byte aligned
    row_bytes: Int32
    weights: Int64  # f32 (rows, topk)
    topk: Int32
    max_recv_rows: Int32  # that fit into the memory
    weights_offset: Int64  # regions of the layout
    weight_row_bytes: Int32
    y_offset: Int64


class CombineSend:
    def __init__(self):
        @cute.struct
        class Smem:
            flag: cute.struct.MemRange[Int32, 4]

        self.Smem = Smem

    @cute.jit
    def __call__(self, g: Group, args: CombineSendArgs, stream: cuda.CUstream):
        self.kernel(g, args).launch(grid=(1, 1, 1), block=(SEND_THREADS, 1, 1), stream=stream, min_blocks_per_mp=1)

    @cute.kernel
    def kernel(self, g: Group, a: CombineSendArgs):
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        flag = SmemAllocator().allocate(self.Smem).flag.data_ptr()
        epoch = read_epoch(g, "combine")
        reached = Boolean(True)
        if tid < g.ranks:
            reached = wait_flag(g, g.own + COMBINE_ACK + tid * LINE, epoch - 1, tid, PHASE["combine_ack"])
        if may_proceed(g, reached & may_send(g, a)):
            rows = rows_of(g, a)
            thread, threads = cta * SEND_THREADS + tid, ctas * SEND_THREADS
            if a.y != 0:
                copy_vectors(g.own + a.y_offset, a.y, Int64(rows) * a.row_bytes // 16, thread, threads)
            if a.weights != 0:
                records = g.own + a.weights_offset
                in_batches(
                    thread,
                    rows * a.topk,
                    threads,
                    lambda i: ld_i32(a.weights + Int64(i) * 4),
                    lambda i, word: st_i32(records + Int64(i // a.topk) * a.weight_row_bytes + i % a.topk * 4, word),
                )
        start_next_kernel()
        if last_to_arrive(g, ARRIVALS["combine_send"], flag):
            if not aborted(g):
                signal_peers(g, Int64(COMBINE_READY), epoch)


def rows_of(g: Group, a):
    """Rows that my experts have received."""
    return ld_i32(a.matrix + Int64((g.ranks - 1) * g.ranks + g.rank) * 4)


@cute.jit
def may_send(g: Group, a):
    """By all threads: whether the memory holds the rows. Not if the handle is of another buffer, or of a call that was
    lost; that is reported then. a: has matrix and max_recv_rows."""
    tid, _, _ = cute.arch.thread_idx()
    rows = rows_of(g, a)
    fits = (rows >= 0) & (rows <= a.max_recv_rows)
    if (not fits) & (tid == 0):
        report(g, g.rank, PHASE["rows"], rows, a.max_recv_rows, Int64(0))
    return fits


def program(config) -> Program:
    """The host function and the fake arguments that compile it."""
    kernel = CombineSend()
    kernel.kernel.set_name_prefix("cutehop_ep_combine_send", remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(Group), fake_args(CombineSendArgs), cuda.CUstream(0)),
        threads=SEND_THREADS,
        smem_bytes=kernel.Smem.size_in_bytes(),
        params=param_kinds(Group) + param_kinds(CombineSendArgs),
    )
