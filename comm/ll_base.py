"""LowLatencyBuffer: what every low-latency buffer does, whatever moves the bytes, and the registry that ops find it in.

Every operation, a dispatch or a combine, is a send and later a receive. The send returns the operation's epoch, a
tensor, which is all that the receive needs to find its data; between the two nothing of this rank runs. A subclass
moves the rows (the methods with one underscore that are abstract here); this class checks arguments, allocates outputs
and counts operations.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cutehop.cute_kernels.errors import check

from . import ll_checks as checks
from .checks import Once
from .living import Living, Registry
from .ll_config import MAX_OUTSTANDING, SLOTS, LlConfig
from .ll_outputs import LlDispatched, LlHandle, empty_combined, empty_dispatched

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LowLatencyBuffer(Living[LlConfig]):
    """Dispatch and combine for few tokens per rank. All ranks of the group make the same sends in the same order and
    receive each, in any order, a rank without tokens too; k and the options of a call are equal on all of them.

    At most 3 operations may be sent and not yet received, and each is received before the fourth send after its own,
    which uses its memory. Nothing ever needs cleaning.
    T is config.max_tokens, H config.hidden, E config.num_experts, L = E / R.

    With config.elastic a wait for a peer that expires masks the peer: now and until it is unmasked it is sent nothing
    and what it sends is not awaited. Its tokens do not exist, the choices of its experts contribute nothing. Each rank
    has its own mask; a rank that learns that it is masked masks the other in turn. Between a dispatch and its combine
    a rank may be masked, but not unmasked. A rank comes back when the ranks agree: all wait until their work on this
    buffer is done, meet by means of their own, unmask each other, meet again and go on; the numbers of operations that
    they have made meanwhile need not be equal.

    Errors of every method: RuntimeError after destroy(), EpTimeoutError (a RuntimeError) once a wait for a peer has
    expired without config.elastic, TypeError and ValueError for arguments.
    """

    _mode = "LowLatencyBuffer"
    _registry: Registry[LowLatencyBuffer] = Registry("low-latency buffer", "ll")

    def __init__(
        self, group: ProcessGroup, config: LlConfig, device: torch.device, name: str | None = None, num_sms: int = 0
    ) -> None:
        """name: None for one that is free."""
        super().__init__(group, config, device, name, num_sms)
        self._like = torch.empty(0, device=device)  # outputs are allocated where it lies
        self._check_dispatch_send = Once(checks.check_dispatch_send, config, device)
        self._check_dispatch_receive = Once(checks.check_dispatch_receive, config, device)
        self._check_stats = Once(checks.check_stats, config, device)
        self._check_outputs = Once(checks.check_outputs, config, device)
        self._check_combine_send = Once(checks.check_combine_send, config, device)
        self._check_combine_receive = Once(checks.check_combine_receive, config, device)
        self._check_combine_inputs = Once(checks.check_combine_inputs, config, device)
        self._sends = 0
        self._outstanding: dict[int, tuple[int, Tensor]] = {}  # by address of the epoch: number of the send, epoch

    @property
    def outstanding(self) -> int:
        """Operations sent and not yet received. Replays of CUDA graphs do not count: a graph, or graphs that replay
        together, hold each send and its receive."""
        return len(self._outstanding)

    def dispatch_send(
        self, x: Tensor, topk_idx: Tensor, *, use_fp8: bool = True, round_scale: bool = False, use_ue8m0: bool = False
    ) -> Tensor:
        """Send every token to the ranks of its experts. Returns the epoch, int32 (1,) on the buffer's device.

        x: bfloat16 (n, H), n <= T, contiguous.
        topk_idx: int64 or int32 (n, k), contiguous; an id outside [0, E) is no choice.
        use_fp8: rows travel and arrive as e4m3 with a scale per 128 columns, as cutehop.ref.ep_ll.quantize has it.
        round_scale: scales are powers of two.  use_ue8m0: they are, and arrive as packed exponents. With use_fp8 only.

        RuntimeError if 3 operations are outstanding, or the one sent 4 sends before.
        """
        self._ready()
        self._check_dispatch_send((x, topk_idx), use_fp8, round_scale, use_ue8m0)
        self._check_room("ep_ll_dispatch_send")
        epoch = self._dispatch_send(x, topk_idx, use_fp8=use_fp8, round_scale=round_scale, use_ue8m0=use_ue8m0)
        return self._sent(epoch)

    def dispatch_receive(
        self,
        epoch: Tensor,
        *,
        num_topk: int,
        use_fp8: bool = True,
        use_ue8m0: bool = False,
        out: LlDispatched | None = None,
        recv_stats: Tensor | None = None,
        wait_stats: Tensor | None = None,
    ) -> LlDispatched:
        """The rows of all ranks' tokens that chose an expert of this rank.

        epoch: of dispatch_send.  num_topk, use_fp8, use_ue8m0: k and the options of the send.
        out: what empty_outputs returned for these options, to be filled; None allocates it.
        recv_stats: int32 (L,), recv_count is added to it.
        wait_stats: int64 (R,), the nanoseconds that each rank was waited for are added to it.
        """
        self._ready()
        self._check_dispatch_receive((epoch,), num_topk)
        self._check_stats((recv_stats, wait_stats))
        if out is None:
            out = self.empty_outputs(use_fp8=use_fp8, use_ue8m0=use_ue8m0)
        else:
            self._check_outputs((out.recv_x, out.recv_scales), use_fp8, use_ue8m0)
        self._check_outstanding("ep_ll_dispatch_recv", epoch)
        self._dispatch_receive(epoch, out, num_topk=num_topk, recv_stats=recv_stats, wait_stats=wait_stats)
        del self._outstanding[epoch.data_ptr()]
        return out

    def empty_outputs(self, *, use_fp8: bool = True, use_ue8m0: bool = False) -> LlDispatched:
        """Uninitialised `out` of dispatch_receive, for callers that pass the tensors on before they are filled."""
        return empty_dispatched(self.config, self._like, use_fp8, use_ue8m0)

    def combine_send(self, y: Tensor, handle: LlHandle, *, num_topk: int, use_logfmt: bool = False) -> Tensor:
        """Send the experts' outputs home. Returns the epoch, int32 (1,) on the buffer's device.

        y: bfloat16 (L, R * T, H), contiguous, in the order of the received rows; rows past those are not read.
        handle, num_topk: of the dispatch.
        use_logfmt: rows travel as cutehop.ref.ep_ll.logfmt_encode has it, in 10 bits per value where that is possible.

        RuntimeError if 3 operations are outstanding, or the one sent 4 sends before.
        """
        self._ready()
        self._check_combine_send((y, *handle), num_topk)
        self._check_room("ep_ll_combine_send")
        epoch = self._combine_send(y, handle, num_topk=num_topk, use_logfmt=use_logfmt)
        return self._sent(epoch)

    def combine_receive(
        self,
        epoch: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        *,
        use_logfmt: bool = False,
        out: Tensor | None = None,
        wait_stats: Tensor | None = None,
    ) -> Tensor:
        """Every token's sum of its experts' rows, weighted: bfloat16 (n, H), `out` if it is given.

        epoch, use_logfmt: of combine_send.
        topk_idx: of the dispatch, unchanged, with as many rows.  topk_weights: float32 (n, k), contiguous.
        out: bfloat16 (n, H), contiguous; None allocates it.
        wait_stats: as for dispatch_receive.
        """
        self._ready()
        self._check_combine_receive((epoch, topk_idx, topk_weights, out, wait_stats))
        self._check_outstanding("ep_ll_combine_recv", epoch)
        if out is None:
            out = empty_combined(self.config, topk_weights)
        self._combine_receive(epoch, topk_idx, topk_weights, out, use_logfmt=use_logfmt, wait_stats=wait_stats)
        del self._outstanding[epoch.data_ptr()]
        return out

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        *,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        out: LlDispatched | None = None,
        recv_stats: Tensor | None = None,
        wait_stats: Tensor | None = None,
    ) -> LlDispatched:
        """dispatch_send and its dispatch_receive; on a GPU in one launch, which takes less time than two."""
        self._ready()
        self._check_dispatch_send((x, topk_idx), use_fp8, round_scale, use_ue8m0)
        self._check_stats((recv_stats, wait_stats))
        if out is None:
            out = self.empty_outputs(use_fp8=use_fp8, use_ue8m0=use_ue8m0)
        else:
            self._check_outputs((out.recv_x, out.recv_scales), use_fp8, use_ue8m0)
        self._check_room("ep_ll_dispatch")
        self._sends += 1
        self._dispatch(
            x, topk_idx, out, round_scale=round_scale or use_ue8m0, recv_stats=recv_stats, wait_stats=wait_stats
        )
        return out

    def combine(
        self,
        y: Tensor,
        handle: LlHandle,
        topk_idx: Tensor,
        topk_weights: Tensor,
        *,
        use_logfmt: bool = False,
        out: Tensor | None = None,
        wait_stats: Tensor | None = None,
    ) -> Tensor:
        """combine_send and its combine_receive; on a GPU in one launch, which takes less time than two.

        All ranks call this, or all call its two halves.
        topk_idx: of the dispatch, unchanged, with as many rows.
        """
        self._ready()
        self._check_combine_send((y, *handle), topk_idx.shape[1])
        self._check_combine_inputs((topk_idx, topk_weights, out, wait_stats))
        self._check_room("ep_ll_combine")
        self._sends += 1
        if out is None:
            out = empty_combined(self.config, topk_weights)
        self._combine(y, handle, topk_idx, topk_weights, out, use_logfmt=use_logfmt, wait_stats=wait_stats)
        return out

    def update_mask(self, rank: int, masked: bool) -> None:
        """Mask a rank, or let it come back.

        RuntimeError without config.elastic, and to let one come back while an operation is outstanding; ValueError for
        this rank itself or one that does not exist.
        """
        self._ready_elastic("update_mask")
        check(
            0 <= rank < self.ranks and rank != self.rank,
            f"update_mask: rank {rank} on rank {self.rank} of {self.ranks}; name another rank of the group",
        )
        if not masked:
            self._check_idle("update_mask")
        self._update_mask(rank, masked)

    def query_mask(self, out: Tensor) -> None:
        """Write 1 for each masked rank and 0 for the others to `out`, int32 (R,) on the buffer's device.

        RuntimeError without config.elastic.
        """
        self._ready_elastic("query_mask")
        checks.check_mask(self.config, self.device, out)
        self._query_mask(out)

    def clean_mask(self) -> None:
        """Let all ranks come back. RuntimeError without config.elastic, and while an operation is outstanding."""
        self._ready_elastic("clean_mask")
        self._check_idle("clean_mask")
        self._clean_mask()

    def _ready(self) -> None:
        self._require_open()
        self.check()

    def _ready_elastic(self, what: str) -> None:
        self._ready()
        check(
            self.config.elastic,
            f"{what}: buffer {self.name!r} is not elastic, it has no masks; make it with LlConfig(elastic=True)",
            RuntimeError,
        )

    def _check_idle(self, what: str) -> None:
        check(
            not self._outstanding,
            f"{what}: {self.outstanding} operations are outstanding on buffer {self.name!r}, a rank comes back when "
            "there are none; receive them first (call their hooks)",
            RuntimeError,
        )

    def _check_room(self, op: str) -> None:
        sends_ago = [self._sends + 1 - number for number, _ in self._outstanding.values()]
        if len(sends_ago) >= MAX_OUTSTANDING or SLOTS in sends_ago:
            raise RuntimeError(
                f"{op}: operations sent {', '.join(map(str, sends_ago))} sends ago are outstanding on buffer "
                f"{self.name!r}, limit {MAX_OUTSTANDING} operations and {MAX_OUTSTANDING} sends; receive the oldest "
                "first (call its hook)"
            )

    def _sent(self, epoch: Tensor) -> Tensor:
        """Keeps the epoch alive until it is received, so that its address names the operation."""
        self._sends += 1
        self._outstanding[epoch.data_ptr()] = self._sends, epoch
        return epoch

    def _check_outstanding(self, op: str, epoch: Tensor) -> None:
        if epoch.data_ptr() not in self._outstanding:
            raise RuntimeError(
                f"{op}: the epoch is of no operation outstanding on buffer {self.name!r}, which has "
                f"{len(self._outstanding)}; pass the tensor that the send returned, once"
            )

    @abstractmethod
    def _dispatch_send(
        self, x: Tensor, topk_idx: Tensor, *, use_fp8: bool, round_scale: bool, use_ue8m0: bool
    ) -> Tensor:
        """dispatch_send, of checked arguments."""

    @abstractmethod
    def _dispatch_receive(
        self,
        epoch: Tensor,
        out: LlDispatched,
        *,
        num_topk: int,
        recv_stats: Tensor | None,
        wait_stats: Tensor | None,
    ) -> None:
        """Fill `out`, whose dtypes tell the options of the send."""

    @abstractmethod
    def _combine_send(self, y: Tensor, handle: LlHandle, *, num_topk: int, use_logfmt: bool) -> Tensor: ...

    @abstractmethod
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
        """Fill `out`."""

    def _dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        out: LlDispatched,
        *,
        round_scale: bool,
        recv_stats: Tensor | None,
        wait_stats: Tensor | None,
    ) -> None:
        """Both halves of a dispatch. The dtypes of `out` tell its other options."""
        use_fp8 = out.recv_scales is not None
        use_ue8m0 = out.recv_scales is not None and out.recv_scales.dtype == torch.int32
        epoch = self._dispatch_send(x, topk_idx, use_fp8=use_fp8, round_scale=round_scale, use_ue8m0=use_ue8m0)
        self._dispatch_receive(epoch, out, num_topk=topk_idx.shape[1], recv_stats=recv_stats, wait_stats=wait_stats)

    def _combine(
        self,
        y: Tensor,
        handle: LlHandle,
        topk_idx: Tensor,
        topk_weights: Tensor,
        out: Tensor,
        *,
        use_logfmt: bool,
        wait_stats: Tensor | None,
    ) -> None:
        """Both halves of a combine."""
        epoch = self._combine_send(y, handle, num_topk=topk_idx.shape[1], use_logfmt=use_logfmt)
        self._combine_receive(epoch, topk_idx, topk_weights, out, use_logfmt=use_logfmt, wait_stats=wait_stats)

    @abstractmethod
    def _update_mask(self, rank: int, masked: bool) -> None: ...

    @abstractmethod
    def _query_mask(self, out: Tensor) -> None: ...

    @abstractmethod
    def _clean_mask(self) -> None: ...


find = LowLatencyBuffer._registry.find
