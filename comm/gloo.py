"""GlooBuffer: dispatch and combine over gloo, on CPU tensors. Bit-equal to cutehop.ref.ep; for laptops and tests.

Each call is two exchanges between all pairs of ranks: a header of fixed size (what is sent, and how much of it), then
the rows themselves, everything of a token packed side by side. Whatever one rank finds wrong in the headers, all ranks
find wrong: they raise before any row travels and stay in step.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo

from cutehop.cute_kernels.errors import check

from . import outputs
from .base import DEFAULT_TIMEOUT_S, Buffer, Dispatched, EpHandle, InputRegion
from .config import EpConfig
from .errors import EpTimeoutError
from .meeting import Meeting

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CALLS = ("dispatch", "dispatch_cached", "combine")
SHAPE = (
    "call",
    "bytes of a row",
    "bytes of its scales or weights",
    "choices",
    "bytes of a choice",
    "handle (checksum)",
)
"""What the first words of a header say; equal on all ranks."""


class GlooBuffer(Buffer):
    """Buffer on the CPU. Its views (dispatch_input, combine_input) are plain tensors, with the rules of the others.
    As on a GPU, autograd does not see its methods; the ops have gradients.

    destroy(), release_memory() and acquire_memory() wait for nobody: no peer reads this rank's memory.
    """

    def __init__(
        self, group: ProcessGroup, config: EpConfig, name: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        """Collective: all ranks of `group` make their buffers in the same order, with equal configs.

        group: any that torch.distributed made; its store is used, its collectives are not, so an expired wait leaves
            it usable for the next buffer.
        timeout_s: seconds that a rank waits for a peer, in here and in every call.

        ValueError for a config that differs between ranks, EpTimeoutError if a rank is missing.
        """
        super().__init__(group, config, torch.device("cpu"), name)
        words = Meeting(group, timeout_s).meet("creation of a GlooBuffer", f"{uuid.uuid4().hex} {config}")
        for peer, word in enumerate(words):
            theirs = word.partition(" ")[2]
            check(
                theirs == str(config),
                f"GlooBuffer: config of rank {peer} is {theirs}, of rank {self.rank} {config}; use one on all ranks",
            )
        store = PrefixStore(f"cutehop/{words[0].partition(' ')[0]}", group.get_group_store())
        self._links: Any = ProcessGroupGloo(store, self.rank, self.ranks, timedelta(seconds=timeout_s))
        self._timeout_s = timeout_s
        self._epoch = 0  # calls so far
        self._error: EpTimeoutError | None = None
        self._opened()

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def _input_regions(self) -> tuple[InputRegion, InputRegion]:
        # The operating system backs these bytes when they are first written, so an unused view costs nothing.
        c = self.config
        x, y = (
            torch.empty(size, dtype=torch.uint8) for size in (c.max_tokens * c.x_row_bytes, c.recv_rows * c.y_row_bytes)
        )
        return InputRegion("dispatch_input", x), InputRegion("combine_input", y)

    def _await_readers(self, combine: bool) -> None:
        """Nothing to wait for: a call returns when its rows have left."""

    def _release_memory(self) -> None:
        """The regions are gone with the base class's references."""

    def _acquire_memory(self) -> None:
        """The base class asks for new regions."""

    def _destroy(self) -> None:
        self._links = None

    @torch.no_grad()
    def _dispatch(
        self,
        x: Tensor,
        scales: Tensor | None,
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        is_token_in_rank: Tensor,
        num_tokens_per_expert: Tensor,
        *,
        num_worst_tokens: int,
        in_place: bool,
        num_sms: int,
    ) -> Dispatched:
        counts = outputs.counts(is_token_in_rank, num_tokens_per_expert)
        sends = is_token_in_rank.sum(0).expand(self.ranks, -1)
        worst = torch.full((self.ranks, 1), num_worst_tokens)
        words = torch.cat([sends, worst, num_tokens_per_expert.view(self.ranks, -1)], dim=1)
        headers = self._exchange_headers(_shape("dispatch", x, scales, topk_idx), words)
        matrix = headers[:, : self.ranks]
        self._check_bounds(matrix.sum(0).tolist(), headers[:, self.ranks].tolist())
        counts.rank_prefix_matrix.copy_(matrix.cumsum(0))
        counts.num_recv_tokens_per_expert.copy_(headers[:, self.ranks + 1 :].sum(0))
        position = is_token_in_rank.cumsum(0, dtype=torch.int32) - 1
        counts.send_row.copy_(position.masked_fill(~is_token_in_rank, -1))

        token = torch.arange(x.shape[0], dtype=torch.int32)[:, None]
        columns = [x, scales, topk_idx, topk_weights, token]
        received = self._move_tokens(columns, is_token_in_rank, counts.rank_prefix_matrix)
        num_rows = num_worst_tokens or received.shape[0]
        rows = outputs.rows(x, scales, topk_idx, topk_weights, num_rows)
        _unpack(received, [*rows[:-1], rows.recv_src_idx[:, None]])
        if rows.recv_topk_idx is not None and rows.recv_topk_weights is not None:
            self._localise(rows.recv_topk_idx, rows.recv_topk_weights, received.shape[0])
        handle = EpHandle(counts.rank_prefix_matrix, rows.recv_src_idx, is_token_in_rank, counts.send_row)
        per_local_expert = [] if num_worst_tokens else counts.num_recv_tokens_per_expert.tolist()
        return Dispatched(*rows[:-1], counts.num_recv_tokens_per_expert, per_local_expert, handle)

    @torch.no_grad()
    def _dispatch_cached(
        self, x: Tensor, scales: Tensor | None, handle: EpHandle, *, in_place: bool, num_sms: int
    ) -> tuple[Tensor, Tensor | None]:
        self._exchange_headers(_shape("dispatch_cached", x, scales, None, handle))
        received = self._move_tokens([x, scales], handle.is_token_in_rank, handle.rank_prefix_matrix)
        result = outputs.cached(x, scales, handle.recv_src_idx)
        _unpack(received, result)
        return result

    @torch.no_grad()
    def _combine(
        self,
        y: Tensor,
        handle: EpHandle,
        topk_weights: Tensor | None,
        bias_0: Tensor | None,
        bias_1: Tensor | None,
        *,
        in_place: bool,
        num_sms: int,
    ) -> tuple[Tensor, Tensor | None]:
        self._exchange_headers(_shape("combine", y, topk_weights, None, handle))
        combined_x, combined_weights = outputs.combined(y, topk_weights, handle.is_token_in_rank)
        tokens = [mask.nonzero()[:, 0] for mask in handle.is_token_in_rank.unbind(1)]
        packed = _pack([y, topk_weights], slice(0, _ends(handle.rank_prefix_matrix, self.rank)[-1]))
        sends = [packed[begin:end] for begin, end in pairwise(_ends(handle.rank_prefix_matrix, self.rank))]
        receives = [packed.new_empty((len(rows), packed.shape[1])) for rows in tokens]
        self._exchange("combine rows", sends, receives)
        zero = torch.zeros(combined_x.shape)
        total_x = (zero if bias_0 is None else bias_0.float()) + (zero if bias_1 is None else bias_1.float())
        total_weights = None if combined_weights is None else torch.zeros_like(combined_weights)
        for rows, received in zip(tokens, receives):  # rank order: the sum is rounded after every step
            part_x = y.new_empty((len(rows), y.shape[1]))
            part_weights = None if topk_weights is None else topk_weights.new_empty((len(rows), topk_weights.shape[1]))
            _unpack(received, [part_x, part_weights])
            total_x[rows] += part_x.float()
            if total_weights is not None and part_weights is not None:
                total_weights[rows] += part_weights
        return combined_x.copy_(total_x), total_weights

    def _exchange_headers(self, shape: list[int], words: Tensor | None = None) -> Tensor:
        """Tell every peer r [*shape, *words[r]]; returns the words that every rank told this one.

        words: (R, R + 1 + L), tokens from here to each rank, num_worst_tokens, choices of each of r's experts. None
            sends zeros, for headers of one size let ranks that make different calls find out.

        ValueError if another rank's shape differs; it raises there too.
        """
        if words is None:
            words = torch.zeros((self.ranks, self.ranks + 1 + self.config.experts_per_rank))
        mine = torch.cat([torch.tensor(shape).expand(self.ranks, -1), words.long()], dim=1)
        theirs = torch.empty_like(mine)
        self._epoch += 1
        call = CALLS[shape[0]]
        self._exchange(f"{call} counts", mine.split(1), theirs.split(1))
        for peer, given in enumerate(theirs[:, : len(shape)].tolist()):
            if shape[0] != given[0]:
                raise ValueError(
                    f"ep_{call}: rank {peer} calls {CALLS[given[0]]}; make the same calls in one order on all ranks"
                )
            for what, here, there in zip(SHAPE, shape, given):
                if here != there:
                    raise ValueError(
                        f"ep_{call}: {what} {there} on rank {peer}, {here} on rank {self.rank}; pass tensors of equal "
                        "width and dtype on all ranks, and handles of one dispatch"
                    )
        return theirs[:, len(shape) :]

    def _check_bounds(self, totals: list[int], worst: list[int]) -> None:
        """Every rank looks at every rank's bounds, so that all of them raise."""
        for rank, (total, bound) in enumerate(zip(totals, worst)):
            if total > self.config.recv_rows:
                raise ValueError(
                    f"ep_dispatch: rank {rank} receives {total} tokens, the buffer holds {self.config.recv_rows}; make "
                    "it with a larger max_recv_tokens"
                )
            if 0 < bound < total:
                raise ValueError(
                    f"ep_dispatch: rank {rank} receives {total} tokens, its num_worst_tokens is {bound}; pass at least "
                    "ranks * the most tokens of a rank"
                )

    def _move_tokens(self, columns: Sequence[Tensor | None], mask: Tensor, prefix: Tensor) -> Tensor:
        """uint8 (m, bytes): the packed columns of every token on its way to this rank, in row order."""
        sends = [_pack(columns, in_rank.nonzero()[:, 0]) for in_rank in mask.unbind(1)]
        ends = _ends(prefix, self.rank)
        received = sends[0].new_empty((ends[-1], sends[0].shape[1]))
        self._exchange("dispatch rows", sends, [received[begin:end] for begin, end in pairwise(ends)])
        return received

    def _localise(self, idx: Tensor, weights: Tensor, received: int) -> None:
        """Global expert ids to local ones, in place; -1 and weight 0 where not here, -1 past the received rows."""
        local = self.config.experts_per_rank
        idx[received:] = -1
        idx[:received] -= self.rank * local
        elsewhere = (idx < 0) | (idx >= local)
        idx[elsewhere] = -1
        weights[elsewhere] = 0

    def _exchange(self, phase: str, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> None:
        """Send contiguous sends[r] to every rank r, fill receives[r] with what it sent. Empty ones do not travel."""
        begin = time.monotonic()
        receives[self.rank].copy_(sends[self.rank])
        peers = [(self.rank + step) % self.ranks for step in range(1, self.ranks)]
        # Receives first: a rank that is missing is missed for what it should have sent.
        messages = [(peer, receives[peer], self._links.recv) for peer in peers]
        messages += [(peer, sends[peer], self._links.send) for peer in peers]
        waiting_for = self.rank
        try:
            works = []
            for waiting_for, tensor, start in messages:
                if tensor.numel():
                    works.append((waiting_for, start([tensor], waiting_for, 0)))
            for peer, work in works:
                waiting_for = peer
                left_s = self._timeout_s - (time.monotonic() - begin)
                work.wait(timedelta(seconds=max(left_s, 1e-3)))  # gloo takes 0 for no deadline
        except RuntimeError as error:  # expired, or the connection is gone because the peer is
            waited_s = time.monotonic() - begin
            self._error = EpTimeoutError(self.rank, waiting_for, phase, self._epoch, self._epoch - 1, waited_s)
            raise self._error from error


def _shape(
    call: str, rows: Tensor, scales: Tensor | None, topk_idx: Tensor | None, handle: EpHandle | None = None
) -> list[int]:
    """The values of SHAPE; 0 for what a call does not have."""
    return [
        CALLS.index(call),
        rows.shape[1] * rows.element_size(),
        0 if scales is None else scales.shape[1] * scales.element_size(),
        0 if topk_idx is None else topk_idx.shape[1],
        0 if topk_idx is None else topk_idx.element_size(),
        0 if handle is None else hash(tuple(handle.rank_prefix_matrix.flatten().tolist())),
    ]


def _ends(prefix: Tensor, rank: int) -> list[int]:
    """Row 0 and the end of every source's rows among those that `rank` received."""
    return [0, *prefix[:, rank].tolist()]


def _bytes(tensor: Tensor) -> Tensor:
    if tensor.numel() == 0:  # contiguous() keeps its strides, which may allow no view as bytes
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous().view(torch.uint8)


def _pack(columns: Sequence[Tensor | None], rows: Tensor | slice) -> Tensor:
    """uint8 (rows, bytes): those rows of all columns, side by side."""
    return torch.cat([_bytes(column)[rows] for column in columns if column is not None], dim=1)


def _unpack(packed: Tensor, columns: Sequence[Tensor | None]) -> None:
    """The inverse of _pack, into the first rows of the columns, which are contiguous."""
    given = [column for column in columns if column is not None]
    widths = [column.shape[1] * column.element_size() for column in given]
    for column, part in zip(given, packed.split(widths, dim=1)):
        column.view(torch.uint8)[: len(packed)] = part
