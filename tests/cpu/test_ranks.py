"""RankPool on the CPU: results by rank, and what the caller sees when a rank raises, hangs or dies."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from cutehop.comm.errors import EpTimeoutError
from tests.ranks import RankError

pytestmark = pytest.mark.dist


def add_up(group, rank, value, extra=0):
    total = torch.tensor([rank + value + extra])
    dist.all_reduce(total, group=group)
    return rank, total.item()


def environment(group, rank):
    return dict(os.environ), sorted({name.split(".")[0] for name in sys.modules}), os.getpid()


def time_out(group, rank):
    if rank == 1:
        raise EpTimeoutError(rank, 0, "dispatch_ready", 7, 6, 1.5)


def unpicklable_error(group, rank):
    class Local(Exception):
        pass

    raise Local(f"from rank {rank}")


def hang(group, rank, who):
    if rank == who:
        time.sleep(1000)


def die(group, rank, who):
    if rank == who:
        os.kill(os.getpid(), signal.SIGKILL)


def wait_for_everybody(group, rank):
    try:
        dist.barrier(group)
    except RuntimeError:
        return "alone"
    return "together"


def test_results_come_by_rank_and_processes_stay(cpu_ranks):
    pool = cpu_ranks(3)
    assert pool.run(add_up, 10, extra=1) == [(0, 36), (1, 36), (2, 36)]
    ids = [pid for _, _, pid in pool.run(environment)]
    assert len({*ids, os.getpid()}) == 4
    assert cpu_ranks(3) is pool
    assert [pid for _, _, pid in pool.run(environment)] == ids


def test_a_worker_has_the_ranks_environment(cpu_ranks):
    variables, modules, _ = cpu_ranks(3).run(environment)[0]
    assert variables["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"
    assert variables["NCCL_NVLS_ENABLE"] == "0"
    assert "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES" not in variables
    assert "cutlass" not in modules


def test_an_exception_keeps_its_type_and_names_rank_and_place(cpu_ranks):
    pool = cpu_ranks(3)
    with pytest.raises(EpTimeoutError, match="rank 1 waited") as caught:
        pool.run(time_out)
    assert (caught.value.peer, caught.value.phase, caught.value.waited_s) == (0, "dispatch_ready", 1.5)
    assert "rank 1 in time_out" in str(caught.value.__cause__)
    assert "test_ranks.py" in str(caught.value.__cause__)
    assert pool.run(add_up, 0)[0] == (0, 3)  # all ranks had answered: the pool goes on


def test_an_exception_that_cannot_be_pickled_is_told_as_text(cpu_ranks):
    with pytest.raises(RankError, match="Local: from rank 2"):
        cpu_ranks(3).run(unpicklable_error)


def test_a_hang_ends_with_the_pool_and_says_who_and_where(cpu_ranks):
    pool = cpu_ranks(2, fresh=True)
    with pytest.raises(TimeoutError, match=r"hang: ranks \[1\] of 2") as caught:
        pool.run(hang, 1, timeout=5)  # the other rank has to import this module
    assert "in hang" in str(caught.value)
    assert not pool.alive
    with pytest.raises(RankError, match="closed"):
        pool.run(add_up, 0)


def test_a_rank_that_dies_is_named(cpu_ranks):
    with pytest.raises(RankError, match="rank 0 ended with exit code -9"):
        cpu_ranks(2, fresh=True).run(die, 0)


def test_the_others_of_a_killed_rank_go_on(cpu_ranks):
    pool = cpu_ranks(2, fresh=True)
    call = pool.start(hang, 0)
    pool.kill(0)
    assert call.results(10) == [None, None]
    assert pool.run(wait_for_everybody, timeout=30) == [None, "alone"]
    assert cpu_ranks(2) is not pool
