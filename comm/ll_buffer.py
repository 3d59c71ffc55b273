"""CudaLowLatencyBuffer: dispatch and combine for few tokens, pushed to the GPUs of one node, or of processes that share
one.

It owns the symmetric memory and launches the kernels comm/kernels/ll_*. README.md tells the protocol.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import kernels
from .base import DEFAULT_TIMEOUT_S
from .kernels import config as sizes
from .ll_base import LlDispatched, LlHandle, LowLatencyBuffer
from .ll_config import LlLayout
from .memory import DEFAULT_NUM_SMS, PeerMemory, address, aligned

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .ll_config import LlConfig

BF16, F32_SCALES, POW2_SCALES, UE8M0_SCALES = range(4)  # of rows on the wire; kernels.ll_dispatch_send has the same


class CudaLowLatencyBuffer(LowLatencyBuffer):
    """Low-latency buffer of one rank on a GPU. One stream at a time uses a buffer, hooks included.

    provider: "torch" | "nvshmem", where the symmetric memory comes from (comm/heap.py).
    timeout_s: seconds after which a kernel that waits for a peer gives up, or masks it if config.elastic.
    """

    def __init__(
        self,
        group: ProcessGroup,
        config: LlConfig,
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
        self.layout = at = LlLayout(config)
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            self._send = kernels.ll_dispatch_send_kernel(sizes.LlDispatchSendConfig(), stream)
            self._receive = kernels.ll_dispatch_receive_kernel(sizes.LlDispatchReceiveConfig(), stream)
            self._send_home = kernels.ll_combine_send_kernel(sizes.LlCombineSendConfig(), stream)
            self._receive_home = kernels.ll_combine_receive_kernel(sizes.LlCombineReceiveConfig(), stream)
        self._memory = PeerMemory(group, device, provider, at.heap_bytes, at.host_bytes, at.error.offset, timeout_s)
        self._memory.check_sms(num_sms)
        # The last parameters of the kernels: the same in all calls.
        data, elastic, local = (config.slot_bytes, at.data.offset), int(config.elastic), config.experts_per_rank
        records = (at.counts.item_bytes, config.head_bytes, config.record_bytes, *data)
        self._send_args = (elastic, config.num_experts, local, config.max_tokens, *records)
        self._receive_args = (elastic, local, config.max_tokens, config.max_topk, *records)
        self._send_home_args = (elastic, local, config.max_tokens, config.max_topk, *data)
        self._receive_home_args = (elastic, config.num_experts, local, config.max_topk, *data)
        self._tokens = config.max_tokens  # of the last dispatch
        self._opened()

    def check(self) -> None:
        self._memory.check(self.name)

    def _dispatch_send(
        self, x: Tensor, topk_idx: Tensor, *, use_fp8: bool, round_scale: bool, use_ue8m0: bool
    ) -> Tensor:
        stream, x = self._memory.stream(self.name), aligned(x)
        tokens, topk = topk_idx.shape
        epoch = topk_idx.new_empty((1,), dtype=torch.int32)
        self._tokens = tokens
        wire = BF16
        if use_fp8:
            wire = UE8M0_SCALES if use_ue8m0 else POW2_SCALES if round_scale else F32_SCALES
        ctas, teams = sizes.ll_teams(tokens, self.num_sms, self.config.record_bytes)
        self._send.launch(
            (ctas, 1, 1),
            stream,
            *self._memory.group_args,
            x.data_ptr(),
            topk_idx.data_ptr(),
            topk_idx.itemsize,
            tokens,
            topk,
            self.config.hidden,
            wire,
            teams,
            epoch.data_ptr(),
            *self._send_args,
            smem_bytes=self._send.bundle.smem_bytes - sizes.LL_STAGE_BYTES + teams * self.config.record_bytes,
        )
        return epoch

    def _dispatch_receive(
        self,
        epoch: Tensor,
        out: LlDispatched,
        *,
        num_topk: int,
        recv_stats: Tensor | None,
        wait_stats: Tensor | None,
    ) -> None:
        row_bytes = self.config.hidden * out.recv_x.itemsize
        scale_words = 0 if out.recv_scales is None else out.recv_scales.shape[2]
        handle = out.handle
        warps = sizes.ll_copy_warps(row_bytes, scale_words)
        # Other ranks' tokens are not known here; as many as mine is the best guess, and only a matter of speed.
        ctas = min(self.num_sms, -(-self.ranks * max(self._tokens, 1) // warps))
        self._receive.launch(
            (ctas, 1, 1),
            self._memory.stream(self.name),
            *self._memory.group_args,
            epoch.data_ptr(),
            num_topk,
            row_bytes,
            scale_words,
            warps,
            out.recv_x.data_ptr(),
            address(out.recv_scales),
            out.recv_count.data_ptr(),
            handle.layout_range.data_ptr(),
            handle.src_info.data_ptr(),
            handle.send_slot.data_ptr(),
            address(recv_stats),
            address(wait_stats),
            *self._receive_args,
            smem_bytes=self._receive.bundle.smem_bytes
            - sizes.LL_COPY_BYTES
            + warps * sizes.ll_record_bytes(row_bytes, scale_words),
        )

    def _combine_send(self, y: Tensor, handle: LlHandle, *, num_topk: int, use_logfmt: bool) -> Tensor:
        if use_logfmt:
            raise NotImplementedError("ep_ll_combine_send: use_logfmt is not supported on CUDA; send bfloat16 rows")
        stream, y = self._memory.stream(self.name), aligned(y)
        epoch = handle.recv_count.new_empty((1,))
        row_bytes = self.config.row_bytes
        rows = max(self._tokens, 1) * num_topk  # if experts are chosen evenly
        self._send_home.launch(
            (min(self.num_sms, -(-rows // sizes.LL_RINGS)), 1, 1),
            stream,
            *self._memory.group_args,
            y.data_ptr(),
            handle.recv_count.data_ptr(),
            handle.send_slot.data_ptr(),
            row_bytes,
            *sizes.ring(row_bytes, sizes.LL_RING_BYTES),
            epoch.data_ptr(),
            *self._send_home_args,
        )
        return epoch

    def _combine_receive(
        self, epoch: Tensor, topk_idx: Tensor, topk_weights: Tensor, out: Tensor, *, wait_stats: Tensor | None
    ) -> None:
        items = topk_idx.shape[0] * -(-self.config.hidden // 256)
        self._receive_home.launch(
            (max(1, min(self.num_sms, -(-items // sizes.LL_REDUCE_WARPS))), 1, 1),
            self._memory.stream(self.name),
            *self._memory.group_args,
            epoch.data_ptr(),
            topk_idx.data_ptr(),
            topk_idx.itemsize,
            topk_weights.data_ptr(),
            *topk_idx.shape,
            self.config.hidden,
            out.data_ptr(),
            address(wait_stats),
            *self._receive_home_args,
        )

    def _mask(self) -> Tensor:
        """int32 (R,) view of the mask, which kernels read and write."""
        begin = self.layout.mask.offset
        return self._memory.local[begin : begin + 4 * self.ranks].view(torch.int32)

    def _update_mask(self, rank: int, masked: bool) -> None:
        self._mask()[rank] = int(masked)

    def _query_mask(self, out: Tensor) -> None:
        out.copy_(self._mask())

    def _clean_mask(self) -> None:
        self._mask().zero_()

    def _destroy(self) -> None:
        self._memory.destroy()
