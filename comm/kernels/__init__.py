"""EP kernels for sm_90a: layout, send, receive. Importing this needs neither the DSL nor a GPU.

Every size is a run-time parameter, so one build of each kernel serves every shape and every number of ranks.
"""

from collections.abc import Iterator

from ...cute_kernels.jit import Compiled, Program, compiled
from . import nvshmem_library
from .config import BOTH, MASK, PARTS, OneVariant, Parts, RemoteParts


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


@compiled
def ll_combine_whole_kernel(config: Parts) -> Program:
    from .ll_combine_whole import program

    return program(config)


@compiled
def ll_mask_kernel(config: Parts) -> Program:
    from .ll_mask import program

    return program(config)


def ll_variants(
    elastic: bool = False, remote: bool = False, adds_up: bool = False
) -> Iterator[tuple[Compiled[Parts], Parts, Parts]]:
    """The low-latency kernels of a buffer: compiled function, config, and what it does, one of config.PARTS or MASK.

    remote: they reach peers through NVSHMEM. RuntimeError if it is not installed. adds_up: combine in one launch, of
    rows as they are, asks for sums.
    """
    which = nvshmem_library.version() if remote else ""
    families = ((ll_dispatch_kernel, False), (ll_combine_kernel, False), (ll_combine_kernel, True))
    wanted = [(function, parts, coded) for function, coded in families for parts in PARTS]
    if adds_up:
        wanted[wanted.index((ll_combine_kernel, BOTH, False))] = (ll_combine_whole_kernel, BOTH, False)
    if elastic:
        wanted.append((ll_mask_kernel, MASK, False))
    for function, parts, coded in wanted:
        made = (parts.sends, parts.receives, elastic, coded)
        yield function, RemoteParts(*made, which) if remote else Parts(*made), parts


def make_remote(elastic: bool = False) -> None:
    """Find these kernels or compile them, which takes most of a minute, but neither a GPU nor an NVSHMEM world."""
    for function, config, _ in ll_variants(elastic, remote=True):
        function.bundle(config)


def variants():
    """Every kernel of this family that can be compiled here, as (compiled function, config)."""
    yield layout_kernel, OneVariant()
    yield send_kernel, OneVariant()
    yield receive_kernel, OneVariant()
    yield combine_send_kernel, OneVariant()
    yield combine_receive_kernel, OneVariant()
    yield wait_kernel, OneVariant()
    yield ll_combine_whole_kernel, BOTH
    for remote in (False, True) if nvshmem_library.can_compile() else (False,):
        for elastic in (False, True):
            for function, config, _ in ll_variants(elastic, remote):
                yield function, config
