"""Timing: CUDA-graph replays between events, or a loop under the host clock where there is no GPU; lanes take turns."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

BATCH_US = 3000.0  # what one repeat of one lane lasts: equal durations, so that all lanes see the same clocks and heat
MAX_CALLS = 200  # per repeat: keeps the queue of pending launches well below the driver's 1024
ENQUEUE_US = 20.0  # above the host time of one replay: the GPU waits that long first, so that it never starves
FLUSH_BYTES = 256 << 20  # over five times the L2 of an H100


class Lane(Protocol):
    """One implementation on one row, ready to be timed. result: what the timed call returned last."""

    result: Any

    def run(self, calls: int) -> float:
        """Make `calls` calls and return the mean time of one, us."""


class HostLane:
    """Calls on a CPU."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self.result = call()

    def run(self, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            self.result = self._call()
        return (time.perf_counter() - start) / calls * 1e6


class GraphLane:
    """Replays of a CUDA graph of one whole call. With flush, L2 is overwritten before each, outside the timed part."""

    def __init__(self, call: Callable[[], Any], flush: torch.Tensor | None) -> None:
        self._flush = flush
        self._call = call  # keeps the plan and the inputs alive, which the graph reads
        torch.cuda.synchronize()  # the inputs and the plan were made on another stream
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.result = call()
        self._graph.replay()
        torch.cuda.synchronize()

    def run(self, calls: int) -> float:
        # The GPU spins first, so that all replays are queued when it gets to them and a slow host does not show.
        torch.cuda._sleep(int(calls * ENQUEUE_US * 2000))
        pairs = [self._timed(1) for _ in range(calls)] if self._flush is not None else [self._timed(calls)]
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) * 1e3 / calls

    def _timed(self, replays: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        if self._flush is not None:
            self._flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            self._graph.replay()
        end.record()
        return start, end


def make_lane(call: Callable[[], Any], device: torch.device, *, l2_flush: bool = False) -> Lane:
    """A lane for `call` on `device`, warmed up (compiled, captured). ValueError for an L2 flush without a GPU."""
    if device.type == "cuda":
        return GraphLane(call, torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if l2_flush else None)
    if l2_flush:
        raise ValueError(f"--l2-flush on {device}: it is about a GPU's L2; leave it out")
    return HostLane(call)


def interleave(lanes: Mapping[str, Lane], repeats: int) -> dict[str, list[float]]:
    """`repeats` samples (us per call) of every lane, the lanes taking turns and the order rotating."""
    names = list(lanes)
    calls = {name: min(MAX_CALLS, max(1, round(BATCH_US / lanes[name].run(3)))) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        for i in range(len(names)):
            name = names[(repeat + i) % len(names)]
            samples[name].append(lanes[name].run(calls[name]))
    return samples


def kernel_times(call: Callable[[], Any], repeats: int, *, l2_flush: bool = False) -> dict[str, list[float]]:
    """Durations (us) of every GPU kernel of `call`, by kernel name, over `repeats` eager calls, from the profiler."""
    flush = torch.empty(FLUSH_BYTES if l2_flush else 0, dtype=torch.uint8, device="cuda")
    call()
    ignored = set(_profile(flush.zero_, 1))

    def one() -> None:
        flush.zero_()
        call()

    return {name: times for name, times in _profile(one, repeats).items() if name not in ignored}


def _profile(call: Callable[[], Any], repeats: int) -> dict[str, list[float]]:
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profiler.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times.setdefault(event.name, []).append(event.time_range.elapsed_us())
    return times


def sm_clock_mhz(busy: Callable[[], Any]) -> int | None:
    """The SM clock while `busy` is called again and again, None where nvidia-smi does not tell."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None
    while process.poll() is None:
        busy()
    words = process.communicate()[0].split()
    return int(words[0]) if words and words[0].isdigit() else None
