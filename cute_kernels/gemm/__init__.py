"""Grouped GEMM for many rows per expert, sm_90a. Importing this needs neither the DSL nor a GPU."""

from ..jit import Program, compiled
from .config import DTYPES, EPILOGUES, GemmConfig


@compiled
def gemm_kernel(config: GemmConfig) -> Program:
    from .gemm import program

    return program(config)


def variants():
    """Every kernel of this family, as (compiled function, config)."""
    yield from ((gemm_kernel, GemmConfig(dtype, epilogue)) for dtype in DTYPES for epilogue in EPILOGUES)
