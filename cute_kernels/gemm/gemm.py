"""Grouped GEMM (sm_90a).

    out[r, n] = sum_k a[r, k] * b[e, n, k]                                                       bf16, e = expert of r
    out[r, n] = sum_j a_s[r, j] * b_s[e, n / 128, j] * (sum of a * b over K block j of 128)      FP8
    epilogues: store it | silu(gate) * up of two such columns | the same in e4m3 with a scale per row and 128 columns

Grid: one CTA per SM, persistent; a tile is taken when the one before it is about done (tiles.get_tile has their order).
A tile is so many rows of one expert times so many of its weight rows: 128 x 256 (wide), 256 x 128 (tall, bf16) or
192 x 128 (middle, FP8). With SwiGLU half the weight rows are of gate, half the same of up: one thread then holds gate
and up of the same output, and in a wide tile four lanes all 128 columns of an FP8 group. Rows come in units of 64: one
wgmma, one TMA box. K goes by in blocks of 128 bytes, which are one scale block of FP8.

Roles (384 threads; middle 512, with three math warpgroups)
    warps 0-3   WG0   its part of the tile's rows, multiplies and stores     232 registers, middle 160
    warps 4-7   WG1   the next part, and so on                               232
    next warp   loader (TMA), runs ahead of the math across tiles            40, middle 32; three warps fill it up
Units of rows past the expert's last are neither loaded nor multiplied, which leaves the tensor cores to the others.

One K block
    bf16   wait full | acc += A B: four m64n256k16, or tall four m64n128k16 for each of two units | the block before is
           done: arrive empty
    FP8    wait full, then for each 128 columns: product = A B: four m64n128k32 | wait | after the last ones arrive
           empty | acc += product * scales, while another warpgroup multiplies
The scales of the next block are on their way to registers meanwhile, those of the next tile during the epilogue. The
epilogue stores from registers, while the loader fills the stages for the next tile; the warpgroups do not wait for each
other.

Pipelines (mbarriers)
    full[stages]   bytes of the boxes: 8192 of A for each unit of rows, 128 for each weight row
    empty[stages]  one arrive of each math warp
    ordered[8]     the number of the CTA's next tile is in order[8]; at most stages + 1 are on their way, as the loader
                   cannot be further ahead

Shared memory (bytes)
    wide, tall   A and B 4 x 49152, tables 3 x 4096, mbarriers and numbers 160
    middle       A and B 5 x 40960, the same

Rows of a tile past the expert's last are the next expert's or zeros: rows don't mix, and theirs are not stored.

Bounds, per K block and CTA: 1024 tensor cycles, 80 (bf16), 96 (FP8, tall) bytes a cycle read from shared memory, 48
loaded from L2. Middle: 768 tensor cycles, 96 and 53 bytes a cycle.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hh
from cutlass import BFloat16, Float8E4M3FN, Float32, GridConstant, Int32, Int64
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.experimental import primitives as prims
from cutlass.experimental.cuda.tensor_map import TensorMap, create_tensor_map_tiled
from cutlass.memory import SmemAllocator
from cutlass.utils import LayoutEnum

from ..jit import Program
from ..sm90.args import fake_args, param_kinds
from ..sm90.experts import Tables, fill_tables
from ..sm90.gmem import store_i32
from .config import BLOCK_BYTES, MAX_EXPERTS, ORDERS, TILES, UNIT, GemmConfig
from .cta import WG, Shared, next_stage, put_order
from .math import Math
from .tiles import GemmArgs, Place, get_tile, num_tiles

REGISTERS = {2: (232, 40), 3: (160, 32)}  # of math and loader threads, by math warpgroups
EVICT_NORMAL = 0x1000000000000000  # L2 policy of CUTLASS


class GroupedGemm(Math):
    def __init__(self, config: GemmConfig):
        self.config = config
        self.fp8 = config.dtype == "fp8"
        self.dtype = Float8E4M3FN if self.fp8 else BFloat16
        self.block_k = config.block_k
        self.threads = (config.math_wgs + 1) * WG
        tile_m, tile_n, stages = config.tile_m, config.tile_n, config.stages
        assert (tile_m, tile_n) in TILES[config.dtype]
        assert config.possible

        @cute.struct
        class Smem:
            full: cute.struct.MemRange[Int64, stages]
            empty: cute.struct.MemRange[Int64, stages]
            ordered: cute.struct.MemRange[Int64, ORDERS]
            order: cute.struct.MemRange[Int32, ORDERS]
            first: cute.struct.MemRange[Int32, MAX_EXPERTS]
            stop: cute.struct.MemRange[Int32, MAX_EXPERTS]
            tiles: cute.struct.MemRange[Int32, MAX_EXPERTS]
            a: cute.struct.Align[cute.struct.MemRange[self.dtype, stages * tile_m * self.block_k], 1024]
            b: cute.struct.Align[cute.struct.MemRange[self.dtype, stages * tile_n * self.block_k], 1024]

        self.Smem = Smem

    # ------------------------------------------------------------------------------------------------ host

    @cute.jit
    def __call__(self, args: GemmArgs, stream: cuda.CUstream):
        """The map made here only gives the kernel its parameters: the launcher passes real ones."""
        fake = create_tensor_map_tiled(Int64(16), BFloat16, [64, 64], [72], [64, 64])
        self.kernel(fake, fake, args).launch(
            grid=(1, 1, 1),
            block=(self.threads, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
            hint_smem_base_uniform=False,  # else every wgmma descriptor goes through R2UR
        )

    def make_mma(self):
        """64 rows times as many weight rows as one instruction takes: all, or with FP8 those of one scale."""
        return hh.make_trivial_tiled_mma(
            self.dtype, self.dtype, OperandMajorMode.K, OperandMajorMode.K, Float32,
            atom_layout_mnk=(1, 1, 1), tiler_mn=(UNIT, self.config.mma_n),
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------- device

    @cute.kernel
    def kernel(
        self,
        a_map: GridConstant[TensorMap],  # K, rows of a block, blocks
        b_map: GridConstant[TensorMap],  # K, weight rows of an expert, experts
        args: GemmArgs,
    ):
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        math_wgs, stages = self.config.math_wgs, self.config.stages
        sm = SmemAllocator().allocate(self.Smem)
        if tid == 0:
            for i in cutlass.range_constexpr(stages):
                cute.arch.mbarrier_init(sm.full.data_ptr() + i, 1)
                cute.arch.mbarrier_init(sm.empty.data_ptr() + i, 4 * math_wgs)
            for i in cutlass.range_constexpr(ORDERS):
                cute.arch.mbarrier_init(sm.ordered.data_ptr() + i, 1)
        cute.arch.mbarrier_init_fence()
        kind = hh.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, self.dtype, self.block_k)
        atom = warpgroup.make_smem_layout_atom(kind, self.dtype)
        a_stages = cute.tile_to_shape(atom, (self.config.tile_m, self.block_k, stages), order=(0, 1, 2))
        b_stages = cute.tile_to_shape(atom, (self.config.tile_n, self.block_k, stages), order=(0, 1, 2))
        table = cute.make_layout(MAX_EXPERTS)
        shared = Shared(
            a=sm.a.data_ptr(),
            b=sm.b.data_ptr(),
            sA=sm.a.get_tensor(a_stages.outer, swizzle=a_stages.inner),
            sB=sm.b.get_tensor(b_stages.outer, swizzle=b_stages.inner),
            tables=Tables(sm.first.get_tensor(table), sm.stop.get_tensor(table), sm.tiles.get_tensor(table)),
            full=sm.full.data_ptr(),
            order=sm.order.get_tensor(cute.make_layout(ORDERS)),
            ordered=sm.ordered.data_ptr(),
            empty=sm.empty.data_ptr(),
        )
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        lane = tid % 32
        if warp_id == 0:
            fill_tables(args, shared.tables, self.config.tile_m, lane)
        cute.arch.sync_threads()

        wg = warp_id // 4  # the last one is the loader's
        math_registers, loader_registers = REGISTERS[math_wgs]
        place = Place(cta, ctas, lane, wg, wg * self.config.wg_rows + (warp_id % 4) * 16 + lane // 4)
        if wg == math_wgs:
            cute.arch.setmaxregister_decrease(loader_registers)
            if warp_id == 4 * math_wgs:
                self.load(a_map, b_map, args, shared, place)
        else:
            cute.arch.setmaxregister_increase(math_registers)
            if cta < num_tiles(args, shared.tables):
                self.math(args, self.make_mma(), shared, place)

    @cute.jit
    def load(self, a_map, b_map, a: GemmArgs, s: Shared, c: Place):
        """All K blocks of all tiles, as soon as the math frees their place. A CTA asks for a tile when it is about done
        with the one before, so that those under way at a time follow each other: they share what they load in L2."""
        tile_m, tile_n, box_n, stages = self.config.tile_m, self.config.tile_n, self.config.box_n, self.config.stages
        stage, phase, index, number = Int32(0), Int32(1), c.cta, Int32(0)
        total = num_tiles(a, s.tables)
        ask = a.k_blocks - stages if a.k_blocks > stages else Int32(0)
        while index < total:
            tile = get_tile(a, s.tables, self.config.raster_tiles, index, c.lane)
            taken = Int32(0)
            stage_bytes = ((tile.live + (UNIT - 1)) // UNIT * UNIT + tile_n) * BLOCK_BYTES
            for block in cutlass.range(a.k_blocks, unroll=1):
                if (block == ask) & (c.lane == 0):
                    taken = cute.arch.atomic_add(a.taken, Int32(1), sem="relaxed", scope="gpu")
                k = block * self.block_k
                full = s.full + stage
                cute.arch.mbarrier_wait(s.empty + stage, phase)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(full, stage_bytes)
                    for i in cutlass.range_constexpr(tile_m // UNIT):
                        if i * UNIT < tile.live:
                            to = s.a + (stage * tile_m + i * UNIT) * self.block_k
                            copy_box(to, a_map, [k, tile.row + i * UNIT, tile.block], full)
                    for i in cutlass.range_constexpr(tile_n // box_n):
                        to = s.b + (stage * tile_n + i * box_n) * self.block_k
                        row = tile.column * box_n + i * a.columns  # with two boxes: gate, and up `columns` further
                        copy_box(to, b_map, [k, row, tile.expert], full)
                stage, phase = next_stage(self.config.stages, stage, phase)
            index = c.ctas + cute.arch.shuffle_sync(taken, 0)
            if c.lane == 0:
                put_order(s, number, index)
                if taken == total - 1:  # every CTA asks once in vain: nobody will any more
                    store_i32(a.taken, 0, Int32(0))
            number += 1


def copy_box(to, tensor_map, coordinates, full):
    prims.cp_async_bulk_tensor_shared_cta_global(
        to, tensor_map.get_ptr(), coordinates, full, l2_cache_hint=Int64(EVICT_NORMAL)
    )


def program(config: GemmConfig) -> Program:
    """The host function and the fake arguments that compile one variant."""
    kernel = GroupedGemm(config)
    name = f"cutehop_gemm_{config.dtype}_{config.epilogue}_{config.tile_m}x{config.tile_n}"
    kernel.kernel.set_name_prefix(name, remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(GemmArgs), cuda.CUstream(0)),
        threads=kernel.threads,
        smem_bytes=kernel.Smem.size_in_bytes(),
        params=("map", "map", *param_kinds(GemmArgs)),
        pdl=True,
    )
