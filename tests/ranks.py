"""RankPool: worker processes that form a process group and run test functions. Fixtures `cpu_ranks`, `gpu_ranks`.

def add(group, rank, value):  # at module level: it is pickled by its name
    ...
def test_add(cpu_ranks):
    assert cpu_ranks(4).run(add, 3) == [...]  # one result per rank; pass and return CPU values
"""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cutehop.launch import mps_daemon, rank_environment

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 180.0  # eight interpreters import torch at once
GRACE_SECONDS = 10.0  # for the other ranks, once one has failed: they may be waiting for it


class RankError(RuntimeError):
    """A rank raised (the text holds its traceback), or its process ended."""


class RankPool:
    """`ranks` processes with a gloo group over 127.0.0.1; close it, or use it in a `with` block.

    gpu: rank i has CUDA device i % device_count current; ranks that share one run under an MPS daemon of this pool.
    """

    def __init__(self, ranks: int, gpu: bool = False) -> None:
        self.ranks = ranks
        self.killed: set[int] = set()
        self.alive = True
        self._stack = ExitStack()
        self._logs = Path(tempfile.mkdtemp(prefix="cutehop-ranks-"))
        self._stack.callback(shutil.rmtree, self._logs, ignore_errors=True)
        devices = torch.cuda.device_count() if gpu else 0
        environment = rank_environment(shared=gpu and ranks > devices)
        if gpu and ranks > devices:
            environment |= self._stack.enter_context(mps_daemon()).environment
        # The store lives here: killing rank 0 must not take it from the others.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        try:
            for rank in range(ranks):
                self._start(rank, str(rank % devices) if gpu else "cpu", environment)
            Call(self, "start", set(range(ranks))).results(START_SECONDS)
        except BaseException:
            self.close(kill=True)
            raise

    def _start(self, rank: int, device: str, environment: dict[str, str]) -> None:
        ours, theirs = multiprocessing.Pipe()
        fd = theirs.fileno()
        command = [
            sys.executable,
            "-m",
            "tests.rank_worker",
            *map(str, (fd, rank, self.ranks, self._store.port)),
            device,
        ]
        with self.log(rank).open("wb") as log:
            self._processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=(fd,), stdout=log, stderr=log)
            )
        self._pipes.append(ours)
        theirs.close()

    def log(self, rank: int) -> Path:
        """What the rank wrote to stdout and stderr."""
        return self._logs / f"rank{rank}.log"

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120, **kwargs: Any) -> list[Any]:
        """function(group, rank, *args, **kwargs) on every rank that was not killed; results by rank (None if killed).

        An exception of a rank is raised here, its traceback in the cause. If a rank hangs or dies, TimeoutError or
        RankError names it, and the pool is gone.
        """
        return self.start(function, *args, **kwargs).results(timeout)

    def start(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
        """As `run`, but does not wait: for tests that kill a rank meanwhile."""
        if not self.alive:
            raise RankError("this pool was closed; take a new one")
        request = pickle.dumps((function, args, kwargs))
        ranks = set(range(self.ranks)) - self.killed
        for rank in ranks:
            self._pipes[rank].send_bytes(request)
        return Call(self, getattr(function, "__name__", repr(function)), ranks)

    def kill(self, rank: int) -> None:
        """SIGKILL to a rank's process; the others go on."""
        self.killed.add(rank)
        self._processes[rank].kill()
        self._processes[rank].wait()

    def close(self, kill: bool = False) -> None:
        """Ends the processes, then the MPS daemon."""
        self.alive = False
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + (0 if kill else GRACE_SECONDS)
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._stack.close()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(kill=error[0] is not None)


class Call:
    """A function that runs on the ranks of a pool."""

    def __init__(self, pool: RankPool, name: str, ranks: set[int]) -> None:
        self._pool = pool
        self._name = name
        self._waiting = set(ranks)
        self._results: list[Any] = [None] * pool.ranks
        self._errors: dict[int, tuple[bytes | None, str]] = {}
        self._dead: dict[int, str] = {}

    def results(self, timeout: float = 120) -> list[Any]:
        """As RankPool.run."""
        deadline = time.monotonic() + timeout
        while self._waiting:
            pipes = {self._pool._pipes[rank]: rank for rank in self._waiting}
            ready = wait(list(pipes), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                self._receive(pipes[pipe], pipe)  # type: ignore[index,arg-type]
            if self._errors or self._dead:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return self._judge(timeout)

    def _receive(self, rank: int, pipe: Connection) -> None:
        self._waiting.discard(rank)
        try:
            kind, value, text = pipe.recv()
        except (EOFError, ConnectionResetError):
            if rank not in self._pool.killed:
                code = self._pool._processes[rank].wait()
                self._dead[rank] = f"rank {rank} ended with exit code {code}\n{self._tail(rank)}"
            return
        if kind == "ok":
            self._results[rank] = pickle.loads(value)
        else:
            self._errors[rank] = (value, f"rank {rank} in {self._name}:\n{text}")

    def _judge(self, timeout: float) -> list[Any]:
        where = self._where_they_hang() if self._waiting else ""
        if self._waiting or self._dead:
            self._pool.close(kill=True)
        if self._dead:
            raise RankError("\n".join([*self._dead.values(), *(text for _, text in self._errors.values())]))
        if self._errors:
            first = next(iter(self._errors))  # to arrive: the others' may be consequences of it
            cause = RankError("\n".join([text for _, text in self._errors.values()] + [where]).rstrip())
            error = self._errors[first][0]
            if error is None:
                raise cause
            raise pickle.loads(error) from cause
        if self._waiting:
            raise TimeoutError(
                f"{self._name}: ranks {sorted(self._waiting)} of {self._pool.ranks} did not return within {timeout:g} "
                f"s; the pool was killed\n{where}"
            )
        return self._results

    def _where_they_hang(self) -> str:
        for rank in self._waiting:
            self._pool._processes[rank].send_signal(signal.SIGUSR1)
        time.sleep(0.5)  # for the stacks to reach the logs
        return "\n".join(f"rank {rank} hangs:\n{self._tail(rank)}" for rank in sorted(self._waiting))

    def _tail(self, rank: int) -> str:
        return self._pool.log(rank).read_text(errors="replace")[-3000:]


class Pools:
    """The pools of a test session: one per size on the CPU, one at a time on the GPUs, since daemons do not share."""

    def __init__(self, gpu: bool) -> None:
        self._gpu = gpu
        self._kept: dict[int, RankPool] = {}
        self._fresh: list[RankPool] = []

    def __call__(self, ranks: int, fresh: bool = False) -> RankPool:
        """A pool of `ranks` processes. fresh: for this test alone, e.g. because it kills a rank."""
        kept = self._kept.get(ranks)
        if not fresh and kept is not None and kept.alive and not kept.killed:
            return kept
        if self._gpu:
            self.close()
        pool = RankPool(ranks, self._gpu)
        if fresh:
            self._fresh.append(pool)
        else:
            self._kept[ranks] = pool
        return pool

    def end_test(self) -> None:
        """Closes the fresh pools."""
        while self._fresh:
            self._fresh.pop().close(kill=True)

    def close(self) -> None:
        self.end_test()
        while self._kept:
            self._kept.popitem()[1].close()
