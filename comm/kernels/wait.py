"""Wait until no peer reads my input of the call before: what stands before a view of it is handed out. One warp."""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Int32

from ...cute_kernels.jit import Program
from ...cute_kernels.sm90.address import ld_i32
from ...cute_kernels.sm90.args import fake_args, param_kinds
from ..config import LINE
from .verbs import Group, wait_flag


@dataclass(frozen=True)
class WaitArgs:
    """Kernel parameters in launch order; offsets in my memory."""

    ack: Int32  # flags of the operation
    epoch: Int32  # its epoch
    phase: Int32


class Wait:
    @cute.jit
    def __call__(self, g: Group, args: WaitArgs, stream: cuda.CUstream):
        self.kernel(g, args).launch(grid=(1, 1, 1), block=(32, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, g: Group, a: WaitArgs):
        tid, _, _ = cute.arch.thread_idx()
        if tid < g.ranks:
            wait_flag(g, g.own + a.ack + tid * LINE, ld_i32(g.own + a.epoch), tid, a.phase)


def program(config) -> Program:
    """The host function and the fake arguments that compile it."""
    kernel = Wait()
    kernel.kernel.set_name_prefix("cutehop_ep_wait", remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(Group), fake_args(WaitArgs), cuda.CUstream(0)),
        threads=32,
        smem_bytes=0,
        params=param_kinds(Group) + param_kinds(WaitArgs),
    )
