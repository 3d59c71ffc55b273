"""The bench of the MoE layer: its arithmetic, its baseline, and its harness for real on the CPU ops."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tools.bench import moe_layer, moe_layer_rank
from tools.bench.ep_timing import Team
from tools.bench.moe_layer_setting import TOLERANCE, Fp8Swiglu, Setting, TorchMoE, expected

CPU = torch.device("cpu")
TINY = Setting(9, hidden=256, inner=128, experts=16, topk=4, groups=4, topk_groups=2)


def test_settings_of_the_table():
    assert [setting.name for setting in moe_layer.SETTINGS] == ["bf16-t128", "bf16-t4096", "fp8-t128", "fp8-t4096"]
    assert moe_layer.chosen("fp8.*4096") == [Setting(4096, fp8=True)]
    assert Setting(4096).flops == 2 * 4096 * 9 * 3 * 7168 * 2048


def test_experts_are_the_same_wherever_they_are():
    layer = TINY.make_layer(CPU)
    up, down = TINY.expert(5, CPU)
    assert torch.equal(layer.experts.gate_up_proj[5], up)
    assert torch.equal(layer.experts.down_proj[5], down)


@torch.no_grad()
def test_the_baseline_is_the_layer():
    layer, x = TINY.make_layer(CPU), TINY.make_tokens(0, CPU)
    want = expected(TINY, layer, x)
    for call in (layer, TorchMoE(layer, fp8=False)):
        assert (call(x).float() - want).norm() < TOLERANCE[False] * want.norm()


@torch.no_grad()
def test_the_shared_expert_of_the_fp8_baseline():
    """As far from the layer's as its casts are, which torch has on a CPU for the shared expert alone."""
    shared, x = TINY.make_layer(CPU).shared_experts, TINY.make_tokens(0, CPU)
    want = shared(x).float()
    error = (Fp8Swiglu(shared)(x).float() - want).norm() / want.norm()
    assert 0.01 < error < TOLERANCE[True]


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_a_row(monkeypatch, fp8):
    """torch.compile is left out for its time, torch's scaled product where this torch has none for a CPU."""
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    row = moe_layer.run_row(replace(TINY, fp8=fp8), CPU, repeats=2)
    assert row["median_us"][moe_layer.OURS] > 0
    assert set(row["median_us"]) | set(row["failed"]) == {moe_layer.OURS, moe_layer.EAGER, moe_layer.COMPILED}
    assert fp8 or row["failed"] == {}
    cast = ["cast"] if fp8 else []
    assert list(row["stages_us"]) == ["route", *cast, "permute", "GEMM up", "GEMM down", "unpermute", "shared"]


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    right = moe_layer.expected
    monkeypatch.setattr(moe_layer, "expected", lambda *args: right(*args) * 1.1)
    row = moe_layer.run_row(TINY, CPU, repeats=2)
    assert row["median_us"] == {}
    assert row["stages_us"] == {}
    assert all("wrong result: off by 9" in problem for problem in row["failed"].values())
    assert len(row["failed"]) == 3
    assert "FAILED" in moe_layer.table(moe_layer.new_report(CPU, 2, 1) | {"rows": [row]})


@pytest.mark.parametrize(("compiled", "met"), [(200.0, True), (199.0, False), (None, None)])
def test_goal(compiled, met):
    times = {moe_layer.OURS: 100.0} | ({moe_layer.COMPILED: compiled} if compiled else {})
    row = moe_layer.record(Setting(128), times, {"route": 3.0, "shared": 4.0}, {}, {})
    assert row["met"] is met
    text = moe_layer.table(moe_layer.new_report(CPU, 2, 1) | {"rows": [row]})
    assert text.splitlines()[-1].split() == ["bf16-t128", "3.0", "4.0", "7.0"]


def test_the_report_of_a_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setattr(moe_layer, "SETTINGS", (TINY,))
    assert moe_layer.main(["--out", str(tmp_path), "--repeats", "1"]) == 0
    (path,) = tmp_path.glob("moe-layer-1x-*.json")
    assert json.loads(path.read_text())["rows"][0]["name"] == "bf16-t9"
    assert "bf16-t9" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        moe_layer.main(["--rows", "no such row"])


@torch.inference_mode()
def bench_on_ranks(group, rank, setting):
    bench = moe_layer_rank.RankBench(setting, Team(group), CPU)
    row = bench.run(repeats=1)
    bench.buffer.destroy()
    return row


@pytest.mark.dist
@pytest.mark.parametrize("few", [False, True], ids=["normal", "low latency"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_rows_on_ranks(cpu_ranks, fp8, few):
    setting = replace(TINY, fp8=fp8, tokens=9 if few else 130)
    rows = cpu_ranks(2).run(bench_on_ranks, setting)
    for row in rows:
        assert row["failed"] == {}
        assert list(row["stages_us"]) == ["route", "dispatch", "experts", "combine", "shared"]
