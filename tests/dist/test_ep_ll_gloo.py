"""What GlooLowLatencyBuffer does beyond the others: calls that disagree, ranks that end early."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from cutehop.comm.errors import EpTimeoutError
from cutehop.comm.ll_gloo import GlooLowLatencyBuffer
from tests.ep_ll_cases import (
    LlCase,
    LlInputs,
    check_case,
    check_received,
    receive,
    receive_options,
    same_bits,
    send,
    send_home,
)

pytestmark = pytest.mark.dist
CPU = torch.device("cpu")
TIMEOUT_S = 1.0


def disagree(group, rank):
    case = LlCase()
    inputs, odd = LlInputs(case), rank == 1
    x, topk_idx, _, _ = inputs.on(rank, CPU)
    wrong = "make the same calls in one order on all ranks, with the same options"
    calls = [
        lambda buffer: buffer.dispatch_receive(buffer.dispatch_send(x, topk_idx, use_fp8=odd), num_topk=4, use_fp8=odd),
        lambda buffer: buffer.dispatch_receive(
            buffer.dispatch_send(x, topk_idx[:, : 3 + rank].contiguous()), num_topk=3 + rank
        ),
    ]
    for call in calls:
        buffer = GlooLowLatencyBuffer(group, case.config(), timeout_s=30)
        check_case(buffer, inputs)
        with pytest.raises(ValueError, match=wrong):
            call(buffer)
        with pytest.raises(ValueError, match=wrong):  # lost, as after a deadline
            send(buffer, inputs)
        buffer.destroy()
    buffer = GlooLowLatencyBuffer(group, case.config(), timeout_s=30)
    epoch = buffer.dispatch_send(x, topk_idx)
    with pytest.raises(ValueError, match="pass the epoch and the options of one send"):
        buffer.dispatch_receive(epoch, num_topk=4, use_ue8m0=True)
    with pytest.raises(RuntimeError, match="the epoch is of no operation outstanding"):
        buffer.dispatch_receive(epoch + 1, num_topk=4)
    got = receive(buffer, inputs, epoch)  # what raised took nothing away
    with pytest.raises(ValueError, match="a token chooses an expert twice"):
        buffer.dispatch_send(x, torch.zeros_like(topk_idx))
    epoch = send_home(buffer, inputs, got.handle)
    with pytest.raises(ValueError, match="pass the epoch and the options of one send"):
        buffer.dispatch_receive(epoch, num_topk=4)
    buffer.destroy()


def test_calls_that_disagree(cpu_ranks):
    cpu_ranks(2).run(disagree)


def configs_differ(group, rank):
    with pytest.raises(ValueError, match="use one on all ranks"):
        GlooLowLatencyBuffer(group, LlCase(max_tokens=16 + rank).config())


def test_configs_that_differ_raise(cpu_ranks):
    cpu_ranks(2).run(configs_differ)


def end_early(group, rank):
    """Rank 0 ends its buffer when it has all of its rows; the others fetch theirs afterwards."""
    case = LlCase(ranks=3, tokens=(16,))
    inputs, buffer = LlInputs(case), GlooLowLatencyBuffer(group, case.config(), timeout_s=30)
    got = receive(buffer, inputs, send(buffer, inputs))
    epochs = [send(buffer, inputs), send_home(buffer, inputs, got.handle)]
    if rank != 0:
        time.sleep(0.3)
    check_received(inputs, rank, buffer.dispatch_receive(epochs[0], **receive_options(case)))
    _, topk_idx, weights, _ = inputs.on(rank, CPU)
    assert same_bits(buffer.combine_receive(epochs[1], topk_idx, weights), inputs.combined()[rank])
    buffer.destroy()


def test_a_rank_that_ends_early(cpu_ranks):
    cpu_ranks(3).run(end_early)
