"""GlooLowLatencyBuffer: the low-latency mode over gloo, on CPU tensors. Bit-equal to cutehop.ref.ep_ll.

A send hands every peer's rows to gloo, which delivers them when the peer asks, and puts a note of them into the group's
store. A receive waits for the notes, fetches the rows and notes how far this rank is. A wait for a note may expire and
leave everything usable; gloo would close its connections to all peers.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo

from cutehop.cute_kernels.errors import check
from cutehop.ref.ep_ll import (
    has_repeated_choice,
    home_ranks,
    is_choice,
    logfmt_decode,
    logfmt_encode,
    quantize,
    weighted_sum,
)

from .base import DEFAULT_TIMEOUT_S
from .errors import EpTimeoutError
from .gloo import _pack, _unpack
from .ll_base import LowLatencyBuffer
from .ll_config import GROUP, SLOTS, LlConfig
from .ll_outputs import PACK, LlDispatched, LlHandle
from .meeting import Meeting

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

POLL_S = 5e-4  # between looks for a note that a peer should make


class Terms(NamedTuple):
    """What all ranks have to agree on in an operation."""

    call: str
    choices: int
    rows: torch.dtype
    scales: torch.dtype | None = None


class Message(NamedTuple):
    """Rows of a rank for another, all with as many.

    rows: (m, H).  scales: (m, S), with e4m3 rows.  ids: int32 (m, k), the experts of a dispatched token, -1 for none.
    place: int32 (m, 1), index of the token, or in combine token * max_topk + choice.
    """

    rows: Tensor
    scales: Tensor | None
    ids: Tensor | None
    place: Tensor


class GlooLowLatencyBuffer(LowLatencyBuffer):
    """LowLatencyBuffer on the CPU. A send waits for no peer but to receive what was sent 4 sends before.

    destroy() waits until peers have received what this rank sent, or are destroyed too, at most until the deadline.
    A token that chooses an expert twice raises ValueError here, before anything is sent.
    """

    def __init__(
        self, group: ProcessGroup, config: LlConfig, name: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        """Collective: all ranks of `group` make their buffers in the same order, with equal configs.

        group: any that torch.distributed made; its store is used, its collectives are not. The process that serves the
            store is missed by all: no mask helps.
        timeout_s: seconds that a rank waits for its peers, in here and in every call.

        ValueError for a config that differs between ranks, EpTimeoutError if a rank is missing.
        """
        super().__init__(group, config, torch.device("cpu"), name)
        words = Meeting(group, timeout_s).meet("creation of a GlooLowLatencyBuffer", f"{uuid.uuid4().hex} {config}")
        for peer, word in enumerate(words):
            theirs = word.partition(" ")[2]
            check(
                theirs == str(config),
                f"GlooLowLatencyBuffer: config of rank {peer} is {theirs}, of rank {self.rank} {config}; use one on "
                "all ranks",
            )
        store = group.get_group_store()
        prefix = f"cutehop/{words[0].partition(' ')[0]}"
        self._notes = PrefixStore(f"{prefix}/notes", store)
        self._notes.set(_done(self.rank), "0")  # before the links, which need all ranks
        self._notes.set(_reached(self.rank), "0")
        self._links: Any = ProcessGroupGloo(
            PrefixStore(f"{prefix}/links", store), self.rank, self.ranks, timedelta(seconds=timeout_s)
        )
        self._timeout_s = timeout_s
        self._epoch = 0
        self._unread: dict[int, list[tuple[int, Tensor, Any]]] = {}  # by epoch: peer, its rows, gloo's work
        self._own: dict[int, tuple[Terms, Tensor]] = {}  # by epoch: what this rank sends itself
        self._masked = torch.zeros(self.ranks, dtype=torch.int32)
        self._error: Exception | None = None
        self._opened()

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    @torch.no_grad()
    def _dispatch_send(
        self, x: Tensor, topk_idx: Tensor, *, use_fp8: bool, round_scale: bool, use_ue8m0: bool
    ) -> Tensor:
        check(
            not has_repeated_choice(topk_idx, self.config.num_experts),
            "ep_ll_dispatch_send: a token chooses an expert twice; write -1 for one of the choices",
        )
        rows, scales = quantize(x, round_scale, use_ue8m0) if use_fp8 else (x, None)
        ids = topk_idx.masked_fill(~is_choice(topk_idx, self.config.num_experts), -1).int()
        token = torch.arange(len(x), dtype=torch.int32)[:, None]
        home = home_ranks(topk_idx, self.config.num_experts, self.config.experts_per_rank)
        tokens = [(home == peer).any(1).nonzero()[:, 0] for peer in range(self.ranks)]
        messages = [_pack([rows, scales, ids, token], chosen) for chosen in tokens]
        terms = Terms("dispatch", topk_idx.shape[1], rows.dtype, None if scales is None else scales.dtype)
        return self._send(terms, messages)

    @torch.no_grad()
    def _dispatch_receive(
        self,
        epoch: Tensor,
        out: LlDispatched,
        *,
        num_topk: int,
        recv_stats: Tensor | None,
        wait_stats: Tensor | None,
    ) -> None:
        scales = out.recv_scales
        terms = Terms("dispatch", num_topk, out.recv_x.dtype, None if scales is None else scales.dtype)
        messages = self._receive(epoch, terms, wait_stats)
        out.recv_count.zero_()
        out.handle.choice_rows.fill_(-1)
        for source, message in enumerate(messages):
            out.handle.layout_range[:, source] = out.recv_count.long() << 32
            if message is not None:
                self._place(source, message, out)
        if recv_stats is not None:
            recv_stats += out.recv_count

    def _place(self, source: int, message: Message, out: LlDispatched) -> None:
        """A source's rows, behind those that every expert has already."""
        c, handle = self.config, out.handle
        assert message.ids is not None
        for expert in range(c.experts_per_rank):
            row, choice = (message.ids == self.rank * c.experts_per_rank + expert).nonzero().unbind(1)
            begin = int(out.recv_count[expert])
            here = slice(begin, begin + len(row))
            out.recv_x[expert, here] = message.rows[row]
            if out.recv_scales is not None and message.scales is not None:
                out.recv_scales[expert, here] = message.scales[row]
            token = message.place[row, 0]
            handle.src_info[expert, here] = token
            origin = source * c.max_tokens + token
            handle.send_slot[expert, here] = (origin * c.max_topk + choice).int()
            handle.choice_rows[origin, choice] = expert * c.rows + torch.arange(begin, here.stop, dtype=torch.int32)
            handle.layout_range[expert, source] += len(row)
            out.recv_count[expert] += len(row)

    @torch.no_grad()
    def _combine_send(self, y: Tensor, handle: LlHandle, *, num_topk: int, use_logfmt: bool) -> Tensor:
        slots = self.config.max_tokens * self.config.max_topk
        received = torch.arange(self.config.rows) < handle.recv_count[:, None]
        messages = []
        for peer in range(self.ranks):
            chosen = (received & (handle.send_slot // slots == peer)).flatten().nonzero()[:, 0]
            rows = y.flatten(0, 1)[chosen]
            if use_logfmt:
                rows = logfmt_decode(*logfmt_encode(rows), rows)
            place = chosen.new_empty((len(chosen), 1), dtype=torch.int32)
            place[:, 0] = handle.send_slot.flatten()[chosen] % slots
            messages.append(_pack([rows, place], slice(None)))
        return self._send(Terms("combine", num_topk, torch.float32 if use_logfmt else torch.bfloat16), messages)

    @torch.no_grad()
    def _combine_receive(
        self,
        epoch: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        out: Tensor,
        *,
        use_logfmt: bool,
        wait_stats: Tensor | None,
    ) -> None:
        c = self.config
        terms = Terms("combine", topk_idx.shape[1], torch.float32 if use_logfmt else torch.bfloat16)
        messages = self._receive(epoch, terms, wait_stats)
        rows = torch.zeros((c.max_tokens * c.max_topk, c.hidden))
        home = home_ranks(topk_idx, c.num_experts, c.experts_per_rank)
        for peer, message in enumerate(messages):
            if message is None:
                home[home == peer] = -1
            else:
                rows[message.place[:, 0]] = message.rows.float()
        out.copy_(weighted_sum(rows.view(c.max_tokens, c.max_topk, c.hidden), topk_weights, home))

    def _update_mask(self, rank: int, masked: bool) -> None:
        if masked:
            self._leave_out(rank)
        else:
            self._take_back(rank)

    def _query_mask(self, out: Tensor) -> None:
        out.copy_(self._masked)

    def _clean_mask(self) -> None:
        self._take_back(*(peer for peer in range(self.ranks) if peer != self.rank))

    def _leave_out(self, peer: int) -> None:
        """Mask a peer and tell it."""
        self._masked[peer] = 1
        self._notes.set(_told(self.rank, peer), "yes")

    def _take_back(self, *peers: int) -> None:
        """Unmask peers, and go on from the operation that is the last of any rank that is not masked."""
        for peer in peers:
            self._masked[peer] = 0
            self._notes.delete_key(_told(self.rank, peer))
        those = [peer for peer, masked in enumerate(self._masked.tolist()) if not masked]
        self._epoch = max(int(self._notes.get(_reached(peer))) for peer in those)
        self._notes.set(_reached(self.rank), str(self._epoch))
        self._notes.set(_done(self.rank), str(self._epoch))

    def _send(self, terms: Terms, messages: list[Tensor]) -> Tensor:
        """Offer messages[r], packed rows, to every rank r. Returns the epoch."""
        self._epoch += 1
        self._notes.set(_reached(self.rank), str(self._epoch))
        self._await_readers(self._epoch - SLOTS)
        self._own[self._epoch] = terms, messages[self.rank]
        offered = self._unread[self._epoch] = []
        for peer in self._peers():
            packed, work = messages[peer], None
            if packed.numel():
                try:
                    work = self._links.send([packed], peer, self._epoch)
                except RuntimeError:  # the connection is gone because the peer is: the receive will miss it
                    continue
            offered.append((peer, packed, work))
            self._notes.set(_note(self._epoch, self.rank, peer), f"{len(packed)} {terms}")
        return torch.tensor([self._epoch], dtype=torch.int32)

    def _receive(self, epoch: Tensor, terms: Terms, wait_stats: Tensor | None) -> list[Message | None]:
        """What every rank sent in an operation, None from a masked one. ValueError if the ranks' terms differ."""
        number = int(epoch)
        mine, own_rows = self._own[number]
        check(mine == terms, f"ep_ll_receive: {terms}, sent was {mine}; pass the epoch and the options of one send")
        begin = time.monotonic()
        messages: list[Message | None] = [None] * self.ranks
        messages[self.rank] = self._unpack(terms, own_rows)
        for peer in self._peers():
            wait_began = time.monotonic_ns()
            packed = self._fetch(peer, number, terms, begin)
            messages[peer] = None if packed is None else self._unpack(terms, packed)
            if wait_stats is not None:
                wait_stats[peer] += time.monotonic_ns() - wait_began
        del self._own[number]
        self._notes.set(_done(self.rank), str(min(self._own, default=self._epoch + 1) - 1))
        return messages

    def _fetch(self, peer: int, number: int, terms: Terms, begin: float) -> Tensor | None:
        """The packed rows of a peer; None if it was masked because they did not come."""
        note = _note(number, peer, self.rank)
        try:
            self._notes.wait([note], self._left(begin))
            count, _, theirs = self._notes.get(note).decode().partition(" ")
            if theirs != str(terms):
                self._error = ValueError(
                    f"{terms.call} {number}: rank {peer} sent {theirs}, rank {self.rank} {terms}; make the same calls "
                    "in one order on all ranks, with the same options"
                )
                raise self._error
            packed = torch.empty((int(count), _row_bytes(self._columns(terms, 0))), dtype=torch.uint8)
            if packed.numel():
                self._links.recv([packed], peer, number).wait(self._left(begin))
            self._notes.delete_key(note)
            return packed
        except RuntimeError as error:  # the note did not come in time, or the connection is gone because the peer is
            self._missed(peer, f"{terms.call} rows", number, number - 1, begin, error)
            return None

    def _await_readers(self, number: int) -> None:
        """Peers are done with that operation: the one that begins may use its memory.

        A masked peer is not waited for, but may be reading what it was sent before that, so this is kept.
        """
        begin = time.monotonic()
        for peer, _, _ in self._unread.get(number, []):
            while not self._masked[peer] and not self._has_done(peer, number):
                if time.monotonic() > begin + self._timeout_s:
                    self._missed(peer, "ack", number, number - 1, begin)
                time.sleep(POLL_S)
        for old in [old for old in self._unread if old <= number]:
            self._unread[old] = [kept for kept in self._unread[old] if not self._has_done(kept[0], old)]
            if not self._unread[old]:
                del self._unread[old]

    def _has_done(self, peer: int, number: int) -> bool:
        """Whether a peer has received that operation and all before it."""
        return int(self._notes.get(_done(peer))) >= number

    def _missed(
        self, peer: int, phase: str, expected: int, got: int, begin: float, cause: Exception | None = None
    ) -> None:
        """A wait has expired: go on without the peer, or raise."""
        if self.config.elastic:
            self._leave_out(peer)
            return
        self._error = EpTimeoutError(self.rank, peer, phase, expected, got, time.monotonic() - begin)
        raise self._error from cause

    def _left(self, begin: float) -> timedelta:
        """Until the deadline of what began then; a moment after it, for what is there need not be waited for."""
        return timedelta(seconds=max(begin + self._timeout_s - time.monotonic(), 1e-2))

    def _peers(self) -> list[int]:
        """Other ranks that are not masked, and have not masked this one."""
        peers = [peer for peer, masked in enumerate(self._masked.tolist()) if peer != self.rank and not masked]
        for peer in peers if self.config.elastic else ():
            if self._notes.check([_told(peer, self.rank)]):
                self._leave_out(peer)
        return [peer for peer in peers if not self._masked[peer]]

    def _columns(self, terms: Terms, rows: int) -> Message:
        """The parts of `rows` packed rows."""
        hidden, is_dispatch = self.config.hidden, terms.call == "dispatch"
        scale_columns = -(-hidden // (GROUP * PACK)) if terms.scales == torch.int32 else hidden // GROUP
        return Message(
            torch.empty((rows, hidden), dtype=terms.rows),
            None if terms.scales is None else torch.empty((rows, scale_columns), dtype=terms.scales),
            torch.empty((rows, terms.choices), dtype=torch.int32) if is_dispatch else None,
            torch.empty((rows, 1), dtype=torch.int32),
        )

    def _unpack(self, terms: Terms, packed: Tensor) -> Message:
        message = self._columns(terms, len(packed))
        _unpack(packed, message)
        return message

    def _destroy(self) -> None:
        if self._error is None:
            self._notes.set(f"gone {self.rank}", "yes")
            deadline = time.monotonic() + self._timeout_s
            for number, offered in self._unread.items():
                for peer, _, _ in offered:
                    while not self._is_over(peer, number) and time.monotonic() < deadline:
                        time.sleep(POLL_S)
        self._links = None

    def _is_over(self, peer: int, number: int) -> bool:
        """Whether a peer will not ask for the rows of that operation any more."""
        return bool(self._masked[peer]) or self._notes.check([f"gone {peer}"]) or self._has_done(peer, number)


def _note(number: int, source: int, peer: int) -> str:
    return f"{number} from {source} to {peer}"


def _done(rank: int) -> str:
    """Where a rank notes the last operation up to which it has received all."""
    return f"done by {rank}"


def _reached(rank: int) -> str:
    """Where a rank notes how many operations it has begun."""
    return f"reached by {rank}"


def _told(rank: int, peer: int) -> str:
    """Is there while a rank has masked a peer."""
    return f"{rank} without {peer}"


def _row_bytes(columns: Message) -> int:
    return sum(column.shape[1] * column.element_size() for column in columns if column is not None)
