"""A small kernel with most kinds of parameters: it shows that compiling, loading and launching work on a machine.

    out[64 * x + t] = tile[x, t] * scale + bias + sum(ints)        x = CTA, t = thread, 64 threads

Grid (x, 1, 1). One TMA box of 64 floats per CTA; rows past the end of `tile` read as zeros. Shared memory: 256 bytes of
tile, 8 of mbarrier.
"""

from dataclasses import dataclass
from typing import Any

from cutehop.cute_kernels.jit.bundle import Program
from cutehop.cute_kernels.jit.cache import Compiled, compiled

WIDTH = 64


@dataclass(frozen=True)
class ProbeConfig:
    """ints: how many i32 parameters, at least 1. The others: launch attributes, as in Program."""

    ints: int = 2
    cluster: int = 1
    pdl: bool = False
    cooperative: bool = False


@compiled
def probe_kernel(config: ProbeConfig) -> Program:
    """Parameters: map of tile (rows, 64) f32, box (64, 1), no swizzle; ptr out f32; i64 bias; f32 scale; i32 ints..."""
    import cutlass
    import cutlass.cute as cute
    from cutlass import Float32, Int32, Int64
    from cutlass.cute.nvgpu import cpasync
    from cutlass.cute.runtime import make_fake_compact_tensor, make_ptr
    from cutlass.memory import SmemAllocator

    @cute.kernel
    def probe(
        load: cute.CopyAtom, mTile: cute.Tensor, out: cute.Pointer, bias: Int64, scale: Float32, ints: tuple[Any, ...]
    ):
        tid, _, _ = cute.arch.thread_idx()
        row, _, _ = cute.arch.block_idx()
        smem = SmemAllocator()
        sTile = smem.allocate_tensor(Float32, cute.make_layout((1, WIDTH), stride=(WIDTH, 1)), byte_alignment=128)
        mbar = smem.allocate_array(Int64, 1)
        if tid == 0:
            cute.arch.mbarrier_init(mbar, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if cutlass.const_expr(config.pdl):
            cute.arch.griddepcontrol_wait()
        tS, tG = cpasync.tma_partition(
            load,
            0,
            cute.make_layout(1),
            cute.group_modes(sTile, 0, 2),
            cute.group_modes(cute.local_tile(mTile, (1, WIDTH), (None, 0)), 0, 2),
        )
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(mbar, WIDTH * 4)
            cute.copy(load, tG[None, row], tS, tma_bar_ptr=mbar)
        cute.arch.mbarrier_wait(mbar, 0)
        total = Int64(bias)
        for value in ints:
            total += Int64(value)
        gOut = cute.make_tensor(out + row * WIDTH, cute.make_layout(WIDTH))
        gOut[tid] = sTile[0, tid] * scale + Float32(total)

    @cute.jit
    def host(mTile: cute.Tensor, out: cute.Pointer, bias: Int64, scale: Float32, ints: tuple[Any, ...]):
        box = cute.make_layout((1, WIDTH), stride=(WIDTH, 1))
        load, tile = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), mTile, box, (1, WIDTH))
        probe(load, tile, out, bias, scale, ints).launch(grid=(1, 1, 1), block=(WIDTH, 1, 1))

    probe.set_name_prefix("cutehop_probe", remove_cutlass_symbol=True, keep_mangled_name=False)
    tile = make_fake_compact_tensor(Float32, (1 << 20, WIDTH), stride_order=(1, 0), assumed_align=16)
    out = make_ptr(Float32, 16, cutlass.AddressSpace.gmem, assumed_align=16)
    ints = tuple(Int32(1) for _ in range(config.ints))
    return Program(
        host=host,
        args=(tile, out, Int64(1), Float32(1), ints),
        threads=WIDTH,
        smem_bytes=264,
        params=("map", "ptr", "i64", "f32", *["i32"] * config.ints),
        cluster=config.cluster,
        pdl=config.pdl,
        cooperative=config.cooperative,
    )


def variants() -> list[tuple[Compiled[ProbeConfig], ProbeConfig]]:
    """What an ahead-of-time build compiles."""
    return [(probe_kernel, ProbeConfig())]
