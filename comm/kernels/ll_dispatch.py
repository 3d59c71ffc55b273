"""Low-latency dispatch: send, receive, or both in one launch.

Grid (g, 1, 1). Sending alone takes 640 threads, receiving alone 512, both 640. In one launch a CTA receives when it has
sent its share; all CTAs have to be on the GPU at once then, since they wait for a flag that their last one sets.
Shared memory is declared for the largest call; `data`, which comes last, may be shorter in a launch.
"""

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8, const_expr
from cutlass.memory import SmemAllocator

from ...cute_kernels.jit import Program
from ...cute_kernels.sm90.address import ld_i32
from ...cute_kernels.sm90.args import fake_args, param_kinds
from ..config import MAX_RANKS
from . import ll_dispatch_receive, ll_dispatch_send
from .config import COPY_WARPS, IDS, MAX_EXPERTS, MAX_TEAMS, Parts, ll_dispatch_data_bytes
from .ll_dispatch_receive import DispatchReceiver, LlDispatchReceiveArgs
from .ll_dispatch_send import DispatchSender, LlDispatchSendArgs
from .ll_records import HEAD_WORDS
from .ll_verbs import group_of, name_of
from .verbs import Group


class LlDispatch(DispatchSender, DispatchReceiver):
    def __init__(self, config: Parts):
        self.sends, self.receives = config.sends, config.receives
        self.threads = ll_dispatch_send.THREADS if config.sends else ll_dispatch_receive.THREADS
        send, receive = int(config.sends), int(config.receives)

        @cute.struct
        class Smem:
            flag: cute.struct.MemRange[Int32, 4]
            bases: cute.struct.MemRange[Int64, MAX_RANKS]
            full: cute.struct.MemRange[Int64, COPY_WARPS]
            arrived: cute.struct.MemRange[Int32, MAX_RANKS]  # records of each source
            heads: cute.struct.MemRange[Int32, MAX_TEAMS * HEAD_WORDS]
            index: cute.struct.MemRange[Int32, MAX_TEAMS * MAX_RANKS]  # of the team's token at each rank, or -1
            ids: cute.struct.MemRange[Int32, max(send * IDS, 1)]
            counters: cute.struct.MemRange[Int32, max(send * (MAX_EXPERTS + MAX_RANKS), 1)]  # per expert, then per rank
            firsts: cute.struct.MemRange[Int32, max(receive * MAX_EXPERTS, 1)]  # (expert, source): rows, then first row
            data: cute.struct.Align[cute.struct.MemRange[Uint8, ll_dispatch_data_bytes(config)], 128]

        self.Smem = Smem

    @cute.jit
    def __call__(self, g: Group, s, r, stream: cuda.CUstream):
        self.kernel(g, s, r).launch(
            grid=(1, 1, 1), block=(self.threads, 1, 1), stream=stream, min_blocks_per_mp=1, use_pdl=True
        )

    @cute.kernel
    def kernel(self, g: Group, s, r):
        sm = SmemAllocator().allocate(self.Smem)
        cute.arch.griddepcontrol_wait()
        if const_expr(not self.receives):
            self.send(g, s, sm)
        elif const_expr(not self.sends):
            self.receive(g, r, sm, ld_i32(r.epoch), False)
        else:
            epoch, late = self.send(g, s, sm)
            self.receive(g, r, sm, epoch, late)


def program(config: Parts) -> Program:
    """The host function and the fake arguments that compile one variant."""
    kernel = LlDispatch(config)
    name = name_of("ll_dispatch", config)
    kernel.kernel.set_name_prefix(name, remove_cutlass_symbol=True, keep_mangled_name=False)
    given = [LlDispatchSendArgs] * config.sends + [LlDispatchReceiveArgs] * config.receives
    group = group_of(config)
    parts = (
        fake_args(LlDispatchSendArgs) if config.sends else None,
        fake_args(LlDispatchReceiveArgs) if config.receives else None,
    )
    return Program(
        host=kernel,
        args=(fake_args(group), *parts, cuda.CUstream(0)),
        threads=kernel.threads,
        smem_bytes=kernel.Smem.size_in_bytes(),
        pdl=True,
        params=sum((param_kinds(each) for each in (group, *given)), ()),
    )
