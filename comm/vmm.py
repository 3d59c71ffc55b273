"""Memory of the heap provider `vmm`: physical memory from the CUDA driver, mapped by all ranks at addresses that stay.

Each rank creates its memory (cuMemCreate), exports it as a file descriptor and sends that to its peers through Unix
sockets, which are made once. `free` unmaps, so that the memory goes back to the GPU, but keeps the addresses: acquired
again, memory lies where it was, and graphs that were captured before are valid.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed import ProcessGroup

from cutehop.cute_kernels.errors import check
from cutehop.cute_kernels.jit import driver

from .heap import tensor_at

SEND_TIMEOUT_S = 10.0  # a peer's queue holds a datagram of each rank, unless its system allows fewer than 7


class VmmMemory:
    """One block of memory per rank of a group on one node, whose processes share a network namespace."""

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.rank, self.ranks, self.device = group.rank(), group.size(), device
        self._name = f"cutehop-{os.getpid()}-{secrets.token_hex(8)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + self._name)  # an abstract name: nothing is left in the file system
        self._size = 0  # of a rank's block, whole pages of the driver
        self._places: tuple[int, ...] = ()  # reserved addresses, by rank
        self._mapped: list[int] = []
        self._handle: Any = None  # of my memory, until it is mapped

    def greeting(self) -> str:
        """Where my peers send their descriptors. Nobody has sent one for the allocation that begins here."""
        for fd in self._received().values():
            os.close(fd)
        return self._name

    def allocate(self, nbytes: int, greetings: Sequence[str]) -> torch.Tensor:
        """My memory, mapped; its descriptor is on the way to all peers."""
        cuda, what = driver.bindings(), f"heap: {nbytes} bytes on {self.device}"
        properties = self._properties(cuda)
        granularity = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        page = driver.check(what, cuda.cuMemGetAllocationGranularity(properties, granularity))
        self._size = -(-nbytes // page) * page
        result = cuda.cuMemCreate(self._size, properties, 0)
        if result[0] == cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            torch.cuda.empty_cache()  # torch keeps what its tensors no longer need
            result = cuda.cuMemCreate(self._size, properties, 0)
        self._handle = driver.check(what, result)
        while len(self._places) < self.ranks:
            self._places += (int(driver.check(what, cuda.cuMemAddressReserve(self._size, 0, 0, 0))),)
        self._map(cuda, self.rank, self._handle)
        self._send(cuda, greetings)
        return tensor_at(self._places[self.rank], nbytes, self.device)

    def addresses(self) -> tuple[int, ...]:
        """All peers have sent, so nothing waits."""
        cuda = driver.bindings()
        self._release_handle(cuda)
        received = self._received()
        try:
            for rank in range(self.ranks):
                if rank == self.rank:
                    continue
                check(
                    rank in received,
                    f"heap: rank {rank}'s memory has not come; raise `ulimit -n` if this process has many files open",
                    RuntimeError,
                )
                what = f"heap: mapping rank {rank}'s memory into {self.device}"
                kind = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
                handle = driver.check(what, cuda.cuMemImportFromShareableHandle(received[rank], kind))
                try:
                    self._map(cuda, rank, handle)
                finally:
                    driver.check(what, cuda.cuMemRelease(handle))  # a mapping keeps the memory
        finally:
            for fd in received.values():
                os.close(fd)
        return self._places

    def free(self) -> None:
        cuda = driver.bindings()
        self._release_handle(cuda)
        while self._mapped:
            driver.check("heap: unmapping", cuda.cuMemUnmap(self._mapped.pop(), self._size))

    abandon = free  # a peer's mapping keeps its pages alive, so nobody has to be waited for

    def close(self) -> None:
        cuda = driver.bindings()
        for place in self._places:
            driver.check("heap: giving addresses back", cuda.cuMemAddressFree(place, self._size))
        self._places = ()
        self._socket.close()  # and with it descriptors that were never looked at

    def _properties(self, cuda: Any) -> Any:
        properties = cuda.CUmemAllocationProp()
        properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self.device.index or 0
        kind = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        properties.requestedHandleTypes = kind
        return properties

    def _map(self, cuda: Any, rank: int, handle: Any) -> None:
        """A rank's memory to its place, for kernels of this rank's GPU."""
        what, place = f"heap: mapping rank {rank}'s memory into {self.device}", self._places[rank]
        driver.check(what, cuda.cuMemMap(place, self._size, 0, handle, 0))
        self._mapped.append(place)
        access = cuda.CUmemAccessDesc()
        access.location = self._properties(cuda).location
        access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        driver.check(f"{what}; see `nvidia-smi topo -p2p r`", cuda.cuMemSetAccess(place, self._size, [access], 1))

    def _send(self, cuda: Any, greetings: Sequence[str]) -> None:
        kind = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        fd = int(driver.check("heap: export", cuda.cuMemExportToShareableHandle(self._handle, kind, 0)))
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))
        self._socket.settimeout(SEND_TIMEOUT_S)
        try:
            for rank, name in enumerate(greetings):
                if rank != self.rank:
                    self._socket.sendmsg([bytes([self.rank])], [rights], 0, "\0" + name)
        except OSError as error:
            raise RuntimeError(
                f"heap: rank {rank} cannot be reached through Unix sockets ({error}); the ranks' processes need one "
                "network namespace (containers: share the host's), or pass provider='torch'"
            ) from error
        finally:
            os.close(fd)

    def _received(self) -> dict[int, int]:
        """Descriptors that have come, by rank. One for which this process has no room is lost."""
        received: dict[int, int] = {}
        self._socket.settimeout(0.0)
        while True:
            try:
                words, fds, _, _ = socket.recv_fds(self._socket, 1, 1)
            except BlockingIOError:
                return received
            received.update(zip(words, fds))

    def _release_handle(self, cuda: Any) -> None:
        if self._handle is not None:
            driver.check("heap: release", cuda.cuMemRelease(self._handle))
            self._handle = None
