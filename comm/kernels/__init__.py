"""EP kernels for sm_90a: layout, send, receive. Importing this needs neither the DSL nor a GPU.

Every size is a run-time parameter, so one build of each kernel serves every shape and every number of ranks.
"""

from ...cute_kernels.jit import Program, compiled
from .config import PARTS, OneVariant, Parts


@compiled
def layout_kernel(config: OneVariant) -> Program:
    from .layout import program

    return program(config)


@compiled
def send_kernel(config: OneVariant) -> Program:
    from .send import program

    return program(config)


@compiled
def receive_kernel(config: OneVariant) -> Program:
    from .receive import program

    return program(config)


@compiled
def combine_send_kernel(config: OneVariant) -> Program:
    from .combine_send import program

    return program(config)


@compiled
def combine_receive_kernel(config: OneVariant) -> Program:
    from .combine_receive import program

    return program(config)


@compiled
def wait_kernel(config: OneVariant) -> Program:
    from .wait import program

    return program(config)


@compiled
def ll_dispatch_kernel(config: Parts) -> Program:
    from .ll_dispatch import program

    return program(config)


@compiled
def ll_combine_kernel(config: Parts) -> Program:
    from .ll_combine import program

    return program(config)


def variants():
    """Every kernel of this family, as (compiled function, config)."""
    yield layout_kernel, OneVariant()
    yield send_kernel, OneVariant()
    yield receive_kernel, OneVariant()
    yield combine_send_kernel, OneVariant()
    yield combine_receive_kernel, OneVariant()
    yield wait_kernel, OneVariant()
    for parts in PARTS:
        yield ll_dispatch_kernel, parts
        yield ll_combine_kernel, parts
