"""GlooBuffer on real processes against the reference: values, views, disagreements, deadlines, lifetime."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from cutehop.comm.errors import EpTimeoutError
from cutehop.comm.gloo import GlooBuffer
from tests.ep_cases import CASES, MAX_TOKENS, EpCase, EpInputs, check_case, check_received, same_bits

pytestmark = pytest.mark.dist
CPU = torch.device("cpu")
TIMEOUT_S = 2.0


def check_on_rank(group, rank, case):
    buffer = GlooBuffer(group, case.config())
    check_case(buffer, EpInputs(case))
    buffer.destroy()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(cpu_ranks, case, ranks):
    cpu_ranks(ranks).run(check_on_rank, replace(case, ranks=ranks))


def many_calls(group, rank):
    """Calls of all shapes on one buffer, two buffers in turns, handles used late and in reverse."""
    cases = [replace(case, seed=seed) for seed in range(3) for case in CASES if case.rows != "ue8m0"]
    config = EpCase(rows="f32", hidden=512, local_experts=4).config()
    buffers = [GlooBuffer(group, config, timeout_s=30) for _ in range(2)]
    pending = []
    for number, case in enumerate(case for case in cases if case.local_experts == 4):
        inputs, buffer = EpInputs(case), buffers[number % 2]
        got = buffer.dispatch(*inputs.arguments(rank, CPU))
        check_received(inputs, rank, got)
        pending.append((buffer, inputs, got.handle))
        if len(pending) == 4:
            for late, given, handle in reversed(pending):
                combined, _ = late.combine(given.ys[rank], handle)
                assert same_bits(combined, given.combined(0, False)[0][rank])
            pending.clear()
    for buffer in buffers:
        buffer.destroy()


def test_calls_of_all_shapes_on_two_buffers(cpu_ranks):
    cpu_ranks(2).run(many_calls)


def use_views(group, rank):
    case = EpCase(tokens=(16, 24))
    inputs, buffer = EpInputs(case), GlooBuffer(group, case.config())
    x, *others = inputs.arguments(rank, CPU)
    view = buffer.dispatch_input(len(x))
    view.copy_(x)
    got = buffer.dispatch(view, *others)
    check_received(inputs, rank, got)
    with pytest.raises(ValueError, match="dispatch_input: stale view"):
        buffer.dispatch(view, *others)
    again = buffer.dispatch_input(MAX_TOKENS)
    again[: len(x)] = x
    with pytest.raises(ValueError, match="rows begin 512 bytes into the view"):
        buffer.dispatch_cached(again[1 : len(x) + 1], None, got.handle)
    recv_x, _ = buffer.dispatch_cached(again[: len(x)], None, got.handle)  # what raised above took nothing away
    assert same_bits(recv_x, got.recv_x)
    buffer.dispatch_input(1)
    buffer.dispatch(x, *others)  # a call with another tensor uses the view up as well
    with pytest.raises(ValueError, match="stale view"):
        buffer.dispatch_cached(view, None, got.handle)
    y = buffer.combine_input(got.handle)
    assert y.shape == got.recv_x.shape
    y.copy_(inputs.ys[rank])
    combined, _ = buffer.combine(y, got.handle)
    assert same_bits(combined, inputs.combined(0, False)[0][rank])
    with pytest.raises(ValueError, match="combine_input: stale view"):
        buffer.combine(y, got.handle)
    assert buffer.dispatch_input(4, 128, torch.float8_e4m3fn).shape == (4, 128)
    with pytest.raises(ValueError, match="49 tokens"):
        buffer.dispatch_input(MAX_TOKENS + 1)
    with pytest.raises(TypeError, match="float32"):
        buffer.dispatch_input(1, dtype=torch.float32)
    with pytest.raises(ValueError, match="1024 bytes"):
        buffer.combine_input(got.handle, 512)
    buffer.destroy()


def test_views(cpu_ranks):
    cpu_ranks(2).run(use_views)


def disagree(group, rank):
    """What one rank does wrong raises on all of them, and the buffer goes on."""
    case = EpCase(ranks=4, tokens=(16, 24, 9))
    inputs = EpInputs(case)
    m = [len(got.handle.recv_src_idx) for got in inputs.received]
    buffer = GlooBuffer(group, case.config(max_recv_tokens=max(m) + 8))
    x, *others = arguments = inputs.arguments(rank, CPU)
    got = buffer.dispatch(*arguments)
    odd = rank == 1
    with pytest.raises(ValueError, match=f"rank 1 receives {m[1]} tokens, its num_worst_tokens is {m[1] - 1}"):
        buffer.dispatch(*arguments, num_worst_tokens=m[1] - 1 if odd else 500)
    with pytest.raises(ValueError, match="bytes of a row"):
        buffer.dispatch(x[:, :128].contiguous() if odd else x, *others)
    with pytest.raises(ValueError, match="choices"):
        buffer.dispatch(x, None, *((None, None) if odd else others[1:3]), *others[3:])
    with pytest.raises(
        ValueError, match=r"dispatch_cached: rank 1 calls combine|combine: rank \d calls dispatch_cached"
    ):
        buffer.combine(got.recv_x, got.handle) if odd else buffer.dispatch_cached(x, None, got.handle)
    other = EpInputs(replace(case, seed=5))
    received = buffer.dispatch(*other.arguments(rank, CPU))
    handle = received.handle if odd else got.handle
    with pytest.raises(ValueError, match="handles of one dispatch"):
        buffer.combine(torch.zeros(len(handle.recv_src_idx), 8).bfloat16(), handle)
    full = EpInputs(replace(case, routing="one_rank"))
    with pytest.raises(ValueError, match=r"rank \d receives \d+ tokens, the buffer holds"):
        buffer.dispatch(*full.arguments(rank, CPU))
    check_received(inputs, rank, buffer.dispatch(*arguments))
    buffer.destroy()


def test_disagreements(cpu_ranks):
    cpu_ranks(4).run(disagree)


def configs_differ(group, rank):
    config = EpCase().config(max_tokens=MAX_TOKENS + rank)
    with pytest.raises(ValueError, match="use one on all ranks"):
        GlooBuffer(group, config)


def test_configs_that_differ_raise(cpu_ranks):
    cpu_ranks(2).run(configs_differ)


def expect_timeout(rank, peers, phase, call, at_least_s=TIMEOUT_S):
    begin = time.monotonic()
    with pytest.raises(EpTimeoutError) as caught:
        call()
    error, waited_s = caught.value, time.monotonic() - begin
    assert (error.rank, error.phase) == (rank, phase)
    assert error.peer in peers
    assert at_least_s * 0.9 <= error.waited_s <= waited_s < TIMEOUT_S + 5
    return error


def one_never_calls(group, rank):
    case = EpCase(ranks=3)
    inputs, buffer = EpInputs(case), GlooBuffer(group, case.config(), timeout_s=TIMEOUT_S)
    arguments = inputs.arguments(rank, CPU)
    got = buffer.dispatch(*arguments)
    if rank != 1:
        error = expect_timeout(rank, [1], "combine counts", lambda: buffer.combine(got.recv_x, got.handle))
        assert (error.expected, error.got) == (2, 1)
        for call in (buffer.check, lambda: buffer.dispatch(*arguments), lambda: buffer.dispatch_input(1)):
            with pytest.raises(EpTimeoutError):
                call()
    new = GlooBuffer(group, case.config(), timeout_s=30)  # on the same group
    buffer.destroy()  # on rank 1 only now: the others see a closed connection at once
    check_case(new, inputs)
    new.destroy()


def test_a_rank_that_never_calls(cpu_ranks):
    cpu_ranks(3).run(one_never_calls)


def one_never_comes(group, rank):
    if rank == 0:
        expect_timeout(
            0, [1], "creation of a GlooBuffer", lambda: GlooBuffer(group, EpCase().config(), timeout_s=TIMEOUT_S)
        )


def test_a_rank_that_never_comes(cpu_ranks):
    cpu_ranks(2, fresh=True).run(one_never_comes)


KEPT = {}  # what lives in a rank's process from one run to the next


def dispatch_once(group, rank):
    case = EpCase(ranks=3)
    inputs = EpInputs(case)
    KEPT["buffer"] = GlooBuffer(group, case.config(), timeout_s=TIMEOUT_S)
    KEPT["got"] = KEPT["buffer"].dispatch(*inputs.arguments(rank, CPU))


def combine_without_one(group, rank):
    buffer, got = KEPT["buffer"], KEPT["got"]
    # The connection to rank 1 is closed, so nobody has to wait; who finds out first stops sending to the other.
    peers = [1, 2 - rank]
    expect_timeout(rank, peers, "combine counts", lambda: buffer.combine(got.recv_x, got.handle), at_least_s=0)
    survivors = dist.new_group([0, 2], backend="gloo", use_local_synchronization=True)
    buffer.destroy()
    case = EpCase(ranks=2)
    new = GlooBuffer(survivors, case.config(), timeout_s=30)
    check_case(new, EpInputs(case))
    new.destroy()


def test_a_rank_that_is_killed(cpu_ranks):
    ranks = cpu_ranks(3, fresh=True)
    ranks.run(dispatch_once)
    ranks.kill(1)
    ranks.run(combine_without_one)


def live_and_end(group, rank):
    case = EpCase()
    inputs, buffer = EpInputs(case), GlooBuffer(group, case.config())
    view = buffer.dispatch_input(4)
    buffer.release_memory()
    for call in (lambda: buffer.dispatch_input(1), buffer.release_memory):
        with pytest.raises(RuntimeError, match=r"has released its memory; call acquire_memory\(\)"):
            call()
    buffer.acquire_memory()
    with pytest.raises(RuntimeError, match="has its memory"):
        buffer.acquire_memory()
    assert buffer.dispatch_input(4).data_ptr() != view.data_ptr()
    check_case(buffer, inputs)
    buffer.release_memory()
    buffer.destroy()
    buffer.destroy()
    for call in (buffer.acquire_memory, lambda: buffer.dispatch(*inputs.arguments(rank, CPU))):
        with pytest.raises(RuntimeError, match=f"buffer '{buffer.name}' is destroyed"):
            call()


def test_lifetime(cpu_ranks):
    cpu_ranks(2).run(live_and_end)
