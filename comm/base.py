"""Buffer: what every expert-parallel buffer does, whatever moves the bytes, and the registry that ops find it in.

A subclass moves the rows (the methods that begin with one underscore and are abstract here); this class checks
arguments, knows which calls are legal now and hands out the views that peers read in place.
"""

from __future__ import annotations

from abc import abstractmethod
from operator import index
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cutehop.cute_kernels.errors import check

from . import checks
from .config import EpConfig
from .living import Living, Registry

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DEFAULT_TIMEOUT_S = 100.0  # seconds until a wait for a peer gives up; DeepEP V1's


class EpHandle(NamedTuple):
    """What a rank keeps of a dispatch, to send rows back (combine) or new rows the same way (dispatch_cached).

    rank_prefix_matrix: int32 (R, R), equal on all ranks. [s, r] = tokens that ranks 0..s send to rank r.
    recv_src_idx: int32 (m,), index of each received row's token on its source rank; undefined past the received rows.
    is_token_in_rank: bool (n, R), where this rank's own tokens went.
    send_row: int32 (n, R), index of token t among those that this rank sends to rank r, ascending by t; -1 for none.
    """

    rank_prefix_matrix: Tensor
    recv_src_idx: Tensor
    is_token_in_rank: Tensor
    send_row: Tensor


class Dispatched(NamedTuple):
    """What a rank receives: m rows, the true number or num_worst_tokens; cutehop.ref.ep defines order and values.

    recv_x: (m, H) of x's dtype.
    recv_scales: (m, S) of the scales' dtype, contiguous; None without scales.
    recv_topk_idx: (m, k) of topk_idx's dtype, local expert or -1, also past the received rows; None without topk_idx.
    recv_topk_weights: float32 (m, k), 0 where recv_topk_idx is -1; None without topk_weights.
    num_recv_tokens_per_expert: int32 (L,) on the device, choices of each local expert.
    num_recv_tokens_per_expert_list: the same as ints, rounded to no alignment; empty with num_worst_tokens.
    handle: for combine and dispatch_cached.
    Rows past the received ones are undefined unless said otherwise.
    """

    recv_x: Tensor
    recv_scales: Tensor | None
    recv_topk_idx: Tensor | None
    recv_topk_weights: Tensor | None
    num_recv_tokens_per_expert: Tensor
    num_recv_tokens_per_expert_list: list[int]
    handle: EpHandle


