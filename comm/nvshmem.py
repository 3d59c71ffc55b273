"""Memory of the heap provider `nvshmem`: NVSHMEM's host API through nvshmem4py, bootstrapped over the group's store."""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed import ProcessGroup, get_process_group_ranks

from cutehop.cute_kernels.errors import check

from .heap import tensor_at
from .layout import ROW_ALIGN

# NVSHMEM's documented variables, set before the library starts unless the user did: no NIC is looked for, no NVLink
# multicast, and no warning that NCCL is not used when ranks share a GPU.
ENVIRONMENT = {"NVSHMEM_REMOTE_TRANSPORT": "none", "NVSHMEM_DISABLE_NVLS": "1", "NVSHMEM_DISABLE_NCCL": "1"}
# Of a world on several nodes instead: NICs are looked for, and kernels write their requests themselves.
SEVERAL_NODES = {"NVSHMEM_IB_ENABLE_IBGDA": "1", "NVSHMEM_DISABLE_NVLS": "1"}
DEFAULT_QUEUE = 1  # NVSHMEM's handle for those that it chooses from by itself


@dataclass
class _World:
    """NVSHMEM has one per process. It begins with the first allocation and ends with the last: NVSHMEM keeps freed
    memory for itself, and only the end of the world gives it back to the GPU. Starting it takes seconds."""

    ranks: list[int]  # PE i is this rank of torch's default group
    device: torch.device
    one_node: bool
    queue: int = DEFAULT_QUEUE  # handle of the queue pair for what kernels send
    libraries: list[int] = field(default_factory=list)  # CUlibrary handles that have this world's state
    allocations: int = 0
    broken: bool = False  # a rank went missing or failed in the middle of a collective; the next one could hang


_world: _World | None = None
_ours: list[str] = []  # variables of the environment that this module has set


