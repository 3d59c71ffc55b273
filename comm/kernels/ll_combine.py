"""Low-latency combine: send, receive, or both in one launch where ll_combine_whole.py does not do that: with LogFMT,
ranks that may be left out, peers that are not mapped, or many ranks.

Grid (g, 1, 1), 512 threads; sending alone 256. In one launch a CTA receives when it has sent its share; all CTAs have
to be on the GPU at once then, since they wait for a flag that their last one sets.
"""

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8, const_expr
from cutlass.memory import SmemAllocator

from ...cute_kernels.jit import Program
from ...cute_kernels.sm90.address import ld_i32
from ...cute_kernels.sm90.args import fake_args, param_kinds
from ..config import MAX_LOCAL_EXPERTS, MAX_RANKS
from . import ll_combine_receive, ll_combine_send
from .config import MAX_STAGES, RINGS, SEND_RING_BYTES, Parts
from .ll_combine_receive import CombineReceiver, LlCombineReceiveArgs
from .ll_combine_send import CombineSender, LlCombineSendArgs
from .ll_verbs import group_of, name_of
from .verbs import Group


class LlCombine(CombineSender, CombineReceiver):
    def __init__(self, config: Parts):
        self.sends, self.receives, self.coded = config.sends, config.receives, config.coded
        self.threads = ll_combine_receive.THREADS if config.receives else ll_combine_send.THREADS
        rings = RINGS if config.sends else 0

        @cute.struct
        class Smem:
            flag: cute.struct.MemRange[Int32, 4]
            bases: cute.struct.MemRange[Int64, MAX_RANKS]
            full: cute.struct.MemRange[Int64, max(rings * MAX_STAGES, 1)]
            targets: cute.struct.MemRange[Int64, max(rings * MAX_STAGES, 1)]
            sizes: cute.struct.MemRange[Int32, max(rings * MAX_STAGES, 1)]
            ends: cute.struct.MemRange[
                Int32, max(MAX_LOCAL_EXPERTS * min(rings, 1), 1)
            ]  # rows of experts up to this one
            ring: cute.struct.Align[cute.struct.MemRange[Uint8, max(rings * SEND_RING_BYTES, 16)], 128]

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
            self.receive(g, r, sm, ld_i32(r.epoch))
        else:
            self.receive(g, r, sm, self.send(g, s, sm))


def program(config: Parts) -> Program:
    """The host function and the fake arguments that compile one variant."""
    kernel = LlCombine(config)
    name = name_of("ll_combine", config)
    kernel.kernel.set_name_prefix(name, remove_cutlass_symbol=True, keep_mangled_name=False)
    given = [LlCombineSendArgs] * config.sends + [LlCombineReceiveArgs] * config.receives
    group = group_of(config)
    parts = (
        fake_args(LlCombineSendArgs) if config.sends else None,
        fake_args(LlCombineReceiveArgs) if config.receives else None,
    )
    return Program(
        host=kernel,
        args=(fake_args(group), *parts, cuda.CUstream(0)),
        threads=kernel.threads,
        smem_bytes=kernel.Smem.size_in_bytes(),
        pdl=True,
        params=sum((param_kinds(each) for each in (group, *given)), ()),
    )
