"""`python -m cutehop.aot`: builds into a folder, skips what is there, reports failures, lists."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cutehop import aot
from cutehop.cute_kernels.jit import bundle, store
from cutehop.cute_kernels.jit.probe import ProbeConfig

PROBE = ("cutehop.cute_kernels.jit.probe",)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CUTEHOP_CACHE_DIR", str(tmp_path / "unused"))  # build() changes it; this puts it back
    monkeypatch.setenv("CUTEHOP_CACHE", "1")
    store.own_source_hash.cache_clear()
    yield
    store.own_source_hash.cache_clear()


def test_build_then_list(tmp_path, capsys):
    out = tmp_path / "kernels"
    assert aot.build(out, jobs=2, modules=PROBE) == []
    assert "[  1/1] jit.probe.probe_kernel ProbeConfig(ints=2" in capsys.readouterr().out
    assert len(list(out.glob("*/jit.probe.probe_kernel-*.zip"))) == 1
    assert aot.main(["list", "--out", str(out)]) == 0
    listed = capsys.readouterr().out
    assert f"src{store.own_source_hash()}  (made from the sources of this package)" in listed
    assert "jit.probe.probe_kernel ProbeConfig(ints=2" in listed
    assert "264 bytes smem" in listed


def test_worker_says_whether_it_was_there(tmp_path):
    variant = (*("cutehop.cute_kernels.jit.probe", "probe_kernel"), ProbeConfig())
    os.environ["CUTEHOP_CACHE_DIR"] = str(tmp_path)
    stored, text = aot.compile_variant(variant)
    assert stored, text
    assert "compiled in" in text
    stored, text = aot.compile_variant(variant)
    assert stored, text
    assert "was there" in text


def test_failure_of_a_kernel_is_reported(tmp_path):
    stored, text = aot.compile_variant(("cutehop.cute_kernels.jit.probe", "no_such_kernel", ProbeConfig()))
    assert not stored
    assert text.startswith("AttributeError: ")


def test_only_selects_by_pattern(tmp_path, capsys):
    assert aot.main(["build", "--out", str(tmp_path), "--only", "no*kernel"]) == 1
    assert "no kernel variant matches --only 'no*kernel'" in capsys.readouterr().err


def test_build_needs_the_dsl(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "dsl_version", lambda: None)
    (failure,) = aot.build(tmp_path, modules=PROBE)
    assert "nvidia-cutlass-dsl is not installed" in failure


def test_list_shows_damage_and_emptiness(tmp_path, capsys):
    assert aot.main(["list", "--out", str(tmp_path)]) == 1
    assert "holds no kernels" in capsys.readouterr().out
    folder = tmp_path / f"v{store.FORMAT}-{bundle.ARCH}-dsl0-src0"
    folder.mkdir()
    (folder / "x.zip").write_bytes(b"PK")
    assert aot.main(["list", "--out", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert "not from the sources of this package" in listed
    assert "x.zip: corrupt" in listed


def test_variants_are_distinct_and_need_no_dsl():
    code = "import sys; from cutehop import aot; v = [aot.describe(x) for x in aot.all_variants()]\n"
    code += "assert len(v) == len(set(v)) > 1, v\nassert 'cutlass' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
