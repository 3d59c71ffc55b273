"""`python -m cutehop.doctor [--json]`: what this machine offers cutehop, what is wrong with it, and the cure.

Exit code 1 only if something that cutehop needs here is broken. A machine without a GPU is not broken: the ops run
their CPU reference. The file imports nothing of cutehop, so that `python doctor.py` works where torch does not import.

`gather()` asks the machine; `diagnose(facts)` is a pure function of what it found.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

DSL_VERSION = "4.8.1"
NVSHMEM_DEVICE_BITCODE = (3, 5)  # libNVVM refuses the device bitcode of 3.4.5 when it is linked with this DSL's code
NVSHMEM_LIBRARY = "nvidia/nvshmem/lib/libnvshmem_host.so.3"
DISTRIBUTIONS = (
    *("nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-base", "nvidia-cutlass-dsl-libs-core"),
    *("nvidia-cutlass-dsl-libs-cu12", "nvidia-cutlass-dsl-libs-cu13", "cuda-python", "cuda-bindings"),
    *("nvidia-nvshmem-cu12", "nvidia-nvshmem-cu13", "nvshmem4py-cu12", "nvshmem4py-cu13"),
)


@dataclass(frozen=True)
class Facts:
    """What was found. Versions are strings as their owners write them; None means absent."""

    gpus: tuple[tuple[str, str], ...] = ()  # (name, compute capability "9.0")
    driver: str | None = None  # "580.159.03"
    driver_cuda: str | None = None  # the newest CUDA that the driver runs, "13.0"
    visible_devices: str | None = None  # CUDA_VISIBLE_DEVICES
    torch: str | None = None
    torch_cuda: str | None = None
    torch_error: str | None = None  # why torch did not import
    torch_sees_gpu: bool = False
    torch_nvshmem_pin: str | None = None  # "nvidia-nvshmem-cu13==3.4.5"
    distributions: dict[str, str] = field(default_factory=dict)
    bindings_error: str | None = None  # why cuda.bindings.driver did not import
    nvshmem_owner: str | None = None  # the wheel whose files lie in nvidia/nvshmem; "" if they are no wheel's
    mps_folder: str = "/tmp/nvidia-mps"
    mps: str = "off"  # off, on, stale (its folder is there, its daemon is not)
    nvlink: bool | None = None  # do all pairs of GPUs have NVLink; None with fewer than two GPUs
    cache: str = ""  # "" if switched off
    cache_writable: bool = True
    cache_bytes: int = 0


@dataclass(frozen=True)
class Finding:
    """level: ok, note (worth knowing), warn (a part works badly or not at all), broken (cutehop cannot work here)."""

    level: str
    subject: str
    text: str
    cure: str = ""


def diagnose(facts: Facts) -> list[Finding]:
    """Every finding about these facts, in the order in which a reader should take them."""
    rules = (_gpu, _torch, _dsl, _bindings, _nvshmem, _nvshmem4py, _mps, _nvlink, _cache)
    return [finding for rule in rules for finding in rule(facts)]


def _major(version: str) -> int:
    return int(version.split(".")[0])


def _gpu(facts: Facts) -> Iterator[Finding]:
    if not facts.gpus:
        yield Finding("note", "GPU", "none; the ops run their CPU reference, kernels can be compiled but not run")
        return
    names = ", ".join(f"{name} (SM{capability.replace('.', '')})" for name, capability in facts.gpus)
    if facts.driver_cuda is None:
        cure = "start the container with the driver's compute libraries (NVIDIA_DRIVER_CAPABILITIES=compute,utility)"
        yield Finding("broken", "GPU", f"{names}, but libcuda.so.1 does not load", cure)
    elif any(capability == "9.0" for _, capability in facts.gpus):
        yield Finding("ok", "GPU", f"{names}; driver {facts.driver}, CUDA up to {facts.driver_cuda}")
    else:
        yield Finding("warn", "GPU", f"{names}; the kernels are built for SM90", "run on an H100, H200 or H20")
    if facts.visible_devices in ("", "-1"):
        cure = "unset CUDA_VISIBLE_DEVICES"
        yield Finding("warn", "GPU", f"CUDA_VISIBLE_DEVICES={facts.visible_devices!r} hides every GPU", cure)


def _torch(facts: Facts) -> Iterator[Finding]:
    if facts.torch_error is not None:
        cure = "pip install torch"
        if "nvshmem" in facts.torch_error and facts.torch_nvshmem_pin:
            cure = f"pip install --force-reinstall --no-deps {facts.torch_nvshmem_pin}"
        elif facts.torch is not None:
            cure = f"pip install --force-reinstall torch=={facts.torch}"
        yield Finding("broken", "torch", f"does not import: {facts.torch_error}", cure)
        return
    text = f"{facts.torch}, " + (f"built for CUDA {facts.torch_cuda}" if facts.torch_cuda else "built without CUDA")
    if not facts.gpus:
        yield Finding("ok", "torch", text)
    elif facts.torch_cuda is None:
        yield Finding("broken", "torch", f"{text}, but there is a GPU", "install a CUDA build of torch")
    elif facts.driver_cuda is not None and _major(facts.driver_cuda) < _major(facts.torch_cuda):
        cure = f"update the driver, or install a torch built for CUDA {_major(facts.driver_cuda)}"
        yield Finding("broken", "torch", f"{text}; driver {facts.driver} runs CUDA up to {facts.driver_cuda}", cure)
    elif not facts.torch_sees_gpu and facts.visible_devices not in ("", "-1"):
        cure = 'read the error of python -c "import torch; torch.cuda.init()"; another process may own the GPU'
        yield Finding("broken", "torch", f"{text}, but it finds no usable GPU", cure)
    else:
        yield Finding("ok", "torch", text)


def _dsl(facts: Facts) -> Iterator[Finding]:
    have = facts.distributions
    version = have.get("nvidia-cutlass-dsl")
    cure = f"pip install nvidia-cutlass-dsl=={DSL_VERSION}"
    parts = {name: have[name] for name in have if name.startswith("nvidia-cutlass-dsl-libs-")}
    if version is None:
        text = "not installed; kernels come from a cache that `python -m cutehop.aot build` made, none can be compiled"
        yield Finding("note", "CuTe DSL", text, cure)
    elif any(part != version for part in parts.values()):
        text = f"{version} beside " + ", ".join(f"{name} {part}" for name, part in parts.items())
        yield Finding("broken", "CuTe DSL", text, f"pip install --force-reinstall nvidia-cutlass-dsl=={DSL_VERSION}")
    elif version != DSL_VERSION:
        yield Finding("warn", "CuTe DSL", f"{version}; the kernels are written for and tested with {DSL_VERSION}", cure)
    else:
        yield Finding("ok", "CuTe DSL", version)


def _bindings(facts: Facts) -> Iterator[Finding]:
    version = facts.distributions.get("cuda-bindings")
    # The bindings' major version goes with torch's CUDA: torch imports them too.
    major = _major(facts.torch_cuda) if facts.torch_cuda else 12
    cure = f"pip install 'cuda-python>={major},<{major + 1}'"
    if version is None or facts.bindings_error is not None:
        text = "not installed" if version is None else f"{version} does not import: {facts.bindings_error}"
        yield Finding("broken" if facts.gpus else "note", "cuda-python", f"{text}; it launches the kernels", cure)
    elif facts.driver_cuda is not None and _major(version) > _major(facts.driver_cuda):
        text = f"{version} is newer than driver {facts.driver}, which runs CUDA up to {facts.driver_cuda}"
        yield Finding("warn", "cuda-python", text, f"pip install 'cuda-python<{_major(facts.driver_cuda) + 1}'")
    elif facts.torch_cuda is not None and _major(version) != major:
        yield Finding("warn", "cuda-python", f"{version}, but torch is built for CUDA {facts.torch_cuda}", cure)
    else:
        yield Finding("ok", "cuda-python", version)


def _nvshmem(facts: Facts) -> Iterator[Finding]:
    wheels = {n: v for n, v in facts.distributions.items() if n.startswith("nvidia-nvshmem-")}
    if not wheels:
        text = "not installed; GPUs of one node need none, several nodes do"
        yield Finding("note", "NVSHMEM", text)
        return
    major = _major(facts.torch_cuda) if facts.torch_cuda else None
    right = f"nvidia-nvshmem-cu{major or 12}"
    anew = f"pip uninstall -y {' '.join(wheels)} && pip install {facts.torch_nvshmem_pin or right}"
    text = ", ".join(f"{name} {version}" for name, version in wheels.items())
    owner = facts.nvshmem_owner
    if len(wheels) > 1:
        belongs = f"its files are those of {owner}" if owner else "its files are no single wheel's"
        level = "broken" if major is not None and owner != right else "warn"
        yield Finding(level, "NVSHMEM", f"{text} share the folder nvidia/nvshmem; {belongs}", anew)
        return
    ((name, version),) = wheels.items()
    if owner == "":
        yield Finding("warn", "NVSHMEM", f"{text}, but the files in nvidia/nvshmem are not that wheel's", anew)
    elif major is not None and name != right:
        yield Finding("warn", "NVSHMEM", f"{text}, but torch is built for CUDA {facts.torch_cuda}", anew)
    elif tuple(int(x) for x in version.split(".")[:2]) < NVSHMEM_DEVICE_BITCODE:
        old = f"{text}; kernels that call NVSHMEM on the device need 3.5 (one node needs none, torch pins 3.4.5)"
        yield Finding("note", "NVSHMEM", old, f"for several nodes: pip install --no-deps '{name}>=3.5'")
    else:
        yield Finding("ok", "NVSHMEM", text)


def _nvshmem4py(facts: Facts) -> Iterator[Finding]:
    for name in ("nvshmem4py-cu12", "nvshmem4py-cu13"):
        library = name.replace("nvshmem4py", "nvidia-nvshmem")
        if name in facts.distributions and library not in facts.distributions:
            yield Finding("warn", "NVSHMEM", f"{name} is installed without {library}", f"pip install {library}")


def _mps(facts: Facts) -> Iterator[Finding]:
    if not facts.gpus:
        return
    if facts.mps == "on":
        yield Finding("ok", "MPS", f"daemon at {facts.mps_folder}; processes that share a GPU run at the same time")
    elif facts.mps == "stale":
        cure = f"rm -r {facts.mps_folder} (its daemon has ended), or start one: nvidia-cuda-mps-control -d"
        yield Finding("warn", "MPS", f"{facts.mps_folder} is left from a daemon that has ended", cure)
    else:
        text = "no daemon; several ranks on one GPU take turns (about 2 ms a hop instead of 0.5 us)"
        yield Finding("note", "MPS", text, "for several ranks on one GPU: nvidia-cuda-mps-control -d")


def _nvlink(facts: Facts) -> Iterator[Finding]:
    if facts.nvlink is True:
        yield Finding("ok", "NVLink", "between all pairs of GPUs")
    elif facts.nvlink is False:
        yield Finding("warn", "NVLink", "some pairs of GPUs have none; expert parallelism is slow or impossible there")


def _cache(facts: Facts) -> Iterator[Finding]:
    if not facts.cache:
        cure = "unset CUTEHOP_CACHE"
        yield Finding("note", "kernel cache", "switched off by CUTEHOP_CACHE=0; every process compiles again", cure)
    elif not facts.cache_writable:
        cure = "make it writable, or point CUTEHOP_CACHE_DIR elsewhere; right as it is if it holds every kernel already"
        yield Finding("warn", "kernel cache", f"{facts.cache} cannot be written; every process compiles again", cure)
    else:
        yield Finding("ok", "kernel cache", f"{facts.cache}, {facts.cache_bytes / 2**20:.1f} MiB")


def gather() -> Facts:
    """Ask the machine. Creates no CUDA context and no file that stays."""
    rows = _nvidia_smi("name,compute_cap,driver_version")
    gpus = tuple((name, capability) for name, capability, _ in rows)
    have = {name: version for name in DISTRIBUTIONS if (version := _version(name)) is not None}
    mps_folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    cache = _cache_folder()
    return Facts(
        gpus=gpus,
        driver=rows[0][2] if rows else None,
        driver_cuda=_driver_cuda(),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        distributions=have,
        bindings_error=_import_error("cuda.bindings.driver"),
        nvshmem_owner=_nvshmem_owner([name for name in have if name.startswith("nvidia-nvshmem-")]),
        mps_folder=mps_folder,
        mps=_mps_state(Path(mps_folder)),
        nvlink=_all_pairs_have_nvlink(len(gpus)),
        cache=str(cache or ""),
        cache_writable=cache is None or _writable(cache),
        cache_bytes=sum(p.stat().st_size for p in cache.rglob("*") if p.is_file()) if cache is not None else 0,
        **_torch_facts(),
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _import_error(module: str) -> str | None:
    try:
        import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return str(error)
    return None


def _torch_facts() -> dict[str, Any]:
    facts: dict[str, Any] = {"torch": _version("torch"), "torch_error": _import_error("torch")}
    for requirement in metadata.requires("torch") or () if facts["torch"] else ():
        if requirement.startswith("nvidia-nvshmem-"):
            facts["torch_nvshmem_pin"] = requirement.partition(";")[0].strip()
    if facts["torch_error"] is None:
        torch = import_module("torch")
        facts |= {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
        facts["torch_sees_gpu"] = torch.cuda.is_available()
    return facts


def _output(*command: str) -> str:
    """What a command prints; nothing if it is missing, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _nvidia_smi(fields: str) -> list[list[str]]:
    text = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    return [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]


