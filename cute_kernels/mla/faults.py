"""What the decode kernel does with a plan that is not of its call: it says so in host memory and writes NaN."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from ..sm90 import ptx
from ..sm90.gmem import load_i32, store_f32
from .config import FAULT_PLAN, HEAD_DIM_V, TILE_M
from .cta import WG, Place
from .work import DecodeArgs

NAN_PAIR = 0x7FFF7FFF  # two NaN of 16 bits, bf16 or fp16


def report_fault(report, fault, req, mine):
    """If there is a fault and it is this thread's to report: the host looks at the word before its next launch.

    Of several faults one is kept.
    """
    ptx.st_sys_if(report, fault + 8 * req, Int32((fault != 0) & mine))


class Faults:
    """Part of decode.MlaDecode."""

    @cute.jit
    def refuse(self, a: DecodeArgs, c: Place):
        """NaN into every row of this tile of the sequences that are this CTA's by their number: no record is right."""
        _, _, partitions = cute.arch.grid_dim()
        thread = c.wg * WG + c.t
        report_fault(a.report.toint(), Int32(FAULT_PLAN), Int32(0), thread == 0)
        for req in cutlass.range(c.part, a.batch, partitions, unroll=1):
            token0, s_q = req * a.s_q, a.s_q
            if a.ragged != 0:
                token0 = load_i32(a.cu_seqlens_q, req)
                s_q = load_i32(a.cu_seqlens_q, req + 1) - token0
            rows = s_q * a.heads_per_kv - c.tile * TILE_M
            rows = rows if rows < TILE_M else Int32(TILE_M)
            nan, lane = Int32(NAN_PAIR), thread % 64  # 64 threads fill one row with 16 bytes each
            for row in cutlass.range(thread // 64, rows, 4, unroll=1):
                packed = c.tile * TILE_M + row
                token, head = packed // a.heads_per_kv, c.kv_head * a.heads_per_kv + packed % a.heads_per_kv
                out_row = a.out.toint() + (Int64(token0 + token) * a.h_q + head) * (HEAD_DIM_V * 2)
                ptx.st_global(out_row + lane * 16, nan, nan, nan, nan)
                if lane == 0:
                    store_f32(a.lse, lse_index(a, req, token0, token, head), Float32.nan)


@cute.jit
def lse_index(a, req: Int32, token0: Int32, token: Int32, head: Int32):
    """Element of lse that belongs to a token of a sequence."""
    index = (Int64(req) * a.h_q + head) * a.s_q + token
    if a.ragged != 0:
        index = Int64(head) * a.total_q + token0 + token
    return index
