"""Grouped GEMM for few rows of few experts, sm_90a. Importing this needs neither the DSL nor a GPU."""

from ..jit import Program, compiled
from .config import DTYPES, EPILOGUES, TILES_N, GemmDecodeConfig


@compiled
def gemm_decode_kernel(config: GemmDecodeConfig) -> Program:
    from .kernel import program

    return program(config)


def variants():
    """Every kernel of this family, as (compiled function, config)."""
    yield from (
        (gemm_decode_kernel, GemmDecodeConfig(dtype, epilogue, tile_n))
        for dtype in DTYPES
        for epilogue in EPILOGUES
        for tile_n in TILES_N
    )
