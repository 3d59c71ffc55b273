"""What the low-latency kernels share: places in the memory, and the end of an operation."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int64, const_expr

from ...cute_kernels.sm90.address import ld_i32, st_i32
from ..config import LINE, MAX_RANKS
from ..ll_config import LL_KERNELS, SLOTS, LlConfig, LlLayout
from .ll_remote import see_data, set_flag_of
from .verbs import PHASE, Group, aborted, is_masked, last_to_arrive, peer_base, wait_flag

_ANY = LlLayout(LlConfig(ranks=1, hidden=128, max_tokens=1, num_experts=1, max_topk=1))
READY = _ANY.ready.offset
ACK = _ANY.ack.offset
EPOCH = _ANY.epoch.offset
MASK = _ANY.mask.offset
COUNTS = _ANY.counts.offset
ARRIVALS = {name: _ANY.arrivals.at(i) for i, name in enumerate(LL_KERNELS)}


def slot_of(epoch):
    return epoch & (SLOTS - 1)


def line(region: int, epoch, peer):
    """Offset of the flag that `peer` sets for an operation."""
    return region + (slot_of(epoch) * MAX_RANKS + peer) * LINE


@cute.jit
def mask_of(g: Group, elastic):
    """Address of the mask, or 0 if no rank can be left out."""
    mask = Int64(0)
    if elastic != 0:
        mask = g.own + MASK
    return mask


@cute.jit
def finish(
    g: Group, region: cutlass.Constexpr, kernel: str, epoch, mask, counts_epoch: bool, go, base, shared: cute.Pointer
):
    """End of a kernel, by all its threads: the last CTA sets my flag at every peer.

    region: READY of a send kernel, ACK of a receive kernel. counts_epoch: whether the operation counts here.
    go: whether this CTA did its work. base: in thread r, base of rank r's memory, read early: a trip to L2.
    """
    tid, _, _ = cute.arch.thread_idx()
    ctas, _, _ = cute.arch.grid_dim()
    if last_to_arrive(g, ARRIVALS[kernel], shared, region == READY):
        if (not aborted(g)) if ctas > 1 else go:
            if tid < g.ranks:
                left_out = Boolean(False)
                if const_expr(region == READY):  # that I need its data no more is told to all: it may come back
                    left_out = is_masked(mask, tid)
                if not left_out:
                    set_flag_of(g, base, line(region, epoch, g.rank), epoch, tid, region == READY)
            if counts_epoch:
                if tid == 0:
                    st_i32(g.own + EPOCH, epoch)


@cute.jit
def wait_data(g: Group, epoch, source, mask):
    """Wait for all that a source sent in an operation; as wait_flag."""
    flag = g.own + line(READY, epoch, source)
    reached = wait_flag(g, flag, epoch, source, PHASE["ll_ready"], mask)
    if const_expr(g.remote):
        if reached:
            see_data(g, flag, epoch, peer_base(g, source))
    return reached


@cute.jit
def base_of(g: Group, thread):
    """In thread r, base of rank r's memory."""
    base = Int64(0)
    if thread < g.ranks:
        base = peer_base(g, thread)
    return base


def outbox_of(g, epoch):
    """Where the puts of an operation read. g: a RemoteGroup."""
    return g.outbox + Int64(slot_of(epoch)) * g.outbox_bytes


def next_epoch(g: Group):
    return ld_i32(g.own + EPOCH) + 1


def start_next_kernel():
    """The next kernel's CTAs may come to the SMs now; they wait for the end of this one.

    Not before the waits for peers are over: CTAs that hold an SM and wait behind a kernel that waits for a peer could
    keep that peer's kernels from running, where ranks share a GPU.
    """
    cute.arch.griddepcontrol_launch_dependents()
