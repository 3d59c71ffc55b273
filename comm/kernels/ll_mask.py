"""Masks ranks of an elastic low-latency buffer, or takes them back. One warp, a lane per rank; nothing is outstanding.

Ranks that were apart have made different numbers of operations. All that take each other back go on from the largest
number, which each reads from the others' memory: whoever has it already when another looks changes nothing. Flags of
earlier epochs stand for nothing then, and each rank acknowledges the operations that it was not part of.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64

from ...cute_kernels.jit import Program
from ...cute_kernels.sm90.address import ld_i32, st_i32
from ...cute_kernels.sm90.args import fake_args, param_kinds
from ..config import LINE
from ..ll_config import SLOTS
from .config import Parts
from .ll_remote import ld_peer_i32, set_flag_of
from .ll_verbs import ACK, EPOCH, MASK, TOLD, group_of, is_masked, line, name_of
from .ll_waits import leave_out
from .verbs import Group, peer_base, set_flag


@dataclass(frozen=True)
class LlMaskArgs:
    """Kernel parameters in launch order. Bit r: rank r."""

    out: Int32  # to be masked
    back: Int32  # to be taken back


class LlMask:
    @cute.jit
    def __call__(self, g: Group, args: LlMaskArgs, stream: cuda.CUstream):
        self.kernel(g, args).launch(grid=(1, 1, 1), block=(32, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, g: Group, a: LlMaskArgs):
        rank, _, _ = cute.arch.thread_idx()
        base = Int64(0)
        if rank < g.ranks:
            base = peer_base(g, rank)
            if (a.out >> rank) & 1 != 0:
                leave_out(g, rank)
            if (a.back >> rank) & 1 != 0:
                st_i32(g.own + MASK + Int64(rank) * 4, Int32(0))
                set_flag_of(g, base, Int64(TOLD) + Int64(g.rank) * LINE, Int32(0), rank, False)
        if a.back != 0:
            self.join(g, base, rank)

    @cute.jit
    def join(self, g: Group, base: Int64, rank: Int32):
        """Go on from the largest epoch among the ranks that are not masked."""
        with_me = Boolean(False)
        if rank < g.ranks:
            with_me = not is_masked(g, rank)
        mine, ahead = ld_i32(g.own + EPOCH), Int32(0)
        if with_me:
            ahead = ld_peer_i32(g, base, Int64(EPOCH), rank) - mine
        epoch = mine + cute.arch.warp_redux_sync(ahead if ahead > 0 else Int32(0), "max")
        if rank == 0:
            set_flag(g.own + EPOCH, epoch, False)  # others may look at any time
        if with_me:
            for i in cutlass.range_constexpr(SLOTS):
                set_flag_of(g, base, Int64(line(ACK, epoch - i, g.rank)), epoch - i, rank, False)


def program(config: Parts) -> Program:
    """The host function and the fake arguments that compile it."""
    kernel, group = LlMask(), group_of(config)
    name = name_of("ll_mask", config)
    kernel.kernel.set_name_prefix(name, remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(group), fake_args(LlMaskArgs), cuda.CUstream(0)),
        threads=32,
        smem_bytes=0,
        params=param_kinds(group) + param_kinds(LlMaskArgs),
    )
