"""cutehop.launch: arguments, environment, and an MPS daemon that is always shut down, with a stand-in for NVIDIA's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cutehop import launch

# Behaves as the real one in what launch relies on: `-d` leaves a daemon and its id behind; commands come on stdin.
CONTROL = r"""#!/bin/bash
pipe=$CUDA_MPS_PIPE_DIRECTORY
[[ -d $pipe && -d $CUDA_MPS_LOG_DIRECTORY ]] || { echo "no folder"; exit 3; }
if [[ ${1:-} == -d ]]; then
    if [[ -n ${FAKE_MPS_FAIL:-} ]]; then echo "cannot start: $FAKE_MPS_FAIL" >&2; exit 1; fi
    sleep 600 & echo $! >"$pipe/nvidia-cuda-mps-control.pid"
    sleep 600 & echo $! >"$pipe/server"
    echo "start $$ visible=${CUDA_VISIBLE_DEVICES-unset} percent=${CUDA_MPS_ACTIVE_THREAD_PERCENTAGE-unset}" >>JOURNAL
    cat "$pipe/nvidia-cuda-mps-control.pid" "$pipe/server" >>JOURNAL.pids
    exit 0
fi
while read -r command; do
    echo "$command" >>JOURNAL
    case $command in
        get_server_list) cat "$pipe/server" ;;
        quit) [[ -n ${FAKE_MPS_DEAF:-} ]] || cat "$pipe/nvidia-cuda-mps-control.pid" "$pipe/server" | xargs kill ;;
    esac
