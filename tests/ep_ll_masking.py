"""What the tests of low-latency masks share: a rank that is away, what the others see of it, and how it comes back."""

from __future__ import annotations

import time

import pytest
import torch

from cutehop.comm.errors import EpTimeoutError
from tests.ep_ll_cases import LlCase, LlInputs, check_case, everyone, make_buffer, receive_options, send, send_home

TIMEOUT_S = 2.0
AWAY = 1  # the rank that does not do its part
CASE = LlCase(ranks=3, tokens=(8, 13, 16), rows="bf16")
KEPT = {}  # what lives in a rank's process from one run to the next


def without(case: LlCase, away: int = AWAY) -> tuple[tuple[int, int], ...]:
    """LlCase.masked when one rank and the others have masked each other."""
    others = [rank for rank in range(case.ranks) if rank != away]
    return tuple(pair for rank in others for pair in ((rank, away), (away, rank)))


def mask_of(buffer) -> list[int]:
    status = torch.full((buffer.ranks,), 5, dtype=torch.int32, device=buffer.device)
    buffer.query_mask(status)
    return status.tolist()


def expected_mask(rank: int, ranks: int) -> list[int]:
    return [int((peer == AWAY) != (rank == AWAY)) for peer in range(ranks)]


def come_back(group, buffer, inputs) -> None:
    """All ranks agree, and nothing is left of what was."""
    everyone(group)
    buffer.clean_mask()
    everyone(group)
    assert mask_of(buffer) == [0] * buffer.ranks
    check_case(buffer, inputs, dispatches=5)
    assert mask_of(buffer) == [0] * buffer.ranks


def warm(group, case, device) -> None:
    """What is slow once in a process shall not meet a deadline."""
    if device not in KEPT:
        for elastic in (False, True):
            buffer = make_buffer(group, case.config(elastic), device)
            check_case(buffer, LlInputs(case))
            buffer.destroy()
        KEPT[device] = True
    everyone(group)


def dispatch(buffer, inputs):
    return buffer.dispatch_receive(send(buffer, inputs), **receive_options(inputs.case))


def combine(buffer, inputs, handle):
    _, topk_idx, weights, _ = inputs.on(buffer.rank, buffer.device)
    return buffer.combine_receive(send_home(buffer, inputs, handle), topk_idx, weights)


def expect_timeout(buffer, call) -> EpTimeoutError:
    """The call raises, or on a GPU the next look at the buffer; and so does every later one."""

    def call_and_look() -> None:
        call()
        if buffer.device.type == "cuda":
            torch.cuda.synchronize()
        buffer.check()

    begin = time.monotonic()
    with pytest.raises(EpTimeoutError) as caught:
        call_and_look()
    assert (caught.value.rank, caught.value.peer) == (buffer.rank, AWAY), caught.value
    assert 0.9 * TIMEOUT_S <= caught.value.waited_s <= time.monotonic() - begin + 0.1
    with pytest.raises(EpTimeoutError):
        call()
    return caught.value
