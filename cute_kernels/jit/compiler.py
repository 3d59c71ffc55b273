"""Program -> Bundle: one call of cute.compile, and the checks that what came out is what the Program declares."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
import threading
from typing import Any

from cutehop.cute_kernels.jit.bundle import ARCH, Bundle, Program


def import_cutlass() -> None:
    """Import cutlass with sm_90a as its default target: it reads CUTE_DSL_ARCH once, when it is first imported,
    and without a GPU falls back to sm_100a, for which building an SM90 wgmma atom is an error."""
    if "cutlass" in sys.modules:
        return
    before = os.environ.get("CUTE_DSL_ARCH")
    os.environ["CUTE_DSL_ARCH"] = ARCH
    try:
        import cutlass  # noqa: F401
    finally:
        if before is None:
            del os.environ["CUTE_DSL_ARCH"]
        else:
            os.environ["CUTE_DSL_ARCH"] = before


def compile_program(program: Program, name: str, config: str) -> Bundle:
    """Compile `program` for sm_90a. The caller holds the process-wide lock: two cute.compile at once abort the process.

    name, config: kept in the bundle and named in errors. Raises ValueError when the compiled kernel and the Program
    disagree about parameters, threads or shared memory: launched that way it would read garbage.
    """
    import cutlass.cute as cute

    errors = _StderrOfThisThread()
    with tempfile.TemporaryDirectory(prefix="cutehop-") as dump, contextlib.redirect_stderr(errors):
        options = f"--gpu-arch {ARCH} --keep-ptx --keep-cubin remarks{{ptx}} --dump-dir {dump}"
        function = cute.compile(program.host, *program.args, options=options)
        ptx, cubin = _text(function.__ptx__), bytes(function.__cubin__)
    entries = list(function.kernel_info)
    if len(entries) != 1:
        raise ValueError(f"{name}({config}): the host function launches {len(entries)} kernels, must be exactly 1")
    _check_entry(program, ptx, name)
    smem_bytes = _launched_smem_bytes(str(function.ir_module))
    if smem_bytes != program.smem_bytes:
        raise ValueError(f"{name}: Program.smem_bytes {program.smem_bytes}, but the DSL computed {smem_bytes}")
    return Bundle(
        name=name,
        config=config,
        entry=entries[0],
        threads=program.threads,
        smem_bytes=program.smem_bytes,
        params=program.params,
        cluster=program.cluster,
        pdl=program.pdl,
        cooperative=program.cooperative,
        cubin=cubin,
        ptx=ptx,
        log=_ptxas_log(errors.getvalue(), name),
    )


class _StderrOfThisThread(io.StringIO):
    """Stands in for sys.stderr, which all threads share: keeps this thread's text and passes on what others write."""

    def __init__(self) -> None:
        super().__init__()
        self._owner, self._real = threading.get_ident(), sys.stderr

    def write(self, text: str) -> int:
        return super().write(text) if threading.get_ident() == self._owner else self._real.write(text)


def _text(ptx: Any) -> str:
    return (ptx if isinstance(ptx, str) else ptx.decode()).rstrip("\0")


def _ptxas_log(stderr: str, name: str) -> str:
    """The lines of `ptxas -v`, less the ones that differ between two runs: source paths and the compile time."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stderr)
    plain = re.sub(r"(?m)^\w+\[ptxas[^]]*\]: (ptxas output: )?", "", plain)
    lines = [line.strip() for line in plain.splitlines()]
    lines = [line for line in lines if line.startswith("ptxas") and "Compile time" not in line]
    assert any("registers" in line for line in lines), f"{name}: cute.compile printed no ptxas log:\n{plain}"
    return "\n".join(lines) + "\n"


# One .param declaration of an entry -> the kinds it can be.
_DECLARATIONS = (
    (r"\.align 64 \.b8 \S+\[128\]", {"map"}),
    (r"\.align 8 \.b8 \S+\[8\]", {"ptr"}),  # a tensor with a static layout: its pointer alone
    (r"\.[bus]64 \.ptr \S.*", {"ptr"}),
    (r"\.[bus]64 \S+", {"ptr", "i64"}),
    (r"\.align 4 \.b8 \S+\[4\]", {"i32"}),  # a tensor or layout of which one extent is dynamic
    (r"\.[bus]32 \S+", {"i32"}),
    (r"\.f32 \S+", {"f32"}),
    (r"\.align 1 \.b8 \S+\[1\]", {"u8"}),
    (r"\.[bus]8 \S+", {"u8"}),
)


def _check_entry(program: Program, ptx: str, name: str) -> None:
    """The PTX entry has the parameters and the CTA size that the Program declares."""
    head = re.search(r"\.visible \.entry ([^{]*)\{", ptx)
    assert head, f"{name}: no .entry in the PTX"
    found = [line.strip().rstrip(",").removeprefix(".param ") for line in head[1].splitlines() if ".param" in line]
    fits = [next((kinds for pattern, kinds in _DECLARATIONS if re.fullmatch(pattern, text)), set()) for text in found]
    if len(found) != len(program.params) or any(kind not in kinds for kind, kinds in zip(program.params, fits)):
        listed = [re.sub(r"\S+_param_(\d+)", r"p\1", text) for text in found]
        raise ValueError(f"{name}: Program.params is {list(program.params)}, but the kernel takes {listed}")
    threads = re.search(r"\.(reqntid|maxntid) (\d+)(?:, (\d+), (\d+))?", head[1])
    if threads:
        size = int(threads[2]) * int(threads[3] or 1) * int(threads[4] or 1)
        if program.threads > size or (program.threads < size and threads[1] == "reqntid"):
            raise ValueError(f"{name}: Program.threads {program.threads}, but the kernel was compiled for {size}")


def _launched_smem_bytes(ir: str) -> int:
    """Dynamic shared memory in bytes that the DSL's own host code would launch with.

    Nothing else says it: the cubin does not carry the size. The host code fills a launch config
    {grid[3], block[3], i64 smem, stream, attributes, count}; the size is the constant stored to its third field.
    """
    config = r"!llvm\.struct<\(array<3 x i32>, array<3 x i32>, i64, ptr, ptr, i32\)>"
    field = re.search(rf"(%\d+) = llvm\.getelementptr (?:inbounds )?%\d+\[0, 2\] : .*{config}", ir)
    stored = field and re.search(rf"llvm\.store (%\d+), {field[1]} : i64", ir[field.end() :])
    value = stored and re.search(rf"{stored[1]} = llvm\.mlir\.constant\((\d+) : i64\)", ir)
    assert value, "the DSL's host code no longer stores a constant shared memory size to its launch config"
    return int(value[1])
