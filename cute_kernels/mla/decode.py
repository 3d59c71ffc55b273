"""Dense MLA decode, split over the keys (sm_90a).

    S = scale * Q K^T        (64 rows x 64 keys a block, rows = packed (token, head) of one kv head)
    O = softmax(S) V         V = first 512 columns of K

Grid (row tiles, kv heads, partitions), one CTA per SM, persistent over the pieces the planner gave its partition.

Roles (384 threads)
    warps 0-3   WG0   scores of even blocks, output columns 0-255     232 registers
    warps 4-7   WG1   scores of odd blocks, output columns 256-511    232 registers
    warp  8     K loader (TMA), runs ahead of the math across pieces   40 registers
    warp  9     Q loader (TMA), as soon as the piece before is done with Q; warps 10, 11 fill up the warpgroup

A full 64x512 fp32 output takes half the register file, so one CTA holds one output tile, cut in columns, and the two
warpgroups alternate on the softmax instead of on output tiles. One pair of blocks, the newest key block first:

    WG0  max S0; m, a0  | P0 -> smem              | O_L += P0 V0_L | O_L *= a1; O_L += P1 V1_L | S0' = Q K0'
    WG1  max S1         | O_R *= a0; m, a1; P1 -> smem | O_R += P0 V0_R | O_R *= a1; O_R += P1 V1_R | S1' = Q K1'

Going from the newest block down puts the causal mask and the unused tail rows into the first blocks, before the loop.

Pipelines (mbarriers; L = columns 0-255, R = 256-575)
    k_full[18]   slabs of K0 and K1: bytes of the boxes, so that Q K^T starts with the first 8 KiB
    k_empty[4]   K0L K0R K1L K1R: one arrive of the warpgroup that multiplies that half of V
    q_full   bytes of the slabs               q_empty  one arrive of each warpgroup
Named barriers (256 threads; one warpgroup arrives, the other waits)
    MAX0 a0 and m ready | P0 in smem | P1 in smem, a1 and m ready, V0_R issued | SYNC both wait

Shared memory (bytes): Q 73728, K 2 x 73728, P0 8192, row statistics 1280, plan words 44, mbarriers 192. P1
overlays the RoPE slab of Q, which both warpgroups keep in registers.

Up to 16 rows few_rows.py has other math; the rest is as here.

Bounds: 2176 tensor cycles and 2304 shared-memory cycles per block and CTA; 73,728 B of DRAM per block.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hh
from cutlass import BFloat16, Float16, Float32, GridConstant, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.experimental.cuda.tensor_map import TensorMap, create_tensor_map_tiled
from cutlass.memory import SmemAllocator

from ..jit import Program
from ..sm90.args import fake_args, param_kinds
from .config import BLOCK, HEAD_DIM, NUM_SLABS, TILE_M, DecodeConfig
from .cta import WG, Place, Shared
from .loaders import Loaders
from .math import Math, Mmas
from .work import DecodeArgs, plan_belongs

THREADS = 3 * WG


class MlaDecode(Loaders, Math):
    q_rows = TILE_M

    def __init__(self, config: DecodeConfig):
        self.config = config
        self.dtype = BFloat16 if config.dtype == "bf16" else Float16
        self.page = config.page_size
        self.box_rows = config.box_rows
        self.boxes = BLOCK // self.box_rows
        self.spread = config.spread
        self.Smem = self.smem_struct()

    def smem_struct(self):
        @cute.struct
        class Smem:
            q_full: cute.struct.MemRange[Int64, 1]
            q_empty: cute.struct.MemRange[Int64, 1]
            k_full: cute.struct.MemRange[Int64, 2 * NUM_SLABS]
            k_empty: cute.struct.MemRange[Int64, 4]
            row_max: cute.struct.MemRange[Float32, TILE_M]
            scale0: cute.struct.MemRange[Float32, TILE_M]
            scale1: cute.struct.MemRange[Float32, TILE_M]
            row_sum: cute.struct.MemRange[Float32, 2 * TILE_M]
            ticket: cute.struct.MemRange[Int32, 1]
            cuts: cute.struct.MemRange[Int32, 3]
            addresses: cute.struct.MemRange[Int64, 2]
            work: cute.struct.MemRange[Int32, 3]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, TILE_M * HEAD_DIM], 1024]
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, 2 * BLOCK * HEAD_DIM], 1024]
            p0: cute.struct.Align[cute.struct.MemRange[self.dtype, TILE_M * BLOCK], 1024]

        return Smem

    # ------------------------------------------------------------------------------------------------ host

    @cute.jit
    def __call__(self, args: DecodeArgs, stream: cuda.CUstream):
        """The map made here only gives the kernel its parameters: the launcher passes real ones (ops/_mla_cuda.py)."""
        fake = create_tensor_map_tiled(Int64(16), self.dtype, [64, 64], [72], [64, 64])
        self.kernel(fake, fake, args).launch(
            grid=(1, 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
            hint_smem_base_uniform=False,  # else every wgmma descriptor goes through R2UR: 100 instructions a block
        )

    def make_mmas(self):
        def mma(b_major, n, a_source):
            return hh.make_trivial_tiled_mma(
                self.dtype, self.dtype, OperandMajorMode.K, b_major, Float32,
                atom_layout_mnk=(1, 1, 1), tiler_mn=(TILE_M, n), a_source=a_source,
            )  # fmt: skip

        smem, rmem = warpgroup.OperandSource.SMEM, warpgroup.OperandSource.RMEM
        K, MN = OperandMajorMode.K, OperandMajorMode.MN
        return Mmas(mma(K, BLOCK, smem), mma(K, BLOCK, rmem), mma(MN, 256, rmem), mma(MN, 256, smem))

    # ---------------------------------------------------------------------------------------------- device

    def views_of(self, sm):
        atom = self.swizzle_atom()
        slab = cute.tile_to_shape(atom, (64, 64), order=(0, 1))
        q_slabs = cute.tile_to_shape(atom, (64, 64, NUM_SLABS), order=(0, 1, 2))
        k_slabs = cute.tile_to_shape(atom, (64, 64, 2 * NUM_SLABS), order=(0, 1, 2))
        return Shared(
            q=sm.q.data_ptr(),
            k=sm.k.data_ptr(),
            sQ=sm.q.get_tensor(q_slabs.outer, swizzle=q_slabs.inner),
            sK=sm.k.get_tensor(k_slabs.outer, swizzle=k_slabs.inner),
            sP0=sm.p0.get_tensor(slab.outer, swizzle=slab.inner),
            row_max=sm.row_max.get_tensor(cute.make_layout(TILE_M)),
            scale0=sm.scale0.get_tensor(cute.make_layout(TILE_M)),
            scale1=sm.scale1.get_tensor(cute.make_layout(TILE_M)),
            row_sum=sm.row_sum.get_tensor(cute.make_layout(2 * TILE_M)),
            ticket=sm.ticket.get_tensor(cute.make_layout(1)),
            cuts=sm.cuts.get_tensor(cute.make_layout(3)),
            addresses=sm.addresses.get_tensor(cute.make_layout(2)),
            q_full=sm.q_full.data_ptr(),
            q_empty=sm.q_empty.data_ptr(),
            k_full=sm.k_full.data_ptr(),
            k_empty=sm.k_empty.data_ptr(),
        )

    def row_of(self, t):
        """A math thread's first row; its second is 8 further."""
        return (t // 32) * 16 + (t % 32) // 4

    @cute.jit
    def spread_work(self, work: cute.Tensor):
        """Row tile, kv head and partition of this CTA, by one thread.

        The hardware gives CTAs that follow each other to the two SMs of a pair, which share a path to memory. Where
        there is little work only the first partitions have any, so those go to every other CTA.
        """
        x, y, z = cute.arch.block_idx()
        tiles, kv_heads, partitions = cute.arch.grid_dim()
        index = x + tiles * (y + kv_heads * z)
        turn = index // 2 + (index % 2) * ((tiles * kv_heads * partitions + 1) // 2)
        work[0] = turn % tiles
        work[1] = turn // tiles % kv_heads
        work[2] = turn // (tiles * kv_heads)

    @cute.kernel
    def kernel(
        self,
        q_map: GridConstant[TensorMap],  # columns of a slab, heads, tokens, slabs, batch
        k_map: GridConstant[TensorMap],  # columns, rows of a page, kv heads, pages
        args: DecodeArgs,
    ):
        tid, _, _ = cute.arch.thread_idx()
        warp_id = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        sm = SmemAllocator().allocate(self.Smem)
        work = sm.work.get_tensor(cute.make_layout(3)) if const_expr(self.spread) else cute.arch.block_idx()
        if tid == 0:
            cute.arch.mbarrier_init(sm.q_full.data_ptr(), 1)
            cute.arch.mbarrier_init(sm.q_empty.data_ptr(), 2)
            for i in cutlass.range_constexpr(2 * NUM_SLABS):
                cute.arch.mbarrier_init(sm.k_full.data_ptr() + i, 1)
            for i in cutlass.range_constexpr(4):
                cute.arch.mbarrier_init(sm.k_empty.data_ptr() + i, 1)
            if const_expr(self.spread):
                self.spread_work(work)
        cute.arch.mbarrier_init_fence()
        shared = self.views_of(sm)
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()

        wg = warp_id // 4  # 2 is the loaders
        t = tid % WG
        _, _, partitions = cute.arch.grid_dim()
        belongs = plan_belongs(args.plan, partitions, args.batch, args.split_blocks)
        place = Place(work, belongs, wg, t, self.row_of(t))
        if wg == 2:
            cute.arch.setmaxregister_decrease(40)
            if warp_id == 8:
                self.load_k(k_map, args, shared, place, tid % 32)
            if warp_id == 9:
                self.load_q(q_map, args, shared, place)
        else:
            cute.arch.setmaxregister_increase(232)
            self.math(args, self.make_mmas(), shared, place)


def program(kernel: MlaDecode) -> Program:
    """The host function and the fake arguments that compile one variant."""
    config = kernel.config
    name = (
        f"cutehop_mla_decode_{config.dtype}_page{config.page_size}{'_spread' * config.spread}{'_few' * config.few_rows}"
    )
    kernel.kernel.set_name_prefix(name, remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(DecodeArgs), cuda.CUstream(0)),
        threads=THREADS,
        smem_bytes=kernel.Smem.size_in_bytes(),
        params=("map", "map", *param_kinds(DecodeArgs)),
        pdl=True,
    )
