"""The bench's arithmetic, report, plot and command line; the harness runs for real on the CPU op."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch

from tools.bench import host, mla, peers, plot, report, roofline, rows, timing

CPU = torch.device("cpu")
TINY = rows.Row(2, 2, 70, 3, varlen=True, causal=True)
# A peer whose answer can be spoilt, in the form that a folder of peers has.
PEER = """
from cutehop.ref.mla import mla_decode
NAME, VERSION = "{name}", "1"
def plan(cache_seqlens, s_q, h_q, max_len, causal):
    assert max_len >= int(cache_seqlens.max()) and s_q * h_q > 0
    return causal
def decode(q, k_cache, block_table, cache_seqlens, state, softmax_scale, causal):
    assert state == causal
    out, lse = mla_decode(q, k_cache, block_table, cache_seqlens, softmax_scale=softmax_scale, causal=causal)
    return out * {factor}, lse
"""


def write_peers(folder: Path, **factors: float) -> Path:
    for stem, factor in factors.items():
        (folder / f"{stem}_peer.py").write_text(PEER.format(name=stem, factor=factor))
    return folder


def test_row_table_is_the_published_one():
    """Every shape of the project's table of measured peers, once, and the 15 goals."""
    names = [row.name for row in rows.ROWS]
    assert len(names) == len(set(names)) == 31
    short = {(row.b, row.s_k, row.h_q) for row in rows.ROWS if row.s_k in (1024, 4096) and row.s_q == 1}
    assert short == {
        *((b, 1024, h) for b in (1, 4, 32, 128) for h in (16, 64, 128)),
        *((b, 4096, h) for b in (1, 16, 64, 128) for h in (16, 64, 128)),
    }
    assert sum(row.limit_us is not None for row in rows.ROWS) == 15


@pytest.mark.parametrize(
    ("pattern", "us", "tflops", "gbs"),
    [  # times and rates that were published together for FlashMLA on an H100: the rates must follow from the times
        ("^b128-sq1-sk8192.*varlen$", 529.7, 554, 2360),
        ("^b128-sq2-sk8192-hq128-varlen$", 876.2, 670, None),
        ("^b64-sq4-.*causal$", 143.7, 254, 2163),
        ("^b32-sq1-sk32768", 488.3, 584, 2434),
        ("^b1-sq1-sk65536", 76.7, 238, None),
        ("^b128-sq1-sk1024-hq16$", 67.2, None, 2312),
        ("^b16-sq1-sk4096-hq128$", 61.4, None, 1302),
    ],
)
def test_flops_and_bytes(pattern, us, tflops, gbs):
    (row,) = rows.select(pattern)
    if tflops is not None:
        assert row.flops / us / 1e6 == pytest.approx(tflops, rel=2e-3)
    if gbs is not None:
        assert row.bytes / us / 1e3 == pytest.approx(gbs, rel=2e-3)


def test_select_names_what_it_knows():
    assert rows.select("") == rows.ROWS
    with pytest.raises(ValueError, match=r"'sk77' matches none of the 31 rows; names look like b1-sq1"):
        rows.select("sk77")


