"""What all EP kernels do with addresses, flags and deadlines.

Addresses are 64-bit integers: offsets of the layout are added to the base of a rank. Everything that crosses GPUs is
`.sys` on both sides. No wait is endless: the first one whose deadline passes writes the error record, sets the abort
word, and every later wait and kernel of the buffer ends at once.
"""

from dataclasses import dataclass
from typing import ClassVar

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64

from ...cute_kernels.sm90 import ptx
from ...cute_kernels.sm90.address import ld_i32, ld_i64, ld_vector, st_i64
from ..config import LINE, EpConfig
from ..layout import KERNELS, OPERATIONS, PHASES, EpLayout

GMEM = cute.AddressSpace.gmem

# Offsets of the control regions do not depend on the config.
_ANY = EpLayout(EpConfig(ranks=1, hidden=8, max_tokens=1, num_experts=1, max_topk=1))
DISPATCH_READY = _ANY.dispatch_ready.offset
DISPATCH_ACK = _ANY.dispatch_ack.offset
COMBINE_READY = _ANY.combine_ready.offset
COMBINE_ACK = _ANY.combine_ack.offset
COUNTS = _ANY.counts.offset
ABORT = _ANY.abort.offset
EPOCH = {name: _ANY.epochs.at(i) for i, name in enumerate(OPERATIONS)}
ARRIVALS = {name: _ANY.arrivals.at(i) for i, name in enumerate(KERNELS)}
PHASE = {name: i for i, name in enumerate(PHASES)}


@dataclass(frozen=True)
class Group:
    """The group as a kernel sees it. remote: whether there may be peers that only NVSHMEM reaches (ll_remote.py).
    elastic: whether peers may be left out (ll_waits.py)."""

    remote: ClassVar[bool] = False
    elastic: ClassVar[bool] = False

    bases: Int64  # address of int64 (ranks,): base of every rank's memory
    own: Int64  # base of my memory
    error: Int64  # address of the error record, host memory
    timeout_ns: Int64
    rank: Int32
    ranks: Int32


def peer_base(g: Group, r):
    return ld_i64(g.bases + Int64(r) * 8)


def read_epoch(g: Group, operation: str):
    """The epoch of the call that is running: one more than that of the last whole call."""
    return ld_i32(g.own + EPOCH[operation]) + 1


def ld_relaxed(address):
    """An Int32 that peers may write at any time; it orders nothing."""
    return cute.arch.load(cute.make_ptr(Int32, address, GMEM, assumed_align=4), Int32, sem="relaxed", scope="sys")


def aborted(g: Group):
    return ld_relaxed(g.own + ABORT) != 0


@cute.jit
def report(g: Group, peer, phase: int, expected, got, waited_ns):
    """Fill the error record, unless a thread of this rank has done so before."""
    abort = cute.make_ptr(Int32, g.own + ABORT, GMEM, assumed_align=4)
    if cute.arch.atomic_cas(abort, cmp=Int32(0), val=Int32(1), sem="acq_rel", scope="sys") == 0:
        st_i64(g.error + 8, Int64(peer))
        st_i64(g.error + 16, Int64(phase))
        st_i64(g.error + 24, Int64(expected))
        st_i64(g.error + 32, Int64(got))
        st_i64(g.error + 40, waited_ns)
        raised = cute.make_ptr(Int64, g.error, GMEM, assumed_align=8)
        cute.arch.store(raised, Int64(1), sem="release", scope="sys")


@cute.jit
def wait_flag(g: Group, address, epoch, peer, phase):
    """Wait until the flag in my memory has reached `epoch`; orders what the peer wrote before it set the flag.

    Returns whether the flag was reached and no earlier wait of this rank had expired.
    """
    flag = cute.make_ptr(Int32, address, GMEM, assumed_align=4)
    start, waited = cute.arch.globaltimer(), Int64(0)
    given_up = aborted(g)  # before the flag: behind an acquire it would be a trip of its own
    seen = cute.arch.load(flag, Int32, sem="acquire", scope="sys")
    stop = given_up
    while (seen - epoch < 0) & (not stop):
        seen = cute.arch.load(flag, Int32, sem="acquire", scope="sys")
        waited = cute.arch.globaltimer() - start
        if waited > g.timeout_ns:
            stop = Boolean(True)
            report(g, peer, phase, epoch, seen, waited)
    return (seen - epoch >= 0) & (not given_up)


