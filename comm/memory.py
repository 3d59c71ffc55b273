"""PeerMemory: what every buffer on GPUs has: symmetric memory, and the error record of its kernels."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cutehop.cute_kernels.errors import check

from .errors import EpTimeoutError
from .heap import open_heap
from .layout import ERROR_WORDS, PHASES
from .meeting import Meeting

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.distributed import ProcessGroup

    from cutehop.cute_kernels.jit import Kernel

DEFAULT_NUM_SMS = 16


class PeerMemory:
    """Memory of one rank that all its peers can address, and host memory that its own kernels write.

    local: the symmetric memory, uint8. host: pinned, uint8.
    group_args: the kernels' first parameters (kernels.verbs.Group).
    """

    def __init__(
        self,
        group: ProcessGroup,
        device: torch.device,
        provider: str,
        nbytes: int,
        host_bytes: int,
        error_offset: int,
        timeout_s: float,
        transport: str = "p2p",
        one_node: bool = True,
    ) -> None:
        """Collective. error_offset: of the error record in the host memory. ValueError for timeout_s <= 0.

        transport: "nvshmem": kernels see 0 for the memory of all peers, mapped or not. one_node: as for the heap.
        """
        check(timeout_s > 0, f"Buffer: timeout_s {timeout_s}, must be positive; give peers time to arrive")
        self.rank, self.ranks, self.device, self.timeout_s = group.rank(), group.size(), device, timeout_s
        properties = torch.cuda.get_device_properties(device)
        neighbours = Meeting(group, timeout_s).meet("heap open", str(properties.uuid))
        # A kernel that waits for a peer holds its SMs: ranks on one GPU need room for all at once.
        self._sharers = neighbours.count(str(properties.uuid))
        self._num_sms = properties.multi_processor_count
        self.max_sms = self._num_sms // self._sharers
        self._lost = False
        self.host = torch.zeros(host_bytes, dtype=torch.uint8, pin_memory=True)
        self._error = words(self.host, error_offset, len(ERROR_WORDS))
        self._error_address = self.host.data_ptr() + error_offset
        self._transport = transport
        self._heap = open_heap(provider, group, nbytes, device, timeout_s, one_node)
        self._bases = torch.empty(self.ranks, dtype=torch.int64, device=device)
        self._map()

    def _map(self) -> None:
        """The heap comes zeroed on all ranks, as flags and counters have to be."""
        bases, timeout_ns = self._heap.bases, int(self.timeout_s * 1e9)
        if self._transport == "nvshmem":
            bases = tuple(base if rank == self.rank else 0 for rank, base in enumerate(bases))
        self._bases.copy_(torch.tensor(bases))
        pointers = (self._bases.data_ptr(), bases[self.rank], self._error_address)
        self.group_args = (*pointers, timeout_ns, self.rank, self.ranks)

    @property
    def local(self) -> Tensor:
        return self._heap.local

    @property
    def shares_gpu(self) -> bool:
        return self._sharers > 1

    def admit(self, kernels: Iterable[Kernel]) -> int:
        """Let these kernels call NVSHMEM, whose heap this is; the queue pair that they shall use."""
        world = self._heap.nvshmem()
        for kernel in kernels:
            world.admit(int(kernel.library))
        return world.queue()

    def check(self, name: str) -> None:
        """Raise what a kernel of buffer `name` has recorded: EpTimeoutError, or RuntimeError for too many rows."""
        if self._lost:
            raise RuntimeError(f"buffer {name!r}: a call ended half way; destroy the buffer and make another")
        if not self._error[0]:
            return
        _, peer, phase, expected, got, waited_ns = self._error
        if PHASES[phase] == "rows":
            raise RuntimeError(
                f"buffer {name!r}: rank {peer} receives {expected} rows, the limit is {got}; the call is lost. "
                "Destroy the buffer, make one with a larger max_recv_tokens, or pass num_worst_tokens >= ranks * tokens"
            )
        raise EpTimeoutError(self.rank, peer, PHASES[phase], expected, got, waited_ns / 1e9)

    def stream(self, name: str) -> int:
        """The current stream. RuntimeError unless the memory's device is current."""
        index, current = self.device.index, torch._C._cuda_getDevice()
        if current != index:
            raise RuntimeError(
                f"buffer {name!r} is on {self.device}, the current device is cuda:{current}; make its device current"
            )
        return torch._C._cuda_getCurrentRawStream(index)

    def check_sms(self, num_sms: int) -> int:
        """num_sms, or ValueError if the GPU has not as many for each rank on it."""
        if not 1 <= num_sms <= self.max_sms:
            raise ValueError(
                f"Buffer: num_sms {num_sms}, supported 1..{self.max_sms}; the GPU has {self._num_sms} SMs for "
                f"{self._sharers} ranks"
            )
        return num_sms

    def lose(self) -> None:
        """Every later call raises: this rank has left one half way, which its peers cannot know."""
        self._lost = not self._error[0]

    def release(self) -> None:
        self._heap.release()

    def acquire(self) -> None:
        self._heap.acquire()
        self._map()

    def destroy(self) -> None:
        try:
            self._heap.destroy()
        except EpTimeoutError:
            # After a failed call peers may be gone, and this rank's memory is free either way.
            if not (self._error[0] or self._lost):
                raise


def cuda_device(device: torch.device | str | None) -> torch.device:
    """The device, for None and "cuda" the current GPU with its index."""
    chosen = torch.device("cuda" if device is None else device)
    return torch.device("cuda", torch.cuda.current_device()) if chosen == torch.device("cuda") else chosen


def words(memory: Tensor, offset: int, count: int) -> ctypes.Array[ctypes.c_int64]:
    """64-bit words of host memory that the GPU writes; a slice of them is a list of ints."""
    return (ctypes.c_int64 * count).from_address(memory.data_ptr() + offset)


def address(tensor: Tensor | None) -> int:
    """0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def aligned(rows: Tensor) -> Tensor:
    """The rows, or a copy of them that begins at a multiple of 16 bytes, as 16-byte loads need."""
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()
