"""Every path of the expert-parallel kernels on two ranks, small: for NVIDIA's compute-sanitizer.

    python -m tests.ep_sanitizer memcheck      # or racecheck, initcheck, synccheck; none: without the sanitizer
    python -m tests.ep_sanitizer memcheck --sanitizer /path/to/compute-sanitizer --only full

Each rank is a process of its own under a sanitizer of its own; on one GPU they take turns, without MPS, which the tools
do not support. Prints what each rank printed; exit code 1 if a result is wrong or a tool found something.
Parts: full (dispatch, cached dispatch, combine in all forms), views, graph.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from cutehop.comm.base import Buffer
from cutehop.comm.config import EpConfig
from cutehop.launch import rank_environment
from tests.ep_gpu_work import open_buffer, settle
from tests.ep_traffic import Sizes, Traffic, differ, round_trip, wrong_rows

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2
TOKENS = 12
TOOLS = ("none", "memcheck", "racecheck", "initcheck", "synccheck")
SECONDS = 540  # tools slow kernels down by up to two orders of magnitude
FOUND = 86  # a sanitizer's exit code when it found something

SIZES = [
    Sizes((TOKENS, 5), hidden=64, k=3, routing="hostile"),
    Sizes((0, TOKENS), hidden=8, k=8, idx_dtype=torch.int32),
    Sizes((7, TOKENS), hidden=4104, k=1, routing="one_rank"),  # a row of two unequal pieces
    Sizes((TOKENS, 3), hidden=528, rows="f32", column_major=True),  # 5 scales
    Sizes((TOKENS, 3), hidden=2048, rows="int32"),  # 4 scales: 16 bytes
    Sizes((TOKENS, TOKENS), routing="none"),
]


def run_full(buffer: Buffer, device: str) -> list[torch.Tensor]:
    return [
        round_trip(buffer, Traffic(sizes, seed, device), worst, biases, weights=biases != 1, cached=True)
        for seed, sizes in enumerate(SIZES)
        for biases, worst in enumerate((0, RANKS * TOKENS, RANKS * TOKENS + 5))
    ]


def run_views(buffer: Buffer, device: str) -> list[torch.Tensor]:
    traffic, rank, wrong = Traffic(SIZES[0], 99, device), buffer.rank, []
    x, scales, *rest = traffic.arguments(rank)
    assert x is not None
    for worst in (0, RANKS * TOKENS):
        view = buffer.dispatch_input(*x.shape).copy_(x)
        got = buffer.dispatch(view, scales, *rest, num_worst_tokens=worst)  # type: ignore[arg-type]
        wrong.append(wrong_rows(traffic, rank, got, worst))
        m = traffic.rows_of(rank)
        y = buffer.combine_input(got.handle, x.shape[1])
        y[:m] = traffic.expert(got.recv_x[:m], rank)
        combined, _ = buffer.combine(y, got.handle)
        wrong.append(differ(combined, traffic.combined(rank, 0)[0]))
    return wrong


def run_graph(buffer: Buffer, device: str) -> list[torch.Tensor]:
    if device == "cpu":
        return []
    traffic, rank, wrong = Traffic(SIZES[0], 7, device), buffer.rank, []
    arguments = traffic.arguments(rank)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = buffer.dispatch(*arguments, num_worst_tokens=RANKS * TOKENS)  # type: ignore[arg-type]
        combined, _ = buffer.combine(traffic.expert(got.recv_x, rank), got.handle)
    for _ in range(3):
        graph.replay()
        wrong.append(wrong_rows(traffic, rank, got, RANKS * TOKENS))
        wrong.append(differ(combined, traffic.combined(rank, 0)[0]))
    return wrong


PARTS: dict[str, Callable[[Buffer, str], list[torch.Tensor]]] = {
    "full": run_full,
    "views": run_views,
    "graph": run_graph,
}


def run_rank(rank: int, port: int, device: str, parts: list[str]) -> int:
    if device != "cpu":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=SECONDS))
    group = dist.group.WORLD
    assert group is not None
    config = EpConfig(RANKS, 4112, TOKENS, RANKS * 4, max_topk=8, scales="f32")
    buffer = open_buffer(group, config, device, timeout_s=SECONDS, num_sms=2)
    failed = 0
    for part in parts:
        wrong = PARTS[part](buffer, device)
        settle(group)
        failed += sum(map(bool, wrong))
        print(f"rank {rank}: {part}: {len(wrong)} results compared, {sum(map(bool, wrong))} wrong", flush=True)
    buffer.destroy()
    dist.destroy_process_group()
    return failed


def run_all(tool: str, sanitizer: str, parts: list[str]) -> int:
    """Start both ranks; how many went wrong."""
    gpus = torch.cuda.device_count()
    device = "cuda" if gpus else "cpu"
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    under = [] if tool == "none" else [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND)]
    if tool == "memcheck":  # cuda-python asks the driver for functions that it need not have
        under += ["--report-api-errors", "no"]
    environment = rank_environment(shared=gpus < RANKS)
    processes, codes = [], []
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}" for rank in range(RANKS)]
        try:
            for rank, log in enumerate(logs):
                command = [sys.executable, "-m", "tests.ep_sanitizer", tool, "--only", *parts]
                command += ["--rank", str(rank), "--port", str(store.port), "--device", device]
                with log.open("wb") as out:
                    processes.append(
                        subprocess.Popen([*under, *command], cwd=ROOT, env=environment, stdout=out, stderr=out)
                    )
            codes = [process.wait(SECONDS) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
            for rank, log in enumerate(logs):
                print(f"---- rank {rank} under {tool}\n{log.read_text(errors='replace')}")
    print(f"{tool} on {device}: exit codes {codes}; {FOUND} means that the tool found something")
    return sum(code != 0 for code in codes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--sanitizer", default=shutil.which("compute-sanitizer") or "compute-sanitizer")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    for name in ("--rank", "--port", "--device"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is None:
        return int(run_all(args.tool, args.sanitizer, args.only) > 0)
    return int(run_rank(int(args.rank), int(args.port), args.device, args.only) > 0)


if __name__ == "__main__":
    sys.exit(main())
