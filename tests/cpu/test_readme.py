"""The README's Python runs as it stands, block after block in one namespace, as a reader would type it."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_the_blocks_run(monkeypatch):
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the blocks use the GPU that is there, and the kernels need SM90")
    # What inductor adds is compile time: the step holds nothing but ops of ours.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    namespace: dict[str, object] = {}
    for block in BLOCKS:
        if "CUDAGraph" in block and not torch.cuda.is_available():
            continue
        exec(compile(block, "README.md", "exec"), namespace)
    assert {"sched_meta", "layer", "decode_step", "split"} <= namespace.keys()


def test_the_markers_of_the_generated_table_are_there():
    assert re.search(r"^<!-- mla-table -->\n(.*\n)*<!-- /mla-table -->$", README, re.MULTILINE)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^):#]+)\)", README))))
def test_links_into_the_repository_lead_somewhere(path):
    assert (Path(__file__).resolve().parents[2] / path).exists()
