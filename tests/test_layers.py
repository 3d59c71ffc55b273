"""Imports point down: compat -> layers -> ops -> comm -> (ref | cute_kernels), and nothing imports tests or tools."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"cutehop": "python", "cutehop.comm": "comm", "cutehop.cute_kernels": "cute_kernels"}

# A layer may import itself and those named here.
MAY_IMPORT = {
    "cute_kernels": set(),
    "comm": {"ref", "cute_kernels"},
    "ref": set(),
    "ops": {"ref", "comm", "cute_kernels"},
    "mla": {"ops", "ref"},
    "layers": {"mla", "ops", "ref"},
    "compat": {"layers", "mla", "ops", "ref", "comm"},
    "": {"mla", "ops"},  # cutehop/__init__.py
    "aot": {"cute_kernels"},
    "launch": set(),
    "doctor": set(),  # also runs as a file, where cutehop cannot be imported
}
MAY_NOT_IMPORT = {
    "cute_kernels": {"torch", "nvshmem", "numpy"},
    "ref": {"cutlass", "cuda", "nvshmem"},
    "layers": {"transformers", "cutlass", "cuda"},
    "doctor": {"cutehop"},
}
EVERYBODY_MAY_IMPORT = "cutehop.cute_kernels.errors"  # plain Python: the words in which errors are told
NOBODY_IMPORTS = {"tests", "tools", "comm", "cute_kernels", "python"}


def modules() -> Iterator[tuple[str, bool, Path]]:
    """(dotted name, is it a package, file) of every module of the package."""
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            yield ".".join((package, *(parts[:-1] if is_package else parts))), is_package, path


def imports(source: str, name: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of what a module imports, function bodies included, relative imports resolved."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*above, *([node.module] if node.module else [])])
            # `from cutehop import ops` imports cutehop.ops; `from cutehop.ops import mla` may name a module or a value.
            yield from ((node.lineno, f"{target}.{alias.name}") for alias in node.names)


def layer(name: str) -> str:
    """ "cutehop.ops._define" is in the layer "ops"; the package itself is the layer ""."""
    return [*name.split("."), ""][1]


def faults(source: str, name: str, is_package: bool) -> list[str]:
    here = layer(name)
    found = []
    for line, target in imports(source, name, is_package):
        top = target.split(".")[0]
        if top in NOBODY_IMPORTS or top in MAY_NOT_IMPORT.get(here, ()):
            found.append(f"{name}:{line} imports {target}, which the layer {here!r} may not")
        elif target.startswith(EVERYBODY_MAY_IMPORT):
            continue
        elif top == "cutehop" and layer(target) not in {here, *MAY_IMPORT[here]}:
            found.append(f"{name}:{line} imports {target}; {here!r} may import {sorted(MAY_IMPORT[here])}")
    return found


@pytest.mark.parametrize(
    ("name", "is_package", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_imports_point_down(name, is_package, path):
    assert layer(name) in MAY_IMPORT, f"{name}: say in MAY_IMPORT what this layer may import"
    assert faults(path.read_text(), name, is_package) == []


@pytest.mark.parametrize(
    ("source", "name", "is_package"),
    [
        ("import torch", "cutehop.cute_kernels.jit.cache", False),
        ("def f():\n    from torch import Tensor", "cutehop.cute_kernels.mla.plan", False),
        ("from cutehop.comm import heap", "cutehop.cute_kernels.mla.plan", False),
        ("from ..ops import mla", "cutehop.ref.mla", False),
        ("from ..layers import mla", "cutehop.ops", True),
        ("from cutehop import layers", "cutehop.ops.mla", False),
        ("import cutlass.cute as cute", "cutehop.ref.mla", False),
        ("import tools.bench", "cutehop.layers.mla", False),
        ("from tests import mla_cases", "cutehop.ops.mla", False),
        ("import comm", "cutehop.compat.deep_ep", False),
    ],
)
def test_an_upward_import_is_found(source, name, is_package):
    assert len(faults(source, name, is_package)) == 1


@pytest.mark.parametrize(
    ("source", "name", "is_package"),
    [
        ("from cutehop.cute_kernels.jit import compiled", "cutehop.ops._mla_cuda", False),
        ("from . import mla", "cutehop.ops", True),
        ("from ..ref import mla", "cutehop.ops.mla", False),
        ("import torch", "cutehop.ref.mla", False),
    ],
)
def test_a_downward_import_is_allowed(source, name, is_package):
    assert faults(source, name, is_package) == []