def _driver_cuda() -> str | None:
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except OSError:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _nvshmem_owner(wheels: list[str]) -> str | None:
    """The wheel whose record matches the library on disk; "" if none does, None if there is no wheel."""
    if not wheels:
        return None
    for wheel in wheels:
        for file in metadata.files(wheel) or ():
            path = Path(str(file.locate()))
            if file.as_posix() != NVSHMEM_LIBRARY or file.hash is None or not path.exists():
                continue
            digest = hashlib.new(file.hash.mode, path.read_bytes()).digest()
            if urlsafe_b64encode(digest).decode().rstrip("=") == file.hash.value:
                return wheel
    return ""


def _mps_state(folder: Path) -> str:
    if not (folder / "control").exists():
        return "off"
    try:
        os.kill(int((folder / "nvidia-cuda-mps-control.pid").read_text()), 0)
    except PermissionError:
        return "on"  # another user's daemon
    except (OSError, ValueError):
        return "stale"
    return "on"


def _all_pairs_have_nvlink(gpus: int) -> bool | None:
    if gpus < 2:
        return None
    rows = [line.split()[1 : gpus + 1] for line in _output("nvidia-smi", "topo", "-m").splitlines()]
    cells = [cell for row in rows[1 : gpus + 1] for cell in row]
    return len(cells) == gpus * gpus and all(cell == "X" or cell.startswith("NV") for cell in cells)


def _cache_folder() -> Path | None:
    """The rule of cutehop.cute_kernels.jit.store, which cannot be imported from here (a test compares the two)."""
    if os.environ.get("CUTEHOP_CACHE") == "0":
        return None
    return Path(os.environ.get("CUTEHOP_CACHE_DIR") or Path.home() / ".cache" / "cutehop")


def _writable(folder: Path) -> bool:
    """Can a file be made in the folder, or in the nearest folder above it that exists?"""
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def report(findings: list[Finding]) -> str:
    """The findings as text, one line each and one for a cure."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:>6}  {finding.subject}: {finding.text}")
        if finding.cure:
            lines.append(f"{'':>6}  cure: {finding.cure}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cutehop.doctor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="facts and findings as JSON")
    options = parser.parse_args(arguments)
    facts = gather()
    findings = diagnose(facts)
    broken = any(finding.level == "broken" for finding in findings)
    if options.json:
        found = {"facts": asdict(facts), "findings": [asdict(f) for f in findings], "broken": broken}
        print(json.dumps(found, indent=2))
    else:
        print(report(findings))
        print("broken: see the cures above" if broken else "nothing that cutehop needs here is broken")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
