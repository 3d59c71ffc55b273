"""cutehop.doctor: rules on made-up facts, fact finding on made-up files, and the command."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cutehop import doctor
from cutehop.cute_kernels.jit import store
from cutehop.doctor import Facts, diagnose

ROOT = Path(__file__).resolve().parents[2]

DSL = {f"nvidia-cutlass-dsl{part}": "4.8.1" for part in ("", "-libs-base", "-libs-core", "-libs-cu12")}
CPU = Facts(torch="2.13.0+cpu", distributions={**DSL, "cuda-bindings": "12.9.10"}, cache="/home/user/.cache/cutehop")
H100 = replace(
    CPU,
    gpus=(("NVIDIA H100 80GB HBM3", "9.0"),),
    driver="580.159.03",
    driver_cuda="13.0",
    torch="2.11.0+cu130",
    torch_cuda="13.0",
    torch_sees_gpu=True,
    torch_nvshmem_pin="nvidia-nvshmem-cu13==3.4.5",
    distributions={**DSL, "cuda-bindings": "13.0.3", "nvidia-nvshmem-cu13": "3.7.2"},
    nvshmem_owner="nvidia-nvshmem-cu13",
    mps="on",
)


def changed(facts: Facts, *without: str, **distributions: str) -> Facts:
    """The same facts with other installed packages; underscores stand for dashes."""
    have = {name: version for name, version in facts.distributions.items() if name not in without}
    return replace(facts, distributions=have | {n.replace("_", "-"): v for n, v in distributions.items()})


def test_a_good_gpu_machine_has_nothing_to_say():
    assert {finding.level for finding in diagnose(H100)} == {"ok"}


def test_a_machine_without_a_gpu_is_not_broken_and_says_what_runs():
    findings = diagnose(CPU)
    assert {finding.level for finding in findings} == {"ok", "note"}
    assert "CPU reference" in findings[0].text


BOTH = changed(H100, nvidia_nvshmem_cu12="3.8.0")
NO_TORCH = replace(H100, torch_sees_gpu=False, torch_cuda=None)

CASES = [
    # facts, level, subject, text, cure
    (replace(H100, gpus=(("A100", "8.0"),)), "warn", "GPU", "A100 (SM80)", "H100"),
    (replace(H100, driver_cuda=None), "broken", "GPU", "libcuda.so.1", "NVIDIA_DRIVER_CAPABILITIES"),
    (replace(H100, visible_devices="", torch_sees_gpu=False), "warn", "GPU", "hides every GPU", "unset"),
    (
        replace(NO_TORCH, torch=None, torch_error="No module named 'torch'"),
        "broken",
        "torch",
        "No module",
        "pip install",
    ),
    (
        replace(NO_TORCH, torch_error="libnvshmem_host.so.3: cannot open shared object file"),
        "broken",
        "torch",
        "libnvshmem_host",
        "--force-reinstall --no-deps nvidia-nvshmem-cu13==3.4.5",
    ),
    (replace(NO_TORCH, torch="2.11.0+cpu"), "broken", "torch", "built without CUDA", "a CUDA build"),
    (replace(H100, driver="535.1", driver_cuda="12.2"), "broken", "torch", "up to 12.2", "built for CUDA 12"),
    (replace(H100, torch_sees_gpu=False), "broken", "torch", "no usable GPU", "torch.cuda.init"),
    (changed(H100, *DSL), "note", "CuTe DSL", "not installed", "nvidia-cutlass-dsl==4.8.1"),
    (changed(H100, nvidia_cutlass_dsl_libs_base="4.5.2"), "broken", "CuTe DSL", "libs-base 4.5.2", "--force-reinstall"),
    (changed(H100, **dict.fromkeys((n.replace("-", "_") for n in DSL), "5.0.0")), "warn", "CuTe DSL", "5.0.0", "4.8.1"),
    (changed(H100, "cuda-bindings"), "broken", "cuda-python", "not installed", "cuda-python>=13,<14"),
    (changed(CPU, "cuda-bindings"), "note", "cuda-python", "not installed", "cuda-python>=12,<13"),
    (replace(H100, bindings_error="undefined symbol"), "broken", "cuda-python", "undefined symbol", ">=13,<14"),
    (changed(H100, cuda_bindings="14.0.0"), "warn", "cuda-python", "newer than driver", "cuda-python<14"),
    (changed(H100, cuda_bindings="12.9.10"), "warn", "cuda-python", "built for CUDA 13.0", ">=13,<14"),
    (changed(H100, "nvidia-nvshmem-cu13"), "note", "NVSHMEM", "not installed", ""),
    (
        BOTH,
        "warn",
        "NVSHMEM",
        "those of nvidia-nvshmem-cu13",
        "-y nvidia-nvshmem-cu13 nvidia-nvshmem-cu12",
    ),
    (
        replace(BOTH, nvshmem_owner="nvidia-nvshmem-cu12"),
        "broken",
        "NVSHMEM",
        "those of nvidia-nvshmem-cu12",
        "==3.4.5",
    ),
    (
        replace(BOTH, nvshmem_owner=""),
        "broken",
        "NVSHMEM",
        "no single wheel's",
        "pip install nvidia-nvshmem-cu13==3.4.5",
    ),
    (replace(H100, nvshmem_owner=""), "warn", "NVSHMEM", "not that wheel's", "pip uninstall"),
    (
        replace(changed(H100, "nvidia-nvshmem-cu13", nvidia_nvshmem_cu12="3.8.0"), nvshmem_owner="nvidia-nvshmem-cu12"),
        "warn",
        "NVSHMEM",
        "built for CUDA 13.0",
        "nvidia-nvshmem-cu13",
    ),
    (
        changed(H100, nvidia_nvshmem_cu13="3.4.5"),
        "note",
        "NVSHMEM",
        "on the device need 3.5",
        "nvidia-nvshmem-cu13>=3.5",
    ),
    (changed(H100, nvshmem4py_cu12="0.4.1"), "warn", "NVSHMEM", "without nvidia-nvshmem-cu12", "pip install"),
    (replace(H100, mps="off"), "note", "MPS", "take turns", "nvidia-cuda-mps-control -d"),
    (replace(H100, mps="stale"), "warn", "MPS", "has ended", "rm -r /tmp/nvidia-mps"),
    (replace(H100, nvlink=False), "warn", "NVLink", "some pairs", ""),
    (replace(H100, nvlink=True), "ok", "NVLink", "all pairs", ""),
    (replace(H100, cache=""), "note", "kernel cache", "CUTEHOP_CACHE=0", "unset"),
    (replace(H100, cache_writable=False), "warn", "kernel cache", "cannot be written", "CUTEHOP_CACHE_DIR"),
]


@pytest.mark.parametrize(("facts", "level", "subject", "text", "cure"), CASES)
def test_one_fault_gives_one_finding_with_its_cure(facts, level, subject, text, cure):
    usual = set(diagnose(CPU if facts.gpus == () else H100))
    new = [f for f in diagnose(facts) if f.level == level and f not in usual]
    assert [f.subject for f in new] == [subject]
    assert text in new[0].text
    assert cure in new[0].cure
    assert bool(new[0].cure) == bool(cure)


def fake_wheel(site: Path, name: str, content: bytes) -> None:
    """The record of a wheel that installed `content` as the NVSHMEM library."""
    info = site / f"{name.replace('-', '_')}-3.0.dist-info"
    info.mkdir()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 3.0\n")
    (info / "RECORD").write_text(f"{doctor.NVSHMEM_LIBRARY},sha256={digest},{len(content)}\n")


@pytest.mark.parametrize(
    ("on_disk", "owner"),
    [(b"cu12", "nvidia-nvshmem-cu12"), (b"cu13", "nvidia-nvshmem-cu13"), (b"other", ""), (None, "")],
)
def test_the_owner_of_the_nvshmem_folder_is_the_wheel_whose_hash_matches(tmp_path, monkeypatch, on_disk, owner):
    wheels = ["nvidia-nvshmem-cu12", "nvidia-nvshmem-cu13"]
    for name in wheels:
        fake_wheel(tmp_path, name, name[-4:].encode())
    if on_disk is not None:
        library = tmp_path / doctor.NVSHMEM_LIBRARY
        library.parent.mkdir(parents=True)
        library.write_bytes(on_disk)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor._nvshmem_owner(wheels) == owner


def test_mps_state_follows_the_daemon(tmp_path):
    assert doctor._mps_state(tmp_path) == "off"
    (tmp_path / "control").touch()
    assert doctor._mps_state(tmp_path) == "stale"
    (tmp_path / "nvidia-cuda-mps-control.pid").write_text(str(os.getpid()))
    assert doctor._mps_state(tmp_path) == "on"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "nvidia-cuda-mps-control.pid").write_text(str(ended.pid))
    assert doctor._mps_state(tmp_path) == "stale"


TOPOLOGY = """\
\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity
GPU0\t X \t{0}\t0-15\t0
GPU1\t{0}\t X \t0-15\t0

