"""`python -m cutehop.launch --ranks 8 --one-gpu script.py ...`: several ranks of a script, on one GPU if need be.

The ranks are torchrun's (torch.distributed.run, one node). What this adds: ranks that share a GPU run under a private
MPS daemon, so that they run at the same time, and the daemon is gone afterwards, whatever happened; torch, NCCL and
NVSHMEM are told that ranks may share a device and that NVLink multicast is not used. A script finds its device with
`torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())`. Where there is no GPU, the ranks run
on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

MPS_CONTROL = "nvidia-cuda-mps-control"
MPS_SECONDS = 30.0  # for the daemon to start, to answer and to end
CHILD_SECONDS = 30.0  # for torchrun to stop its ranks when it is told to
# One of these makes a client see fewer SMs, and a run of ranks that wait for each other deadlocked with it.
UNWANTED = ("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "CUDA_MPS_ENABLE_PER_CTX_DEVICE_MULTIPROCESSOR_PARTITIONING")


def rank_environment(shared: bool, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a rank, from `base` (default: this process's).

    shared: ranks share a GPU, which torch's symmetric memory has to be told.
    """
    environment = {k: v for k, v in (os.environ if base is None else base).items() if k not in UNWANTED}
    environment |= {
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        "NCCL_NVLS_ENABLE": "0",
        "NVSHMEM_DISABLE_NVLS": "1",
    }
    if shared:
        environment["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    # All ranks are on this machine; a host name that does not resolve must not stop gloo. torchrun would set the
    # threads to 1 as well, with a paragraph of text.
    return {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"} | environment


@dataclass(frozen=True)
class Mps:
    """environment: what clients of the daemon need; empty if none runs. why_not: the reason for that, or None."""

    environment: dict[str, str] = field(default_factory=dict)
    why_not: str | None = None


@contextlib.contextmanager
def mps_daemon() -> Iterator[Mps]:
    """A private MPS daemon with pipes and logs in a folder of its own, shut down when the block is left.

    End the clients inside the block. Where the daemon cannot be had, the block runs without: processes that share a GPU
    then take turns. A daemon whose client was killed serves no new ones; take another.
    """
    if shutil.which(MPS_CONTROL) is None:
        yield Mps(why_not=f"{MPS_CONTROL} is not installed")
        return
    folder = Path(tempfile.mkdtemp(prefix="cutehop-mps-"))
    names = {"CUDA_MPS_PIPE_DIRECTORY": folder / "pipe", "CUDA_MPS_LOG_DIRECTORY": folder / "log"}
    for path in names.values():
        path.mkdir()
    clients = {name: str(path) for name, path in names.items()}
    try:
        why_not = _start_mps(clients, folder)
        yield Mps(why_not=why_not) if why_not else Mps(clients)
    finally:
        _stop_mps(clients, folder)
        shutil.rmtree(folder, ignore_errors=True)


def _daemon_environment(clients: Mapping[str, str]) -> dict[str, str]:
    # The daemon sees all GPUs: what it is given in CUDA_VISIBLE_DEVICES it would number anew, and a client's value
    # would then be read by those numbers.
    hidden = (*UNWANTED, "CUDA_VISIBLE_DEVICES")
    return {k: v for k, v in os.environ.items() if k not in hidden} | dict(clients)


def _start_mps(clients: Mapping[str, str], folder: Path) -> str | None:
    """Why there is no daemon, or None."""
    output = folder / "start"  # a file: the daemon would hold a pipe open, and reading it would never end
    try:
        with output.open("wb") as out:
            code = subprocess.run(
                [MPS_CONTROL, "-d"],
                env=_daemon_environment(clients),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=MPS_SECONDS,
            ).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{MPS_CONTROL} -d did not start: {error}"
    text = " ".join(output.read_text(errors="replace").split())
    return None if code == 0 else f"{MPS_CONTROL} -d ended with {code}: {text or 'no output'}"


def _stop_mps(clients: Mapping[str, str], folder: Path) -> None:
    """`quit`, then make sure: the daemon's and its servers' ids are known, and neither outlives this call."""
    pid_file = Path(clients["CUDA_MPS_PIPE_DIRECTORY"]) / f"{MPS_CONTROL}.pid"
    daemon = _pids(pid_file.read_text() if pid_file.exists() else "")
    servers = _pids(_ask_mps(clients, "get_server_list", folder)) if daemon else []
    _ask_mps(clients, "quit", folder)
    deadline = time.monotonic() + MPS_SECONDS
    while any(map(_alive, daemon + servers)):
        if time.monotonic() > deadline:
            for pid in daemon + servers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.05)


def _ask_mps(clients: Mapping[str, str], command: str, folder: Path) -> str:
    output = folder / command
    with output.open("wb") as out, contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            [MPS_CONTROL],
            env=_daemon_environment(clients),
            input=f"{command}\n".encode(),
            stdout=out,
            stderr=subprocess.DEVNULL,
            timeout=MPS_SECONDS,
        )
    return output.read_text(errors="replace")


def _pids(text: str) -> list[int]:
    return [int(word) for word in text.split() if word.isdigit()]


def _alive(pid: int) -> bool:
    """Is there such a process, and does it still run? A zombie whose parent does not collect it does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cutehop.launch", description="several ranks of a script, one node")
    parser.add_argument("--ranks", type=int, metavar="N", help="how many; default: one per GPU")
    parser.add_argument("--one-gpu", action="store_true", help="all ranks on the first visible GPU, under MPS")
    parser.add_argument("-m", "--module", action="store_true", help="script is the name of a module")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="for the script")
    return parser


def torchrun(ranks: int, module: bool, script: str, arguments: Sequence[str]) -> list[str]:
    """The command that runs the ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", f"--nproc-per-node={ranks}"]
    return [*command, *(["-m"] if module else []), script, *arguments]


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Exit code of the command. It does not outlive this call, however the call ends."""
    child = subprocess.Popen(command, env=dict(environment))
    try:
        code = child.wait()
        return code if code >= 0 else 128 - code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(CHILD_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _on_terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of torchrun, 130 after Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(argv)
    gpus = _gpu_count()
    ranks = options.ranks if options.ranks is not None else gpus
    if ranks < 1:
        parser.error(
            f"--ranks {ranks}, must be at least 1" if options.ranks is not None else "no GPU here: say --ranks N"
        )
    if gpus and ranks > gpus and not options.one_gpu:
        parser.error(f"--ranks {ranks} on {gpus} GPUs: add --one-gpu to share one, or take {gpus} ranks")
    signal.signal(signal.SIGTERM, _on_terminate)  # so that blocks are left and the daemon ends
    command = torchrun(ranks, options.module, options.script, options.arguments)
    shared = bool(gpus) and options.one_gpu
    environment = rank_environment(shared)
    if not gpus:
        print(f"launch: no GPU here, {ranks} ranks run on the CPU (gloo)", flush=True)
    if not shared:
        return _run(command, environment)
    environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    with mps_daemon() as mps:
        how = "at the same time (MPS)" if mps.why_not is None else f"by turns, which is slow: {mps.why_not}"
        print(f"launch: {ranks} ranks share one GPU {how}", flush=True)
        return _run(command, environment | mps.environment)


if __name__ == "__main__":
    sys.exit(main())
