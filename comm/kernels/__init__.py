"""EP kernels for sm_90a: layout, send, receive. Importing this needs neither the DSL nor a GPU.

Every size is a run-time parameter, so one build of each kernel serves every shape and every number of ranks.
"""

from ...cute_kernels.jit import Program, compiled
from .config import (
    PARTS,
    CombineReceiveConfig,
    CombineSendConfig,
    LayoutConfig,
    LlCombineConfig,
    LlDispatchConfig,
    ReceiveConfig,
    SendConfig,
    WaitConfig,
)


@compiled
def layout_kernel(config: LayoutConfig) -> Program:
    from .layout import program

    return program(config)


@compiled
def send_kernel(config: SendConfig) -> Program:
    from .send import program

    return program(config)


@compiled
def receive_kernel(config: ReceiveConfig) -> Program:
    from .receive import program

    return program(config)


@compiled
def combine_send_kernel(config: CombineSendConfig) -> Program:
    from .combine_send import program

    return program(config)


@compiled
def combine_receive_kernel(config: CombineReceiveConfig) -> Program:
    from .combine_receive import program

    return program(config)


@compiled
def wait_kernel(config: WaitConfig) -> Program:
    from .wait import program

    return program(config)


@compiled
def ll_dispatch_kernel(config: LlDispatchConfig) -> Program:
    from .ll_dispatch import program

    return program(config)


@compiled
def ll_combine_kernel(config: LlCombineConfig) -> Program:
    from .ll_combine import program

    return program(config)


def variants():
    """Every kernel of this family, as (compiled function, config)."""
    yield layout_kernel, LayoutConfig()
    yield send_kernel, SendConfig()
    yield receive_kernel, ReceiveConfig()
    yield combine_send_kernel, CombineSendConfig()
    yield combine_receive_kernel, CombineReceiveConfig()
    yield wait_kernel, WaitConfig()
    for parts in PARTS:
        yield ll_dispatch_kernel, LlDispatchConfig(*parts)
        yield ll_combine_kernel, LlCombineConfig(*parts)