done
"""


class FakeMps:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "journal"
        control = folder / launch.MPS_CONTROL
        control.write_text(CONTROL.replace("JOURNAL", str(self.path)))
        control.chmod(0o755)

    def said(self) -> list[str]:
        return [line.split()[0] for line in self.lines()]

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def running(self) -> list[int]:
        """Processes of daemons that were started and have not ended."""
        pids = Path(f"{self.path}.pids")
        return [int(pid) for pid in pids.read_text().split() if launch._alive(int(pid))] if pids.exists() else []


@pytest.fixture
def mps(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    fake = FakeMps(tmp_path)
    yield fake
    for pid in fake.running():
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def ran(monkeypatch):
    """Instead of running: (command, environment) of each run."""
    runs: list[tuple[list[str], dict[str, str]]] = []

    def record(command, environment):
        runs.append((list(command), dict(environment)))
        return 0

    monkeypatch.setattr(launch, "_run", record)
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    return runs


def with_gpus(monkeypatch, count):
    monkeypatch.setattr(launch, "_gpu_count", lambda: count)


def test_the_daemon_is_private_and_gone_afterwards(mps, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "12")
    with launch.mps_daemon() as first, launch.mps_daemon() as second:
        assert first.why_not is None
        pipes = [Path(daemon.environment["CUDA_MPS_PIPE_DIRECTORY"]) for daemon in (first, second)]
        assert len(set(pipes)) == 2
        assert all(pipe.is_dir() for pipe in pipes)
        assert set(first.environment) == {"CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"}
        assert len(mps.running()) == 4
    assert mps.said() == ["start", "start", *["get_server_list", "quit"] * 2]
    assert mps.lines()[0].endswith("visible=unset percent=unset")
    assert mps.running() == []
    assert not any(pipe.parent.exists() for pipe in pipes)


def test_the_daemon_ends_when_the_block_fails(mps):
    with pytest.raises(KeyboardInterrupt), launch.mps_daemon():
        raise KeyboardInterrupt
    assert mps.said()[-1] == "quit"
    assert mps.running() == []


def test_a_daemon_that_does_not_quit_is_killed(mps, monkeypatch):
    monkeypatch.setenv("FAKE_MPS_DEAF", "1")
    monkeypatch.setattr(launch, "MPS_SECONDS", 0.5)
    with launch.mps_daemon():
        assert len(mps.running()) == 2
    deadline = time.monotonic() + 5
    while mps.running() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert mps.running() == []


def test_a_daemon_that_does_not_start_is_told(mps, monkeypatch):
    monkeypatch.setenv("FAKE_MPS_FAIL", "no permission")
    with launch.mps_daemon() as daemon:
        assert daemon.environment == {}
        assert daemon.why_not == "nvidia-cuda-mps-control -d ended with 1: cannot start: no permission"


def test_without_mps_the_block_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with launch.mps_daemon() as daemon:
        assert daemon == launch.Mps({}, "nvidia-cuda-mps-control is not installed")


def test_rank_environment():
    base = {"A": "1", "NCCL_NVLS_ENABLE": "1", "OMP_NUM_THREADS": "3", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "12"}
    off = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0", "NVSHMEM_DISABLE_NVLS": "1"}
    alone = {"A": "1", "OMP_NUM_THREADS": "3", "GLOO_SOCKET_IFNAME": "lo", **off}
    assert launch.rank_environment(False, base) == alone
    assert launch.rank_environment(True, base) == alone | {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}


def test_ranks_on_one_gpu_run_under_the_daemon(mps, ran, monkeypatch, capsys):
    with_gpus(monkeypatch, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    assert launch.main(["--ranks", "8", "--one-gpu", "train.py", "--steps", "3", "--ranks", "x"]) == 0
    [(command, environment)] = ran
    assert command[1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc-per-node=8"),
        *("train.py", "--steps", "3", "--ranks", "x"),
    ]
    assert environment["CUDA_VISIBLE_DEVICES"] == "5"
    assert environment["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] == "1"
    assert "cutehop-mps-" in environment["CUDA_MPS_PIPE_DIRECTORY"]
    assert mps.said() == ["start", "get_server_list", "quit"]
    assert "8 ranks share one GPU at the same time (MPS)" in capsys.readouterr().out


def test_ranks_on_one_gpu_without_mps_take_turns(ran, monkeypatch, capsys, tmp_path):
    with_gpus(monkeypatch, 1)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launch.main(["--ranks", "4", "--one-gpu", "a.py"]) == 0
    environment = ran[0][1]
    assert environment["CUDA_VISIBLE_DEVICES"] == "0"
    assert not [name for name in environment if name.startswith("CUDA_MPS")]
    assert "by turns, which is slow: nvidia-cuda-mps-control is not installed" in capsys.readouterr().out


def test_one_rank_per_gpu_needs_no_daemon(mps, ran, monkeypatch, capsys):
    with_gpus(monkeypatch, 4)
    assert launch.main(["-m", "pkg.module", "--flag"]) == 0
    command, environment = ran[0]
    assert command[-4:] == ["--nproc-per-node=4", "-m", "pkg.module", "--flag"]
    assert "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES" not in environment
    assert mps.said() == []
    assert capsys.readouterr().out == ""


def test_no_gpu_runs_on_the_cpu_and_says_so(mps, ran, monkeypatch, capsys):
    with_gpus(monkeypatch, 0)
    assert launch.main(["--ranks", "2", "--one-gpu", "a.py"]) == 0
    assert mps.said() == []
    assert capsys.readouterr().out == "launch: no GPU here, 2 ranks run on the CPU (gloo)\n"


@pytest.mark.parametrize(
    ("gpus", "arguments", "said"),
    [
        (2, ["--ranks", "3", "a.py"], "--ranks 3 on 2 GPUs: add --one-gpu"),
        (0, ["a.py"], "say --ranks N"),
        (1, ["--ranks", "0", "a.py"], "--ranks 0, must be at least 1"),
        (1, ["--ranks", "2"], "script"),
    ],
)
def test_arguments_that_do_not_fit(monkeypatch, capsys, ran, gpus, arguments, said):
    with_gpus(monkeypatch, gpus)
    with pytest.raises(SystemExit) as caught:
        launch.main(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert ran == []


@pytest.mark.parametrize(("code", "expected"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)])
def test_exit_codes(code, expected):
    assert launch._run(["bash", "-c", code], os.environ) == expected


# Signals need a process of their own: the launcher, with one GPU made up, and a child that says its id and sleeps.
LAUNCHER = """
import sys
from cutehop import launch
child = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
launch._gpu_count = lambda: 1
launch.torchrun = lambda *arguments: [sys.executable, "-c", child]
sys.exit(launch.main(["--ranks", "2", "--one-gpu", "a.py"]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_child_and_daemon(mps, number, code):
    def heed() -> None:
        """SIGINT, which a shell's background jobs are started to ignore."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True, preexec_fn=heed)
    assert process.stdout is not None
    with process.stdout as out:
        assert "share one GPU" in out.readline()
        child = int(out.readline())
        assert len(mps.running()) == 2
        process.send_signal(number)
        assert process.wait(60) == code
    assert not launch._alive(child)
    assert mps.said()[-1] == "quit"
    assert mps.running() == []


SCRIPT = """
import os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(total)
if sys.argv[1:] == ["fail"] and dist.get_rank() == 1:
    sys.exit(5)
if dist.get_rank() == 0:
    print("total", total.item(), os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"], sys.argv[1:], flush=True)
dist.destroy_process_group()
"""


@pytest.mark.dist
@pytest.mark.parametrize(("argument", "code"), [("on", 0), ("fail", 1)])
def test_ranks_really_run(tmp_path, argument, code):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, "-m", "cutehop.launch", "--ranks", "2", str(script), argument],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == code, result.stderr
    assert "2 ranks run on the CPU" in result.stdout
    assert ("total 3 1 ['on']" in result.stdout) == (code == 0)
