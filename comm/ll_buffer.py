"""CudaLowLatencyBuffer: dispatch and combine for few tokens, pushed to the GPUs of one node, of processes that share
one, or through NVSHMEM to those of other nodes.

It owns the symmetric memory and launches the kernels comm/kernels/ll_*. README.md tells the protocol.
"""

from __future__ import annotations

import math
import socket
from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cutehop.cute_kernels.errors import check
from cutehop.ref.ep_ll import LOGFMT_CHUNK

from . import kernels
from .base import DEFAULT_TIMEOUT_S
from .kernels import config as sizes
from .kernels.config import BF16, BOTH, F32_SCALES, POW2_SCALES, RECEIVE, SEND, UE8M0_SCALES
from .ll_base import LlDispatched, LlHandle, LowLatencyBuffer
from .ll_config import FEW_TOKENS, LlLayout
from .meeting import Meeting
from .memory import PeerMemory, address, aligned, cuda_device
from .outputs import allocator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from cutehop.cute_kernels.jit import Compiled, Kernel

    from .ll_config import LlConfig

MOST_SMS = 64  # that a buffer takes unasked
TRANSPORTS = ("auto", "p2p", "nvshmem")
RECORDS_PER_CTA = 4  # to receive: fewer make the start of a grid dear, more its work long


