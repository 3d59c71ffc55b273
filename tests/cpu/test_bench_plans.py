"""The bench of the planner's ways to cut: its harness for real on the CPU ops."""

from __future__ import annotations

import json

import torch

from tools.bench import plans
from tools.bench.mla import reference
from tools.bench.roofline import Ceilings

CEILINGS = Ceilings(copy_gbs=2000.0, read_gbs=2500.0, matmul_tflops=700.0)


def test_shapes():
    names = [shape.name for shape in plans.SHAPES]
    assert len(names) == len(set(names)) == 387


def test_every_way_is_timed_and_the_choice_judged():
    row = plans.run_row(plans.Shape(2, 4, 16), CEILINGS, torch.device("cpu"), repeats=1)
    assert set(row["median_us"]) == set(row["reckoned"]) == set(plans.WAYS)
    assert row["reckoned"][row["chosen"]] == min(row["reckoned"].values())
    assert row["pieces"] == {"many": 4, "fewer": 2, "two": 2, "whole": 1}
    assert row["median_us"]["fewer"] == row["median_us"]["two"], "one plan, timed once"
    assert row["chosen_over_best"] >= 1
    assert not row["failed"]


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(plans, "reference", lambda x: tuple(torch.zeros_like(t) for t in reference(x)))
    row = plans.run_row(plans.Shape(1, 2, 16), CEILINGS, torch.device("cpu"), repeats=1)
    assert "wrong result" in row["failed"]["many"]
    assert row["chosen_over_best"] is None
    assert plans.went_wrong(row)
    assert "FAILED" in plans.table({"rows": [row]})


def test_the_table_names_bad_choices_only():
    ways = {"many": 10.0, "whole": 12.0}
    good = {"name": "good", "median_us": ways, "reckoned": ways, "pieces": {"many": 3, "whole": 1}, "failed": {}}
    good |= {"chosen": "many", "chosen_over_best": 1.0}
    bad = json.loads(json.dumps(good)) | {"name": "bad", "chosen": "whole", "chosen_over_best": 1.2}
    text = plans.table({"rows": [good, bad]})
    assert "good" not in text
    assert "1.200" in text
    assert "2 shapes: chosen / best 1.0954" in text
