"""Scratch memory of MLA decode and the grouped GEMMs: partial results, counters, and MLA's word for faults.

Calls on one stream run one after the other and share scratch memory that only grows. A captured call gets partial
results of its own, since the graph's replays may run on any stream; calls that one capture puts on one stream share
counters. Counters are zero before the first launch, and launches leave them so, whatever they are given.

A kernel that finds a plan that is not of its call says so in a word of pinned host memory. The next call that uses the
word raises; reading it is free, and waits for nothing. Captured calls have one word per device, which every call reads.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from cutehop.cute_kernels.jit import driver
from cutehop.cute_kernels.mla import config as cfg

Need = tuple[int, int, int]  # bytes of partial results, tickets, arrivals
Addresses = tuple[int, int, int, int]  # partial results, tickets, arrivals, report

_CAPTURE_COUNTERS = 4 << 20  # int32 per device, for captured calls
_FAULTS = {
    cfg.FAULT_PLAN: "tile_scheduler_metadata is of another batch size or other split_tokens; "
    "give mla_plan and mla_decode the same ones",
    cfg.FAULT_PIECES: "num_splits does not fit tile_scheduler_metadata and cache_seqlens at sequence {}; "
    "pass both tensors of one mla_plan call, made for these lengths",
    cfg.FAULT_LENGTHS: "cache_seqlens[{}] is not what it was when the plan was made; call mla_plan after every change",
    cfg.FAULT_MERGE: "a piece of sequence {} did not arrive; do not overwrite a plan while a call reads it",
}


class _Word:
    """One int32 of pinned host memory. A pinned tensor has one address for the host and all devices."""

    def __init__(self) -> None:
        self._tensor = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self.address = self._tensor.data_ptr()
        self.content = ctypes.c_int32.from_address(self.address)


class _Scratch:
    """Of one stream of one device."""

    def __init__(self, device: int) -> None:
        self._device = torch.device("cuda", device)
        self.word = _Word()
        self.bytes = self.count = 0
        self.partial = self.counters = torch.empty(0)
        self.addresses: dict[Need, Addresses] = {}

    def grow(self, need: Need) -> Addresses:
        """Room for one more kind of call."""
        size, count = need[0], need[1] + need[2]
        if size > self.bytes:
            self.bytes, self.partial = size, _partials(size, self._device)
            self.addresses.clear()
        if count > self.count:
            self.count = count
            self.counters = torch.zeros(count, dtype=torch.int32, device=self._device)
            self.addresses.clear()
        found = self.addresses[need] = _addresses(self.partial, self.counters, need, self.word)
        return found


@dataclass
class _Captures:
    """Of all captured calls of one device."""

    stock: Tensor  # zeros, taken for good: nobody says when a graph is gone
    word: _Word
    taken: int = 0
    latest: tuple[int, int] = (0, 0)  # the capture and stream that `counters` belong to
    counters: Tensor | None = None


_scratch: dict[tuple[int, int], _Scratch] = {}
_captures: dict[int, _Captures] = {}


def prepare_captures(device: int) -> None:
    """What a captured call needs and cannot make itself."""
    if device not in _captures:
        zeros = torch.zeros(_CAPTURE_COUNTERS, dtype=torch.int32, device=torch.device("cuda", device))
        _captures[device] = _Captures(zeros, _Word())


def scratch_of(device: int, stream: int, need: Need) -> Addresses:
    """Addresses for a call.

    RuntimeError if a call before this one had a plan that was not its own.
    """
    captures = _captures[device]
    if torch._C._cuda_isCurrentStreamCapturing():
        buffer = _partials(need[0], torch.device("cuda", device))
        return _addresses(buffer, _capture_counters(captures, stream, need[1] + need[2]), need, captures.word)
    scratch = _scratch.get((device, stream))
    if scratch is None:
        scratch = _scratch[device, stream] = _Scratch(device)
    if scratch.word.content.value or captures.word.content.value:
        _raise_fault(scratch, captures)
    return scratch.addresses.get(need) or scratch.grow(need)


def _partials(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _addresses(buffer: Tensor, counters: Tensor, need: Need, word: _Word) -> Addresses:
    tickets = counters.data_ptr()
    return buffer.data_ptr(), tickets, tickets + need[1] * 4, word.address


def _capture_counters(captures: _Captures, stream: int, count: int) -> Tensor:
    """Zeros that no other capture and no other stream uses. When the stock is used up, zeroing is part of the graph."""
    what = "mla_decode: asking for the current capture"
    latest = int(driver.check(what, driver.bindings().cuStreamGetCaptureInfo(stream))[1]), stream
    if captures.counters is None or captures.latest != latest or captures.counters.numel() < count:
        if captures.taken + count > captures.stock.numel():
            return torch.zeros(count, dtype=torch.int32, device=captures.stock.device)
        captures.counters = captures.stock[captures.taken : captures.taken + count]
        captures.latest = latest
        captures.taken += count
    return captures.counters


def _raise_fault(scratch: _Scratch, captures: _Captures) -> NoReturn:
    """The fault that the host has not seen yet, once."""
    here = scratch.word.content.value != 0
    word = scratch.word if here else captures.word
    fault, sequence = word.content.value % 8, word.content.value // 8
    word.content.value = 0
    scratch.counters.zero_()  # they are zero unless the plan was overwritten while the call ran
    if not here:  # a graph may run on any stream: not while its counters are cleared
        torch.cuda.synchronize(captures.stock.device)
        captures.stock.zero_()
        torch.cuda.synchronize(captures.stock.device)
    raise RuntimeError(
        f"mla_decode: {'an earlier call on this stream' if here else 'a CUDA graph'} had a wrong plan and wrote NaN: "
        f"{_FAULTS[fault].format(sequence)} (flash_mla_with_kvcache(..., validate=True) finds the call)"
    )
