"""CudaBuffer when something goes wrong: ranks that do not call, die, or receive too much; memory given back; lifetime.

A wait ends at its deadline and names peer and phase; the process goes on and makes another buffer. Tests with a pool of
their own come first, since such a pool ends the one that tests share.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from cutehop.comm.errors import EpTimeoutError
from tests.ep_cases import MAX_TOKENS, EpCase, EpInputs, check_case, check_received
from tests.ep_gpu_work import open_buffer, settle

pytestmark = [pytest.mark.dist, pytest.mark.gpu]

TIMEOUT_S = 2.0
LATE_S = 4.0  # that a deadline may be overrun on a machine whose ranks share everything
AWAY = 1  # the rank that does not do its part
KEPT = {}  # what lives in a rank's process from one run to the next


class Calls:
    """The calls of one rank on a buffer, by name, after a dispatch and a combine that all ranks took part in."""

    def __init__(self, group, case: EpCase, timeout_s: float = TIMEOUT_S, **config) -> None:
        self.inputs, self.rank = EpInputs(case), group.rank()
        if "warm" not in KEPT:  # what is slow once in a process shall not meet a deadline
            open_buffer(group, case.config(), "cuda").destroy()
            KEPT["warm"] = True
        settle(group)
        self.buffer = open_buffer(group, case.config(**config), "cuda", timeout_s)
        self.arguments = self.inputs.arguments(self.rank, self.buffer.device)
        self.y = self.inputs.ys[self.rank].to(self.buffer.device)
        self.got = self.dispatch()
        check_received(self.inputs, self.rank, self.got)
        self.combine()

    def dispatch(self, num_worst_tokens: int = 0):
        return self.buffer.dispatch(*self.arguments, num_worst_tokens=num_worst_tokens)

    def static_dispatch(self):
        return self.dispatch(self.buffer.ranks * MAX_TOKENS)

    def cached_dispatch(self):
        return self.buffer.dispatch_cached(*self.arguments[:2], self.got.handle)

    def combine(self):
        return self.buffer.combine(self.y, self.got.handle)

    def dispatch_input(self):
        return self.buffer.dispatch_input(1)

    def combine_input(self):
        return self.buffer.combine_input(self.got.handle)

    def send_half(self, phase: str) -> None:
        """What a rank has done of dispatch or combine when it stops between sending and receiving."""
        nothing = SimpleNamespace(launch=lambda *args: None)
        if phase == "dispatch_ack":
            with mock.patch.object(self.buffer, "_receive", nothing):
                self.static_dispatch()
        else:
            with mock.patch.object(self.buffer, "_combine_receive", nothing):
                self.combine()

    def expect_timeout(self, call: str, peer: int, phase: str) -> None:
        begin = time.monotonic()
        with pytest.raises(EpTimeoutError) as caught:
            self.run_to_the_end(call)
        error, waited_s = caught.value, time.monotonic() - begin
        assert (error.rank, error.peer, error.phase) == (self.rank, peer, phase), error
        assert error.got < error.expected, error
        assert error.waited_s >= 0.95 * TIMEOUT_S, error
        assert waited_s < TIMEOUT_S + LATE_S, waited_s
        for later in ("dispatch", "cached_dispatch", "combine", "dispatch_input", "combine_input"):
            with pytest.raises(EpTimeoutError):
                getattr(self, later)()

    def run_to_the_end(self, call: str) -> None:
        """A call that the CPU does not wait for tells later."""
        getattr(self, call)()
        torch.cuda.synchronize()
        self.buffer.check()


def make_among(group, rank, alive):
    """A buffer of the ranks that are left; it works."""
    if len(alive) < group.size():
        group = dist.new_group(alive, backend="gloo", use_local_synchronization=True)
    KEPT["calls"] = calls = Calls(group, EpCase(ranks=len(alive), seed=len(alive)))
    check_case(calls.buffer, calls.inputs)
    settle(group)  # a process that is killed has no kernel running: under MPS that could take the others' along


def miss_one(group, rank, call, phase):
    """The last rank of the buffer was killed."""
    calls = KEPT.pop("calls")
    calls.expect_timeout(call, calls.buffer.ranks - 1, phase)
    calls.buffer.destroy()
    calls.buffer.destroy()


def test_ranks_that_are_killed(gpu_ranks):
    """One after the other, at another point each time; the survivors go on with a buffer of their own."""
    pool, alive = gpu_ranks(5, fresh=True), [0, 1, 2, 3, 4]
    for call, phase in (("dispatch", "counts"), ("cached_dispatch", "dispatch_ready"), ("combine", "combine_ready")):
        pool.run(make_among, alive)
        pool.kill(alive.pop())
        pool.run(miss_one, call, phase)
    pool.run(make_among, alive)


def make_pair(group, rank):
    KEPT["calls"] = Calls(group, EpCase(), timeout_s=TIMEOUT_S if rank == 0 else 100)
    settle(group)


def die_waiting(group, rank):
    """Rank 1 waits in a kernel for rank 0's counts when it is killed; its own part of that dispatch stands."""
    if rank == 1:
        KEPT["calls"].dispatch()


