"""Low-latency buffers when a rank's process is killed, between calls or in a wait, with masks and without."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.ep_ll_cases import LlCase, LlInputs, check_case, check_received, everyone, make_buffer, same_bits
from tests.ep_ll_masking import (
    AWAY,
    CASE,
    KEPT,
    TIMEOUT_S,
    combine,
    dispatch,
    expect_timeout,
    expected_mask,
    mask_of,
    warm,
    without,
)

pytestmark = pytest.mark.dist
on_gpus = pytest.mark.gpu
WORLDS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make_one_to_be_killed(group, rank, device, elastic):
    warm(group, CASE, device)
    buffer = make_buffer(group, CASE.config(elastic), device, timeout_s=60 if rank == AWAY else TIMEOUT_S)
    inputs = LlInputs(CASE)
    check_case(buffer, inputs)
    KEPT["buffer"] = buffer, inputs
    everyone(group)


def go_on_without_it(group, rank, device, elastic):
    """The rank was killed between two operations: the others miss it in the next dispatch."""
    buffer, inputs = KEPT.pop("buffer")
    if elastic:
        check_case(buffer, LlInputs(replace(CASE, masked=without(CASE))), dispatches=4)
        assert mask_of(buffer) == expected_mask(rank, CASE.ranks)
    else:
        expect_timeout(buffer, lambda: dispatch(buffer, inputs))
    buffer.destroy()
    survivors = dist.new_group([0, 2], backend="gloo", use_local_synchronization=True)
    new = make_buffer(survivors, LlCase().config(elastic), device)
    check_case(new, LlInputs(LlCase()))
    new.destroy()


@pytest.mark.parametrize("elastic", [True, False])
@pytest.mark.parametrize("device", WORLDS)
def test_a_rank_killed_between_calls(ranks_on, device, elastic):
    pool = ranks_on(device)(CASE.ranks, fresh=True)
    pool.run(make_one_to_be_killed, device, elastic)
    pool.kill(AWAY)
    pool.run(go_on_without_it, device, elastic)


def wait_for_the_end(group, rank):
    """Rank 1 waits for the others in a receive when it is killed."""
    if rank == AWAY:
        buffer, inputs = KEPT["buffer"]
        dispatch(buffer, inputs)
        everyone(group)  # for a GPU's work


def outlive_one(group, rank, device):
    """What the dead rank had sent is in the others' memory on GPUs, and may be gone with its process on a CPU."""
    buffer, inputs = KEPT.pop("buffer")
    cut = LlInputs(replace(CASE, masked=without(CASE)))
    got = dispatch(buffer, inputs)
    if device == "cpu" and any(mask_of(buffer)):
        inputs = cut
    check_received(inputs, rank, got)
    assert same_bits(combine(buffer, inputs, got.handle), inputs.combined(masked=without(CASE))[rank])
    assert mask_of(buffer) == expected_mask(rank, CASE.ranks)
    check_case(buffer, cut, dispatches=4)
    buffer.destroy()


SEVERAL_GPUS = pytest.mark.skipif(
    torch.cuda.device_count() < CASE.ranks, reason="under MPS a client that dies in a kernel takes others along"
)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[on_gpus, SEVERAL_GPUS])])
def test_a_rank_killed_while_it_waits(ranks_on, device):
    pool = ranks_on(device)(CASE.ranks, fresh=True)
    pool.run(make_one_to_be_killed, device, True)
    call = pool.start(wait_for_the_end)
    time.sleep(1)
    pool.kill(AWAY)
    call.results()
    pool.run(outlive_one, device)
