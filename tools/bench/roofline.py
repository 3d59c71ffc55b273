"""The machine's ceilings, measured in the same run as what is compared with them, and the roofline they make."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tools.bench.rows import Row
from tools.bench.timing import make_lane


@dataclass(frozen=True)
class Sizes:
    """What the ceilings are measured with: the streamed buffer, the square matrices, the number of repeats."""

    stream_bytes: int
    matmul_edge: int
    repeats: int


GPU_SIZES = Sizes(stream_bytes=2_000_000_000, matmul_edge=8192, repeats=15)
CPU_SIZES = Sizes(stream_bytes=32_000_000, matmul_edge=256, repeats=3)


@dataclass(frozen=True)
class Ceilings:
    """copy_gbs counts bytes read and written, read_gbs bytes read, both in 10^9 per second; matmul_tflops is bf16."""

    copy_gbs: float
    read_gbs: float
    matmul_tflops: float

    @property
    def stream_gbs(self) -> float:
        """The better of copying and reading: the memory ceiling."""
        return max(self.copy_gbs, self.read_gbs)

    def attainable_us(self, row: Row) -> float:
        """The least time the row's FLOPs and bytes leave on this machine."""
        return max(row.flops / (self.matmul_tflops * 1e6), row.bytes / (self.stream_gbs * 1e3))


def measure_ceilings(device: torch.device, sizes: Sizes | None = None) -> Ceilings:
    """Device copy and read-only sum of one buffer, and a square bf16 matrix product, on random data."""
    sizes = sizes or (GPU_SIZES if device.type == "cuda" else CPU_SIZES)
    source = torch.randn(sizes.stream_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy_us = _median_us(lambda: target.copy_(source), device, sizes.repeats)
    read_us = _median_us(source.sum, device, sizes.repeats)
    edge = sizes.matmul_edge
    a, b = (torch.randn(edge, edge, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul_us = _median_us(lambda: a @ b, device, sizes.repeats)
    return Ceilings(
        copy_gbs=2 * sizes.stream_bytes / copy_us / 1e3,
        read_gbs=sizes.stream_bytes / read_us / 1e3,
        matmul_tflops=2 * edge**3 / matmul_us / 1e6,
    )


def _median_us(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    lane = make_lane(call, device)
    lane.run(2)
    return statistics.median(lane.run(2) for _ in range(repeats))