def outlive_one(group, rank):
    calls = KEPT.pop("calls")
    check_received(calls.inputs, rank, calls.dispatch())
    calls.expect_timeout("dispatch", 1, "dispatch_ack")
    calls.buffer.destroy()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="under MPS a client that dies in a kernel takes others along")
def test_a_rank_killed_in_a_kernel(gpu_ranks):
    pool = gpu_ranks(2, fresh=True)
    pool.run(make_pair)
    call = pool.start(die_waiting)
    time.sleep(1)
    pool.kill(1)
    call.results()
    pool.run(outlive_one)


MISSED = [
    ("dispatch", "counts"),
    ("static_dispatch", "counts"),
    ("cached_dispatch", "dispatch_ready"),
    ("combine", "combine_ready"),
    ("dispatch", "dispatch_ack"),
    ("dispatch_input", "dispatch_ack"),
    ("combine", "combine_ack"),
    ("combine_input", "combine_ack"),
]


def one_stays_away(group, rank):
    """Each time in a new buffer, which shows that one can be made after a deadline."""
    case = EpCase(ranks=3)
    for call, phase in MISSED:
        calls = Calls(group, case)
        if phase.endswith("_ack"):
            calls.send_half(phase) if rank == AWAY else calls.run_to_the_end(phase.removesuffix("_ack"))
        settle(group)
        if rank != AWAY:
            calls.expect_timeout(call, AWAY, phase)
        dist.barrier(group)
        calls.buffer.destroy()
    new = open_buffer(group, case.config(), "cuda")
    check_case(new, EpInputs(case))
    new.destroy()
    return len(MISSED)


def test_a_rank_that_never_calls(gpu_ranks):
    assert gpu_ranks(3).run(one_stays_away) == [len(MISSED)] * 3


def one_is_late(group, rank):
    """Later than the others' polls have patience for in one slice, earlier than the deadline: nothing raises."""
    case = EpCase(ranks=3, seed=3)
    calls = Calls(group, case, timeout_s=20)
    for call in ("dispatch", "cached_dispatch", "combine", "static_dispatch"):
        if rank == AWAY:
            time.sleep(0.5)
        calls.run_to_the_end(call)
    check_case(calls.buffer, calls.inputs)
    calls.buffer.destroy()


def test_a_rank_that_is_late(gpu_ranks):
    gpu_ranks(3).run(one_is_late)


