"""DeepEP's events, and how a call runs on the communication stream.

On a CPU there is nothing to wait for. torch.cpu has streams and events that do nothing: both devices take one path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from cutehop.cute_kernels.errors import check

Result = TypeVar("Result")
HIGH_PRIORITY = -1


class EventHandle:
    """The work that the current stream has been given so far.

    In a process that has not used CUDA no stream has work, and the event is over at once.
    """

    def __init__(self) -> None:
        self.event: Any = torch.cuda.Event() if torch.cuda.is_initialized() else torch.cpu.Event()
        self.event.record()

    def current_stream_wait(self) -> None:
        """Work given to the current stream from now on begins when the recorded work is over."""
        self.event.wait()


class EventOverlap:
    """An EventHandle or None, usable as `with event:` around work that overlaps with what the event stands for.

    event: EventHandle or None.
    extra_tensors: kept alive as long as this object. record_stream does the same for memory that torch's allocator
        owns; a reference also works for other memory and inside CUDA graphs.
    """

    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple[Tensor, ...] | None = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        """The current stream waits for the event. AssertionError, as in V1, if there is none."""
        check(
            self.event is not None,
            "EventOverlap: event None, needs an EventHandle; calls return one with async_finish=True",
            AssertionError,
        )
        assert self.event is not None
        self.event.current_stream_wait()

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.event is not None:
            self.event.current_stream_wait()


class CommStream:
    """The stream of one Buffer on which its kernels run: high priority, made by the first use."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module = torch.get_device_module(device)
        self._stream: Any = None

    @property
    def stream(self) -> Any:
        """torch.cuda.Stream, or torch.cpu.Stream, which does nothing."""
        if self._stream is None:
            on_gpu = self.device.type == "cuda"
            self._stream = torch.cuda.Stream(self.device, HIGH_PRIORITY) if on_gpu else torch.cpu.Stream()
        return self._stream

    def run(
        self,
        function: Callable[[], Result],
        inputs: tuple,
        previous_event: EventOverlap | None,
        async_finish: bool,
        allocate_on_comm_stream: bool,
    ) -> tuple[Result, EventOverlap]:
        """function() on this stream, and an event that stands for it (none unless async_finish).

        The stream first waits for previous_event, if it holds one, otherwise for the current stream. Without
        async_finish the current stream then waits for this one.

        Outputs belong to this stream's memory pool whatever allocate_on_comm_stream says, and every tensor is recorded
        on the other stream that uses it, so that its memory is not given away too early.

        RuntimeError, as in V1, for allocate_on_comm_stream without both of the others.
        """
        before = getattr(previous_event, "event", None)
        check(
            not allocate_on_comm_stream or (before is not None and async_finish),
            f"deep_ep: allocate_on_comm_stream with previous_event {before}, async_finish {async_finish}, needs an "
            "event and True; pass previous_event=Buffer.capture() and async_finish=True",
            RuntimeError,
        )
        caller = self._module.current_stream(self.device)
        with self._module.stream(self.stream):
            if before is None:
                self.stream.wait_stream(caller)
            else:
                before.current_stream_wait()
            result = function()
            done = EventHandle() if async_finish else None
        if done is None:
            caller.wait_stream(self.stream)
        if self.device.type == "cuda":
            for tensor in tensors(result):
                tensor.record_stream(caller)
            for tensor in tensors(inputs) if async_finish else ():
                tensor.record_stream(self.stream)
        return result, EventOverlap(done)


def tensors(value: object) -> Iterator[Tensor]:
    """The tensors in nested tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors(part)
