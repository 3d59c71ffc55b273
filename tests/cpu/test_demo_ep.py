"""The expert-parallel demo: right over gloo, wrong where an expert is, and the README shows its layer as it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cutehop.comm.config import EpConfig
from tools.demo import ep

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.mark.dist
@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU path of the command")
def test_the_command_of_the_readme(tmp_path):
    arguments = ["--tokens", "40", "--hidden", "64"]
    command = [sys.executable, "-m", "cutehop.launch", "--ranks", "2", "--one-gpu", "tools/demo/ep.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "2 ranks on the CPU over gloo, 40 tokens each, 16 experts" in lines
    assert lines[-1] == "every token came home right"


def with_a_wrong_expert(group, rank, wrong):
    right = ep.apply_experts

    def off(got, factors):
        return right(got, factors) * 1.05

    if rank == wrong:
        ep.apply_experts = off
    try:
        return ep.run(EpConfig(2, 64, max_tokens=40, num_experts=4, max_topk=2), CPU)
    finally:
        ep.apply_experts = right


@pytest.mark.dist
@pytest.mark.parametrize("wrong", [None, 1])
def test_errors_are_seen_where_tokens_come_home(cpu_ranks, wrong):
    results = cpu_ranks(2).run(with_a_wrong_expert, wrong)
    assert all(0 < elsewhere <= 40 for elsewhere, _ in results)
    assert all((error > ep.TOLERANCE) == (wrong is not None) for _, error in results)


def test_the_readme_shows_the_layer_of_the_demo():
    (block,) = re.findall(r"^```py\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert block in (ROOT / "tools/demo/ep.py").read_text()
