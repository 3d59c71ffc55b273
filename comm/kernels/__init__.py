"""EP kernels for sm_90a: layout, send, receive. Importing this needs neither the DSL nor a GPU.

Every size is a run-time parameter, so one build of each kernel serves every shape and every number of ranks.
"""

from ...cute_kernels.jit import Program, compiled
from . import nvshmem_library
from .config import PARTS, OneVariant, Parts, RemoteParts


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


def remote_parts() -> tuple[RemoteParts, ...]:
    """Configs of the low-latency kernels that reach peers through NVSHMEM. RuntimeError if it is not installed."""
    which = nvshmem_library.version()
    return tuple(RemoteParts(parts.sends, parts.receives, which) for parts in PARTS)


def make_remote() -> None:
    """Find these kernels or compile them, which needs neither a GPU nor an NVSHMEM world, and takes half a minute."""
    for parts in remote_parts():
        ll_dispatch_kernel.bundle(parts)
        ll_combine_kernel.bundle(parts)


def variants():
    """Every kernel of this family that can be compiled here, as (compiled function, config)."""
    yield layout_kernel, OneVariant()
    yield send_kernel, OneVariant()
    yield receive_kernel, OneVariant()
    yield combine_send_kernel, OneVariant()
    yield combine_receive_kernel, OneVariant()
    yield wait_kernel, OneVariant()
    for parts in PARTS:
        yield ll_dispatch_kernel, parts
        yield ll_combine_kernel, parts
    for parts in remote_parts() if nvshmem_library.can_compile() else ():
        yield ll_dispatch_kernel, parts
        yield ll_combine_kernel, parts
