"""CudaBuffer: expert-parallel dispatch and combine between the GPUs of one node, or between processes that share one.

It owns the symmetric memory and launches the kernels of comm/kernels. README.md tells the protocol.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cutehop.cute_kernels.errors import check

from . import kernels, outputs
from .base import DEFAULT_TIMEOUT_S, Buffer, Dispatched, EpHandle, InputRegion
from .kernels import config as sizes
from .layout import PHASES, EpLayout
from .memory import DEFAULT_NUM_SMS, PeerMemory, address, aligned, cuda_device, words

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .config import EpConfig

_SPIN_S = 1e-3  # then the wait for counts sleeps: the shortest sleep took 57 us, half of what a dispatch does
_NO_SCALES = (0, 0, 0, 0)
_NO_TOPK = (0, 0, 0, 0)
_NO_LISTS = (0, 0, 0, 0, 0, 0)
_ring = lru_cache(sizes.ring)


class CudaBuffer(Buffer):
    """Buffer of one rank on a GPU. All calls go on the current stream; one stream at a time uses a buffer.

    provider: "vmm" | "torch" | "nvshmem", where the symmetric memory comes from (comm/heap.py).
    timeout_s: seconds after which a kernel that waits for a peer gives up.
    num_sms bounds the CTAs that wait for peers. Rows from elsewhere may be copied by max_num_sms, which do not wait.
    """

    def __init__(
        self,
        group: ProcessGroup,
        config: EpConfig,
        *,
        device: torch.device | None = None,
        provider: str = "vmm",
        name: str | None = None,
        num_sms: int = DEFAULT_NUM_SMS,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Collective. device: None for the current one.

        ValueError for num_sms below 1 or above the GPU's, or a timeout that is not positive.
        """
        device = cuda_device(device)
        super().__init__(group, config, device, name, num_sms)
        self.layout = at = EpLayout(config)
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            self._send = kernels.send_kernel(sizes.OneVariant(), stream)
            self._receive = kernels.receive_kernel(sizes.OneVariant(), stream)
            self._combine_send = kernels.combine_send_kernel(sizes.OneVariant(), stream)
            self._combine_receive = kernels.combine_receive_kernel(sizes.OneVariant(), stream)
            self._wait = kernels.wait_kernel(sizes.OneVariant(), stream)
        self._memory = PeerMemory(group, device, provider, at.heap_bytes, at.host_bytes, at.error.offset, timeout_s)
        self.max_num_sms = self._memory.max_sms
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
        self._experts_per_rank = config.experts_per_rank
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
        stream, ctas, x = self._memory.stream(self.name), self._memory.check_sms(num_sms), aligned(x)
        ticket = 0
        if num_worst_tokens == 0:
            check(
                not torch.cuda.is_current_stream_capturing(),
                "ep_dispatch: num_worst_tokens 0 waits for the counts, which cannot be captured; pass the rows "
                "to return, ranks * the most tokens of a rank",
                RuntimeError,
            )
            ticket = self._ticket = self._ticket % 0x7FFFFFFF + 1
        per_expert, matrix, send_row = outputs.counts(is_token_in_rank, num_tokens_per_expert)
        made_lists = (
            send_row.data_ptr(), matrix.data_ptr(), per_expert.data_ptr(), self._recv_counts_address, ticket,
            num_worst_tokens,
        )  # fmt: skip
        self._launch_send(
            ctas if in_place else self._copiers(x, ctas, combine=False), stream, 1, x, is_token_in_rank.data_ptr(),
            num_tokens_per_expert.data_ptr(), in_place, scales, _topk_args(topk_idx, topk_weights), made_lists,
        )  # fmt: skip
        num_rows, choices = num_worst_tokens, []
        try:
            if ticket:
                num_rows, *choices = self._await_counts(ticket)
            recv = outputs.rows(x, scales, topk_idx, topk_weights, num_rows)
        except BaseException:
            self._memory.lose()  # peers read what was sent, and this rank will not acknowledge it
            raise
        recv_x, recv_scales, recv_topk_idx, recv_topk_weights, src_idx = recv
        recv_topk = _topk_args(recv_topk_idx, recv_topk_weights)
        self._launch_receive(ctas, stream, 1, matrix, src_idx, recv_x, recv_scales, recv_topk)
        handle = EpHandle(matrix, src_idx, is_token_in_rank, send_row)
        return Dispatched(recv_x, recv_scales, recv_topk_idx, recv_topk_weights, per_expert, choices, handle)

    def _dispatch_cached(
        self, x: Tensor, scales: Tensor | None, handle: EpHandle, *, in_place: bool, num_sms: int
    ) -> tuple[Tensor, Tensor | None]:
        stream, ctas, x = self._memory.stream(self.name), self._memory.check_sms(num_sms), aligned(x)
        recv_x, recv_scales = outputs.cached(x, scales, handle.recv_src_idx)
        senders = _in_place_ctas(ctas, scales) if in_place else self._copiers(x, ctas, combine=False)
        self._launch_send(senders, stream, 0, x, 0, 0, in_place, scales, _NO_TOPK, _NO_LISTS)
        self._launch_receive(
            ctas, stream, 0, handle.rank_prefix_matrix, handle.recv_src_idx, recv_x, recv_scales, _NO_TOPK
        )
        return recv_x, recv_scales

    def _copiers(self, rows: Tensor, ctas: int, *, combine: bool) -> int:
        """CTAs that send rows from elsewhere, which they copy: for many bytes all that may run, not only the call's,
        since a copy ends by itself. For peers that still read the memory one CTA waits before. Half of all SMs are as
        fast as memory, so a call with more gains nothing.
        """
        if rows.nbytes <= ctas * sizes.COPY_BYTES or 2 * ctas > self.max_num_sms:
            return ctas
        self._await_readers(combine)
        return self.max_num_sms

    def _launch_send(
        self,
        ctas: int,
        stream: int,
        lists: int,
        x: Tensor,
        is_token_in_rank: int,
        per_expert: int,
        in_place: bool,
        scales: Tensor | None,
        topk: tuple[int, ...],
        made_lists: tuple[int, ...],
    ) -> None:
        """In launch order of kernels.send.SendArgs. made_lists: from send_row to out_rows; ints are addresses."""
        n, columns = x.shape
        self._send.launch(
            (ctas, 1, 1),
            stream,
            *self._memory.group_args,
            lists,
            n,
            is_token_in_rank,
            per_expert,
            self._experts_per_rank,
            0 if in_place else x.data_ptr(),
            columns * x.itemsize,
            *(_NO_SCALES if scales is None else (scales.data_ptr(), scales.shape[1], *scales.stride())),
            *topk,
            *made_lists,
            *self._send_regions,
        )

    def _launch_receive(
        self,
        ctas: int,
        stream: int,
        lists: int,
        matrix: Tensor,
        src_idx: Tensor,
        x: Tensor,
        scales: Tensor | None,
        topk: tuple[int, ...],
    ) -> None:
        """In launch order of kernels.receive.ReceiveArgs. x, scales, topk: what arrives."""
        num_rows, columns = x.shape
        row_bytes = columns * x.itemsize
        self._receive.launch(
            (ctas, 1, 1),
            stream,
            *self._memory.group_args,
            lists,
            matrix.data_ptr(),
            src_idx.data_ptr(),
            num_rows,
            x.data_ptr(),
            row_bytes,
            *_ring(row_bytes, sizes.RING_BYTES, ctas * sizes.MOVERS),
            *((0, 0) if scales is None else (scales.data_ptr(), scales.shape[1])),
            *topk,
            *self._receive_regions,
        )

    def _await_counts(self, ticket: int) -> list[int]:
        """Rows that this rank receives, then the choices of each local expert, once the kernel has told them."""
        counts, start = self._recv_counts, time.monotonic()
        # The kernel gives up first, after two waits at most.
        deadline = start + 2 * self._memory.timeout_s + 10
        while not (counts[0] >> 32 == ticket and all(word >> 32 == ticket for word in counts)):
            now = time.monotonic()
            if now < start + _SPIN_S:
                continue
            self.check()
            if now > deadline:
                raise RuntimeError(
                    f"buffer {self.name!r}: the kernel that counts rows has not run; something before it blocks the "
                    "stream"
                )
            time.sleep(0)  # lets other threads run
        return [word & 0xFFFFFFFF for word in counts]

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
        stream, ctas, y = self._memory.stream(self.name), self._memory.check_sms(num_sms), aligned(y)
        matrix = handle.rank_prefix_matrix.data_ptr()
        row_bytes = y.shape[1] * y.itemsize
        topk = 0 if topk_weights is None else topk_weights.shape[1]
        combined_x, combined_weights = outputs.combined(y, topk_weights, handle.is_token_in_rank)
        biases = [aligned(bias) for bias in (bias_0, bias_1) if bias is not None]
        sends = not in_place or topk_weights is not None  # else there is nothing to copy
        if sends:
            self._combine_send.launch(
                (ctas if in_place else self._copiers(y, ctas, combine=True), 1, 1),
                stream,
                *self._memory.group_args,
                matrix,
                0 if in_place else y.data_ptr(),
                row_bytes,
                address(topk_weights),
                topk,
                self.config.recv_rows,
                *self._combine_regions,
            )
        self._combine_receive.launch(
            (ctas, 1, 1),
            stream,
            *self._memory.group_args,
            int(not sends),
            self.config.recv_rows,
            matrix,
            handle.send_row.data_ptr(),
            combined_x.shape[0],
            combined_x.data_ptr(),
            row_bytes,
            *_ring(row_bytes, sizes.TEAM_RING_BYTES, ctas * sizes.TEAMS),
            *[bias.data_ptr() for bias in biases],
            *(0,) * (2 - len(biases)),
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


def _in_place_ctas(ctas: int, aside: Tensor | None) -> int:
    """CTAs that send rows which lie in the memory already: with nothing to copy one is enough."""
    return 1 if aside is None else ctas


def _topk_args(topk_idx: Tensor | None, topk_weights: Tensor | None) -> tuple[int, ...]:
    """Addresses, size of an id, choices of a token."""
    if topk_idx is None or topk_weights is None:
        return _NO_TOPK
    return topk_idx.data_ptr(), topk_idx.itemsize, topk_weights.data_ptr(), topk_idx.shape[1]