class NvshmemMemory:
    """One nvshmem_malloc. Needs libnvshmem 3.4.5 or newer, which can start again in a process after it was ended.

    What it cannot do: heaps of two different groups, or on two devices, at the same time in one process; heaps that
    only some ranks of a world open; outlive a rank that died. NVSHMEM takes memory from the GPU in pieces of
    NVSHMEM_CUMEM_GRANULARITY (512 MiB).
    """

    def __init__(self, group: ProcessGroup, device: torch.device, one_node: bool = True) -> None:
        self.core, self.api = _library()
        self.group_ranks = get_process_group_ranks(group)
        self.rank = group.rank()
        self.device = device
        self.one_node = one_node
        self._raw = 0  # what nvshmem_malloc returned
        self._base = 0  # the first multiple of ROW_ALIGN behind it
        self._check_world()

    def greeting(self) -> str:
        """Rank 0's unique id, if there is a world to begin."""
        self._check_world()
        if self.rank != 0 or _world is not None:
            return ""
        self._set_defaults()
        return self.core.get_unique_id()._data.tobytes().hex()

    def allocate(self, nbytes: int, greetings: Sequence[str]) -> torch.Tensor:
        world = _world if _world is not None else self._begin(bytes.fromhex(greetings[0]))
        # nvshmem_malloc aligns to less; the shift is the same on all ranks.
        self._raw = self.api.malloc(nbytes + ROW_ALIGN)
        check(self._raw, f"heap: nvshmem_malloc of {nbytes} bytes failed; free GPU memory", RuntimeError)
        world.allocations += 1
        self._base = -(-self._raw // ROW_ALIGN) * ROW_ALIGN
        return tensor_at(self._base, nbytes, self.device)

    def addresses(self) -> tuple[int, ...]:
        return tuple(int(self.api.ptr(self._base, pe)) for pe in range(len(self.group_ranks)))

    def free(self) -> None:
        global _world
        assert _world is not None, "an allocation has a world"
        self.api.free(self._raw)
        self._raw = 0
        _world.allocations -= 1
        if _world.allocations == 0:
            for library in _world.libraries:
                self.api.culibrary_finalize(library)
            self.core.finalize()
            _world = None

    def abandon(self) -> None:
        if _world is not None:
            _world.broken = True

    def close(self) -> None:
        """The world, like its library, ends with the process."""

    def _begin(self, unique_id: bytes) -> _World:
        global _world
        import numpy
        from cuda.core import Device

        self._set_defaults()
        torch.cuda.set_device(self.device)
        device = Device(self.device.index)
        device.set_current()
        uid = self.core.get_unique_id(empty=True)
        uid._data.view(numpy.int8)[:] = numpy.frombuffer(unique_id, numpy.int8)
        self.core.init(device=device, uid=uid, rank=self.rank, nranks=len(self.group_ranks), initializer_method="uid")
        pe, pes = self.core.my_pe(), self.core.n_pes()
        check(
            (pe, pes) == (self.rank, len(self.group_ranks)),
            f"heap: NVSHMEM says PE {pe} of {pes}, this is rank {self.rank} of {len(self.group_ranks)}: something else "
            "in this process started NVSHMEM; finalize it first, or use provider 'vmm'",
            NotImplementedError,
        )
        _world = _World(self.group_ranks, self.device, self.one_node)
        if not self.one_node:
            _world.queue = _make_queue()
        return _world

    def queue(self) -> int:
        """NVSHMEM's handle of the queue pair that kernels shall use."""
        assert _world is not None, "allocate comes first"
        return _world.queue

    def admit(self, library: int) -> None:
        """Kernels of this CUlibrary may call NVSHMEM from now on, until the world ends. RuntimeError if NVSHMEM will
        not have them: their device code is of another version than the host library."""
        assert _world is not None, "allocate comes first"
        if library not in _world.libraries:
            status = self.api.culibrary_init(library)
            if status:
                raise RuntimeError(
                    f"nvshmemx_culibrary_init: status {status}, the NVSHMEM library of this process is "
                    f"{self.core.get_version().libnvshmem_version}; it must be of the version that the kernels were "
                    "built with. torch may have loaded its own before: `python -m cutehop.doctor`"
                )
            _world.libraries.append(library)

    def _set_defaults(self) -> None:
        """Those of this world instead of the last one's; what the user set stays."""
        while _ours:
            os.environ.pop(_ours.pop(), None)
        for name, value in (ENVIRONMENT if self.one_node else SEVERAL_NODES).items():
            if name not in os.environ:
                os.environ[name] = value
                _ours.append(name)

    def _check_world(self) -> None:
        if _world is None:
            return
        check(
            not _world.broken,
            "heap: in the NVSHMEM world of this process a rank failed or went missing, after which NVSHMEM cannot go "
            "on; start the processes again, or use provider 'vmm'",
            NotImplementedError,
        )
        check(
            (_world.ranks, _world.device) == (self.group_ranks, self.device),
            f"heap: this process is in an NVSHMEM world of ranks {_world.ranks} on {_world.device}, asked for ranks "
            f"{self.group_ranks} on {self.device}, and NVSHMEM has one world per process; destroy or release the heaps "
            "of the other one first, or use provider 'vmm'",
            NotImplementedError,
        )


def _make_queue() -> int:
    """A queue pair to every PE that nothing else uses, so that what goes through it arrives in order. Collective.

    nvshmem4py has no call for it. Where NVSHMEM's transport has no queue pairs to give, its default one is used, and
    fences in the kernels wait for completion.
    """
    library = ctypes.CDLL("libnvshmem_host.so.3", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    handles = ctypes.POINTER(ctypes.c_int)()
    status = library.nvshmemx_qp_create(1, ctypes.byref(handles))
    return int(handles[0]) if status == 0 and handles else DEFAULT_QUEUE


def _library() -> tuple[Any, Any]:
    """nvshmem.core and, for malloc, free and ptr as plain addresses, nvshmem.bindings."""
    try:
        return importlib.import_module("nvshmem.core"), importlib.import_module("nvshmem.bindings")
    except ImportError as error:
        extra = "cu12" if (torch.version.cuda or "12").startswith("12") else "cu13"
        raise ImportError(
            f"heap: provider 'nvshmem' needs nvshmem4py, which did not import ({error}); "
            f"pip install 'cutehop[{extra}]', or use provider 'vmm'"
        ) from error