class CudaLowLatencyBuffer(LowLatencyBuffer):
    """Low-latency buffer of one rank on a GPU. One stream at a time uses a buffer, hooks included.

    Masks: a rank that others have masked masks them in its next call. update_mask and clean_mask wait for the stream
    and cannot be captured; a captured graph follows the masks. destroy() waits for masked ranks until the deadline.

    transport: "p2p": stores to peers' memory, which is mapped. "nvshmem": NVSHMEM's puts to all peers. "auto": p2p on
        one node; on several NVSHMEM for the peers whose memory is not mapped. NVSHMEM needs its library, and an outbox
        of LlConfig.outbox_bytes for each of 4 slots.
    provider: "vmm" | "torch" | "nvshmem", where the symmetric memory comes from (comm/heap.py) if all peers are mapped.
    timeout_s: seconds after which a kernel that waits for a peer gives up.
    """

    def __init__(
        self,
        group: ProcessGroup,
        config: LlConfig,
        *,
        device: torch.device | None = None,
        transport: str = "auto",
        provider: str = "vmm",
        name: str | None = None,
        num_sms: int | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Collective. device: None for the current one. num_sms: the most CTAs of a kernel; None for 64, or this rank's
        share of the GPU if that is less. Few tokens take fewer.

        ValueError for num_sms below 1 or above the GPU's, a timeout that is not positive, or an unknown transport.
        RuntimeError if NVSHMEM is needed and not installed.
        """
        device = cuda_device(device)
        super().__init__(group, config, device, name)
        check(timeout_s > 0, f"LowLatencyBuffer: timeout_s {timeout_s}, must be positive; give peers time to arrive")
        self.transport, one_node = _agreed(group, transport, timeout_s)
        remote = self.transport != "p2p"
        self.layout = at = LlLayout(config, remote)
        # Shared memory of a kernel for what it moves, used or not.
        self._data_bytes = {parts: sizes.ll_dispatch_data_bytes(parts) for parts in sizes.PARTS}
        if remote:
            provider = "nvshmem"
            kernels.make_remote(config.elastic)
        else:
            self._load(remote)
        self._memory = PeerMemory(
            group, device, provider, at.heap_bytes, at.host_bytes, at.error.offset, timeout_s, self.transport, one_node
        )
        self._group_args: tuple[int, ...] = self._memory.group_args
        if remote:
            self._load(remote)
            self._join_nvshmem()
        self._remember(num_sms)
        self._opened()

    def _load(self, remote: bool) -> None:
        """The kernels, by what they do. Those that call NVSHMEM come after its memory, where its world begins."""
        found: dict[tuple[Compiled, bool], dict[sizes.Parts, Kernel]] = defaultdict(dict)
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream().cuda_stream
            for function, config, parts in kernels.ll_variants(self.config.elastic, remote, self.layout.adds_up):
                found[function, config.coded][parts] = function(config, stream)
        self._dispatch_kernels = found[kernels.ll_dispatch_kernel, False]
        self._combine_kernels = [found[kernels.ll_combine_kernel, coded] for coded in (False, True)]  # by use_logfmt
        self._combine_whole = found[kernels.ll_combine_whole_kernel, False].get(BOTH)
        self._mask_kernels = found[kernels.ll_mask_kernel, False]

    def _join_nvshmem(self) -> None:
        mine = (self._dispatch_kernels, *self._combine_kernels, self._mask_kernels)
        queue = self._memory.admit([kernel for each in mine for kernel in each.values()])
        self._queue = torch.tensor([queue], dtype=torch.int32, device=self.device)
        outbox = self._memory.local.data_ptr() + self.layout.outbox.offset
        self._group_args += (outbox, self.config.outbox_bytes, self._queue.data_ptr())

    def _remember(self, num_sms: int | None) -> None:
        """What is the same in all calls."""
        config, at = self.config, self.layout
        self.num_sms = self._memory.check_sms(min(MOST_SMS, self._memory.max_sms) if num_sms is None else num_sms)
        # The last parameters of the kernels.
        data, local = (config.slot_bytes, at.data.offset), config.experts_per_rank
        records = (
            at.counts.item_bytes,
            config.head_bytes,
            config.record_bytes,
            *data,
            config.words_bytes,
            at.words.offset,
        )
        self._send_args = (config.num_experts, local, config.max_tokens, *records)
        self._receive_args = (local, config.max_tokens, config.max_topk, *records)
        self._send_home_args = (local, config.max_tokens, config.max_topk, *data)
        self._receive_home_args = (config.num_experts, local, config.max_topk, *data)
        if self._combine_whole is not None:
            sums = self._memory.local[at.sums.offset : at.sums.offset + config.sums_bytes]
            sums.view(torch.float32).fill_(-0.0)  # the kernel's mark of what has not come
            torch.cuda.current_stream(self.device).synchronize()  # calls may come on another stream
            self._whole_args = (
                int(self._memory.shares_gpu), config.num_experts, local, config.max_tokens, config.max_topk,
                at.counts.item_bytes, config.asks_bytes, at.asks.offset, at.sums.offset,
            )  # fmt: skip
        self._coding = (math.gcd(config.hidden, LOGFMT_CHUNK), config.limits_bytes)
        self._limits_offset = config.max_tokens * config.max_topk * config.row_bytes
        self._record_bytes = config.record_bytes
        self._tokens = config.max_tokens  # of the last dispatch

    def check(self) -> None:
        self._memory.check(self.name)

    def _dispatch_send(
        self, x: Tensor, topk_idx: Tensor, *, use_fp8: bool, round_scale: bool, use_ue8m0: bool
    ) -> Tensor:
        x = aligned(x)
        epoch = allocator(topk_idx)((1,), (1,), torch.int32)
        wire = _wire(use_fp8, round_scale, use_ue8m0)
        ctas, data_bytes, values = self._sending(SEND, x, topk_idx, wire, epoch)
        self._launch(self._dispatch_kernels[SEND], ctas, values, self._data_bytes[SEND] - data_bytes)
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
        ctas, data_bytes, values = self._receiving(RECEIVE, epoch, out, num_topk, recv_stats, wait_stats)
        self._launch(self._dispatch_kernels[RECEIVE], ctas, values, self._data_bytes[RECEIVE] - data_bytes)

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
        x = aligned(x)
        epoch = allocator(topk_idx)((1,), (1,), torch.int32)
        use_ue8m0 = out.recv_scales is not None and out.recv_scales.dtype == torch.int32
        wire = _wire(out.recv_scales is not None, round_scale, use_ue8m0)
        ctas, sent_bytes, sending = self._sending(BOTH, x, topk_idx, wire, epoch)
        more, received_bytes, receiving = self._receiving(BOTH, epoch, out, topk_idx.shape[1], recv_stats, wait_stats)
        unused = self._data_bytes[BOTH] - max(sent_bytes, received_bytes)
        self._launch(self._dispatch_kernels[BOTH], max(ctas, more), sending + receiving, unused)

    def _require_aligned(self, op: str, out: Tensor) -> None:
        if out.data_ptr() % 16 != 0:
            raise ValueError(
                f"{op}: out begins at address {out.data_ptr():#x}, must be a multiple of 16; allocate it by itself"
            )

    def _sending(
        self, parts: sizes.Parts, x: Tensor, topk_idx: Tensor, wire: int, epoch: Tensor
    ) -> tuple[int, int, tuple[int, ...]]:
        """CTAs, bytes of shared memory for records, and the parameters LlDispatchSendArgs."""
        tokens, topk = topk_idx.shape
        self._tokens = tokens
        ctas, teams = sizes.ll_teams(tokens, self.num_sms, self._record_bytes, self._data_bytes[parts])
        values = (
            x.data_ptr(), topk_idx.data_ptr(), topk_idx.itemsize, tokens, topk, self.config.hidden, wire, teams,
            epoch.data_ptr(), *self._send_args,
        )  # fmt: skip
        return ctas, teams * self._record_bytes, values

    def _receiving(
        self,
        parts: sizes.Parts,
        epoch: Tensor,
        out: LlDispatched,
        num_topk: int,
        recv_stats: Tensor | None,
        wait_stats: Tensor | None,
    ) -> tuple[int, int, tuple[int, ...]]:
        """CTAs, bytes of shared memory for rows, and the parameters LlDispatchReceiveArgs."""
        self._require_aligned("ep_ll_dispatch_recv", out.recv_x)
        row_bytes = self.config.hidden * out.recv_x.itemsize
        scale_words = 0 if out.recv_scales is None else out.recv_scales.shape[2]
        warps = sizes.ll_copy_warps(row_bytes, scale_words, self._data_bytes[parts])
        # Other ranks' tokens are not known here; as many as mine is the best guess, and only a matter of speed.
        records, per_cta = self.ranks * max(self._tokens, 1), RECORDS_PER_CTA
        if self._tokens <= FEW_TOKENS:
            records, per_cta = records * sizes.ll_word_pieces(row_bytes, scale_words), sizes.COPY_WARPS
        ctas = min(self.num_sms, -(-records // per_cta))
        handle = out.handle
        values = (
            epoch.data_ptr(), num_topk, row_bytes, scale_words, warps, out.recv_x.data_ptr(), address(out.recv_scales),
            out.recv_count.data_ptr(), handle.layout_range.data_ptr(), handle.src_info.data_ptr(),
            handle.send_slot.data_ptr(), handle.choice_rows.data_ptr(), address(recv_stats), address(wait_stats),
            *self._receive_args,
        )  # fmt: skip
        return ctas, warps * sizes.ll_row_bytes(row_bytes, scale_words), values

    def _launch(self, kernel: Kernel, ctas: int, values: tuple[int, ...], unused: int = 0) -> None:
        """unused: bytes of the kernel's shared memory that this launch does without."""
        stream = self._memory.stream(self.name)
        smem_bytes = kernel.bundle.smem_bytes - unused
        kernel.launch((ctas, 1, 1), stream, *self._group_args, *values, smem_bytes=smem_bytes)

    def _combine_send(self, y: Tensor, handle: LlHandle, *, num_topk: int, use_logfmt: bool) -> Tensor:
        y = aligned(y)
        epoch = allocator(y)((1,), (1,), torch.int32)
        ctas, values = self._sending_home(y, handle, num_topk, use_logfmt, epoch)
        self._launch(self._combine_kernels[use_logfmt][SEND], ctas, values)
        return epoch

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
        ctas, values = self._receiving_home(epoch, topk_idx, topk_weights, out, wait_stats)
        self._launch(self._combine_kernels[use_logfmt][RECEIVE], ctas, values)

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
        y = aligned(y)
        if self._combine_whole is not None and not use_logfmt:
            self._launch_whole(self._combine_whole, y, handle, topk_idx, topk_weights, out, wait_stats)
            return
        epoch = allocator(y)((1,), (1,), torch.int32)
        ctas, sending = self._sending_home(y, handle, topk_idx.shape[1], use_logfmt, epoch)
        more, receiving = self._receiving_home(epoch, topk_idx, topk_weights, out, wait_stats)
        self._launch(self._combine_kernels[use_logfmt][BOTH], max(ctas, more), sending + receiving)

    def _launch_whole(
        self,
        kernel: Kernel,
        y: Tensor,
        handle: LlHandle,
        topk_idx: Tensor,
        topk_weights: Tensor,
        out: Tensor,
        wait_stats: Tensor | None,
    ) -> None:
        self._require_aligned("ep_ll_combine", out)
        values = (
            y.data_ptr(), handle.choice_rows.data_ptr(), topk_idx.data_ptr(), topk_idx.itemsize,
            topk_weights.data_ptr(), *topk_idx.shape, self.config.hidden, out.data_ptr(), address(wait_stats),
            *self._whole_args,
        )  # fmt: skip
        # Other ranks' tokens are not known here; as many as mine is the best guess.
        self._launch(kernel, self._combining_ctas(topk_idx.shape[0] * max(self.ranks - 1, 1)), values)

    def _combining_ctas(self, tokens: int) -> int:
        """CTAs that add up rows of tokens."""
        items = tokens * -(-self.config.hidden // 256)
        return max(1, min(self.num_sms, -(-items // sizes.REDUCE_WARPS)))

    def _sending_home(
        self, y: Tensor, handle: LlHandle, num_topk: int, use_logfmt: bool, epoch: Tensor
    ) -> tuple[int, tuple[int, ...]]:
        """CTAs and the parameters LlCombineSendArgs."""
        row_bytes = self.config.row_bytes
        pieces = max(self._tokens, 1) * num_topk  # rows, if experts are chosen evenly
        if use_logfmt:
            pieces *= self.config.hidden // self._coding[0]
        values = (
            y.data_ptr(), handle.recv_count.data_ptr(), handle.send_slot.data_ptr(), row_bytes, *self._coding,
            *sizes.ring(row_bytes, sizes.SEND_RING_BYTES), epoch.data_ptr(), *self._send_home_args,
        )  # fmt: skip
        return min(self.num_sms, -(-pieces // sizes.RINGS)), values

    def _receiving_home(
        self, epoch: Tensor, topk_idx: Tensor, topk_weights: Tensor, out: Tensor, wait_stats: Tensor | None
    ) -> tuple[int, tuple[int, ...]]:
        """CTAs and the parameters LlCombineReceiveArgs."""
        self._require_aligned("ep_ll_combine_recv", out)
        values = (
            epoch.data_ptr(), topk_idx.data_ptr(), topk_idx.itemsize, topk_weights.data_ptr(), *topk_idx.shape,
            self.config.hidden, *self._coding, self._limits_offset, out.data_ptr(), address(wait_stats),
            *self._receive_home_args,
        )  # fmt: skip
        return self._combining_ctas(topk_idx.shape[0]), values

    def _mask(self) -> Tensor:
        """int32 (R,) view of the mask, which kernels read and write."""
        begin = self.layout.mask.offset
        return self._memory.local[begin : begin + 4 * self.ranks].view(torch.int32)

    def _update_mask(self, rank: int, masked: bool) -> None:
        bit = 1 << rank
        self._change_masks(*((bit, 0) if masked else (0, bit)))

    def _query_mask(self, out: Tensor) -> None:
        out.copy_(self._mask())

    def _clean_mask(self) -> None:
        self._change_masks(0, (1 << self.ranks) - 1 - (1 << self.rank))

    def _change_masks(self, out: int, back: int) -> None:
        """Bit r: rank r is masked, or taken back. Peers know when this returns."""
        self._launch(self._mask_kernels[sizes.MASK], 1, (out, back))
        torch.cuda.current_stream(self.device).synchronize()

    def _destroy(self) -> None:
        if self.config.elastic and self._mask().any():
            self._memory.lose()  # and do not complain that they do not come
        self._memory.destroy()


def _agreed(group: ProcessGroup, transport: str, timeout_s: float) -> tuple[str, bool]:
    """The transport, "auto" only if the ranks are on several nodes, and whether they are on one."""
    check(transport in TRANSPORTS, f"LowLatencyBuffer: transport {transport!r}, supported {'|'.join(TRANSPORTS)}")
    asked = Meeting(group, timeout_s).meet("transport", f"{transport} on {socket.gethostname()}")
    for rank, said in enumerate(asked):
        check(
            said.partition(" ")[0] == transport,
            f"LowLatencyBuffer: transport {transport!r} here, {said.partition(' ')[0]!r} on rank {rank}; pass the same",
        )
    one_node = len(set(asked)) == 1
    return "p2p" if transport == "auto" and one_node else transport, one_node or transport == "p2p"


def _wire(use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> int:
    """How rows travel."""
    if not use_fp8:
        return BF16
    return UE8M0_SCALES if use_ue8m0 else POW2_SCALES if round_scale else F32_SCALES
