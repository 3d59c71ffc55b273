"""Waits of the low-latency kernels for peers. One that expires ends the buffer; in an elastic group it leaves the peer
out: masked here, told so in its own memory, sent nothing and not awaited from then on.

All CTAs of a launch must agree on who is left out. To send, it is enough that a mask only grows within a launch: the
last CTA sends no `ready` to a rank that any of them has masked, and without it the rank uses nothing of what came.
To receive, the first CTA that knows decides by compare-and-swap, and all take its verdict.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, const_expr

from ..config import LINE
from ..ll_config import SLOTS
from .ll_remote import see_data, set_flag_of
from .ll_verbs import ACK, MASK, READY, SEND_LIVE, TOLD, VERDICT, is_masked, line, note_live, slot_of
from .verbs import GMEM, PHASE, Group, aborted, ld_relaxed, peer_base, wait_flag

GRACE_NS = 10_000_000  # for a peer that has begun to write before it could see that it is left out


@cute.jit
def peek_acks(g: Group, peer):
    """A peer's acks of all slots, read before the epoch is known: nearly always the one in question stands already. And
    whether this rank has given up."""
    seen, given_up = tuple(Int32(0) for _ in range(SLOTS)), Boolean(False)
    if const_expr(not g.elastic):
        if (peer >= 0) & (peer < g.ranks):
            seen = tuple(ld_relaxed(g.own + line(ACK, slot, peer)) for slot in range(SLOTS))
            given_up = aborted(g)
    return seen, given_up


@cute.jit
def wait_ack(g: Group, epoch, peer, peeked):
    """Wait until a peer has read what I sent into this slot; False: the rank has given up, or the peer is left out.
    peeked: of peek_acks."""
    flag = g.own + line(ACK, epoch, peer)
    reached = Boolean(False)
    if const_expr(g.elastic):
        reached = poll_or_leave_out(g, flag, epoch - SLOTS, peer)
    else:
        seen, given_up = peeked
        ack = seen[0]
        for slot in cutlass.range_constexpr(1, SLOTS):
            ack = seen[slot] if slot_of(epoch) == slot else ack
        reached = (ack - (epoch - SLOTS) >= 0) & (not given_up)
        if not reached:
            reached = wait_flag(g, flag, epoch - SLOTS, peer, PHASE["ll_ack"])
    return reached


@cute.jit
def wait_data(g: Group, epoch, source):
    """Wait for all that a source sent in an operation; False: as wait_ack, the same for all CTAs if it is left out."""
    flag = g.own + line(READY, epoch, source)
    reached = Boolean(False)
    if const_expr(g.elastic):
        reached = agree(g, flag, epoch, source)
    else:
        reached = wait_flag(g, flag, epoch, source, PHASE["ll_ready"])
    if const_expr(g.remote):
        if reached:
            see_data(g, flag, epoch, peer_base(g, source))
    return reached


def ld_flag(address):
    return cute.arch.load(cute.make_ptr(Int32, address, GMEM, assumed_align=4), Int32, sem="acquire", scope="sys")


def is_told(g: Group, peer):
    """Whether a peer has left me out."""
    return ld_relaxed(g.own + TOLD + Int64(peer) * LINE) != 0


@cute.jit
def poll_or_leave_out(g: Group, flag, wanted, peer):
    """By any number of threads, each for itself."""
    start = cute.arch.globaltimer()
    out = is_masked(g, peer) | is_told(g, peer)
    seen = ld_flag(flag)
    while (seen - wanted < 0) & (not out):
        out = is_told(g, peer)
        if cute.arch.globaltimer() - start > g.timeout_ns:
            out = peer != g.rank  # this rank itself will come: all its waits end
        seen = ld_flag(flag)
    if out:
        leave_out(g, peer)
    return not out


@cute.jit
def note_receivers(g: Group, shared: cute.Pointer, reached):
    """By one warp, behind its waits for acks: whom this CTA sends to. A lane that has its ack at once may be told while
    another one waits for a dead rank until the deadline, and who told goes on without me meanwhile."""
    if const_expr(g.elastic):
        peer = cute.arch.lane_idx()
        cute.arch.sync_warp()
        if reached & (peer < g.ranks):
            if is_told(g, peer):
                leave_out(g, peer)
                reached = Boolean(False)
        note_live(g, shared, SEND_LIVE, reached)


@cute.jit
def agree(g: Group, flag, epoch, source):
    """By one thread of each CTA: the verdict of this operation. Its epoch tells it from the slot's earlier ones."""
    address = g.own + VERDICT + Int64(slot_of(epoch)) * LINE + Int64(source) * 4
    word = cute.make_ptr(Int32, address, GMEM, assumed_align=4)
    start = cute.arch.globaltimer()
    verdict = ld_flag(address)  # passes on what the CTA that decided has seen
    while verdict >> 1 != (epoch << 1) >> 1:
        out = is_masked(g, source) | is_told(g, source)
        here = ld_flag(flag) - epoch >= 0
        late = (cute.arch.globaltimer() - start > g.timeout_ns) & (source != g.rank)
        if out | here | late:
            mine = (epoch << 1) | Int32(out | (not here))
            before = cute.arch.atomic_cas(word, cmp=verdict, val=mine, sem="acq_rel", scope="gpu")
            if before == verdict:
                verdict = mine
                if mine & 1 != 0:
                    leave_out(g, source)
            else:
                verdict = ld_flag(address)
        else:
            verdict = ld_flag(address)
    return verdict & 1 == 0


@cute.jit
def leave_out(g: Group, peer):
    """Mask a peer and tell it. What it is writing here at that moment lands before this launch sends its flags: the CTA
    that has masked it waits, others go on at once."""
    mask = cute.make_ptr(Int32, g.own + MASK + Int64(peer) * 4, GMEM, assumed_align=4)
    if cute.arch.atomic_cas(mask, cmp=Int32(0), val=Int32(1), sem="relaxed", scope="gpu") == 0:
        set_flag_of(g, peer_base(g, peer), TOLD + Int64(g.rank) * LINE, Int32(1), peer, False)
        start = cute.arch.globaltimer()
        while cute.arch.globaltimer() - start < GRACE_NS:
            pass
