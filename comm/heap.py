"""SymmetricHeap: memory of equal size on every rank of a group, mapped by all of them.

Three providers. `vmm`, the default: the CUDA driver's memory, one node, any number of groups and heaps, addresses that
stay while memory is released. `torch`: torch's symmetric memory, one node. `nvshmem`: NVSHMEM's heap, one world per
process, of several nodes if asked. All work where ranks share a GPU, without a NIC and without NVLink multicast.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch.distributed import ProcessGroup

from cutehop.cute_kernels.errors import check

from .layout import ROW_ALIGN
from .meeting import Meeting

if TYPE_CHECKING:
    from .nvshmem import NvshmemMemory

PROVIDERS = ("vmm", "torch", "nvshmem")


class Memory(Protocol):
    """What a provider does for one heap. Ranks meet between the steps, so a step need not wait for others by itself."""

    def greeting(self) -> str:
        """What the other ranks have to know before they allocate; one line."""
        ...

    def allocate(self, nbytes: int, greetings: Sequence[str]) -> torch.Tensor:
        """(nbytes,) uint8, this rank's memory. greetings: of all ranks."""
        ...

    def addresses(self) -> tuple[int, ...]:
        """Every rank's memory as mapped here. All ranks have allocated, and all call this."""
        ...

    def free(self) -> None:
        """Unmaps and frees. All ranks do, and none uses the memory any more."""
        ...

    def abandon(self) -> None:
        """As `free`, but not all ranks are there: whatever can be done without them."""
        ...

    def close(self) -> None:
        """Gives up what outlives `free`. The last call; there is no memory any more."""
        ...


def open_heap(
    provider: str,
    group: ProcessGroup,
    nbytes: int,
    device: torch.device,
    timeout_s: float = 60.0,
    one_node: bool = True,
) -> SymmetricHeap:
    """Symmetric memory of `nbytes` zeroed bytes per rank; collective over `group`.

    provider: "vmm" | "torch" | "nvshmem".
    group: any backend. It must outlive the heap.
    device: a CUDA device; ranks may share one.
    timeout_s: longest wait for another rank, here and in the heap's collective methods.
    one_node: the group's ranks are on one, or ValueError. If False, which "nvshmem" alone takes, bases of peers whose
        memory is not mapped here are 0.

    Raises ValueError for arguments (also if ranks differ in them), NotImplementedError for what a provider cannot do,
    RuntimeError on every rank if one of them could not allocate or map, EpTimeoutError if one did not come.
    """
    check(
        provider in PROVIDERS,
        f"heap: provider {provider!r}, supported {'|'.join(PROVIDERS)}; one node needs only vmm",
    )
    check(nbytes > 0, f"heap: nbytes {nbytes}, must be positive; pass EpLayout.heap_bytes")
    check(device.type == "cuda", f"heap: device {device}, must be a CUDA device; without a GPU use the gloo buffer")
    check(
        one_node or provider == "nvshmem",
        f"heap: provider {provider!r}, ranks on several nodes need nvshmem; use it, or one node",
        NotImplementedError,
    )
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    memory: Memory
    if provider == "vmm":
        from .vmm import VmmMemory

        memory = VmmMemory(group, device)
    elif provider == "torch":
        memory = TorchMemory(group, device)
    else:
        from .nvshmem import NvshmemMemory  # only here, so that one node needs no NVSHMEM

        memory = NvshmemMemory(group, device, one_node)
    return SymmetricHeap(provider, group, nbytes, device, memory, timeout_s, one_node)


