"""The benchmark of routing, permutation and FP8 cast: every row runs and checks itself on small sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tools.bench import moe as bench
from tools.bench.roofline import Ceilings

CEILINGS = Ceilings(copy_gbs=1000.0, read_gbs=2000.0, matmul_tflops=1.0)
SMALL = bench.Sizes(tokens=20, hidden=256, experts=64)


@pytest.mark.parametrize("operation", bench.OPERATIONS)
def test_row(operation, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # takes a minute; the GPU run has it
    found = bench.run_row(bench.Row(operation, SMALL), CEILINGS, torch.device("cpu"), 1)
    assert not found["failed"]
    assert set(found["median_us"]) == {bench.OURS, bench.EAGER, bench.COMPILED}
    assert found["met"] is None
    assert found["bytes"] > 0


def test_a_wrong_result_is_named(monkeypatch):
    right = bench.OPERATIONS["quantize"]

    def wrong(sizes, device):
        job = right(sizes, device)
        return dataclasses.replace(job, expected=job.expected + 1)

    monkeypatch.setitem(bench.OPERATIONS, "quantize", wrong)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    found = bench.run_row(bench.Row("quantize", SMALL, goal_us=1e9), CEILINGS, torch.device("cpu"), 1)
    assert all("wrong result" in found["failed"][name] for name in (bench.OURS, bench.EAGER, bench.COMPILED))
    assert found["met"] is False
    assert "missed" in bench.table({"rows": [found], "ceilings": dataclasses.asdict(CEILINGS)})


def test_goals():
    row = bench.Row("permute", bench.Sizes(4096), goal_factor=1.25)
    found = bench.record(row, 2_000_000, {bench.OURS: 1.2, bench.EAGER: 3.6}, {}, CEILINGS)
    assert found["goal_us"] == pytest.approx(1.25)
    assert found["met"]
    assert found["ratio"] == pytest.approx(3.0)
    assert not bench.record(row, 2_000_000, {bench.OURS: 1.3}, {}, CEILINGS)["met"]
