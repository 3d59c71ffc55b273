"""The heap provider `vmm` between processes on a CPU: the driver's calls act on shared memory of the system instead."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from cutehop.comm.errors import EpTimeoutError
from cutehop.comm.heap import SymmetricHeap, tensor_at
from cutehop.comm.meeting import Meeting
from cutehop.comm.vmm import VmmMemory
from cutehop.cute_kernels.jit import driver

CPU = torch.device("cpu")
PAGE = 65536
NBYTES = PAGE + 1024

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
MAP_FIXED = 0x10
NO_ACCESS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class SystemMemory:
    """The part of the CUDA driver that the provider uses. Handles are descriptors of anonymous files.

    full: how many of the next creations find no memory. refuse: the rank whose memory cannot be imported here.
    """

    CUresult = SimpleNamespace(CUDA_ERROR_OUT_OF_MEMORY=2)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_RECOMMENDED=1)
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAllocationHandleType = SimpleNamespace(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)

    def __init__(self, full=0, refuse=False):
        self.full, self.refuse = full, refuse
        self.open = set()

    def CUmemAllocationProp(self):
        return SimpleNamespace(location=SimpleNamespace())

    def CUmemAccessDesc(self):
        return SimpleNamespace()

    def cuMemGetAllocationGranularity(self, properties, flags):
        return 0, PAGE

    def _opened(self, fd):
        self.open.add(fd)
        return 0, fd

    def cuMemCreate(self, size, properties, flags):
        assert size % PAGE == 0
        if self.full:
            self.full -= 1
            return 2, None
        fd = os.memfd_create("block")
        os.ftruncate(fd, size)
        return self._opened(fd)

    def cuMemExportToShareableHandle(self, handle, kind, flags):
        return 0, os.dup(handle)  # the provider's own to close

    def cuMemImportFromShareableHandle(self, fd, kind):
        return (1, None) if self.refuse else self._opened(os.dup(fd))

    def cuMemRelease(self, handle):
        self.open.remove(handle)
        os.close(handle)
        return (0,)

    def cuMemAddressReserve(self, size, alignment, address, flags):
        return 0, libc.mmap(None, size, 0, NO_ACCESS, -1, 0)

    def cuMemMap(self, place, size, offset, handle, flags):
        access = mmap.PROT_READ | mmap.PROT_WRITE
        return (int(libc.mmap(place, size, access, mmap.MAP_SHARED | MAP_FIXED, handle, 0) != place),)

    def cuMemSetAccess(self, place, size, access, count):
        return (int(access[0].flags != 3 or count != 1),)

    def cuMemUnmap(self, place, size):
        return (int(libc.mmap(place, size, 0, NO_ACCESS | MAP_FIXED, -1, 0) != place),)

    def cuMemAddressFree(self, place, size):
        return (libc.munmap(place, size),)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def open_vmm(group, timeout_s=20.0):
    return SymmetricHeap("vmm", group, NBYTES, CPU, VmmMemory(group, CPU), timeout_s)


def read_all(meeting, heap, salt):
    """Each rank fills its memory with its rank + salt; then each reads all of it."""
    heap.local.fill_(meeting.rank + salt)
    meeting.meet("written")
    found = [set(tensor_at(base, NBYTES, CPU).tolist()) for base in heap.bases]
    meeting.meet("read")
    return found == [{rank + salt} for rank in range(meeting.ranks)]


def live_a_life(group, rank):
    system, meeting = SystemMemory(full=1), Meeting(group, 20.0)  # full once: torch's cache may hold what is missing
    before = descriptors()
    with mock.patch.object(driver, "bindings", return_value=system):
        heap = open_vmm(group)
        bases, right = heap.bases, [read_all(meeting, heap, 1)]
        other = open_vmm(group)
        assert not set(other.bases) & set(bases)
        for salt in (10, 20):
            heap.release()
            heap.acquire()
            assert heap.bases == bases, "graphs hold the addresses"
            assert not heap.local.any()
            right.append(read_all(meeting, heap, salt))
        heap.destroy()
        right.append(read_all(meeting, other, 30))
        other.destroy()
    assert not system.open
    assert descriptors() == before
    return right


@pytest.mark.dist
def test_ranks_map_each_others_memory_and_it_comes_back_where_it_was(cpu_ranks):
    assert cpu_ranks(3).run(live_a_life) == [[True] * 4] * 3


def overlap(group, rank):
    """Rank 0 makes a heap more than the others before all of them make one."""
    alone, everybody = dist.new_group([0]), dist.new_group([0, 1, 2])
    with mock.patch.object(driver, "bindings", return_value=SystemMemory()):
        first = open_vmm(alone) if rank == 0 else None
        heap = open_vmm(everybody)
        right = read_all(Meeting(everybody, 20.0), heap, 5)
        heap.destroy()
        if first is not None:
            first.destroy()
    return right


@pytest.mark.dist
def test_processes_may_have_made_unequal_numbers_of_heaps(cpu_ranks):
    assert cpu_ranks(3).run(overlap) == [True] * 3


def fail_once(group, rank, what):
    system, before = SystemMemory(), descriptors()
    with mock.patch.object(driver, "bindings", return_value=system):
        if rank == 1:
            system.full, system.refuse = (2, False) if what == "create" else (0, True)
        with pytest.raises(RuntimeError, match="rank 1: RuntimeError: heap: " if rank != 1 else "heap: "):
            open_vmm(group)
        assert not system.open
        assert descriptors() == before
        system.refuse = False
        heap = open_vmm(group)
        right = read_all(Meeting(group, 20.0), heap, 7)
        heap.destroy()
    return right


@pytest.mark.dist
@pytest.mark.parametrize("what", ["create", "import"])
def test_what_fails_on_one_rank_leaves_nothing_open(cpu_ranks, what):
    assert cpu_ranks(3).run(fail_once, what) == [True] * 3


class Gone(BaseException):
    """A rank goes away without telling the others."""


def leave_in_the_middle(group, rank, step):
    system, before = SystemMemory(), descriptors()
    with mock.patch.object(driver, "bindings", return_value=system):
        if rank == 1:
            with mock.patch.object(VmmMemory, step, side_effect=Gone), pytest.raises(Gone):
                open_vmm(group, timeout_s=1.0)
        else:
            with pytest.raises(EpTimeoutError) as caught:
                open_vmm(group, timeout_s=1.0)
            phase = "heap allocate" if step == "allocate" else "heap map"
            assert (caught.value.peer, caught.value.phase) == (1, phase)
        assert not system.open
        assert descriptors() == before


@pytest.mark.dist
@pytest.mark.parametrize("step", ["allocate", "addresses"])
def test_a_rank_that_leaves_in_the_middle_is_named_and_nothing_stays_open(cpu_ranks, step):
    cpu_ranks(3, fresh=True).run(leave_in_the_middle, step)


def have_no_room_for_descriptors(group, rank):
    def lose(sock, size, most):
        words, fds, flags, sender = receive(sock, size, most)
        for fd in fds:
            os.close(fd)
        return words, [], flags, sender

    receive, system, before = socket.recv_fds, SystemMemory(), descriptors()
    with (
        mock.patch.object(driver, "bindings", return_value=system),
        mock.patch.object(socket, "recv_fds", lose if rank == 1 else receive),
        pytest.raises(RuntimeError, match="rank 0's memory has not come; raise `ulimit -n`"),
    ):
        open_vmm(group)
    assert not system.open
    assert descriptors() == before


@pytest.mark.dist
def test_a_process_with_too_many_files_open_says_so(cpu_ranks):
    cpu_ranks(3).run(have_no_room_for_descriptors)


def hide(group, rank):
    with (
        mock.patch.object(driver, "bindings", return_value=SystemMemory()),
        mock.patch.object(VmmMemory, "greeting", return_value="cutehop-nobody"),
        pytest.raises(RuntimeError, match=r"rank [01] cannot be reached through Unix sockets .* one network namespace"),
    ):
        open_vmm(group)


@pytest.mark.dist
def test_ranks_that_sockets_do_not_reach_are_told_the_cure(cpu_ranks):
    cpu_ranks(2).run(hide)