class SymmetricHeap:
    """Made by `open_heap`. Its collective methods are called by all ranks, in the same order.

    provider: "vmm" | "torch" | "nvshmem".
    rank, ranks: of the group.
    nbytes: of one rank.
    bases: address of every rank's memory as mapped into this rank's GPU, multiples of 1024; bases[rank] is its own.
        Empty while the memory is released.
    """

    def __init__(
        self,
        provider: str,
        group: ProcessGroup,
        nbytes: int,
        device: torch.device,
        memory: Memory,
        timeout_s: float,
        one_node: bool = True,
    ) -> None:
        self.provider = provider
        self.one_node = one_node
        self.rank = group.rank()
        self.ranks = group.size()
        self.nbytes = nbytes
        self.device = device
        self.bases: tuple[int, ...] = ()
        self._local: torch.Tensor | None = None
        self._memory = memory
        self._meeting = Meeting(group, timeout_s)
        self._destroyed = False
        try:
            self.acquire()
        except BaseException:
            self._memory.close()
            raise

    @property
    def local(self) -> torch.Tensor:
        """(nbytes,) uint8 view of this rank's memory. Views of it do not survive `release`: drop them before."""
        if self._local is None:
            raise RuntimeError("heap: its memory is released; call acquire on all ranks")
        return self._local

    def nvshmem(self) -> NvshmemMemory:
        """What NVSHMEM does for the kernels. Only with provider "nvshmem", and while there is memory."""
        from .nvshmem import NvshmemMemory

        assert isinstance(self._memory, NvshmemMemory), self.provider
        return self._memory

    def acquire(self) -> None:
        """Gets the memory (back), zeroed, with `vmm` where it was. Collective; does nothing if it is there.

        When it returns on any rank, the memory of all ranks is zeroed. Errors as for `open_heap`; after one the heap
        has no memory. It can be tried again, unless a rank did not come: then ranks are out of step.
        """
        if self._destroyed:
            raise RuntimeError("heap: destroyed; open another one")
        if self._local is not None:
            return
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "heap: memory cannot be acquired in a graph capture; acquire it before the capture begins"
            )
        greetings = self._agree()
        try:
            with self._all_or_none("heap allocate"):
                self._local = self._memory.allocate(self.nbytes, greetings)
            with self._all_or_none("heap map"):
                self.bases = self._memory.addresses()
                self._check_bases()
                self._local.zero_()
                self._synchronize()
        except BaseException:
            self._drop()
            self._memory.abandon()
            raise

    def release(self) -> None:
        """Gives the memory back to the GPU. Collective; waits for this rank's kernels; does nothing if it is not there.

        When it returns on any rank, all ranks have unmapped and freed: a physical page lives until its last mapping
        goes. If a rank does not come, EpTimeoutError is raised after this rank's part is freed as far as that can be
        done alone.
        """
        if self._local is None:
            return
        try:
            self._synchronize()
            self._meeting.meet("heap release")
        except BaseException:
            self._drop()
            self._memory.abandon()
            raise
        self._drop()
        self._memory.free()
        self._meeting.meet("heap free")

    def destroy(self) -> None:
        """Releases for good. Collective, idempotent; errors as for `release`; after one it is destroyed, too."""
        if not self._destroyed:
            self._destroyed = True
            try:
                self.release()
            finally:
                self._memory.close()

    def _agree(self) -> list[str]:
        """Ranks compare what must be equal and hear each other's greetings."""
        asked = f"{self.provider} {self.nbytes} bytes on {socket.gethostname() if self.one_node else 'any node'}"
        said = [words.partition("|") for words in self._meeting.meet("heap open", f"{asked}|{self._memory.greeting()}")]
        for rank, (theirs, _, _) in enumerate(said):
            check(
                theirs == said[0][0],
                f"heap: rank 0 asked for {said[0][0]}, rank {rank} for {theirs}; "
                "all ranks need the same provider and size, and one node",
            )
        return [greeting for _, _, greeting in said]

    @contextmanager
    def _all_or_none(self, phase: str) -> Iterator[None]:
        """If the block fails on one rank, it fails on all: none goes on to wait for one that stopped."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        text = "" if error is None else f"{type(error).__name__}: {error}".replace("\n", " ")
        failed = {rank: words for rank, words in enumerate(self._meeting.meet(phase, text)) if words}
        if error is not None:
            raise error
        if failed:
            listed = "; ".join(f"rank {rank}: {words}" for rank, words in failed.items())
            raise RuntimeError(f"{phase} of {self.nbytes} bytes failed on other ranks: {listed}")

    def _check_bases(self) -> None:
        for rank, base in enumerate(self.bases):
            check(
                base % ROW_ALIGN == 0 and (base or not self.one_node),
                f"heap: rank {rank}'s memory is mapped at {base:#x}, must be a multiple of {ROW_ALIGN} and not 0 "
                "(0 means no peer access); see `nvidia-smi topo -p2p r`",
                RuntimeError,
            )

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _drop(self) -> None:
        self._local = None
        self.bases = ()


class TorchMemory:
    """One torch symmetric memory allocation and its handle.

    The allocation bypasses the memory pool from which newer torch's `symm_mem.empty` takes by default, since a pool
    keeps what is freed. Without it, dropping tensor and handle frees: the tensor's deleter removes torch's record of
    the block, and with it and the handle go the mappings of the peers' blocks.

    torch numbers the rendezvous of a process, whatever their groups, and ranks meet under that number: a rank that has
    taken part in fewer of them than its peers would wait for ever. So where groups overlap, all their ranks have to
    take part in equally many; if not, RuntimeError says so.
    """

    rendezvous = 0  # of this process, as far as this class made them

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.group_name = group.group_name
        self.device = device
        self._tensor: torch.Tensor | None = None
        self._handle: object | None = None

    def greeting(self) -> str:
        return str(TorchMemory.rendezvous)

    def allocate(self, nbytes: int, greetings: Sequence[str]) -> torch.Tensor:
        check(
            len(set(greetings)) == 1,
            f"heap: the ranks' processes have made {', '.join(greetings)} symmetric memories so far; torch joins only "
            "processes that have made equally many. Make the missing ones, in groups of one rank",
            RuntimeError,
        )
        from torch._C._distributed_c10d import _SymmetricMemory

        self._tensor = _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, self.device)
        return self._tensor

    def addresses(self) -> tuple[int, ...]:
        from torch.distributed import _symmetric_memory as symm_mem

        assert self._tensor is not None, "allocate comes first"
        with _set_environment(TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES="1", TORCH_SYMM_MEM_DISABLE_MULTICAST="1"):
            TorchMemory.rendezvous += 1
            handle = symm_mem.rendezvous(self._tensor, self.group_name)
        self._handle = handle
        # The pointers are the blocks'; if a torch version puts something before the tensor, it does so on all ranks.
        offset = self._tensor.data_ptr() - handle.buffer_ptrs[handle.rank]
        return tuple(pointer + offset for pointer in handle.buffer_ptrs)

    def free(self) -> None:
        self._tensor = self._handle = None

    abandon = free  # a mapping keeps a peer's pages alive, so nobody has to be waited for

    def close(self) -> None:
        """Nothing outlives `free`."""


@contextmanager
def _set_environment(**values: str) -> Iterator[None]:
    """torch reads these when it maps; whatever the user set holds again afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def tensor_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """(nbytes,) uint8 view of memory that somebody else owns, addressed from `device`. Nothing is checked.

    Not through __cuda_array_interface__: for a peer's memory torch would ask the driver whose it is and run kernels on
    the peer's GPU.
    """
    storage = torch._C._construct_storage_from_data_pointer(address, device, nbytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
