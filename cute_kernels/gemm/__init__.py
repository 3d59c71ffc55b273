"""Grouped GEMM for many rows per expert, sm_90a. Importing this needs neither the DSL nor a GPU."""

from ..jit import Program, compiled
from .config import EPILOGUES, TILES, GemmConfig


@compiled
def gemm_kernel(config: GemmConfig) -> Program:
    from .gemm import program

    return program(config)


def variants():
    """Every kernel of this family, as (compiled function, config)."""
    for dtype, tiles in TILES.items():
        for tile in tiles:
            configs = [GemmConfig(dtype, epilogue, *tile) for epilogue in EPILOGUES]
            yield from ((gemm_kernel, config) for config in configs if config.possible)
