"""Cast bfloat16 to e4m3 with a scale per 128 columns. cutehop.ref.ep.quantize_fp8 is the rule.

    amax = max(1e-4, max |x|)        scale = amax / 448        q = e4m3(x * (448 / amax))
    powers of two: scale = 2 ** ceil(log2(amax / 448)), q = e4m3(x / scale)

Grid (vectors / 1024, 1, 1), 256 threads: x is one run of 16-byte vectors, 16 of them in a group. A thread takes four,
256 apart, whose loads are in flight together; 16 lanes share a group. No shared memory. Bound by memory.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from ..jit import Program
from ..sm90 import ptx
from ..sm90.address import ld_vector_if, st_f32, unpack_bf16
from ..sm90.args import fake_args, param_kinds
from .config import FP8_GROUP, QUANT_THREADS, QUANT_VECTORS

FP8_MAX, FP8_MIN_AMAX = 448.0, 1e-4
LANES = FP8_GROUP // 8  # of a group


@dataclass(frozen=True)
class QuantArgs:
    """Kernel parameters in launch order."""

    x: Int64  # bf16 (vectors, 8)
    vectors: Int64  # a multiple of 16
    round_scale: Int32
    q: Int64  # out, e4m3 (vectors, 8)
    scales: Int64  # out, f32 (vectors / 16,)


class Quant:
    @cute.jit
    def __call__(self, args: QuantArgs, stream: cuda.CUstream):
        self.kernel(args).launch(
            grid=(1, 1, 1), block=(QUANT_THREADS, 1, 1), stream=stream, min_blocks_per_mp=4, preferred_smem_carveout=0
        )

    @cute.kernel
    def kernel(self, a: QuantArgs):
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        first = Int64(cta) * (QUANT_THREADS * QUANT_VECTORS) + tid
        loaded = []
        for u in cutlass.range_constexpr(QUANT_VECTORS):
            at = first + u * QUANT_THREADS
            loaded.append(ld_vector_if(a.x + at * 16, Int32(at < a.vectors)))
        for u in cutlass.range_constexpr(QUANT_VECTORS):
            self.cast(a, first + u * QUANT_THREADS, unpack_bf16(loaded[u]))

    @cute.jit
    def cast(self, a: QuantArgs, at: Int64, values):
        """One vector; 16 lanes come here with those of a group, or with none."""
        amax = Float32(FP8_MIN_AMAX)
        for i in cutlass.range_constexpr(8):
            amax = cute.arch.fmax(amax, ptx.abs_f32(values[i]))
        for i in cutlass.range_constexpr(4):
            amax = cute.arch.fmax(amax, cute.arch.shuffle_sync_bfly(amax, offset=1 << i))
        scale, inverse = ptx.div_rn(amax, Float32(FP8_MAX)), ptx.div_rn(Float32(FP8_MAX), amax)
        if a.round_scale != 0:
            bits = scale.bitcast(Int32)
            exponent = (bits >> 23) & 255
            if bits & 0x7FFFFF != 0:
                exponent += 1
            scale, inverse = (exponent << 23).bitcast(Float32), ((254 - exponent) << 23).bitcast(Float32)
        low = ptx.cvt_e4m3x4(*(values[i] * inverse for i in range(4)))
        high = ptx.cvt_e4m3x4(*(values[i] * inverse for i in range(4, 8)))
        if at < a.vectors:
            ptx.st_global(a.q + at * 8, low, high)
            if at % LANES == 0:
                st_f32(a.scales + at // LANES * 4, scale)


def program(config) -> Program:
    """The host function and the fake arguments that compile it."""
    kernel = Quant()
    kernel.kernel.set_name_prefix("cutehop_moe_quant", remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(QuantArgs), cuda.CUstream(0)),
        threads=QUANT_THREADS,
        smem_bytes=0,
        params=param_kinds(QuantArgs),
    )
