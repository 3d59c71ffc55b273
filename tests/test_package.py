"""The package: what a wheel holds, what `import cutehop` loads, how long files may be."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"cutehop": "python", "cutehop/comm": "comm", "cutehop/cute_kernels": "cute_kernels"}


def tracked_sources() -> set[str]:
    """Every file that a wheel must hold, by its name there."""
    return {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for inside, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, without a network."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", *FOLDERS.values()):
        assert run("cp", "-r", str(ROOT / name), str(copy / name), cwd=ROOT).returncode == 0
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-index",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(out),
        ".",
    ]
    result = run(*command, cwd=copy)
    assert result.returncode == 0, result.stderr
    return next(out.glob("cutehop-*.whl"))


def test_wheel_holds_every_source_file_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == tracked_sources()
    assert "cutehop/py.typed" in names
    assert any(name.endswith("LICENSE") for name in metadata)


def test_every_folder_with_sources_is_a_listed_package():
    """Said apart from the wheel: the list in pyproject.toml names the folder that was forgotten."""
    listed = re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert listed is not None
    folders = {name.rpartition("/")[0].replace("/", ".") for name in tracked_sources()}
    assert set(re.findall(r'"(.*?)"', listed[1])) == folders
    assert not [f for f in folders if f"{f.replace('.', '/')}/__init__.py" not in tracked_sources()]


def test_wheel_imports_from_a_folder_of_its_own(wheel, tmp_path):
    """Not through the editable installation: the folder goes first on the path, and the origin is checked."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import cutehop, cutehop.comm, cutehop.cute_kernels.errors as e; print(cutehop.__file__, e.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert all(Path(file).is_relative_to(tmp_path) for file in result.stdout.split())


def test_import_loads_no_kernels_and_creates_no_context(tmp_path):
    code = """
import sys, cutehop, torch
print(sorted(m for m in sys.modules if m.split(".")[0] in ("cutlass", "nvshmem", "transformers")
             or m.startswith(("cutehop.cute_kernels.mla",
                 *("cutehop.comm." + n for n in ("buffer", "gloo", "heap", "kernels", "nvshmem"))))))
print(torch.cuda.is_initialized())
print(callable(cutehop.get_mla_metadata), callable(cutehop.flash_mla_with_kvcache), cutehop.__version__)
print(torch.ops.cutehop.mla_decode.default._schema.name)
"""
    result = run(sys.executable, "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    from importlib.metadata import version

    assert result.stdout.split("\n")[:4] == ["[]", "False", f"True True {version('cutehop')}", "cutehop::mla_decode"]


@pytest.mark.parametrize(("name", "cure"), [("comm", "import cutehop.comm"), ("cute_kernels", "cutehop.cute_kernels")])
def test_a_bare_import_from_the_repository_root_is_refused(name, cure):
    result = run(sys.executable, "-c", f"import {name}", cwd=ROOT)
    assert result.returncode == 1
    assert "ImportError" in result.stderr
    assert cure in result.stderr


def test_a_torch_that_does_not_import_names_the_doctor(tmp_path):
    (tmp_path / "torch.py").write_text('raise ImportError("libnvshmem_host.so.3: cannot open shared object file")')
    result = run(
        sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import cutehop", cwd=tmp_path
    )
    assert result.returncode == 1
    assert "libnvshmem_host.so.3" in result.stderr
    assert "doctor.py" in result.stderr


FILE_LINES, KERNEL_FILE_LINES = 400, 700  # a kernel file is one that holds device code
FUNCTION_LINES, KERNEL_FUNCTION_LINES = 80, 150


def python_files() -> list[Path]:
    return [p for folder in (*FOLDERS.values(), "tests", "tools") for p in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_and_its_functions_fit_a_head(path):
    source = path.read_text()
    is_kernel = "@cute.kernel" in source
    assert len(source.splitlines()) <= (KERNEL_FILE_LINES if is_kernel else FILE_LINES)
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lines = {
        f.name: (f.end_lineno or 0) - f.lineno + 1 - len((ast.get_docstring(f) or "").splitlines()) for f in functions
    }
    limit = KERNEL_FUNCTION_LINES if is_kernel else FUNCTION_LINES
    assert {name: n for name, n in lines.items() if n > limit} == {}