def test_inputs_use_every_page_once():
    x = rows.make_inputs(TINY, CPU)
    used = [x.block_table[i, : -(-n // rows.PAGE)] for i, n in enumerate(TINY.lengths)]
    assert torch.cat(used).sort().values.tolist() == list(range(x.k_cache.shape[0]))
    assert x.cache_seqlens.tolist() == list(TINY.lengths)
    assert x.max_len >= max(TINY.lengths) >= min(TINY.lengths) >= TINY.s_q
    assert x.q.shape == (2, 2, 3, 576)
    assert x.k_cache.std().item() == pytest.approx(1, rel=0.05)


class FakeLane:
    """Takes a set time and writes down when it ran."""

    result = None

    def __init__(self, name: str, us: float, diary: list[tuple[str, int]]) -> None:
        self.name, self.us, self.diary = name, us, diary

    def run(self, calls: int) -> float:
        self.diary.append((self.name, calls))
        return self.us


def test_lanes_take_turns_for_equal_durations():
    diary: list[tuple[str, int]] = []
    lanes = {name: FakeLane(name, us, diary) for name, us in (("a", 1000.0), ("b", 30.0), ("c", 0.1))}
    samples = timing.interleave(lanes, 4)
    assert samples == {"a": [1000.0] * 4, "b": [30.0] * 4, "c": [0.1] * 4}
    timed = diary[3:]
    assert [name for name, _ in timed] == list("abcbcacababc")
    assert {name: {n for who, n in timed if who == name} for name in "abc"} == {"a": {3}, "b": {100}, "c": {200}}


def test_host_lane_counts_time_and_keeps_the_result():
    answers = iter(range(100))
    lane = timing.make_lane(lambda: next(answers), CPU)
    assert lane.result == 0
    assert lane.run(5) > 0
    assert lane.result == 5
    with pytest.raises(ValueError, match="--l2-flush on cpu"):
        timing.make_lane(lambda: None, CPU, l2_flush=True)


def test_ceilings_and_attainable_time():
    measured = roofline.measure_ceilings(CPU, roofline.Sizes(stream_bytes=4_000_000, matmul_edge=64, repeats=2))
    assert min(measured.copy_gbs, measured.read_gbs, measured.matmul_tflops) > 0
    ceilings = roofline.Ceilings(copy_gbs=2000, read_gbs=2500, matmul_tflops=500)
    (memory_bound,), (compute_bound,) = (
        rows.select("^b128-sq1-sk1024-hq16$"),
        rows.select("^b128-sq2-sk8192-hq128-varlen$"),
    )
    assert ceilings.attainable_us(memory_bound) == pytest.approx(memory_bound.bytes / 2.5e6)
    assert ceilings.attainable_us(compute_bound) == pytest.approx(compute_bound.flops / 5e8)


def test_check_rejects_wrong_and_not_finite():
    want = (torch.randn(8, 512), torch.randn(8))
    assert mla.check((want[0] * 1.001, want[1]), want) == pytest.approx(1e-3, rel=1e-2)
    poisoned = want[0].clone()
    poisoned[3, 7] = float("nan")
    for out, lse in ((want[0] * 1.02, want[1]), (poisoned, want[1]), (want[0], want[1] + 0.01)):
        with pytest.raises(ValueError, match="wrong result"):
            mla.check((out, lse), want)


def synthetic(names: tuple[str, ...] = ("cutehop", "A", "B")) -> report.Report:
    """A report of every row with made-up times: ours 10 us, the first peer 12, the second 20."""
    implementations = [peers.Implementation(name, "1", lambda _: pytest.fail("not to be run")) for name in names]
    ceilings = roofline.Ceilings(2900, 2800, 750)
    made = report.new_report(implementations, ceilings, CPU, {"repeats": 3})
    times = dict(zip(names, (10.0, 12.0, 20.0)))
    for row in rows.ROWS:
        samples = {name: [us - 1, us, us + 1] for name, us in times.items()}
        made["rows"].append(
            report.row_record(row, samples, dict.fromkeys(names, 0.003), ceilings, {"failed": {}, "sm_clock_mhz": 1755})
        )
    return made


def test_report_round_trip(tmp_path):
    made = synthetic()
    path = report.write(made, tmp_path / "new" / "folder")
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    loaded = report.load(path)
    assert loaded == json.loads(json.dumps(report.summarise(made)))
    assert loaded["geometric_mean_ratio"] == pytest.approx(1.2)
    first = loaded["rows"][0]
    assert (first["best_peer"], first["ratio_to_best_peer"]) == ("A", pytest.approx(1.2))
    result = first["results"]["cutehop"]
    assert (result["q1_us"], result["median_us"], result["q3_us"], result["samples"]) == (9.5, 10.0, 10.5, 3)
    assert result["tflops"] == pytest.approx(first["flops"] / 10e-6 / 1e12)
    assert result["gbs"] == pytest.approx(first["bytes"] / 10e-6 / 1e9)
    assert result["roofline_percent"] == pytest.approx(100 * first["bytes"] / 2.9e12 / 10e-6)
    assert {"date", "git_commit", "command", "machine", "settings", "ceilings"} <= loaded.keys()
    assert {"device", "driver", "torch", "cuda", "python"} <= loaded["machine"].keys()
    path.write_text('{"schema": 99}')
    with pytest.raises(ValueError, match=r"not a report of tools\.bench\.mla"):
        report.load(path)


def test_table_shows_every_row_and_missed_goals():
    made = synthetic()
    made["rows"][12]["results"]["cutehop"]["median_us"] = 18.5  # b1-sq1-sk4096-hq16, goal 18
    lines = report.table(made).splitlines()
    assert len(lines) == 1 + 31 + 2
    assert "18 missed" in lines[13]
    assert sum("missed" in line for line in lines) == 1
    assert lines[-1].startswith("geometric mean of best peer / ours: 1.200")
    alone = report.table(synthetic(("cutehop",)))
    assert "geometric" not in alone


def test_markdown_says_what_was_met_missed_and_failed(tmp_path, capsys):
    made = synthetic()
    made["rows"][12]["results"]["cutehop"]["median_us"] = 18.5  # b1-sq1-sk4096-hq16, goal 18
    del made["rows"][13]["results"]["A"]
    assert mla.main(["--from", str(report.write(made, tmp_path)), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == report.markdown(made).splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:33]]
    assert table[0] == [
        *("row", "cutehop us", "A us", "B us", "best peer / ours", "limit us", "TFLOPS", "GB/s", "% of roofline")
    ]
    assert {len(cells) for cells in table} == {9}
    assert [cells[0] for cells in table[2:]] == [row.name for row in rows.ROWS]
    assert (table[14][5], table[15][2], table[15][5], table[2][5]) == ("18 missed", "failed", "18 met", "-")
    assert table[2][1:5] == ["10.0", "12.0", "20.0", "1.20"]
    assert lines[-2] == "Limits met: 14 of 15."
    assert lines[-1] == "Geometric mean of best peer / ours over 31 rows: 1.200; worst row: b1-sq1-sk1024-hq16."


def test_markdown_without_peers_or_without_us():
    alone = report.markdown(synthetic(("cutehop",)))
    assert "Geometric" not in alone
    assert alone.endswith("Limits met: 15 of 15.")
    only_peers = report.markdown(synthetic(("A",)))
    assert "| 18 missed | - | - | - |" in only_peers
    assert only_peers.endswith("Limits met: 0 of 15.")


def test_geometric_mean():
    assert report.geometric_mean([]) is None
    ratios = [random.Random(1).uniform(0.5, 2) for _ in range(3)]
    assert report.geometric_mean(ratios) == pytest.approx((ratios[0] * ratios[1] * ratios[2]) ** (1 / 3))


def test_sm_clock_is_read_under_load(tmp_path, monkeypatch):
    """With a stand-in for nvidia-smi that takes its time, then one that knows nothing, then none."""
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    loads: list[int] = []
    for script, answer in (("sleep 0.2; echo 1755", 1755), ("echo '[N/A]'", None)):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        assert timing.sm_clock_mhz(lambda: loads.append(1)) == answer
    assert len(loads) > 1
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert timing.sm_clock_mhz(lambda: pytest.fail("nothing to wait for")) is None


@pytest.mark.parametrize(("ending", "magic"), [(".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_plot(tmp_path, ending, magic):
    pytest.importorskip("matplotlib")
    path = tmp_path / "sub" / f"roofline{ending}"
    plot.draw(synthetic(), path)
    data = path.read_bytes()
    assert data.startswith(magic)
    assert len(data) > 5000


def test_plot_rejects_other_endings(tmp_path):
    with pytest.raises(ValueError, match=r"'\.pdf', supported \.svg \.png"):
        plot.draw(synthetic(), tmp_path / "roofline.pdf")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--repeats", "0"], "--repeats 0: at least 1"),
        (["--from", "x.json"], "--from needs --plot or --markdown"),
        (["--rwos"], "--rwos"),
    ],
)
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        mla.parse(argv)
    assert message in capsys.readouterr().err


def test_peers_are_found(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"none of flash_mla_peer\.py, fa3_peer\.py is there"):
        peers.find_peers(tmp_path)
    found = peers.find_peers(write_peers(tmp_path, fa3=1, flash_mla=1))
    assert [peer.name for peer in found] == ["flash_mla", "fa3"]
    monkeypatch.setitem(sys.modules, "flash_mla", None)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.find_peers(None) == []


def test_run_row_times_the_right_and_names_the_wrong(tmp_path):
    found = peers.find_peers(write_peers(tmp_path, flash_mla=1, fa3=1.05))
    ceilings = roofline.Ceilings(20, 20, 1)
    record = mla.run_row(TINY, [peers.ours(), *found], ceilings, CPU, mla.Options(repeats=3))
    assert set(record["results"]) == {"cutehop", "flash_mla"}
    assert record["best_peer"] == "flash_mla"
    assert record["ratio_to_best_peer"] > 0
    assert set(record["failed"]) == {"fa3"}
    assert record["failed"]["fa3"].startswith("ValueError: wrong result: out is off by 5.0")
    assert all(result["samples"] == 3 for result in record["results"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU path of the command")
def test_the_command(tmp_path, capsys):
    """`python -m tools.bench.mla` from arguments to table, JSON and plot, with a right peer, then with a wrong one."""
    pytest.importorskip("matplotlib")
    figure = tmp_path / "roofline.svg"
    argv = [
        "--rows",
        "^b1-sq1-sk1024-hq16$",
        "--repeats",
        "2",
        "--peers",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
    ]
    write_peers(tmp_path, flash_mla=1)
    assert mla.main([*argv, "--plot", str(figure)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("b1-sq1-sk1024-hq16")
    assert printed[-1].startswith("geometric mean")
    assert figure.stat().st_size > 5000
    (path,) = (tmp_path / "out").iterdir()
    assert report.load(path)["rows"][0]["results"]["cutehop"]["error"] < mla.OUT_TOLERANCE
    figure.unlink()
    assert mla.main(["--from", str(path), "--plot", str(figure)]) == 0
    assert figure.exists()
    write_peers(tmp_path, flash_mla=2)
    assert mla.main(argv) == 1
    with pytest.raises(SystemExit, match="--kernel-only: needs a GPU"):
        mla.main([*argv, "--kernel-only"])


def test_host_parts_and_first_call():
    times = host.parts(rows.make_inputs(rows.Row(1, 1, 3, 2), CPU))
    assert times["mla_decode"] > times["torch.empty of out and lse"] > 0
    first = host.first_call(CPU, repeats=1)
    assert first["first_result_s"] >= first["plan_s"] + first["decode_s"] > 0
    assert first["compiler_imported"] is False
