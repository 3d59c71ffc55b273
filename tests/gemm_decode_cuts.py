"""Runs the device functions that cut the work of cute_kernels/gemm_decode, on the CPU."""

from __future__ import annotations

from cutehop.cute_kernels.jit.compiler import import_cutlass

import_cutlass()

import cutlass.cute as cute  # noqa: E402
import torch  # noqa: E402
from cutlass import Int32  # noqa: E402
from cutlass.cute.runtime import from_dlpack  # noqa: E402

from cutehop.cute_kernels.gemm_decode.work import cta_of, cut  # noqa: E402


@cute.jit
def _fill(spans: cute.Tensor, owners: cute.Tensor, units: Int32, ctas: Int32):
    for cta in range(ctas):
        begin, stop, share, extra = cut(units, cta, ctas)
        spans[cta, 0], spans[cta, 1] = begin, stop
        for unit in range(begin, stop):
            owners[unit] = cta_of(share, extra, unit)


def spans_and_owners(units: int, ctas: int) -> tuple[list[list[int]], list[int]]:
    """[begin, stop] of every CTA, and the CTA that cta_of names for every unit."""
    spans, owners = torch.zeros(ctas, 2, dtype=torch.int32), torch.full((max(units, 1),), -1, dtype=torch.int32)
    _fill(from_dlpack(spans), from_dlpack(owners), Int32(units), Int32(ctas))
    return spans.tolist(), owners[:units].tolist()
