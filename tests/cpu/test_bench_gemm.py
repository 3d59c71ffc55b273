"""The grouped GEMM bench: its arithmetic, and its harness for real on the CPU ops."""

from __future__ import annotations

import json

import pytest
import torch

from tools.bench import gemm, row_bench
from tools.bench.roofline import Ceilings

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_gbs=2000.0, read_gbs=2500.0, matmul_tflops=700.0)
TINY = {"sizes": (128, 256)}


def test_rows_of_the_table():
    names = [row.name for row in gemm.ROWS]
    assert len(names) == len(set(names)) == 32
    large = {(row.fp8, row.layer): row.goal_tflops for row in gemm.ROWS if row.goal_tflops}
    assert large == {(fp8, layer): 1050 if fp8 else 660 for fp8 in (False, True) for layer in gemm.LAYERS}


@pytest.mark.parametrize(("tokens", "mean"), [(8, 2), (128, 32)])
def test_decode_rows_are_those_that_eight_ranks_send(tokens, mean):
    totals = [sum(gemm.Row("up", False, tokens=tokens).counts) for _ in range(3)]
    assert len(set(totals)) == 1
    assert totals[0] / gemm.EXPERTS == pytest.approx(mean, rel=0.2)


def test_flops_and_bytes():
    """Rates that were published together with times for torch on an H100."""
    row = gemm.Row("up", False, 32768)
    assert row.flops / 3013e-6 / 1e12 == pytest.approx(639, rel=0.01)
    assert row.weight_bytes / 688e-6 / 1e12 == pytest.approx(2.73, rel=0.01)
    assert gemm.Row("up", True, 32768).weight_bytes * 2 == row.weight_bytes


@pytest.mark.parametrize(
    ("row", "medians", "met"),
    [
        (gemm.Row("up", False, 32768, goal_tflops=660), {gemm.OURS: 2900.0}, True),
        (gemm.Row("up", False, 32768, goal_tflops=660), {gemm.OURS: 3000.0}, False),
        (gemm.Row("up", False, 4096, goal_ratio=1.4), {gemm.OURS: 100.0, gemm.GROUPED: 141.0, gemm.LOOP: 500.0}, True),
        (gemm.Row("up", False, 4096, goal_ratio=1.4), {gemm.OURS: 100.0, gemm.GROUPED: 139.0, gemm.LOOP: 500.0}, False),
        (gemm.Row("up", False, 4096, goal_ratio=1.4), {gemm.OURS: 100.0}, False),
        (gemm.Row("up", False, 4096), {gemm.OURS: 100.0}, None),
    ],
)
def test_goals(row, medians, met):
    assert gemm.record(row, medians, {}, {}, CEILINGS)["met"] is met


def test_epilogue_costs():
    rows = [gemm.Row("up", False, 32768, epilogue=epilogue) for epilogue in ("store", "swiglu")]
    records = [gemm.record(row, {gemm.OURS: us}, {}, {}, CEILINGS) for row, us in zip(rows, (100.0, 102.0))]
    assert gemm.epilogue_costs(records) == ["up-bf16-m32768: swiglu costs +2.0 % over store (goal: at most +3 %)"]


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("epilogue", ["store", "swiglu", "swiglu_fp8"])
def test_every_implementation_is_right(fp8, epilogue):
    for row in (
        gemm.Row("up", fp8, 100, epilogue=epilogue, **TINY),
        gemm.Row("up", fp8, tokens=4, epilogue=epilogue, **TINY),
    ):
        found = gemm.run_row(row, CEILINGS, CPU, 1)
        failed = set(found["failed"]) - {gemm.SCALED}  # torch has that one on GPUs only
        assert not failed
        assert gemm.OURS in found["median_us"]


def test_report(tmp_path, monkeypatch, capsys):
    row = gemm.Row("up", False, 64, goal_ratio=1.4, **TINY)
    monkeypatch.setattr(gemm, "ROWS", (row,))
    monkeypatch.setattr(row_bench, "measure_ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(gemm.torch.cuda, "is_available", lambda: False)
    assert gemm.main(["--repeats", "1", "--out", str(tmp_path)]) == 0
    assert row.name in capsys.readouterr().out
    (path,) = tmp_path.glob("gemm-*.json")
    report = json.loads(path.read_text())
    assert report["rows"][0]["counts"] == list(row.counts)
    with pytest.raises(SystemExit):
        gemm.main(["--rows", "nothing matches"])
