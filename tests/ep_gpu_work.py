"""What ranks do in the tests of expert-parallel buffers on GPUs: make buffers, poison memory, look for stray writes.

The functions take a device, so that most of them also run over gloo on CPU ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

import cutehop.comm.memory
from cutehop.comm import outputs
from cutehop.comm.base import Buffer
from cutehop.comm.buffer import CudaBuffer
from cutehop.comm.config import EpConfig
from cutehop.comm.gloo import GlooBuffer
from cutehop.comm.layout import EpLayout
from tests.ep_traffic import NAN_BYTE

FEW_SMS = 6  # eight ranks that share a GPU leave most of it to the kernels that one of them waits for
GUARD_BYTES = 4096
CANARY = 0xA5


def open_buffer(
    group: ProcessGroup, config: EpConfig, device: str, timeout_s: float = 30, num_sms: int = FEW_SMS
) -> Buffer:
    """device: "cpu" or "cuda", the rank's current one."""
    if device == "cpu":
        return GlooBuffer(group, config, timeout_s=timeout_s)
    return CudaBuffer(group, config, timeout_s=timeout_s, num_sms=num_sms)


def settle(group: ProcessGroup) -> None:
    """All ranks are here and their GPU work is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    dist.barrier(group)


def poison_rows(buffer: Buffer) -> None:
    """Everything in the symmetric memory but flags and counters becomes NaN or -1. Collective."""
    if isinstance(buffer, CudaBuffer):
        settle(buffer.group)
        buffer._memory.local[buffer.layout.control_bytes :].fill_(NAN_BYTE)
        settle(buffer.group)


class Guards:
    """Outputs of calls begin as NaN and lie between bytes that nobody may write."""

    def __init__(self) -> None:
        self._memories: list[tuple[Tensor, int]] = []

    def rehome(self, output: Tensor | None) -> Tensor | None:
        if output is None:
            return None
        nbytes = output.numel() * output.element_size()
        memory = torch.full((nbytes + 2 * GUARD_BYTES,), NAN_BYTE, dtype=torch.uint8, device=output.device)
        self._memories.append((memory, nbytes))
        return memory[GUARD_BYTES : GUARD_BYTES + nbytes].view(output.dtype).view(output.shape)

    def guarded(self, allocate: Callable[..., Any]) -> Callable[..., Any]:
        def allocate_between_guards(*args: Any) -> Any:
            made = allocate(*args)
            moved = [self.rehome(each) for each in made]
            return made._make(moved) if hasattr(made, "_make") else tuple(moved)

        return allocate_between_guards

    def check(self) -> int:
        """How many outputs were made; AssertionError if bytes around one were written. Forgets them."""
        count = len(self._memories)
        for memory, nbytes in self._memories:
            for guard in (memory[:GUARD_BYTES], memory[GUARD_BYTES + nbytes :]):
                assert bool((guard == NAN_BYTE).all()), f"bytes around an output of {nbytes} bytes were written"
        self._memories.clear()
        return count


@contextmanager
def guarded_outputs() -> Iterator[Guards]:
    """Whatever buffers return inside the block is guarded; looked at when the block ends."""
    guards = Guards()
    with mock.patch.multiple(
        outputs, **{name: guards.guarded(getattr(outputs, name)) for name in ("counts", "rows", "cached", "combined")}
    ):
        yield guards
        guards.check()


@contextmanager
def heap_with_guard() -> Iterator[None]:
    """Buffers made inside the block have GUARD_BYTES of symmetric memory behind what their layout asks for."""
    original = cutehop.comm.memory.open_heap

    def with_guard(provider: str, group: ProcessGroup, nbytes: int, *others: Any) -> Any:
        return original(provider, group, nbytes + GUARD_BYTES, *others)

    with mock.patch.object(cutehop.comm.memory, "open_heap", with_guard):
        yield


def bytes_of_a_call(
    layout: EpLayout, n: int, row_bytes: int, k: int, scale_words: int, sent: list[int], received: int, y_bytes: int
) -> Tensor:
    """bool (heap bytes,): what dispatch and combine may write. The rest of each region, and the space between, is not
    theirs. n: own tokens; sent: tokens to each rank; received: rows; row_bytes, y_bytes: of a row of x and of y."""
    ranks = layout.config.ranks
    used = torch.zeros(layout.heap_bytes, dtype=torch.bool)

    def mark(name: str, items: int, begin: int, end: int) -> None:
        region = getattr(layout, name)
        assert items <= region.items
        assert end <= region.item_bytes
        view = used[region.offset : region.offset + region.items * region.item_bytes]
        view.view(region.items, -1)[:items, begin:end] = True

    for name in ("dispatch_ready", "dispatch_ack", "combine_ready", "combine_ack"):
        mark(name, ranks, 0, 4)
    mark("counts", ranks, 0, 8 * ranks)
    for name in ("epochs", "arrivals", "abort"):
        mark(name, getattr(layout, name).items, 0, 4)
    mark("expert_counts", ranks, 0, 8 * layout.config.experts_per_rank)
    for peer, count in enumerate(sent):
        begin = layout.send_lists.at(peer)
        used[begin : begin + 4 * count] = True
    weights = 4 * layout.config.max_topk
    mark("topk", n, 0, 4 * k)
    mark("topk", n, weights, weights + 4 * k)
    if scale_words:
        mark("x_scales", n, 0, 4 * scale_words)
    used[layout.x.offset : layout.x.offset + n * row_bytes] = True  # rows lie densely, whatever the region's width
    mark("y_weights", received, 0, 4 * k)
    used[layout.y.offset : layout.y.offset + received * y_bytes] = True
    return used


class Canaries:
    """The bytes of a buffer's memory that a call does not own, filled with a pattern. The buffer was made in
    heap_with_guard(). Collective."""

    def __init__(self, buffer: CudaBuffer, used: Tensor) -> None:
        self._buffer = buffer
        guard = torch.ones(GUARD_BYTES, dtype=torch.bool)
        self._theirs = torch.cat([~used, guard]).to(buffer.device)
        assert buffer._memory.local.numel() == len(self._theirs)
        settle(buffer.group)
        buffer._memory.local[self._theirs] = CANARY
        settle(buffer.group)

    def check(self) -> int:
        """How many bytes were watched; AssertionError that names the region in or behind which one was written."""
        settle(self._buffer.group)
        written = ((self._buffer._memory.local != CANARY) & self._theirs).nonzero()[:, 0].tolist()
        heap = [region for region in self._buffer.layout.regions if region.memory == "heap"]
        for offset in written[:1]:
            region = max((r for r in heap if r.offset <= offset), key=lambda r: r.offset)
            raise AssertionError(f"{len(written)} stray bytes, the first {offset - region.offset} into {region.name}")
        return int(self._theirs.sum())
