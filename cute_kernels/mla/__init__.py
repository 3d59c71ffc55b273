"""MLA decode for sm_90a: planner, split-KV decode, merge. Importing this needs neither the DSL nor a GPU."""

from itertools import product

from ..jit import Program, compiled
from .config import COMBINE_SHAPES, PAGE_SIZES, CombineConfig, DecodeConfig, PlanConfig


@compiled
def plan_kernel(config: PlanConfig) -> Program:
    from .plan import program

    return program(config)


@compiled
def decode_kernel(config: DecodeConfig) -> Program:
    from .decode import MlaDecode, program
    from .few_rows import FewRowsDecode

    return program(FewRowsDecode(config) if config.few_rows else MlaDecode(config))


@compiled
def combine_kernel(config: CombineConfig) -> Program:
    from .combine import program

    return program(config)


def variants():
    """Every kernel of this family, as (compiled function, config)."""
    dtypes = ("bf16", "f16")
    yield plan_kernel, PlanConfig()
    for dtype, page, spread, few in product(dtypes, PAGE_SIZES, (False, True), (False, True)):
        yield decode_kernel, DecodeConfig(dtype, page, spread, few)
    for dtype, shape in product(dtypes, COMBINE_SHAPES):
        yield combine_kernel, CombineConfig(dtype, *shape)
