"""Grouped GEMM for few rows per expert (sm_90a).

    out[r, n] = sum_k x[r, k] * w[e, n, k]                                                        bf16, e = expert of r
    out[r, n] = sum_j x_s[r, j] * w_s[e, n / 128, j] * (sum of x * w over K block j of 128, fp32) FP8
    epilogues: store it | silu(gate) * up of two such columns | the same in e4m3 with a scale per row and 128 columns

Weights are read once and multiplied with few rows, so reading them is the work: all SMs read all the time. Operands are
swapped: weight rows are the M of wgmma, and the rows of activations its N, which can be as small as 8.

Grid: one CTA per SM. A tile is 256 weight rows (with SwiGLU 128 of gate and the same 128 of up) times at most tile_n
rows of one expert. K goes by in blocks of 128 bytes, which are one scale block of FP8. A K block of a tile is a unit;
all units of the call, tile after tile, are cut into equal shares of consecutive ones (work.get_span), so a CTA has
whole tiles and at most two pieces of tiles. Experts without rows have no tiles. Every role walks the pieces by itself.

Roles (384 threads)
    warps 0-3   WG0   rows 0-63 of both halves of the tile, multiplies and stores    232 registers
    warps 4-7   WG1   rows 64-127 of both halves
    warp  8     loader (TMA), runs ahead of the math across pieces                    40 registers
    warp  9     FP8: products of scales, likewise; warps 10 and 11 fill up the warpgroup

One K block
    bf16   wait full | acc += W X of both halves: eight m64k16 | the block before is done: arrive empty
    FP8    wait full | for each half: part = W X, four m64k32; wait; acc += part * factors | arrive empty

A tile in pieces: each CTA stores its accumulators in fp32 and counts itself; the last one adds all pieces in the order
of K. Pieces that a CTA begins with are stored while the loader goes on; only the last piece shows in the time.

Pipeline (mbarriers)
    full[stages]    bytes of the boxes, and with FP8 an arrive of each lane of warp 9       empty[stages]   8 math warps

Shared memory (bytes): stages x (weights 32768, activations 128 tile_n, FP8 factors 8 tile_n), tables 3 x 2048,
swiglu_fp8 maxima 32 tile_n, mbarriers.

Rows of a tile past the expert's last are whatever lies in shared memory: rows don't mix, and theirs are not stored.

Bounds: 32768 bytes of DRAM per K block and CTA, at 21.6 bytes/ns of an SM's share 2700 cycles; tensor cores 16 tile_n
cycles in bf16, 8 tile_n in FP8.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hh
from cutlass import BFloat16, Float8E4M3FN, Float32, GridConstant, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.experimental import primitives as prims
from cutlass.experimental.cuda.tensor_map import TensorMap, create_tensor_map_tiled
from cutlass.memory import SmemAllocator
from cutlass.utils import LayoutEnum

from ..jit import Program
from ..sm90.args import fake_args, param_kinds
from ..sm90.experts import WARP, Tables, fill_tables
from .config import MAX_EXPERTS, TILE_W, WG_ROWS, GemmDecodeConfig
from .cta import MATH_WARPS, WG, Place, Shared
from .loaders import Loaders
from .math import Math
from .work import GemmDecodeArgs

THREADS = 3 * WG


class GemmDecode(Loaders, Math):
    def __init__(self, config: GemmDecodeConfig):
        self.config = config
        self.fp8 = config.dtype == "fp8"
        self.dtype = Float8E4M3FN if self.fp8 else BFloat16
        stages, tile_n, block_k = config.stages, config.tile_n, config.block_k
        num_factors = stages * 2 * tile_n if self.fp8 else 0
        num_amax = MATH_WARPS * tile_n if config.epilogue == "swiglu_fp8" else 0

        @cute.struct
        class Smem:
            full: cute.struct.MemRange[Int64, stages]
            empty: cute.struct.MemRange[Int64, stages]
            ticket: cute.struct.MemRange[Int32, 1]
            first: cute.struct.MemRange[Int32, MAX_EXPERTS]
            stop: cute.struct.MemRange[Int32, MAX_EXPERTS]
            tiles: cute.struct.MemRange[Int32, MAX_EXPERTS]
            factors: cute.struct.MemRange[Float32, num_factors]
            amax: cute.struct.MemRange[Float32, num_amax]
            w: cute.struct.Align[cute.struct.MemRange[self.dtype, stages * TILE_W * block_k], 1024]
            x: cute.struct.Align[cute.struct.MemRange[self.dtype, stages * tile_n * block_k], 1024]

        self.Smem = Smem

    # ------------------------------------------------------------------------------------------------ host

    @cute.jit
    def __call__(self, args: GemmDecodeArgs, stream: cuda.CUstream):
        """The map made here only gives the kernel its parameters: the launcher passes real ones."""
        fake = create_tensor_map_tiled(Int64(16), BFloat16, [64, 64], [72], [64, 64])
        self.kernel(fake, fake, args).launch(
            grid=(1, 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
            hint_smem_base_uniform=False,  # else every wgmma descriptor goes through R2UR
        )

    def make_mma(self):
        return hh.make_trivial_tiled_mma(
            self.dtype, self.dtype, OperandMajorMode.K, OperandMajorMode.K, Float32,
            atom_layout_mnk=(1, 1, 1), tiler_mn=(WG_ROWS, self.config.tile_n),
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------- device

    @cute.kernel
    def kernel(
        self,
        x_map: GridConstant[TensorMap],  # K, rows of a block, blocks
        w_map: GridConstant[TensorMap],  # K, weight rows of an expert, experts
        args: GemmDecodeArgs,
    ):
        stages, tile_n, block_k = self.config.stages, self.config.tile_n, self.config.block_k
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        sm = SmemAllocator().allocate(self.Smem)
        if tid == 0:
            for i in cutlass.range_constexpr(stages):
                cute.arch.mbarrier_init(sm.full.data_ptr() + i, 1 + WARP if self.fp8 else 1)
                cute.arch.mbarrier_init(sm.empty.data_ptr() + i, MATH_WARPS)
            for tensor_map in (x_map, w_map):
                prims.prefetch_tensormap(tensor_map.get_ptr())
        cute.arch.mbarrier_init_fence()
        kind = hh.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, self.dtype, block_k)
        atom = warpgroup.make_smem_layout_atom(kind, self.dtype)
        w_stages = cute.tile_to_shape(atom, (TILE_W, block_k, stages), order=(0, 1, 2))
        x_stages = cute.tile_to_shape(atom, (tile_n, block_k, stages), order=(0, 1, 2))
        table = cute.make_layout(MAX_EXPERTS)
        shared = Shared(
            w=sm.w.data_ptr(),
            x=sm.x.data_ptr(),
            sW=sm.w.get_tensor(w_stages.outer, swizzle=w_stages.inner),
            sX=sm.x.get_tensor(x_stages.outer, swizzle=x_stages.inner),
            factors=cute.make_tensor(sm.factors.data_ptr(), cute.make_layout((tile_n, 2, stages))),
            amax=cute.make_tensor(sm.amax.data_ptr(), cute.make_layout((tile_n, MATH_WARPS))),
            ticket=sm.ticket.get_tensor(cute.make_layout(1)),
            tables=Tables(sm.first.get_tensor(table), sm.stop.get_tensor(table), sm.tiles.get_tensor(table)),
            full=sm.full.data_ptr(),
            empty=sm.empty.data_ptr(),
        )
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        if warp_id == 0:
            fill_tables(args, shared.tables, tile_n, tid % WARP)
        cute.arch.sync_threads()

        wg = warp_id // 4  # 2 is the loaders
        t = tid % WG
        place = Place(cta, ctas, tid % WARP, wg, t, (t // WARP) * 16 + (t % WARP) // 4)
        if wg == 2:
            cute.arch.setmaxregister_decrease(40)
            if warp_id == 8:
                self.load(x_map, w_map, args, shared, place)
            if const_expr(self.fp8):
                if warp_id == 9:
                    self.load_factors(args, shared, place)
        else:
            cute.arch.setmaxregister_increase(232)
            self.math(args, self.make_mma(), shared, place)


def program(config: GemmDecodeConfig) -> Program:
    """The host function and the fake arguments that compile one variant."""
    kernel = GemmDecode(config)
    name = f"cutehop_gemm_decode_{config.dtype}_{config.epilogue}_n{config.tile_n}"
    kernel.kernel.set_name_prefix(name, remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(GemmDecodeArgs), cuda.CUstream(0)),
        threads=THREADS,
        smem_bytes=kernel.Smem.size_in_bytes(),
        params=("map", "map", *param_kinds(GemmDecodeArgs)),
        pdl=True,
    )
