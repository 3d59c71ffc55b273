"""One rank of a RankPool (tests/ranks.py): `python -m tests.rank_worker FD RANK RANKS PORT DEVICE`.

Imports torch and cutehop, joins a gloo group, then runs the functions that come down the pipe FD until it closes.
DEVICE is "cpu" or a CUDA index. The environment may name the heap provider of all buffers.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

import cutehop  # noqa: F401  (loaded at start-up rather than inside the first timed call)

PROVIDER_VARIABLE = "CUTEHOP_TESTS_HEAP_PROVIDER"


def _picklable(value: Any) -> bytes | None:
    try:
        return pickle.dumps(value)
    except Exception:
        return None


def _answer(request: bytes, rank: int) -> tuple[str, bytes | None, str]:
    """("ok", pickled result, "") or ("error", pickled exception or None, traceback)."""
    try:
        function, args, kwargs = pickle.loads(request)
        return "ok", pickle.dumps(function(dist.group.WORLD, rank, *args, **kwargs)), ""
    except BaseException as error:  # SystemExit of a test function is a failed test as well
        return "error", _picklable(error), traceback.format_exc()


def _give_all_buffers(provider: str) -> None:
    """What buffers ask for, and what they get, is a heap of this provider."""
    from cutehop.comm import memory

    original = memory.open_heap
    memory.open_heap = lambda _, *arguments: original(provider, *arguments)  # type: ignore[assignment]


def main() -> None:
    fd, rank, ranks, port = map(int, sys.argv[1:5])
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the pool asks where a rank hangs; stderr is the rank's log
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then closes the pipe
    pipe = Connection(fd)
    if sys.argv[5] != "cpu":
        torch.cuda.set_device(int(sys.argv[5]))
    if PROVIDER_VARIABLE in os.environ:
        _give_all_buffers(os.environ[PROVIDER_VARIABLE])
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    pipe.send(("ok", pickle.dumps(None), ""))
    try:
        while True:
            pipe.send(_answer(pipe.recv_bytes(), rank))
            sys.stdout.flush()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    # No destructors: a group whose peers are gone, or a CUDA context under MPS, may wait in them.
    os._exit(0)


if __name__ == "__main__":
    main()