def one_never_comes(group, rank):
    """To make a buffer. The others are told, and make one without it."""
    everybody = dist.new_group(list(range(group.size())), backend="gloo")
    if rank == AWAY:
        # As many rendezvous as the others make: torch numbers them per process (comm.heap.TorchMemory).
        alone = dist.new_group([AWAY], backend="gloo", use_local_synchronization=True)
        open_buffer(alone, EpCase(ranks=1).config(), "cuda").destroy()
        return
    with pytest.raises(EpTimeoutError) as caught:
        open_buffer(everybody, EpCase(ranks=group.size()).config(), "cuda", TIMEOUT_S)
    assert (caught.value.peer, caught.value.phase) == (AWAY, "heap open")
    others = dist.new_group([0, 2], backend="gloo", use_local_synchronization=True)
    new = open_buffer(others, EpCase().config(), "cuda")
    check_case(new, EpInputs(EpCase()))
    new.destroy()


def test_a_rank_that_never_comes(gpu_ranks):
    gpu_ranks(3).run(one_never_comes)


def receive_too_much(group, rank):
    """Rows for a rank beyond max_recv_tokens: every rank raises, in both forms of dispatch, and names that rank."""
    ranks = group.size()
    case = EpCase(ranks=ranks, tokens=(16, 24, 9))
    most = max(len(got.handle.recv_src_idx) for got in EpInputs(case).received)
    full = EpInputs(EpCase(ranks=ranks, tokens=(40,), routing="one_rank"))
    rows = [len(got.handle.recv_src_idx) for got in full.received]
    assert rows == [0, 0, 120]
    for call in ("dispatch", "static_dispatch"):
        calls = Calls(group, case, timeout_s=20, max_recv_tokens=most)
        assert calls.buffer.layout.y.items == most
        calls.arguments = full.arguments(rank, calls.buffer.device)
        with pytest.raises(RuntimeError, match=rf"rank 2 receives 120 rows, the limit is {most}") as caught:
            calls.run_to_the_end(call)
        assert not isinstance(caught.value, EpTimeoutError)
        with pytest.raises(RuntimeError, match="the call is lost"):
            calls.combine()
        settle(group)
        calls.buffer.destroy()


def test_more_rows_than_the_memory_holds(gpu_ranks):
    gpu_ranks(3).run(receive_too_much)


def ask_for_too_few(group, rank):
    """num_worst_tokens below what rank 2 receives. It raises; the others do when they next need it, at the latest."""
    case = EpCase(ranks=3, tokens=(40,), routing="one_rank")
    calls = Calls(group, case)
    calls.dispatch(119)  # no CPU waits for it
    with pytest.raises(RuntimeError) as caught:
        calls.run_to_the_end("combine")
    if rank == 2:
        assert "rank 2 receives 120 rows, the limit is 119" in str(caught.value)
    settle(group)
    calls.buffer.destroy()


def test_fewer_rows_than_arrive(gpu_ranks):
    gpu_ranks(3).run(ask_for_too_few)


def live_and_end(group, rank):
    case = EpCase(ranks=3)
    inputs, buffer = EpInputs(case), open_buffer(group, case.config(), "cuda")
    for _ in range(2):
        check_case(buffer, inputs)
        buffer.release_memory()
        for call in (lambda: buffer.dispatch_input(1), buffer.release_memory):
            with pytest.raises(RuntimeError, match=r"has released its memory; call acquire_memory\(\)"):
                call()
        buffer.acquire_memory()
        with pytest.raises(RuntimeError, match="has its memory"):
            buffer.acquire_memory()
    check_case(buffer, inputs)
    for num_sms in (-1, 0x7FFFFFFF):
        with pytest.raises(ValueError, match=f"num_sms {num_sms}, supported 1"):
            buffer.dispatch(*inputs.arguments(rank, buffer.device), num_sms=num_sms)
    other = open_buffer(group, case.config(), "cuda", num_sms=1)
    buffer.release_memory()
    buffer.destroy()
    buffer.destroy()
    check_case(other, inputs)
    other.destroy()
    for call in (buffer.acquire_memory, lambda: buffer.dispatch(*inputs.arguments(rank, buffer.device))):
        with pytest.raises(RuntimeError, match=f"buffer '{buffer.name}' is destroyed"):
            call()


def test_lifetime(gpu_ranks):
    gpu_ranks(3).run(live_and_end)
