"""What all buffers have in common, whatever their mode: a name that ops find them by, and an end that is collective."""

from __future__ import annotations

import itertools
import warnings
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

from cutehop.cute_kernels.errors import check

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


class _Config(Protocol):
    @property
    def ranks(self) -> int: ...


ConfigOf = TypeVar("ConfigOf", bound=_Config)
BufferOf = TypeVar("BufferOf", bound="Living")


class Registry(Generic[BufferOf]):
    """The living buffers of one mode by name. It keeps none of them alive."""

    def __init__(self, what: str, prefix: str) -> None:
        """what: a buffer is called in messages.  prefix: of the names given to buffers that come without one."""
        self._what = what
        self._names = (f"{prefix}{number}" for number in itertools.count())
        self._buffers: WeakValueDictionary[str, BufferOf] = WeakValueDictionary()

    def __contains__(self, name: str | None) -> bool:
        return name in self._buffers

    def free_name(self) -> str:
        return next(name for name in self._names if name not in self._buffers)

    def add(self, buffer: BufferOf) -> None:
        self._buffers[buffer.name] = buffer

    def remove(self, name: str) -> None:
        self._buffers.pop(name, None)

    def find(self, name: str) -> BufferOf:
        """The living buffer of that name. ValueError if there is none."""
        buffer = self._buffers.get(name)
        if buffer is None:
            raise ValueError(
                f"{self._what} {name!r} does not exist, living ones: {', '.join(sorted(self._buffers)) or 'none'}; "
                "make it before the call and keep a reference to it"
            )
        return buffer


class Living(ABC, Generic[ConfigOf]):
    """A buffer of one rank, from its constructor to destroy().

    name: unique in the process among the buffers of its mode; ops name the buffer by it.
    group, rank, ranks, config, device: as given; all ranks use equal configs.
    num_sms: CTAs of a call that does not say otherwise; 0 where nothing runs on a GPU.
    """

    _registry: Registry  # of the mode
    _mode: str  # the class that users know, for messages
    _open = False  # a constructor that raised leaves nothing to warn about

    def __init__(
        self, group: ProcessGroup, config: ConfigOf, device: torch.device, name: str | None = None, num_sms: int = 0
    ) -> None:
        """name: None for one that is free."""
        check(
            group.size() == config.ranks,
            f"{self._mode}: config.ranks {config.ranks}, the group has {group.size()} ranks; make the config for the "
            "group",
        )
        check(
            name not in self._registry,
            f"{self._mode}: name {name!r} is taken by a living buffer; destroy it or choose another",
        )
        self.name = self._registry.free_name() if name is None else name
        self.group, self.rank, self.ranks = group, group.rank(), group.size()
        self.config, self.device, self.num_sms = config, device, num_sms

    def _opened(self) -> None:
        """The last statement of a subclass's constructor: from now on ops find the buffer and destroy() is due."""
        self._open = True
        self._registry.add(self)

    def destroy(self) -> None:
        """Free everything. Collective; a second call does nothing. Legal after an EpTimeoutError too."""
        if not self._open:
            return
        self._open = False
        self._registry.remove(self.name)
        self._destroy()

    def __del__(self) -> None:
        if self._open:  # destroying is collective, and nobody knows when peers collect theirs
            message = f"buffer {self.name!r} was not destroyed; call destroy() on every rank"
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)

    def _require_open(self) -> None:
        if not self._open:
            raise RuntimeError(f"buffer {self.name!r} is destroyed; make another one")

    @abstractmethod
    def check(self) -> None:
        """Raise EpTimeoutError if one of the buffer's waits has expired, now or earlier."""

    @abstractmethod
    def _destroy(self) -> None:
        """Called once. Must not hang if a wait has expired before."""
