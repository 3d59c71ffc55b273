"""`python -m tools.bench.host_launch`: host time of one Kernel.launch, in us, on an idle GPU.

The probe kernel with 20 ints has 24 parameters, one of them a tensor map: the size of a decode kernel's list.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from cutehop.cute_kernels.jit import tensor_map
from cutehop.cute_kernels.jit.probe import WIDTH, ProbeConfig, probe_kernel


def host_us(call: Callable[[], object], calls: int = 400, repeats: int = 9) -> float:
    """Median over `repeats` of the mean time of one call; `calls` stays below the depth of a stream's queue."""
    samples = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(samples)


def main() -> None:
    tile = torch.ones(8, WIDTH, device="cuda")
    out = torch.empty_like(tile)
    stream = torch.cuda.current_stream().cuda_stream
    config = ProbeConfig(ints=20)
    start = time.perf_counter()
    kernel = probe_kernel(config, stream)
    print(f"{'compile or read, and load':34} {(time.perf_counter() - start) * 1e3:8.2f} ms")

    def describe() -> object:
        return tensor_map(tile.data_ptr(), "f32", (WIDTH, 8), (WIDTH * 4,), (WIDTH, 1), swizzle=0)

    tile_map = describe()
    values = (tile_map, out.data_ptr(), 0, 1.0, *range(20))
    rows = {
        "Kernel.launch, 24 parameters": lambda: kernel.launch((8, 1, 1), stream, *values),
        "Compiled.__call__, loaded": lambda: probe_kernel(config, stream),
        "tensor_map, remembered": describe,
        "torch empty kernel (zero_)": out.zero_,
    }
    for name, call in rows.items():
        print(f"{name:34} {host_us(call):8.2f} us")


if __name__ == "__main__":
    main()
