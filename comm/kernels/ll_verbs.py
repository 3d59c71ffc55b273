"""What the low-latency kernels share: the group, places in the memory, and the end of an operation."""

from dataclasses import dataclass
from typing import ClassVar

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, const_expr

from ...cute_kernels.sm90.address import ld_i32, ld_i64, st_i32, st_i64
from ..config import LINE, MAX_RANKS
from ..ll_config import LL_KERNELS, SLOTS, LlConfig, LlLayout
from .config import Parts, RemoteParts
from .ll_remote import RemoteGroup, set_flag_of
from .verbs import Group, aborted, last_to_arrive, peer_base

_ANY = LlLayout(LlConfig(ranks=1, hidden=128, max_tokens=1, num_experts=1, max_topk=1))
READY = _ANY.ready.offset
ACK = _ANY.ack.offset
EPOCH = _ANY.epoch.offset
MASK = _ANY.mask.offset
VERDICT = _ANY.verdict.offset
TOLD = _ANY.told.offset
COUNTS = _ANY.counts.offset
ARRIVALS = {name: _ANY.arrivals.at(i) for i, name in enumerate(LL_KERNELS)}

SEND_LIVE, RECEIVE_LIVE = 1, 2  # words of a CTA's `flag`: bit r: rank r is not left out of the operation


@dataclass(frozen=True)
class ElasticGroup(Group):
    """The group of a kernel that may leave peers out."""

    elastic: ClassVar[bool] = True


@dataclass(frozen=True)
class ElasticRemoteGroup(RemoteGroup):
    elastic: ClassVar[bool] = True


def group_of(config: Parts) -> type[Group]:
    """What a kernel is compiled for."""
    if isinstance(config, RemoteParts):
        return ElasticRemoteGroup if config.elastic else RemoteGroup
    return ElasticGroup if config.elastic else Group


def name_of(kernel: str, config: Parts) -> str:
    parts = "_send" * config.sends + "_receive" * config.receives
    kinds = "_coded" * config.coded + "_elastic" * config.elastic + "_nvshmem" * isinstance(config, RemoteParts)
    return f"cutehop_ep_{kernel}{parts}{kinds}"


def slot_of(epoch):
    return epoch & (SLOTS - 1)


def line(region: int, epoch, peer):
    """Offset of the flag that `peer` sets for an operation."""
    return region + (slot_of(epoch) * MAX_RANKS + peer) * LINE


@cute.jit
def is_masked(g: Group, peer):
    """Whether a peer is left out from now on."""
    masked = Boolean(False)
    if const_expr(g.elastic):
        masked = ld_i32(g.own + MASK + Int64(peer) * 4) != 0
    return masked


@cute.jit
def note_live(g: Group, shared: cute.Pointer, which: cutlass.Constexpr, live):
    """By one warp: what lane r has found out about rank r, for the threads behind the next barrier."""
    if const_expr(g.elastic):
        lane = cute.arch.lane_idx()
        live = cute.arch.vote_ballot_sync(live & (lane < g.ranks))
        if lane == 0:
            cute.arch.store(shared + which, Int32(live))


@cute.jit
def is_live(g: Group, shared: cute.Pointer, which: cutlass.Constexpr, peer):
    """Whether a rank takes part in this operation, for this CTA."""
    live = Boolean(True)
    if const_expr(g.elastic):
        live = (cute.arch.load(shared + which, Int32) >> peer) & 1 != 0
    return live


@cute.jit
def has_home(g: Group, shared: cute.Pointer, place: Int32, choices: Int32):
    """Whether a row's place, which comes from the caller's handle, is one of a rank that takes part in this combine."""
    within = (place >= 0) & (place < g.ranks * choices)
    return within & is_live(g, shared, SEND_LIVE, place // choices)


@cute.jit
def finish(g: Group, region: cutlass.Constexpr, kernel: str, epoch, counts_epoch: bool, go, base, shared: cute.Pointer):
    """End of a kernel, by all its threads: the last CTA sets my flag at every peer.

    region: READY of a send kernel, ACK of a receive kernel. counts_epoch: whether the operation counts here.
    go: whether this CTA did its work. base: in thread r, base of rank r's memory, read early: a trip to L2.
    """
    tid, _, _ = cute.arch.thread_idx()
    ctas, _, _ = cute.arch.grid_dim()
    if last_to_arrive(g, ARRIVALS[kernel], shared, region == READY):
        if (not aborted(g)) if ctas > 1 else go:
            if tid < g.ranks:
                if not is_masked(g, tid):  # to any CTA: a rank to which one has not sent does not see the flag
                    set_flag_of(g, base, line(region, epoch, g.rank), epoch, tid, region == READY)
            if counts_epoch:
                if tid == 0:
                    st_i32(g.own + EPOCH, epoch)


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


@cute.jit
def add_wait(stats, source, start):
    """Add what a wait since `start` took to int64 (ranks,), unless there is none."""
    cta, _, _ = cute.arch.block_idx()
    if (cta == 0) & (stats != 0):
        place = stats + Int64(source) * 8
        st_i64(place, ld_i64(place) + (cute.arch.globaltimer() - start))