Legend:
  X    = Self
"""


@pytest.mark.parametrize(("link", "all_pairs"), [("NV18", True), ("SYS", False), ("PIX", False)])
def test_nvlink_is_read_from_the_topology(monkeypatch, link, all_pairs):
    monkeypatch.setattr(doctor, "_output", lambda *command: TOPOLOGY.format(link))
    assert doctor._all_pairs_have_nvlink(2) is all_pairs
    assert doctor._all_pairs_have_nvlink(1) is None


def test_a_folder_that_cannot_be_written_is_found(tmp_path):
    assert doctor._writable(tmp_path / "not" / "there" / "yet")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert not doctor._writable(tmp_path / "file" / "below")


@pytest.mark.parametrize("environment", [{}, {"CUTEHOP_CACHE_DIR": "/somewhere/else"}, {"CUTEHOP_CACHE": "0"}])
def test_the_cache_folder_is_the_one_that_the_store_uses(monkeypatch, environment):
    for name in ("CUTEHOP_CACHE", "CUTEHOP_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    opened = store.open_store()
    assert doctor._cache_folder() == (None if opened is None else opened.root)


def test_the_dsl_version_is_the_one_that_the_project_pins():
    assert f'"nvidia-cutlass-dsl=={doctor.DSL_VERSION}"' in (ROOT / "pyproject.toml").read_text()


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_the_command_reports_as_json(tmp_path):
    result = run_doctor("-m", "cutehop.doctor", "--json", CUTEHOP_CACHE_DIR=str(tmp_path))
    found = json.loads(result.stdout)
    assert result.returncode == int(found["broken"]) == int(any(f["level"] == "broken" for f in found["findings"]))
    assert found["facts"]["cache"] == str(tmp_path)
    assert found["facts"]["torch_error"] is None
    assert re.match(r"\d+\.\d+", found["facts"]["torch"])


def test_the_file_runs_alone_and_exits_1_where_torch_does_not_import(tmp_path):
    (tmp_path / "torch.py").write_text('raise ImportError("libnvshmem_host.so.3: cannot open shared object file")')
    result = run_doctor(doctor.__file__, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1, result.stderr
    assert "broken  torch: does not import: libnvshmem_host.so.3" in result.stdout
    assert "cure: pip install --force-reinstall" in result.stdout
