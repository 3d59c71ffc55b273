"""CudaBuffer: expert-parallel dispatch and combine between the GPUs of one node, or between processes that share one.

It owns the symmetric memory and launches the kernels of comm/kernels. README.md tells the protocol.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cutehop.cute_kernels.errors import check

from . import kernels, outputs
from .base import DEFAULT_TIMEOUT_S, Buffer, Dispatched, EpHandle, InputRegion
from .kernels import config as sizes
from .layout import PHASES, EpLayout
from .memory import DEFAULT_NUM_SMS, PeerMemory, address, aligned, words

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .config import EpConfig


class CudaBuffer(Buffer):
    """Buffer of one rank on a GPU. All calls go on the current stream; one stream at a time uses a buffer.

    provider: "torch" | "nvshmem", where the symmetric memory comes from (comm/heap.py).
    timeout_s: seconds after which a kernel that waits for a peer gives up.
    """

    def __init__(
        self,
        group: ProcessGroup,
        config: EpConfig,
        *,
        device: torch.device | None = None,
        provider: str = "torch",
        name: str | None = None,
        num_sms: int = DEFAULT_NUM_SMS,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Collective. device: None for the current one.

        ValueError for num_sms below 1 or above the GPU's, or a timeout that is not positive.
        """
        device = torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device)
        super().__init__(group, config, device, name, num_sms)
        self.layout = at = EpLayout(config)
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            self._send = kernels.send_kernel(sizes.SendConfig(), stream)
            self._receive = kernels.receive_kernel(sizes.ReceiveConfig(), stream)
            self._combine_send = kernels.combine_send_kernel(sizes.CombineSendConfig(), stream)
            self._combine_receive = kernels.combine_receive_kernel(sizes.CombineReceiveConfig(), stream)
            self._wait = kernels.wait_kernel(sizes.WaitConfig(), stream)
        self._memory = PeerMemory(group, device, provider, at.heap_bytes, at.host_bytes, at.error.offset, timeout_s)
        self._memory.check_sms(num_sms)
        self._recv_counts = words(self._memory.host, at.recv_counts.offset, at.recv_counts.items)
        self._recv_counts_address = self._memory.host.data_ptr() + at.recv_counts.offset
        self._ticket = 0
        self._region_args()
        self._opened()

    def check(self) -> None:
        self._memory.check(self.name)

    def _region_args(self) -> None:
        """Kernel parameters that say where the regions are, the last ones of every kernel: the same in all calls."""
        at, config = self.layout, self.config
        lists, topk = (at.send_lists.offset, at.send_lists.item_bytes), (at.topk.offset, at.topk.item_bytes)
        rows = (*lists, *topk, at.x_scales.offset, at.x_scales.item_bytes, at.x.offset)
        counts = (at.expert_counts.offset, at.expert_counts.item_bytes)
        self._send_regions = (config.recv_rows, config.max_topk, *counts, *rows)
        self._receive_regions = (config.experts_per_rank, config.max_topk, *rows)
        self._combine_regions = (at.y_weights.offset, at.y_weights.item_bytes, at.y.offset)

    def _input_regions(self) -> tuple[InputRegion, InputRegion]:
        x, y, memory = self.layout.x, self.layout.y, self._memory.local
        return (
            InputRegion("dispatch_input", memory[x.offset : x.end]),
            InputRegion("combine_input", memory[y.offset : y.end]),
        )

    def _await_readers(self, combine: bool) -> None:
        ack, operation, phase = (
            (self.layout.combine_ack, 1, "combine_ack") if combine else (self.layout.dispatch_ack, 0, "dispatch_ack")
        )
        values = (ack.offset, self.layout.epochs.at(operation), PHASES.index(phase))
        self._wait.launch((1, 1, 1), self._memory.stream(self.name), *self._memory.group_args, *values)

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
        stream = self._memory.stream(self.name)
        ticket = 0
        if num_worst_tokens == 0:
            check(
                not torch.cuda.is_current_stream_capturing(),
                "ep_dispatch: num_worst_tokens 0 waits for the counts, which cannot be captured; pass the rows "
                "to return, ranks * the most tokens of a rank",
                RuntimeError,
            )
            ticket = self._ticket = self._ticket % 0x7FFFFFFF + 1
        counts = outputs.counts(is_token_in_rank, num_tokens_per_expert)
        x = aligned(x)
        self._launch_send(
            stream, x, scales, topk_idx, topk_weights, is_token_in_rank, num_tokens_per_expert, counts,
            ticket, num_worst_tokens, in_place, num_sms,
        )  # fmt: skip
        num_rows, choices = num_worst_tokens, []
        if ticket:
            num_rows, *choices = self._await_counts(ticket)
        rows = outputs.rows(x, scales, topk_idx, topk_weights, num_rows)
        self._launch_receive(
            stream, True, counts.rank_prefix_matrix, rows.recv_src_idx, rows.recv_x, rows.recv_scales,
            rows.recv_topk_idx, rows.recv_topk_weights, num_sms,
        )  # fmt: skip
        handle = EpHandle(counts.rank_prefix_matrix, rows.recv_src_idx, is_token_in_rank, counts.send_row)
        return Dispatched(*rows[:4], counts.num_recv_tokens_per_expert, choices, handle)

    def _dispatch_cached(
        self, x: Tensor, scales: Tensor | None, handle: EpHandle, *, in_place: bool, num_sms: int
    ) -> tuple[Tensor, Tensor | None]:
        stream, x = self._memory.stream(self.name), aligned(x)
        recv_x, recv_scales = outputs.cached(x, scales, handle.recv_src_idx)
        self._launch_send(stream, x, scales, None, None, None, None, None, 0, 0, in_place, num_sms)
        self._launch_receive(
            stream, False, handle.rank_prefix_matrix, handle.recv_src_idx, recv_x, recv_scales, None, None, num_sms
        )
        return recv_x, recv_scales

    def _launch_send(
        self,
        stream: int,
        x: Tensor,
        scales: Tensor | None,
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        is_token_in_rank: Tensor | None,
        num_tokens_per_expert: Tensor | None,
        counts: outputs.Counts | None,
        ticket: int,
        out_rows: int,
        in_place: bool,
        num_sms: int,
    ) -> None:
        """In launch order of kernels.send.SendArgs. counts: None for a cached dispatch."""
        nothing_to_copy = in_place and scales is None and counts is None
        self._send.launch(
            (1 if nothing_to_copy else self._memory.check_sms(num_sms), 1, 1),
            stream,
            *self._memory.group_args,
            int(counts is not None),
            x.shape[0],
            address(is_token_in_rank),
            address(num_tokens_per_expert),
            self.config.experts_per_rank,
            0 if in_place else x.data_ptr(),
            x.shape[1] * x.itemsize,
            address(scales),
            scales.shape[1] if scales is not None else 0,
            *(scales.stride() if scales is not None else (0, 0)),
            address(topk_idx),
            topk_idx.itemsize if topk_idx is not None else 0,
            address(topk_weights),
            topk_idx.shape[1] if topk_idx is not None else 0,
            address(counts and counts.send_row),
            address(counts and counts.rank_prefix_matrix),
            address(counts and counts.num_recv_tokens_per_expert),
            self._recv_counts_address,
            ticket,
            out_rows,
            *self._send_regions,
        )

    def _launch_receive(
        self,
        stream: int,
        lists: bool,
        matrix: Tensor,
        src_idx: Tensor,
        x: Tensor,
        scales: Tensor | None,
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        num_sms: int,
    ) -> None:
        """In launch order of kernels.receive.ReceiveArgs."""
        row_bytes = x.shape[1] * x.itemsize
        self._receive.launch(
            (self._memory.check_sms(num_sms), 1, 1),
            stream,
            *self._memory.group_args,
            int(lists),
            matrix.data_ptr(),
            src_idx.data_ptr(),
            x.shape[0],
            x.data_ptr(),
            row_bytes,
            *sizes.ring(row_bytes, sizes.RING_BYTES),
            address(scales),
            scales.shape[1] if scales is not None else 0,
            address(topk_idx),
            topk_idx.itemsize if topk_idx is not None else 0,
            address(topk_weights),
            topk_idx.shape[1] if topk_idx is not None else 0,
            *self._receive_regions,
        )

    def _await_counts(self, ticket: int) -> list[int]:
        """Rows that this rank receives, then the choices of each local expert, once the kernel has told them."""
        deadline = (
            time.monotonic() + 2 * self._memory.timeout_s + 10
        )  # the kernel gives up first, after two waits at most
        while True:
            words = self._recv_counts[:]
            if all(word >> 32 == ticket for word in words):
                return [word & 0xFFFFFFFF for word in words]
            self.check()
            check(
                time.monotonic() < deadline,
                f"buffer {self.name!r}: the kernel that counts rows has not run; something before it blocks the stream",
                RuntimeError,
            )
            time.sleep(0)  # lets other threads run

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
        stream, num_sms = self._memory.stream(self.name), self._memory.check_sms(num_sms)
        y = aligned(y)
        row_bytes = y.shape[1] * y.itemsize
        topk = topk_weights.shape[1] if topk_weights is not None else 0
        combined_x, combined_weights = outputs.combined(y, topk_weights, handle.is_token_in_rank)
        biases = [aligned(bias) for bias in (bias_0, bias_1) if bias is not None]
        self._combine_send.launch(
            (1 if in_place and topk_weights is None else num_sms, 1, 1),
            stream,
            *self._memory.group_args,
            handle.rank_prefix_matrix.data_ptr(),
            0 if in_place else y.data_ptr(),
            row_bytes,
            address(topk_weights),
            topk,
            *self._combine_regions,
        )
        self._combine_receive.launch(
            (num_sms, 1, 1),
            stream,
            *self._memory.group_args,
            handle.rank_prefix_matrix.data_ptr(),
            handle.send_row.data_ptr(),
            combined_x.shape[0],
            combined_x.data_ptr(),
            row_bytes,
            *sizes.ring(row_bytes, sizes.TEAM_RING_BYTES),
            *(biases[i].data_ptr() if i < len(biases) else 0 for i in range(2)),
            address(combined_weights),
            topk,
            *self._combine_regions,
        )
        return combined_x, combined_weights

    def _release_memory(self) -> None:
        self._memory.release()

    def _acquire_memory(self) -> None:
        self._memory.acquire()

    def _destroy(self) -> None:
        self._memory.destroy()