class InputRegion:
    """Memory that peers pull rows from. One call's caller at a time may write its rows there itself (zero copy)."""

    def __init__(self, what: str, memory: Tensor) -> None:
        """what: the method that lends it, for messages.  memory: uint8, one-dimensional."""
        self._what = what
        self._memory = memory
        self._begin = memory.data_ptr()
        self._end = self._begin + memory.numel()
        self._lent = False

    def lend(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """The first rows as a tensor (rows, columns); belongs to the caller until `spend`."""
        self._lent = True
        return self._memory[: rows * columns * dtype.itemsize].view(dtype).view(rows, columns)

    def holds(self, rows: Tensor) -> bool:
        """True: `rows` is the view lent for this call, so no copy is needed. False: it lies elsewhere.

        ValueError for a view of an earlier call, or for a part of a view that does not begin with its first row.
        """
        address = rows.data_ptr()
        if not self._begin <= address < self._end:
            return False
        if not self._lent:
            raise ValueError(
                f"{self._what}: stale view, the call it was asked for is over and peers may read that memory; "
                f"ask {self._what} for a view before each call"
            )
        if address != self._begin:
            raise ValueError(
                f"{self._what}: rows begin {address - self._begin} bytes into the view, supported 0; "
                "pass the view, or its first rows"
            )
        return True

    def spend(self) -> None:
        """The call is on its way: views lent until now are stale."""
        self._lent = False


class Buffer(Living[EpConfig]):
    """Expert-parallel dispatch and combine of one rank. Every method that moves rows is collective: all ranks of the
    group make the same calls in the same order, a rank without tokens too, with equal H, dtype, S and k.

    max_num_sms: the most CTAs that a call may use, the GPU's SMs shared among the ranks on it; 0 without a GPU.

    Errors of every method: RuntimeError after destroy() or while the memory is released, EpTimeoutError (a
    RuntimeError) once a wait for a peer has expired, TypeError and ValueError for arguments.
    """

    max_num_sms = 0
    _mode = "Buffer"
    _registry: Registry[Buffer] = Registry("buffer", "ep")

    def __init__(
        self, group: ProcessGroup, config: EpConfig, device: torch.device, name: str | None = None, num_sms: int = 0
    ) -> None:
        """name: None for one that is free."""
        super().__init__(group, config, device, name, num_sms)
        self._check_dispatch = checks.Once(checks.check_dispatch_fits, config, device)
        self._check_cached = checks.Once(checks.check_cached_fits, config, device)
        self._check_combine = checks.Once(checks.check_combine_fits, config, device)
        self._inputs: tuple[InputRegion, InputRegion] | None = None

    def _opened(self) -> None:
        self._inputs = self._input_regions()
        super()._opened()

    def dispatch(
        self,
        x: Tensor,
        scales: Tensor | None,
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        is_token_in_rank: Tensor,
        num_tokens_per_expert: Tensor,
        *,
        num_worst_tokens: int = 0,
        num_sms: int | None = None,
    ) -> Dispatched:
        """Send every token to the ranks of its experts; cutehop.ref.ep.dispatch says what arrives.

        x: (n, H) bfloat16, or of a 1-byte dtype, contiguous; copied bit for bit.
        scales: float32 or int32 (n, S) of any strides, with 1-byte x only, or None.
        topk_idx: int64 or int32 (n, k), and topk_weights: float32 (n, k), contiguous; both or neither None.
        is_token_in_rank: bool (n, R).  num_tokens_per_expert: int32 (E,).  Both contiguous, of ep_layout.
        num_worst_tokens: 0 returns the exact number of rows, for which the CPU waits. Above 0 that many rows are
            returned and nothing waits, so the call can be captured in a CUDA graph; with too few the call
            fails here, and on the other ranks at the deadline.
        """
        first, _ = self._ready()
        num_worst_tokens = index(num_worst_tokens)
        tensors = (x, scales, topk_idx, topk_weights, is_token_in_rank, num_tokens_per_expert)
        self._check_dispatch(tensors, num_worst_tokens)
        in_place = first.holds(x)
        first.spend()
        return self._dispatch(
            x, scales, topk_idx, topk_weights, is_token_in_rank, num_tokens_per_expert,
            num_worst_tokens=num_worst_tokens, in_place=in_place, num_sms=num_sms or self.num_sms,
        )  # fmt: skip

    def dispatch_cached(
        self, x: Tensor, scales: Tensor | None, handle: EpHandle, *, num_sms: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """recv_x (m, H) and recv_scales of new rows that go the way of an earlier dispatch; no CPU wait.

        x, scales: as for dispatch, with that dispatch's n, but any H and dtype.
        """
        first, _ = self._ready()
        self._check_cached((x, scales, *handle))
        in_place = first.holds(x)
        first.spend()
        return self._dispatch_cached(x, scales, handle, in_place=in_place, num_sms=num_sms or self.num_sms)

    def combine(
        self,
        y: Tensor,
        handle: EpHandle,
        topk_weights: Tensor | None = None,
        bias_0: Tensor | None = None,
        bias_1: Tensor | None = None,
        *,
        num_sms: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Sum each token's rows over the ranks that received it, in fp32, in rank order: cutehop.ref.ep.combine.

        y: bfloat16 (m, H), contiguous, in the order of the received rows; rows past those are not read.
        topk_weights: float32 (m, k), contiguous, summed likewise.  bias_0, bias_1: bfloat16 (n, H), contiguous, added
        first.

        Returns combined_x bfloat16 (n, H) and combined_topk_weights float32 (n, k), or None.
        """
        _, second = self._ready()
        self._check_combine((y, topk_weights, bias_0, bias_1, *handle))
        in_place = second.holds(y)
        second.spend()
        return self._combine(
            y, handle, topk_weights, bias_0, bias_1, in_place=in_place, num_sms=num_sms or self.num_sms
        )

    def dispatch_input(self, n: int, hidden: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Uninitialised (n, hidden) in the memory that peers pull from: write the tokens of the next dispatch or
        dispatch_cached there and pass it as x, and they are not copied.

        The view is good for that one call; a later one with it raises ValueError. hidden: config.hidden if None.
        """
        first, _ = self._ready()
        columns = self.config.hidden if hidden is None else hidden
        checks.check_dispatch_input(self.config, n, columns, dtype)
        self._await_readers(combine=False)
        return first.lend(n, columns, dtype)

    def combine_input(self, handle: EpHandle, hidden: int | None = None) -> Tensor:
        """Uninitialised bfloat16 (m, hidden) for the y of the next combine, as dispatch_input is for x."""
        _, second = self._ready()
        columns = self.config.hidden if hidden is None else hidden
        rows = handle.recv_src_idx.shape[0]
        checks.check_combine_input(self.config, rows, columns)
        self._await_readers(combine=True)
        return second.lend(rows, columns, torch.bfloat16)

    def release_memory(self) -> None:
        """Give the buffer's memory back; until acquire_memory() only that and destroy() are legal. Collective."""
        self._ready()
        self._inputs = None
        self._release_memory()

    def acquire_memory(self) -> None:
        """Allocate the memory again after release_memory(), without a new rendezvous. Collective."""
        self._require_open()
        check(
            self._inputs is None,
            f"buffer {self.name!r} has its memory; acquire_memory() follows release_memory()",
            RuntimeError,
        )
        self._acquire_memory()
        self._inputs = self._input_regions()

    def destroy(self) -> None:
        self._inputs = None
        super().destroy()

    destroy.__doc__ = Living.destroy.__doc__

    def _ready(self) -> tuple[InputRegion, InputRegion]:
        """Regions for x and for y, if the buffer can take a call."""
        self._require_open()
        self.check()
        if self._inputs is None:
            raise RuntimeError(f"buffer {self.name!r} has released its memory; call acquire_memory() on every rank")
        return self._inputs

    @abstractmethod
    def _input_regions(self) -> tuple[InputRegion, InputRegion]:
        """Memory for the rows of dispatch (max_tokens * x_row_bytes) and of combine (recv_rows * y_row_bytes)."""

    @abstractmethod
    def _await_readers(self, combine: bool) -> None:
        """The caller is about to write input of the next dispatch or combine: order that after peers' last reads."""

    @abstractmethod
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
        """dispatch, of checked arguments. in_place: x already lies in the region."""

    @abstractmethod
    def _dispatch_cached(
        self, x: Tensor, scales: Tensor | None, handle: EpHandle, *, in_place: bool, num_sms: int
    ) -> tuple[Tensor, Tensor | None]: ...

    @abstractmethod
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
    ) -> tuple[Tensor, Tensor | None]: ...

    @abstractmethod
    def _release_memory(self) -> None: ...

    @abstractmethod
    def _acquire_memory(self) -> None: ...


find = Buffer._registry.find
