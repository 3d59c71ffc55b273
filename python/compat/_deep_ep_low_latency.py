"""The low-latency methods of DeepEP V1's Buffer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cutehop.comm.ll_base import LowLatencyBuffer
from cutehop.comm.ll_config import MAX_TOPK, LlConfig
from cutehop.comm.ll_outputs import LlHandle, empty_combined
from cutehop.comm.meeting import Meeting
from cutehop.cute_kernels.errors import check

from ._deep_ep_capacity import Asked
from ._deep_ep_events import CommStream, EventOverlap

HANDLE_PARTS = 8  # V1's five, then what combine needs here


class Hook:
    """Receives what a call with return_recv_hook has sent, on the stream that was current in that call. For one use."""

    def __init__(self, device: torch.device, receive: Callable[[], object]) -> None:
        self._module = torch.get_device_module(device)
        self._stream = self._module.current_stream(device)
        self._receive: Callable[[], object] | None = receive

    def __call__(self) -> None:
        """RuntimeError for a second call."""
        check(self._receive is not None, "hook: was called; call the hook of each operation once", RuntimeError)
        assert self._receive is not None
        with self._module.stream(self._stream):
            self._receive()
        self._receive = None  # and with it the tensors that it kept


class LowLatency:
    """Dispatch to experts and combine from them, for a few tokens per rank, in V1's conventions.

    All sizes are those of the first dispatch, which makes the memory: a collective exchange among the ranks, once, that
    cannot happen inside a CUDA graph. A call of other sizes raises; several Buffers may be alive.

    Beyond V1: any hidden that is a multiple of 128, 1..16 choices, rows in the order of their source rank and token;
    three operations may be outstanding (V1: two, in order), a fourth raises; nothing needs cleaning, and calls of the
    normal mode may come between.
    """

    group: torch.distributed.ProcessGroup
    group_size: int
    low_latency_mode: bool
    enable_shrink: bool
    _asked: Asked
    _comm: CommStream
    _destroyed: bool
    _device: torch.device
    _provider: str
    _timeout_s: float
    _ll_runtime: LowLatencyBuffer | None = None
    _ll_next_x: Tensor | None = None

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Nothing: there is never anything to clean. RuntimeError, as in V1, without low_latency_mode."""
        self._check_low_latency("clean_low_latency_buffer")

    @torch.no_grad()
    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor, tuple, EventOverlap, Hook | None]:
        """Send every token's row to its experts. T is num_max_dispatch_tokens_per_rank, L the experts of a rank.

        x: bfloat16 (n, H), n <= T.  topk_idx: int64 or int32 (n, k), -1 for no choice; a token's choices differ.
        cumulative_local_expert_recv_stats: int32 (L,), the received rows are added.
        dispatch_wait_recv_cost_stats: int64 (R,), the nanoseconds (V1: cycles) waited for each rank are added.
        use_fp8: cast to e4m3, with float32 scales per 128 columns.  round_scale: of powers of two.
        use_ue8m0: these as exponents, four in an int32.
        async_finish: the returned event stands for the call.
        return_recv_hook: only send, on the current stream; the results are there when the hook has been called.

        Returns (recv_x bfloat16 (L, R * T, H), or a pair with the scales, (L, R * T, H / 128 or ceil(H / 512)), tokens
        contiguous; recv_count int32 (L,); handle; event; hook or None).
        handle: (src_info, layout_range, T, H, E) of V1, then recv_count, where each row goes home, and where the row of
            each choice is.

        As in V1, RuntimeError without low_latency_mode, for use_ue8m0 without round_scale, and for async_finish with
        return_recv_hook. ValueError, TypeError for tensors that do not fit; RuntimeError for a fourth operation
        outstanding; EpTimeoutError.
        """
        check(
            round_scale or not use_ue8m0,
            "low_latency_dispatch: use_ue8m0 without round_scale, needs it; pass round_scale=True",
            RuntimeError,
        )
        hidden = x.shape[-1]
        core = self._ll_core(
            "low_latency_dispatch", num_max_dispatch_tokens_per_rank, hidden, num_experts, topk_idx.shape[-1]
        )
        pow2, packed = use_fp8 and round_scale, use_fp8 and use_ue8m0
        recv_stats, wait_stats = cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats
        out, event, hook = self._ll_call(
            "low_latency_dispatch",
            lambda: core.dispatch(
                x,
                topk_idx,
                use_fp8=use_fp8,
                round_scale=pow2,
                use_ue8m0=packed,
                recv_stats=recv_stats,
                wait_stats=wait_stats,
            ),
            lambda: core.dispatch_send(x, topk_idx, use_fp8=use_fp8, round_scale=pow2, use_ue8m0=packed),
            lambda: core.empty_outputs(use_fp8=use_fp8, use_ue8m0=packed),
            lambda epoch, out: core.dispatch_receive(
                epoch,
                num_topk=topk_idx.shape[1],
                use_fp8=use_fp8,
                use_ue8m0=packed,
                out=out,
                recv_stats=recv_stats,
                wait_stats=wait_stats,
            ),
            (x, topk_idx, recv_stats, wait_stats),
            async_finish,
            return_recv_hook,
        )
        way = out.handle
        sizes = (num_max_dispatch_tokens_per_rank, hidden, num_experts)
        handle = (way.src_info, way.layout_range, *sizes, way.recv_count, way.send_slot, way.choice_rows)
        recv_x = out.recv_x if out.recv_scales is None else (out.recv_x, out.recv_scales)
        return recv_x, out.recv_count, handle, event, hook

    @torch.no_grad()
    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: tuple,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Hook | None]:
        """Add up the experts' rows of every token, weighted: rank by rank, on a rank in the order of its choices.

        x: bfloat16 (L, R * T, H), contiguous, in the order of the received rows; read in place, never copied first.
        topk_idx: of the dispatch, unchanged, with as many rows.  topk_weights: float32 (n, k).
        handle: of the dispatch.
        use_logfmt: rows travel in 10 bits per value where that is possible.
        zero_copy: the rows are in the tensor of the last get_next_low_latency_combine_buffer and x is not read.
        out: bfloat16 (n, H), contiguous, for the result.
        combine_wait_recv_cost_stats: int64 (R,), as dispatch_wait_recv_cost_stats.
        async_finish, return_recv_hook: as for low_latency_dispatch; return_recv_hook is the same on all ranks.

        Returns (combined_x bfloat16 (n, H), event, hook or None).

        As in V1, RuntimeError for zero_copy with use_logfmt; for zero_copy with no such tensor; the rest as for
        low_latency_dispatch.
        """
        check(
            not (zero_copy and use_logfmt),
            "low_latency_combine: zero_copy with use_logfmt, which encodes a copy; choose one",
            RuntimeError,
        )
        src_info, layout_range, tokens, hidden, num_experts, *places = _checked(handle)
        core = self._ll_core("low_latency_combine", tokens, hidden, num_experts, topk_idx.shape[-1])
        rows = x
        if zero_copy:
            if self._ll_next_x is None:
                raise RuntimeError(
                    "low_latency_combine: zero_copy without a tensor to read; write the rows to the one that "
                    "get_next_low_latency_combine_buffer(handle) returns, before each such call"
                )
            rows, self._ll_next_x = self._ll_next_x, None
        way = LlHandle(src_info, layout_range, *places)
        combined, event, hook = self._ll_call(
            "low_latency_combine",
            lambda: core.combine(
                rows,
                way,
                topk_idx,
                topk_weights,
                use_logfmt=use_logfmt,
                out=out,
                wait_stats=combine_wait_recv_cost_stats,
            ),
            lambda: core.combine_send(rows, way, num_topk=topk_idx.shape[1], use_logfmt=use_logfmt),
            lambda: empty_combined(core.config, topk_weights) if out is None else out,
            lambda epoch, out: core.combine_receive(
                epoch, topk_idx, topk_weights, use_logfmt=use_logfmt, out=out, wait_stats=combine_wait_recv_cost_stats
            ),
            (rows, topk_idx, topk_weights, way, combine_wait_recv_cost_stats),
            async_finish,
            return_recv_hook,
        )
        return combined, event, hook

    def get_next_low_latency_combine_buffer(self, handle: tuple) -> Tensor:
        """Uninitialised bfloat16 (L, R * T, H) for the rows of the next low_latency_combine with zero_copy.

        An ordinary tensor, contiguous (V1's is not): combine reads any x in place.
        """
        self._check_low_latency("get_next_low_latency_combine_buffer")
        src_info, _, _, hidden, *_ = _checked(handle)
        self._ll_next_x = src_info.new_empty((*src_info.shape, hidden), dtype=torch.bfloat16)
        return self._ll_next_x

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Mask a rank, or let it come back: a masked rank is sent nothing and not waited for, as one that did not come
        in time. cutehop.comm.ll_base.LowLatencyBuffer tells how ranks agree that one comes back.

        RuntimeError, as in V1, without enable_shrink, before the first call, since there are no masks yet, and to let a
        rank come back while an operation is outstanding.
        """
        self._ll_elastic("low_latency_update_mask_buffer").update_mask(rank_to_mask, mask)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Write 1 for each masked rank, else 0, to mask_status, int32 (R,). Errors as for an update."""
        self._ll_elastic("low_latency_query_mask_buffer").query_mask(mask_status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Let all ranks come back. Errors as for an update."""
        self._ll_elastic("low_latency_clean_mask_buffer").clean_mask()

    def _ll_call(
        self,
        name: str,
        whole: Callable[[], Any],
        send: Callable[[], Tensor],
        allocate: Callable[[], Any],
        receive: Callable[[Tensor, Any], Any],
        inputs: tuple,
        async_finish: bool,
        return_recv_hook: bool,
    ) -> tuple[Any, EventOverlap, Hook | None]:
        """The whole call on the communication stream; or the send on the current one, and the receive by the hook."""
        check(
            not (async_finish and return_recv_hook),
            f"{name}: async_finish with return_recv_hook, the hook's stream orders the receive; choose one",
            RuntimeError,
        )
        if return_recv_hook:
            epoch = send()
            out = allocate()
            return out, EventOverlap(), Hook(self._device, lambda: receive(epoch, out))
        out, event = self._comm.run(whole, inputs, None, async_finish, False)
        return out, event, None

    def _ll_core(self, name: str, tokens: int, hidden: int, num_experts: int, num_topk: int) -> LowLatencyBuffer:
        """The buffer beneath, made now if this is the first call, for calls of these sizes."""
        self._check_low_latency(name)
        if self._ll_runtime is None:
            self._ll_runtime = self._ll_made(tokens, hidden, num_experts, num_topk)
        config = self._ll_runtime.config
        given, made = (tokens, hidden, num_experts), (config.max_tokens, config.hidden, config.num_experts)
        check(
            given == made,
            f"{name}: T, hidden, experts {given}, the first call had {made}; make another Buffer for other sizes",
        )
        return self._ll_runtime

    def _ll_made(self, tokens: int, hidden: int, num_experts: int, num_topk: int) -> LowLatencyBuffer:
        check(
            self._device.type != "cuda" or not torch.cuda.is_current_stream_capturing(),
            "deep_ep.Buffer: has no low-latency memory yet and the stream is being captured; before the capture begins "
            "call low_latency_dispatch once on every rank",
            RuntimeError,
        )
        phase, mine = "first low-latency call of deep_ep.Buffer", [tokens, hidden, num_experts, num_topk]
        words = Meeting(self.group, self._timeout_s).meet(phase, json.dumps(mine))
        for rank, word in enumerate(words):
            check(
                json.loads(word) == mine,
                f"{phase}: T, hidden, experts, choices {word} on rank {rank}, {mine} here; pass the same on all ranks",
            )
        asked_topk = min(self._asked.num_topk or num_topk, MAX_TOPK)
        config = LlConfig(
            self.group_size, hidden, tokens, num_experts, max(num_topk, asked_topk), elastic=self.enable_shrink
        )
        if self._device.type == "cuda":
            from cutehop.comm.ll_buffer import CudaLowLatencyBuffer

            return CudaLowLatencyBuffer(
                self.group, config, device=self._device, provider=self._provider, timeout_s=self._timeout_s
            )
        from cutehop.comm.ll_gloo import GlooLowLatencyBuffer

        return GlooLowLatencyBuffer(self.group, config, timeout_s=self._timeout_s)

    def _ll_elastic(self, name: str) -> LowLatencyBuffer:
        check(
            self.enable_shrink,
            f"{name}: shrink mode is off; make the Buffer with enable_shrink=True",
            RuntimeError,
        )
        self._check_low_latency(name)
        if self._ll_runtime is None:
            raise RuntimeError(f"{name}: there are no masks before the first call; call low_latency_dispatch first")
        return self._ll_runtime

    def _check_low_latency(self, name: str) -> None:
        check(
            self.low_latency_mode,
            f"{name}: low_latency_mode is off; make the Buffer with low_latency_mode=True",
            RuntimeError,
        )
        check(not self._destroyed, "deep_ep.Buffer: was destroyed; make another one", RuntimeError)

    def _destroy_low_latency(self) -> None:
        if self._ll_runtime is not None:
            self._ll_runtime.destroy()
        self._ll_runtime = self._ll_next_x = None


def _checked(handle: tuple) -> tuple:
    check(
        len(handle) == HANDLE_PARTS,
        f"deep_ep: low-latency handle of {len(handle)} parts, low_latency_dispatch returns {HANDLE_PARTS}; pass the "
        "handle of a low_latency_dispatch of this package",
    )
    return handle
