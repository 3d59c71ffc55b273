"""MoE kernels for sm_90a: routing, permutation, FP8 cast. Importing this needs neither the DSL nor a GPU."""

from ..jit import Program, compiled
from .config import ROUTE_VALUES, SCORINGS, OneVariant, RouteConfig


@compiled
def route_kernel(config: RouteConfig) -> Program:
    from .route import program

    return program(config)


@compiled
def count_kernel(config: OneVariant) -> Program:
    from .count import program

    return program(config)


@compiled
def sort_kernel(config: OneVariant) -> Program:
    from .sort import program

    return program(config)


@compiled
def permute_kernel(config: OneVariant) -> Program:
    from .permute import program

    return program(config)


@compiled
def unpermute_kernel(config: OneVariant) -> Program:
    from .unpermute import program

    return program(config)


@compiled
def unpermute_backward_kernel(config: OneVariant) -> Program:
    from .unpermute_backward import program

    return program(config)


@compiled
def quant_kernel(config: OneVariant) -> Program:
    from .quant import program

    return program(config)


def variants():
    """Every kernel of this family, as (compiled function, config)."""
    yield from ((route_kernel, RouteConfig(values, scoring)) for scoring in SCORINGS for values in ROUTE_VALUES)
    for kernel in (
        count_kernel,
        sort_kernel,
        permute_kernel,
        unpermute_kernel,
        unpermute_backward_kernel,
        quant_kernel,
    ):
        yield kernel, OneVariant()
