"""Ahead-of-time build: compile every kernel variant into a cache folder, on a machine with or without a GPU.

    python -m cutehop.aot build --arch sm_90a --out DIR [--only PATTERN] [--jobs N]
    python -m cutehop.aot list --out DIR

A GPU machine that runs the same sources with CUTEHOP_CACHE_DIR=DIR then compiles nothing and needs no CuTe DSL.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import fnmatch
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cutehop.cute_kernels.jit import bundle, cache, store

# Each has a function variants() that gives (function decorated with `compiled`, config) pairs.
KERNEL_MODULES = (
    "cutehop.cute_kernels.jit.probe",
    "cutehop.cute_kernels.mla",
    "cutehop.cute_kernels.gemm",
    "cutehop.cute_kernels.gemm_decode",
    "cutehop.cute_kernels.moe",
    "cutehop.comm.kernels",
)

Variant = tuple[str, str, Any]  # module and name of the compiled function, config


def all_variants(modules: Sequence[str] = KERNEL_MODULES) -> list[Variant]:
    """Every kernel the package can need, in the order of `modules`; imports no cutlass."""
    found = []
    for module in modules:
        for function, config in importlib.import_module(module).variants():
            found.append((function.__module__, function.__qualname__, config))
    return found


def describe(variant: Variant) -> str:
    """e.g. mla.kernels.decode_kernel DecodeConfig(dtype='bf16'); what --only matches."""
    module, name, config = variant
    return f"{module.removeprefix('cutehop.cute_kernels.')}.{name} {cache.config_text(config)}"


def compile_variant(variant: Variant) -> tuple[bool, str]:
    """Make sure the cache folder holds this variant: (whether it does, what was done). Runs in a worker process."""
    try:
        return True, _compile_variant(variant)
    except Exception as error:  # as text: the DSL's exceptions do not all survive the way to the parent process
        return False, f"{type(error).__name__}: {error}"


def _compile_variant(variant: Variant) -> str:
    module, name, config = variant
    function = getattr(importlib.import_module(module), name)
    folder = store.open_store()
    assert folder is not None
    path = folder.path(function.name, cache.config_text(config))
    assert path is not None
    known, start = path.exists(), time.perf_counter()
    made = function.bundle(config)
    if not path.exists():
        reason = "the sources changed during the build" if store.sources_changed() else "the folder cannot be written"
        raise RuntimeError(f"not stored in {path.parent}: {reason}")
    text = f"{made.registers} registers, {made.smem_bytes} bytes smem, {path.stat().st_size / 1024:.0f} KiB"
    return f"{text}, {'was there' if known else f'compiled in {time.perf_counter() - start:.1f} s'}"


def build(out: Path, only: str = "", jobs: int = 1, modules: Sequence[str] = KERNEL_MODULES) -> list[str]:
    """Compile the variants whose description contains a match of the glob `only` into `out`; returns failures as text.

    Processes, because cute.compile is not thread-safe; spawned, so that none inherits a CUDA context or held lock.
    """
    os.environ["CUTEHOP_CACHE_DIR"] = str(out.resolve())  # read by the workers
    os.environ.pop("CUTEHOP_CACHE", None)
    if store.dsl_version() is None:
        return ["nvidia-cutlass-dsl is not installed here, and compiling needs it"]
    variants = [variant for variant in all_variants(modules) if fnmatch.fnmatch(describe(variant), f"*{only}*")]
    if not variants:
        return [f"no kernel variant matches --only {only!r}"]
    failures = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(jobs, len(variants)), mp_context=context) as pool:
        running = {pool.submit(compile_variant, variant): describe(variant) for variant in variants}
        for count, done in enumerate(concurrent.futures.as_completed(running), 1):
            stored, outcome = done.result()
            if not stored:
                failures.append(f"{running[done]}: {outcome}")
            print(f"[{count:3}/{len(running)}] {running[done]}: {'' if stored else 'FAILED '}{outcome}", flush=True)
    return failures


def list_kernels(out: Path) -> list[str]:
    """One line per fingerprint folder in `out`, then one per kernel in it."""
    own, lines = store.open_store(), []
    for folder in sorted(out.glob("v*-src*")):
        matches = own is not None and folder.name.endswith(f"-src{own.source}")
        lines.append(f"{folder.name}  ({'made from' if matches else 'not from'} the sources of this package)")
        for path in sorted(folder.glob("*.zip")):
            try:
                kernel = bundle.Bundle.from_bytes(path.read_bytes())
            except bundle.CorruptBundle as error:
                lines.append(f"  {path.name}: corrupt ({error})")
            else:
                size = f"{kernel.registers} registers, {kernel.smem_bytes} bytes smem, {len(kernel.cubin)} bytes cubin"
                lines.append(f"  {kernel.name.removeprefix('cutehop.cute_kernels.')} {kernel.config}: {size}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cutehop.aot", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("build", "compile kernels into a folder"), ("list", "show what a folder holds")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the cache folder")
        if name == "build":
            command.add_argument("--arch", choices=[bundle.ARCH], default=bundle.ARCH)
            command.add_argument(
                "--only", default="", metavar="PATTERN", help="glob, matched anywhere in the line shown"
            )
            command.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes")
    options = parser.parse_args(arguments)
    if options.command == "list":
        lines = list_kernels(options.out)
        print("\n".join(lines) if lines else f"{options.out} holds no kernels")
        return 0 if lines else 1
    failures = build(options.out, options.only, max(1, options.jobs))
    for failure in failures:
        print(f"aot: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
