"""Timing of calls that all ranks make together: graph replays, eager calls, or host time alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

BATCH_US = 3000.0  # what a sample lasts at least, unless MAX_BATCHES are shorter
MAX_BATCHES = 50
POISON = 0x5A  # a byte that no correct result consists of


class Team:
    """The ranks of the run. Every method is collective."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.rank, self.ranks = group, group.rank(), group.size()

    def barrier(self) -> None:
        dist.barrier(self.group)

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, by rank, on every rank."""
        values = [None] * self.ranks
        dist.all_gather_object(values, value, self.group)
        return values


class Lane(Protocol):
    """A call that is ready to be timed."""

    def once(self) -> tuple[Tensor | None, ...]:
        """Make the call (or the batch of a graph), wait for it, and return its tensors."""
        ...

    def time(self, batches: int) -> float:
        """Mean time of one call of `batches` batches, us."""
        ...


class GraphLane:
    """Replays of a CUDA graph that holds a batch of calls."""

    def __init__(self, call: Callable[[], tuple[Tensor | None, ...]], calls: int) -> None:
        self._calls = calls
        torch.cuda.synchronize()  # what the call reads was made on another stream
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(calls):
                self._result = call()

    def once(self) -> tuple[Tensor | None, ...]:
        self._graph.replay()
        torch.cuda.synchronize()
        return self._result

    def time(self, batches: int) -> float:
        # Ranks leave a barrier at different times. The first replay lets them meet on the GPU, and the host get ahead.
        return _between_events(self._graph.replay, batches) / (batches * self._calls)


class EagerLane:
    """Calls as Python makes them."""

    def __init__(self, call: Callable[[], tuple[Tensor | None, ...]], calls: int) -> None:
        self._call, self._calls = call, calls
        self._result: tuple[Tensor | None, ...] = ()

    def once(self) -> tuple[Tensor | None, ...]:
        self._result = ()  # the allocator gives the same memory again, poison and all
        self._result = self._call()
        torch.cuda.synchronize()
        return self._result

    def time(self, batches: int) -> float:
        self._result = ()
        return _between_events(self._call, batches * self._calls) / (batches * self._calls)


def _between_events(call: Callable[[], object], calls: int) -> float:
    """GPU time (us) of `calls` calls that follow one more."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    call()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3


class HostLane:
    """The host's time for calls, which return before a GPU is done; on a CPU they are all the work."""

    def __init__(self, call: Callable[[], tuple[Tensor | None, ...]], calls: int, device: torch.device) -> None:
        self._call, self._calls = call, calls
        self._synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self._result: tuple[Tensor | None, ...] = ()

    def once(self) -> tuple[Tensor | None, ...]:
        self._result = ()
        self._result = self._call()
        self._synchronize()
        return self._result

    def time(self, batches: int) -> float:
        """Of one batch, behind another one that warms the host up. So few calls do not fill the GPU's launch queue,
        which would block the host."""
        self._result = ()
        for _ in range(2):
            start = time.perf_counter()
            for _ in range(self._calls):
                self._call()
            spent = time.perf_counter() - start
        self._synchronize()
        return spent * 1e6 / self._calls


def make_lane(how: str, call: Callable[[], tuple[Tensor | None, ...]], calls: int, device: torch.device) -> Lane:
    """how: "graph" | "eager" | "host"; a CPU has only the last. calls: in a batch."""
    if how == "host" or device.type != "cuda":
        return HostLane(call, calls, device)
    return GraphLane(call, calls) if how == "graph" else EagerLane(call, calls)


def poison(tensors: tuple[Tensor | None, ...]) -> None:
    """Spoil results, so that a call which leaves them alone is found out."""
    for tensor in tensors:
        if tensor is not None:
            tensor.view(torch.uint8).fill_(POISON)


def samples(lane: Lane, calls: int, team: Team, repeats: int) -> list[list[float]]:
    """us per call: of every rank, `repeats` samples, each after a barrier. All ranks make equally many calls."""
    team.barrier()
    slowest = max(team.gather(lane.time(1)))
    batches = min(MAX_BATCHES, max(1, round(BATCH_US / (slowest * calls))))
    own = []
    for _ in range(repeats):
        team.barrier()
        own.append(lane.time(batches))
    return team.gather(own)