@cute.jit
def wait_count(g: Group, address, epoch, peer, phase):
    """Wait for a count word of `epoch` in my memory and return the count; 0 if it does not come."""
    pointer = cute.make_ptr(Int64, address, GMEM, assumed_align=8)
    start, waited = cute.arch.globaltimer(), Int64(0)
    stop = aborted(g)
    word = cute.arch.load(pointer, Int64, sem="relaxed", scope="sys")
    while (Int32(word >> 32) != epoch) & (not stop):
        word = cute.arch.load(pointer, Int64, sem="relaxed", scope="sys")
        waited = cute.arch.globaltimer() - start
        if waited > g.timeout_ns:
            stop = Boolean(True)
            report(g, peer, phase, epoch, Int32(word >> 32), waited)
    count = Int32(0)
    if Int32(word >> 32) == epoch:
        count = Int32(word & 0x7FFFFFFF)
    return count


def send_count(address, epoch, count):
    """Write a count word to any rank's memory: valid by itself, no order needed."""
    word = (Int64(epoch) << 32) | Int64(count)
    cute.arch.store(cute.make_ptr(Int64, address, GMEM, assumed_align=8), word, sem="relaxed", scope="sys")


@cute.jit
def last_to_arrive(g: Group, arrivals: int, shared: cute.Pointer, wrote: cutlass.Constexpr = True):
    """True in all threads of the last CTA of a grid to come here; all threads of every CTA call it once, at its end.

    What any thread of the grid did before happens before what this CTA does then. One thread carries the order between
    CTAs and each flag's thread that to its peer (`set_flag`): fences by all warps cost microseconds. The counter is
    zero again afterwards. arrivals: its offset in my memory. shared: one Int32 of shared memory. wrote: False where
    no peer looks at what the grid has written; what it read has been read when its threads have come here.
    """
    tid, _, _ = cute.arch.thread_idx()
    ctas, _, _ = cute.arch.grid_dim()
    cute.arch.sync_threads()
    last = Int32(1)
    if ctas > 1:
        if tid == 0:
            counter = cute.make_ptr(Int32, g.own + arrivals, GMEM, assumed_align=4)
            order = "acq_rel" if wrote else "relaxed"
            before = cute.arch.atomic_add(counter, Int32(1), sem=order, scope="gpu")
            cute.arch.store(shared, before)
            if before == ctas - 1:
                cute.arch.store(counter, Int32(0), sem="relaxed", scope="gpu")
        cute.arch.sync_threads()
        last = Int32(cute.arch.load(shared, Int32) == ctas - 1)
    return last != 0


@cute.jit
def signal_peers(g: Group, offset, epoch, wrote: cutlass.Constexpr = True):
    """Set my flag at every peer; called by all threads of one CTA after `last_to_arrive`."""
    tid, _, _ = cute.arch.thread_idx()
    if tid < g.ranks:
        set_flag(peer_base(g, tid) + offset + g.rank * LINE, epoch, wrote)


def set_flag(address, epoch, wrote: bool = True):
    """wrote: whether the peer that sees the flag must see what came before it."""
    order = "release" if wrote else "relaxed"
    cute.arch.store(cute.make_ptr(Int32, address, GMEM, assumed_align=4), epoch, sem=order, scope="sys")


@cute.jit
def may_proceed(g: Group, reached, barrier: int = 0, threads: cutlass.Constexpr = None):
    """The barrier after the waits of a CTA, by all its threads: False if this rank has given up.

    reached: False in a thread whose wait has expired. barrier, threads: another barrier than that of the whole CTA.
    """
    failed = Int32(0)
    if not reached:
        failed = Int32(aborted(g))  # not if the peer is left out instead (ll_waits.py)
    return ptx.barrier_or(failed, barrier, threads) == 0


@cute.jit
def in_batches(first, total, step, load: cutlass.Constexpr, store: cutlass.Constexpr):
    """store(i, load(i)) for i = first, first + step, ... below total, with four loads in flight before the first store.

    Past the end of the last batch its first element is copied again, which changes nothing.
    """
    i = first
    while i < total:
        places = [i]
        for u in cutlass.range_constexpr(1, 4):
            place = i + step * u
            places.append(place if place < total else i)
        loaded = [load(place) for place in places]
        for u in cutlass.range_constexpr(4):
            store(places[u], loaded[u])
        i += step * 4


def copy_vectors(target, source, vectors, thread, threads):
    """Copy contiguous 16-byte vectors, the work of `thread` of `threads`."""
    in_batches(
        Int64(thread),
        vectors,
        Int64(threads),
        lambda i: ld_vector(source + i * 16),
        lambda i, words: ptx.st_global(target + i * 16, *words),
    )


def start_next_kernel():
    """The next kernel's CTAs may come to the SMs now; they wait for the end of this one.

    Not before the waits for peers are over: CTAs that hold an SM and wait behind a kernel that waits for a peer could
    keep that peer's kernels from running, where ranks share a GPU.
    """
    cute.arch.griddepcontrol_launch_dependents()
