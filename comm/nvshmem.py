"""Memory of the heap provider `nvshmem`: NVSHMEM's host API through nvshmem4py, bootstrapped over the group's store."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup, get_process_group_ranks

from cutehop.cute_kernels.errors import check

from .heap import tensor_at
from .layout import ROW_ALIGN

# NVSHMEM's documented variables, set before the library starts unless the user did: no NIC is looked for, no NVLink
# multicast, and no warning that NCCL is not used when ranks share a GPU.
ENVIRONMENT = {"NVSHMEM_REMOTE_TRANSPORT": "none", "NVSHMEM_DISABLE_NVLS": "1", "NVSHMEM_DISABLE_NCCL": "1"}


@dataclass
class _World:
    """NVSHMEM has one per process. It begins with the first allocation and ends with the last: NVSHMEM keeps freed
    memory for itself, and only the end of the world gives it back to the GPU. Starting it takes seconds."""

    ranks: list[int]  # PE i is this rank of torch's default group
    device: torch.device
    allocations: int = 0
    broken: bool = False  # a rank went missing or failed in the middle of a collective; the next one could hang


_world: _World | None = None


class NvshmemMemory:
    """One nvshmem_malloc. Needs libnvshmem 3.4.5 or newer, which can start again in a process after it was ended.

    What it cannot do: heaps of two different groups, or on two devices, at the same time in one process; heaps that
    only some ranks of a world open; outlive a rank that died. NVSHMEM takes memory from the GPU in pieces of
    NVSHMEM_CUMEM_GRANULARITY (512 MiB).
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.core, self.api = _library()
        self.group_ranks = get_process_group_ranks(group)
        self.rank = group.rank()
        self.device = device
        self._raw = 0  # what nvshmem_malloc returned
        self._base = 0  # the first multiple of ROW_ALIGN behind it
        self._check_world()

    def greeting(self) -> str:
        """Rank 0's unique id, if there is a world to begin."""
        self._check_world()
        if self.rank != 0 or _world is not None:
            return ""
        _set_defaults()
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

        _set_defaults()
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
        _world = _World(self.group_ranks, self.device)
        return _world

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


def _set_defaults() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


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
