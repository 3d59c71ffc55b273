"""cute_kernels.jit without a GPU: what gets compiled, what is refused, and the bundle file."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
import threading

import pytest

from cutehop.cute_kernels.jit import Bundle, Program, cache, compiler
from cutehop.cute_kernels.jit.bundle import CorruptBundle
from cutehop.cute_kernels.jit.probe import ProbeConfig, probe_kernel

TEXT = cache.config_text(ProbeConfig())


@pytest.fixture(scope="module")
def program():
    compiler.import_cutlass()
    return probe_kernel.__wrapped__(ProbeConfig())


@pytest.fixture(scope="module")
def bundle(program):
    return compiler.compile_program(program, probe_kernel.name, TEXT)


# ---- compile -------------------------------------------------------------------------------------------------------


def test_bundle_describes_the_kernel(bundle):
    assert bundle.cubin[:4] == b"\x7fELF"
    assert ".target sm_90a" in bundle.ptx
    assert f".visible .entry {bundle.entry}(" in bundle.ptx
    assert "cp.async.bulk.tensor" in bundle.ptx
    assert (bundle.params, bundle.threads, bundle.smem_bytes) == (("map", "ptr", "i64", "f32", "i32", "i32"), 64, 264)
    assert 0 < bundle.registers <= 64
    assert bundle.spill_bytes == 0
    assert all(line.startswith("ptxas") for line in bundle.log.splitlines())


@pytest.mark.parametrize(
    "params",
    [
        ("map", "ptr", "i64", "f32", "i32"),
        ("map", "ptr", "i64", "f32", "i32", "i32", "i32"),
        ("map", "ptr", "i64", "i32", "f32", "i32"),
        ("ptr", "ptr", "i64", "f32", "i32", "i32"),
        ("map", "i64", "i64", "f32", "i32", "i32"),
    ],
)
def test_parameter_mismatch_is_refused(program, params):
    wrong = dataclasses.replace(program, params=params)
    with pytest.raises(ValueError, match=r"Program\.params is .* but the kernel takes .*\.align 64 \.b8 p0\[128\]"):
        compiler.compile_program(wrong, "probe", TEXT)


@pytest.mark.parametrize(("field", "value"), [("smem_bytes", 256), ("smem_bytes", 0), ("threads", 128)])
def test_other_mismatch_is_refused(program, field, value):
    with pytest.raises(ValueError, match=rf"Program\.{field} {value}, but .* (264|64)$"):
        compiler.compile_program(dataclasses.replace(program, **{field: value}), "probe", TEXT)


def test_two_launches_are_refused():
    import cutlass.cute as cute

    @cute.kernel
    def nothing():
        pass

    @cute.jit
    def host():
        nothing().launch(grid=(1, 1, 1), block=(32, 1, 1))
        nothing().launch(grid=(1, 1, 1), block=(32, 1, 1))

    with pytest.raises(ValueError, match="launches 2 kernels, must be exactly 1"):
        compiler.compile_program(Program(host, (), 32, 0, ()), "twice", "")


@pytest.mark.parametrize(
    ("field", "value"), [("smem_bytes", 232449), ("params", ("map", "f64")), ("threads", 0), ("cluster", 17)]
)
def test_impossible_program_is_refused(program, field, value):
    with pytest.raises(ValueError, match=f"^Program: {field}"):
        dataclasses.replace(program, **{field: value})


def test_stderr_of_other_threads_is_passed_on():
    real = io.StringIO()
    with contextlib.redirect_stderr(real):
        mine = compiler._StderrOfThisThread()
        with contextlib.redirect_stderr(mine):
            print("mine", file=sys.stderr)
            thread = threading.Thread(target=lambda: print("theirs", file=sys.stderr))
            thread.start()
            thread.join()
    assert (mine.getvalue(), real.getvalue()) == ("mine\n", "theirs\n")


# ---- bundle --------------------------------------------------------------------------------------------------------


def test_bundle_round_trip(bundle):
    data = bundle.to_bytes()
    assert Bundle.from_bytes(data) == bundle
    assert bundle.to_bytes() == data


def test_damaged_bundle_is_noticed(bundle):
    data = bundle.to_bytes()
    for size in range(0, len(data), 97):
        with pytest.raises(CorruptBundle):
            Bundle.from_bytes(data[:size])
    middle = data.index(b"kernel.cubin") + len(bundle.cubin) // 8
    with pytest.raises(CorruptBundle):
        Bundle.from_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
