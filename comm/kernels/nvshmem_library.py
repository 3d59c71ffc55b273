"""The NVSHMEM that is installed here: its version, and its device code for the compiler. Imports nothing of it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from pathlib import Path

WHEELS = ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12")
OLDEST = (3, 5)  # the first with calls that name a queue pair
CURE = f"pip install '{WHEELS[0]}>=3.5' (or {WHEELS[1]}, by the CUDA version of torch)"
BITCODE = "libnvshmem_device_sm_90.bc"


def version() -> str:
    """Of the wheel, e.g. "3.8.0". RuntimeError if there is none, none that will do, or two that differ: their files
    lie in one folder."""
    found = {}
    for wheel in WHEELS:
        try:
            found[wheel] = importlib.metadata.version(wheel)
        except importlib.metadata.PackageNotFoundError:
            continue
    if not found:
        raise RuntimeError(f"transport 'nvshmem' needs the NVSHMEM library, which is not installed; {CURE}")
    if len(set(found.values())) > 1:
        listed = " and ".join(f"{wheel} {which}" for wheel, which in found.items())
        raise RuntimeError(f"transport 'nvshmem': {listed} lie in one folder; pip uninstall both, then {CURE}")
    which = next(iter(found.values()))
    if tuple(int(part) for part in which.split(".")[:2]) < OLDEST:
        raise RuntimeError(f"transport 'nvshmem': {', '.join(found)} is {which}, 3.5 is the oldest supported; {CURE}")
    return which


def bitcode() -> Path:
    """Device code that the compiler links in. RuntimeError if the wheel is not installed or lacks it."""
    which = version()
    spec = None
    with contextlib.suppress(ModuleNotFoundError):  # no nvidia either
        spec = importlib.util.find_spec("nvidia.nvshmem")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "lib" / BITCODE
        if path.is_file():
            return path
    raise RuntimeError(f"NVSHMEM {which} is installed without lib/{BITCODE}, which kernels are compiled with; {CURE}")


def can_compile() -> bool:
    try:
        bitcode()
    except RuntimeError:
        return False
    return True
