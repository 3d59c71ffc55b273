"""Peers whose memory is not mapped here, through NVSHMEM's device library. With its IBGDA transport the GPU itself
writes the requests of the InfiniBand NIC; where NVSHMEM finds the peer mapped, it stores.

Such a peer has the base 0. It is named by its rank, and a place in its memory by the same place in mine. What is put
must lie in memory that NVSHMEM knows, so it goes by way of the outbox: a part for each slot, written again when all
ranks have acknowledged what was sent from it, so nothing ever waits for a put.

All puts and flags of a buffer for one peer go through one queue pair, which delivers in order: a flag needs no
completion of the puts before it. The fence costs nothing there, and does what other ways to the peer need.
"""

from dataclasses import dataclass
from typing import ClassVar

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from ...cute_kernels.sm90.address import ld_i32
from . import nvshmem_library
from .verbs import Group, ld_relaxed, set_flag

# Values of NVSHMEM's enumerations.
SIGNAL_SET = 9
CMP_EQ = 0


class _Library(cute.BitCode):
    """Found when a kernel is compiled that calls it."""

    def __init__(self):
        """The path is a property."""

    @property
    def path(self) -> str:
        return str(nvshmem_library.bitcode())


_LIBRARY = _Library()


@cute.extern(name="nvshmemx_qp_char_put_nbi_warp", source=_LIBRARY)
def _put_nbi_warp(target: Int64, source: Int64, nbytes: Int64, peer: Int32, queue: Int32) -> None: ...


@cute.extern(name="nvshmemx_qp_fence", source=_LIBRARY)
def _fence(peer: Int32, queues: Int64, count: Int32) -> None: ...


@cute.extern(name="nvshmemx_qp_signal_op", source=_LIBRARY)
def _signal_op(flag: Int64, value: Int64, operation: Int32, peer: Int32, queue: Int32) -> None: ...


@cute.extern(name="nvshmem_int_g", source=_LIBRARY)
def _get(word: Int64, peer: Int32) -> Int32: ...


@cute.extern(name="nvshmem_uint64_test", source=_LIBRARY)
def _test(word: Int64, comparison: Int32, value: Int64) -> Int32: ...


@dataclass(frozen=True)
class RemoteGroup(Group):
    """The group of a kernel that can reach peers through NVSHMEM."""

    remote: ClassVar[bool] = True

    outbox: Int64  # address of my symmetric memory that puts read
    outbox_bytes: Int64  # of a slot
    queue: Int64  # address of int32 (1,): NVSHMEM's handle of the queue pair


@cute.jit
def put(g: RemoteGroup, offset: Int64, source: Int64, nbytes: Int32, peer: Int32):
    """By one warp: bytes of my outbox to an offset of the peer's memory. What other threads have written there lies
    behind a barrier, what this warp has behind this call's."""
    cute.arch.sync_warp()
    _put_nbi_warp(g.own + offset, source, Int64(nbytes), peer, ld_i32(g.queue))


@cute.jit
def set_flag_of(g: Group, base: Int64, offset: Int64, epoch: Int32, peer: Int32, wrote: cutlass.Constexpr):
    """By one thread: `verbs.set_flag` at the offset of the peer's memory, whose base this is.

    A signal is a word of 64 bits; who waits looks at its low half.
    """
    if const_expr(g.remote):
        if base != 0:
            set_flag(base + offset, epoch, wrote)
        else:
            if const_expr(wrote):
                _fence(peer, g.queue, Int32(1))
            _signal_op(g.own + offset, _word(epoch), Int32(SIGNAL_SET), peer, ld_i32(g.queue))
    else:
        set_flag(base + offset, epoch, wrote)


@cute.jit
def see_data(g: RemoteGroup, flag: Int64, epoch: Int32, peer_base: Int64):
    """After the flag of a peer was seen: what the NIC has written before it. NVSHMEM does here what the GPU needs."""
    if peer_base == 0:
        _test(flag, Int32(CMP_EQ), _word(epoch))


@cute.jit
def ld_peer_i32(g: Group, base: Int64, offset: Int64, peer: Int32):
    """An int32 at the offset of the peer's memory, whose base this is."""
    word = Int32(0)
    if const_expr(g.remote):
        word = ld_relaxed(base + offset) if base != 0 else _get(g.own + offset, peer)
    else:
        word = ld_relaxed(base + offset)
    return word


def _word(epoch):
    """As `set_flag_of` sends it."""
    return Int64(epoch) & 0xFFFFFFFF
