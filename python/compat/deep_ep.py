"""DeepEP V1's names, signatures and conventions for its normal and low-latency modes on one node.

    import sys
    from cutehop.compat import deep_ep
    sys.modules["deep_ep"] = sys.modules["deep_ep.utils"] = deep_ep  # for code that says `from deep_ep import Buffer`

Row order, -1 and 0 conventions, event and stream rules are V1's. What differs:

* Any group of 1..8 ranks; any hidden whose rows are a multiple of 16 bytes; topk_idx int64 or int32.
* Memory is sized by tokens and not by queues. V1's constructor does not know them, so the first call settles them with
  the other ranks (num_nvl_bytes, num_max_tokens_per_rank of Buffer).
* A handle does not pin num_sms: dispatch and combine may use different numbers.
* num_worst_tokens below the true count raises and does not write out of bounds.
* A peer that does not come ends in EpTimeoutError, and the process goes on.
* On a machine without a GPU the same Buffer works over a gloo group; streams and events do nothing there.
* The low-latency methods have memory of their own and rules of their own (_deep_ep_low_latency.py).
* Internode methods raise NotImplementedError.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cutehop.comm.base import DEFAULT_TIMEOUT_S, EpHandle
from cutehop.comm.base import Buffer as CommBuffer
from cutehop.comm.memory import cuda_device
from cutehop.cute_kernels.errors import check

from . import _deep_ep_config as v1
from ._deep_ep_capacity import Asked, Sizes, check_fits, check_not_capturing, settle
from ._deep_ep_checks import (
    check_alignment,
    check_buffer_bytes,
    check_choices,
    check_group_size,
    check_layout,
    check_no_choices,
)
from ._deep_ep_config import Config
from ._deep_ep_events import CommStream, EventHandle, EventOverlap
from ._deep_ep_low_latency import LowLatency
from ._deep_ep_refused import Refused

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"]

topk_idx_t = torch.int64
Rows: TypeAlias = "Tensor | tuple[Tensor, Tensor]"


class Buffer(LowLatency, Refused):
    """Dispatch and combine among the ranks of one group; every rank makes the same calls in the same order.

    group: torch ProcessGroup of 1..8 ranks, of any backend on a GPU, gloo on a CPU.
    num_nvl_bytes: memory per rank in bytes, a multiple of 128. It becomes a capacity in tokens: as many as it has room
        for if all of them go to one rank, but no fewer than any rank brings to the first call.
    explicitly_destroy: the caller promises to call destroy() on every rank. Without it V1 frees its memory in a
        destructor, which is collective and can hang; here nothing does until runtime.destroy() on every rank.
    low_latency_mode: the low-latency methods may be called; ranks on other nodes are reached through NVSHMEM.
    enable_shrink: so may those for masks, and a rank that does not come in time is masked by them.
    num_rdma_bytes, num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric: for several nodes,
        accepted and without effect.
    comm: an MPI communicator, not supported; pass group.

    Beyond V1, by keyword. The first dispatch or combine settles what is None of the first four, which costs an exchange
    among the ranks, once, and cannot happen inside a CUDA graph; if all are given, the constructor does it.
    num_max_tokens_per_rank: most tokens that a rank dispatches in one call.
    hidden, num_topk: the largest of any call.
    num_experts: of the group.
    provider: "vmm" | "torch" | "nvshmem", who allocates the memory on a GPU.
    timeout_s: seconds that a call waits for a peer.
    device: where the tensors are; the current GPU if there is one, otherwise the CPU.

    runtime: the cutehop.comm buffer beneath, None before the first call and after destroy().

    ValueError without a group; NotImplementedError for comm or more than 8 ranks; RuntimeError, as in V1, for sizes
    that are no multiple of 128 or too large.
    """

    num_sms: int = 20

    def __init__(
        self,
        group: torch.distributed.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        use_fabric: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        *,
        num_max_tokens_per_rank: int | None = None,
        hidden: int | None = None,
        num_experts: int | None = None,
        num_topk: int | None = None,
        provider: str = "vmm",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        device: torch.device | str | None = None,
    ) -> None:
        if group is None:
            check(comm is None, "deep_ep.Buffer: comm is not supported; pass a torch ProcessGroup", NotImplementedError)
            raise ValueError("deep_ep.Buffer: group is None, needs a torch ProcessGroup; pass group")
        self.group = group
        self.rank, self.group_size = group.rank(), group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        check_group_size(self.group_size)
        check_buffer_bytes(num_nvl_bytes, num_rdma_bytes, low_latency_mode)
        self.runtime: CommBuffer | None = None
        self._destroyed = False
        self._provider, self._timeout_s = provider, timeout_s
        self._device = _device(device)
        self._comm = CommStream(self._device)
        self._asked = Asked(num_max_tokens_per_rank, hidden, num_experts, num_topk)
        if self._asked.is_complete:
            assert hidden is not None
            self._settled(Sizes(0, hidden, num_experts, num_topk))

    def destroy(self) -> None:
        """Give the memory back. Collective, may be called again; later calls of other methods raise RuntimeError.

        AssertionError, as in V1, without explicitly_destroy.
        """
        check(
            self.explicitly_destroy,
            "deep_ep.Buffer: destroy() with explicitly_destroy False; make the Buffer with explicitly_destroy=True",
            AssertionError,
        )
        self._destroyed = True
        if self.runtime is not None:
            self.runtime.destroy()
        self.runtime = None
        self._destroy_low_latency()

    @staticmethod
    def is_sm90_compiled() -> bool:
        """True: all kernels are for SM90."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """SMs of calls without a Config, of all Buffers. AssertionError, as in V1, for an odd number."""
        check(
            new_num_sms % 2 == 0,
            f"set_num_sms: {new_num_sms}, needs an even number; pass Config(num_sms) for an odd one",
            AssertionError,
        )
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event on the current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes of V1's low-latency buffer, for callers that size by it. Does not depend on num_ranks."""
        return v1.low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_experts)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """V1's table, with Buffer.num_sms. AssertionError for a group size it lacks; config=None works with any."""
        return v1.from_table(v1.DISPATCH_CHUNKS, num_ranks, Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """V1's table, with Buffer.num_sms. AssertionError for a group size it lacks; config=None works with any."""
        return v1.from_table(v1.COMBINE_CHUNKS, num_ranks, Buffer.num_sms)

    def get_comm_stream(self) -> torch.Stream:
        """The stream that the kernels run on, of high priority; on a CPU a torch.cpu.Stream, which does nothing."""
        return self._comm.stream

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: torch.Size | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Tensor:
        """The memory that peers pull this rank's tokens from, as a raw tensor; the next dispatch overwrites it.

        offset: in bytes, as V1's code has it (its text says elements); here the length shrinks by it.
        size: shape, everything if None.
        Flags and counters of the protocol are not part of it. Without an offset it serves as x of the next dispatch,
        which then copies nothing.

        ValueError if the memory ends before size; RuntimeError before the first call; NotImplementedError for
        use_rdma_buffer.
        """
        check(
            not use_rdma_buffer,
            "get_local_buffer_tensor: there is no RDMA buffer on one node; pass use_rdma_buffer=False",
            NotImplementedError,
        )
        core = self.runtime
        if core is None:
            raise RuntimeError("get_local_buffer_tensor: no memory before the first call; call dispatch first")
        view, _ = self._comm.run(lambda: core.dispatch_input(core.config.max_tokens), (), None, False, False)
        memory = view.view(-1).view(torch.uint8)[offset:]
        whole = memory[: memory.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        if size is None:
            return whole
        count = math.prod(size)
        check(
            count <= whole.numel(),
            f"get_local_buffer_tensor: size {tuple(size)}, {whole.numel()} elements are there; ask for fewer",
        )
        return whole[:count].view(size)

    @torch.no_grad()
    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """Where this rank's n tokens go. topk_idx: int64 or int32 (n, k), -1 for no choice.

        Returns num_tokens_per_rank int32 (R,), None (V1: per node), num_tokens_per_expert int32 (E,), is_token_in_rank
        bool (n, R), and the event, which holds something only with async_finish.
        RuntimeError, as in V1, for allocate_on_comm_stream without previous_event and async_finish.
        """
        (per_rank, per_expert, in_rank), event = self._comm.run(
            lambda: tuple(torch.ops.cutehop.ep_layout(topk_idx, num_experts, self.group_size)),
            (topk_idx,),
            previous_event,
            async_finish,
            allocate_on_comm_stream,
        )
        return per_rank, None, per_expert, in_rank, event

    @torch.no_grad()
    def dispatch(
        self,
        x: Rows,
        handle: tuple | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Rows, Tensor | None, Tensor | None, list[int] | None, tuple | None, EventOverlap]:
        """Send every token to the ranks of its experts, once per rank. Not recorded by autograd, as in V1.

        x: bf16 (n, H), or a pair of e4m3 (n, H) and scales (n, S), float32 or int32, of any strides.
        handle: of an earlier dispatch, to send x the same way; needs no layout and allows no topk_idx.
        num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert: of get_dispatch_layout.
        topk_idx int64 or int32 (n, k), topk_weights float32 (n, k): both or neither.
        expert_alignment: rounds the counts of the returned list up, and moves no row.
        num_worst_tokens: 0, or the number of rows to receive into, at least ranks * the most tokens of a rank. The CPU
            waits for nothing then, a CUDA graph may capture the call, and topk_idx is needed.

        Returns (recv_x as x, recv_topk_idx, recv_topk_weights, counts per local expert, handle, event): rows by source
        rank, then by token; choices numbered locally, -1 (weight 0) where not on this rank. The list is empty with
        num_worst_tokens, whose rows past the received ones have choices -1 and are otherwise undefined. All but recv_x
        and the event are None with a handle.
        handle: (rank_prefix_matrix int32 (R, R), channel_prefix_matrix and recv_channel_prefix_matrix int32 (R, 1) of
        the one channel there is, recv_src_idx int32 (rows,), is_token_in_rank, send_row int32 (n, R) in place of V1's
        send_head).

        As in V1, AssertionError for a missing layout, or routing beside a handle; RuntimeError for topk_idx without
        topk_weights or the reverse, num_worst_tokens without them, and the event rule of get_dispatch_layout.
        ValueError, TypeError for tensors that do not fit each other or the buffer; EpTimeoutError.
        """
        data, scales = x if isinstance(x, tuple) else (x, None)
        streams = previous_event, async_finish, allocate_on_comm_stream
        if handle is not None:
            check_no_choices(topk_idx, topk_weights)
            way = _unpack(handle)
            core = self._settled(Sizes.of(data, scales, None, None))
            received, event = self._comm.run(
                lambda: core.dispatch_cached(data, scales, way, num_sms=_num_sms(config, core)),
                (data, scales, way),
                *streams,
            )
            return _rows(*received), None, None, None, None, event
        check_layout(
            num_tokens_per_rank=num_tokens_per_rank,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=num_tokens_per_expert,
        )
        check_choices(topk_idx, topk_weights, num_worst_tokens)
        check_alignment(expert_alignment)
        assert num_tokens_per_rank is not None
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        core = self._settled(Sizes.of(data, scales, num_tokens_per_expert, topk_idx))
        routing = topk_idx, topk_weights, is_token_in_rank, num_tokens_per_expert
        out, event = self._comm.run(
            lambda: core.dispatch(
                data, scales, *routing, num_worst_tokens=num_worst_tokens, num_sms=_num_sms(config, core)
            ),
            (data, scales, *routing, num_tokens_per_rank),
            *streams,
        )
        counts = [-(-count // expert_alignment) * expert_alignment for count in out.num_recv_tokens_per_expert_list]
        packed = self._pack(out.handle, num_tokens_per_rank)
        return _rows(out.recv_x, out.recv_scales), out.recv_topk_idx, out.recv_topk_weights, counts, packed, event

    @torch.no_grad()
    def combine(
        self,
        x: Tensor,
        handle: tuple,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Add up each token's rows, unweighted, over the ranks that received it. Not recorded by autograd, as in V1.

        x: bf16 (rows, H) in the order of the received rows.  handle: of the dispatch.
        topk_weights: float32 (rows, k), added up likewise.
        bias: bf16 (n, H) or a pair of them, added.

        Returns (combined_x bf16 (n, H), combined_topk_weights float32 (n, k) or None, event). The sum is made in fp32
        from the biases on, in rank order, and rounded once; a token that went nowhere gets its bias, or 0.

        RuntimeError for the event rule of get_dispatch_layout; AssertionError, as in V1, for a tuple of other than two
        biases; ValueError, TypeError for tensors that do not fit each other or the buffer; EpTimeoutError.
        """
        biases = bias if isinstance(bias, tuple) else (bias, None)
        check(len(biases) == 2, f"deep_ep.combine: {len(biases)} biases, needs a tensor or two of them", AssertionError)
        way = _unpack(handle)
        tokens = len(way.is_token_in_rank)
        core = self._settled(Sizes(tokens, x.shape[-1], None, None if topk_weights is None else topk_weights.shape[-1]))
        (combined_x, combined_weights), event = self._comm.run(
            lambda: core.combine(x, way, topk_weights, *biases, num_sms=_num_sms(config, core)),
            (x, way, topk_weights, *biases),
            previous_event,
            async_finish,
            allocate_on_comm_stream,
        )
        return combined_x, combined_weights, event

    def _settled(self, call: Sizes) -> CommBuffer:
        """The buffer beneath, made now if this is the first call, with room for `call`."""
        check(not self._destroyed, "deep_ep.Buffer: was destroyed; make another one", RuntimeError)
        if self.runtime is None:
            check_not_capturing(self._device)
            ep_config = settle(self.group, self._asked, call, self.num_nvl_bytes, self._timeout_s)
            if self._device.type == "cuda":
                from cutehop.comm.buffer import CudaBuffer

                self.runtime = CudaBuffer(
                    self.group, ep_config, device=self._device, provider=self._provider, timeout_s=self._timeout_s
                )
            else:
                from cutehop.comm.gloo import GlooBuffer

                self.runtime = GlooBuffer(self.group, ep_config, timeout_s=self._timeout_s)
            self._no_offset = torch.zeros((self.group_size, 1), dtype=torch.int32, device=self.runtime.device)
        check_fits(self.runtime.config, call, self.rank)
        return self.runtime

    def _pack(self, way: EpHandle, num_tokens_per_rank: Tensor) -> tuple:
        sent = num_tokens_per_rank.unsqueeze(1)
        return way.rank_prefix_matrix, sent, self._no_offset, way.recv_src_idx, way.is_token_in_rank, way.send_row


def _unpack(handle: tuple) -> EpHandle:
    check(
        len(handle) == 6,
        f"deep_ep: handle of {len(handle)} parts, dispatch returns 6; pass the handle of a dispatch of this package",
    )
    rank_prefix_matrix, _, _, recv_src_idx, is_token_in_rank, send_row = handle
    return EpHandle(rank_prefix_matrix, recv_src_idx, is_token_in_rank, send_row)


def _rows(recv_x: Tensor, recv_scales: Tensor | None) -> Rows:
    return recv_x if recv_scales is None else (recv_x, recv_scales)


def _num_sms(config: Config | None, core: CommBuffer) -> int:
    return min(Buffer.num_sms if config is None else config.num_sms, core.max_num_sms or 1 << 30)


def _device(device: torch.device | str | None) -> torch.device:
    return cuda_device(device) if device is not None or torch.cuda.is_available() else torch.device("cpu")
