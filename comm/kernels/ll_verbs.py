"""What the low-latency kernels share: places in the memory, and the end of an operation."""

import cutlass.cute as cute
from cutlass import Int32, Int64

from ..config import LINE, MAX_RANKS
from ..ll_config import LL_KERNELS, SLOTS, LlConfig, LlLayout
from .verbs import GMEM, Group, aborted, is_masked, last_to_arrive, ld_i32, peer_base

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
def finish(g: Group, region: int, kernel: str, epoch, mask, counts_epoch: bool, shared: cute.Pointer):
    """End of a kernel, by all its threads: the last CTA sets my flag at every peer.

    region: READY of a send kernel, ACK of a receive kernel. counts_epoch: whether the operation counts here.
    """
    tid, _, _ = cute.arch.thread_idx()
    if last_to_arrive(g, ARRIVALS[kernel], shared):
        if not aborted(g):
            if tid < g.ranks:
                if not is_masked(mask, tid):
                    flag = cute.make_ptr(
                        Int32, peer_base(g, tid) + line(region, epoch, g.rank), GMEM, assumed_align=4
                    )
                    cute.arch.fence_acq_rel_sys()
                    cute.arch.store(flag, epoch, sem="release", scope="sys")
            if counts_epoch:
                if tid == 0:
                    cute.arch.store(cute.make_ptr(Int32, g.own + EPOCH, GMEM, assumed_align=4), epoch)


def next_epoch(g: Group):
    return ld_i32(g.own + EPOCH) + 1
