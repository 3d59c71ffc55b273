"""The expert-parallel bench: bytes, floors, limits, report and table from made-up numbers; real runs over gloo."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cutehop.comm.gloo import GlooBuffer
from cutehop.ref import ep as ref
from tools.bench import ep, ep_known, ep_rank, ep_timing
from tools.bench import ep_report as reports
from tools.bench.ep_ceilings import EpCeilings, measure
from tools.bench.ep_jobs import Job
from tools.bench.ep_setting import Moved, Setting, combine_moves, dispatch_moves, expect, make_inputs

CPU = torch.device("cpu")
ONE_GPU = Setting(8, 1)
TWO_GPUS = Setting(2, 2, experts=64, sms=(8, 24, 48))
TINY = Setting(2, 0, tokens=24, hidden=144, topk=3, experts=6, sms=(0,), repeats=2)
BF16, FP8 = 2 * 7168, 7168 + 4 * 56  # bytes of a row
CEILINGS = EpCeilings(stream_gbs=2980, peer_copy_gbs=None)
LINKED = EpCeilings(stream_gbs=2980, peer_copy_gbs=365)


def job(name: str = "dispatch-bf16", sms: int | None = 16, moved: Moved | None = None) -> Job:
    return Job(name, sms, "graph", lambda: (), {}, moved=moved)


def record(
    which: Job, us: float, setting: Setting = ONE_GPU, ceilings: EpCeilings = CEILINGS, before: tuple = ()
) -> reports.Report:
    """The row of a call that takes `us` on all ranks, which move the same bytes."""
    samples, moved = [[us] * 3] * setting.ranks, [which.moved] * setting.ranks
    return reports.row_record(which, samples, moved, setting, ceilings, before)


@pytest.mark.parametrize(
    ("moved", "us", "gbs", "floor"),
    [  # rates of DeepEP and floors as they were published with its times: 21,736 rows on each of eight ranks
        (dispatch_moves(ONE_GPU, 21736, 19019, BF16), 3301, 94, 1670),
        (dispatch_moves(ONE_GPU, 21736, 19019, FP8), 1797, 89, 860),
        (combine_moves(ONE_GPU, 21736, 21736, 19019, BF16), 3071, 101, 1000),
    ],
)
def test_rates_and_floors_on_one_gpu(moved, us, gbs, floor):
    row = record(job(moved=moved), us)
    assert row["gbs"] == pytest.approx(gbs, rel=6e-3)
    assert row["floor_us"] == row["memory_floor_us"] == pytest.approx(floor, rel=1e-2)
    assert row["wire_floor_us"] is None
    assert row["floor_percent"] == pytest.approx(100 * row["floor_us"] / us)


def test_floors_on_two_gpus():
    """The link is the floor, unless the rows stay at home; the SMs' is told apart and follows their number."""
    moved = dispatch_moves(TWO_GPUS, 8170, 4086, BF16)
    row = record(job(sms=8, moved=moved), 207, TWO_GPUS, LINKED)
    assert row["floor_us"] == row["wire_floor_us"] == pytest.approx(160, rel=5e-3)
    assert row["memory_floor_us"] == pytest.approx(2 * 8170 * BF16 / 2980e3)
    assert row["sm_floor_us"] == pytest.approx(8170 * BF16 * 5 / 4 / (8 * 63e3))
    assert record(job(sms=4, moved=moved), 207, TWO_GPUS, LINKED)["sm_floor_us"] == 2 * row["sm_floor_us"]
    home = record(job(moved=replace(moved, remote=0)), 207, TWO_GPUS, LINKED)
    assert home["floor_us"] == home["memory_floor_us"]


def test_unequal_ranks():
    """One memory sees the bytes of all ranks, separate ones those of the busiest; a rate is about the mean."""
    moved = [Moved(1000, 2000, 1000, 1000, 500), Moved(3000, 6000, 3000, 3000, 1500)]
    samples = [[10.0, 30.0, 20.0, 40.0, 50.0], [20.0, 10.0, 20.0, 10.0, 60.0]]
    shared, apart = (
        reports.row_record(job(), samples, moved, setting, EpCeilings(1, 2), ())
        for setting in (Setting(2, 1), Setting(2, 2))
    )
    assert shared["memory_floor_us"] == 8
    assert apart["memory_floor_us"] == 6
    assert apart["wire_floor_us"] == 0.75
    assert shared["samples_us"] == [20, 30, 20, 40, 60]
    assert (shared["q1_us"], shared["median_us"], shared["q3_us"]) == (20, 30, 40)
    assert shared["rank_median_us"] == [30, 20]
    assert shared["gbs"] == pytest.approx(2000 / 30e3)


def test_foreign_tensors_cost_a_local_copy():
    n, m = ONE_GPU.tokens, 21736
    for moves, copied in ((dispatch_moves, n), (combine_moves, m)):
        sizes = (m, m) if moves is combine_moves else (m,)
        at_hand, foreign = (moves(ONE_GPU, *sizes, 19019, BF16, elsewhere) for elsewhere in (False, True))
        assert foreign.memory - at_hand.memory == 2 * copied * BF16
        assert replace(foreign, memory=at_hand.memory) == at_hand
        copies = record(job("copy-combine", None), 300), record(job("copy-dispatch-bf16", None), 7000)
        before = (*copies, record(job("combine", moved=at_hand), 1100), record(job("combine", 8, at_hand), 5000))
        assert record(job("combine-foreign", moved=foreign), 2000, before=before)["limit_us"] == 1400
        for missing in (before[1:], before[:2]):
            assert record(job("combine-foreign", moved=foreign), 2000, before=missing)["limit_us"] is None


@pytest.mark.parametrize(
    ("setting", "name", "sms", "known", "limit"),
    [
        (ONE_GPU, "layout", None, (62, 16), 20),
        (ONE_GPU, "dispatch-bf16", 16, (3301, 16), 2000),
        (ONE_GPU, "dispatch-fp8", 8, (1797, 16), None),
        (ONE_GPU, "dispatch-fp8-full", 16, (1859, 16), 1120),
        (ONE_GPU, "dispatch-fp8-static", 16, None, None),
        (ONE_GPU, "combine-foreign", 16, (3071, 16), None),
        (ONE_GPU, "combine-weights", 16, None, None),
        (ONE_GPU, "host-dispatch-static", 16, None, 60),
        (ONE_GPU, "host-combine", 16, None, 60),
        (TWO_GPUS, "layout", None, (35, 24), None),
        (TWO_GPUS, "dispatch-fp8", 8, (252, 24), 100),
        (TWO_GPUS, "combine", 4, (437, 24), 209),
        (TWO_GPUS, "combine", 48, (275, 48), None),
        (TWO_GPUS, "nccl-all-gather", None, None, None),
        (Setting(8, 8), "dispatch-bf16", 16, None, 1000),
        (Setting(8, 8), "dispatch-bf16", 24, None, None),
        (Setting(8, 8), "dispatch-fp8", 16, None, None),
        (replace(ONE_GPU, tokens=128), "dispatch-bf16", 16, None, None),
        (replace(TWO_GPUS, experts=256), "dispatch-bf16", 8, None, None),
        (Setting(8, 0), "layout", None, None, None),
    ],
)
def test_known_figures_and_limits(setting, name, sms, known, limit):
    assert ep_known.deepep(setting, name, sms) == known
    assert ep_known.limit_us(setting, name, sms, 380e6) == limit


def test_settings():
    assert [s.shared for s in (Setting(8, 1), Setting(1, 1), Setting(2, 0), Setting(2, 2))] == [True] * 3 + [False]
    ONE_GPU.check_sms(132)
    replace(TWO_GPUS, sms=(132,)).check_sms(132)
    with pytest.raises(
        ValueError, match="--sms 24: 192 CTAs that wait for each other on a GPU of 132 SMs; take at most 16"
    ):
        replace(ONE_GPU, sms=(8, 24)).check_sms(132)


def test_expectations_are_the_reference():
    setting = replace(TINY, ranks=3, experts=12)
    inputs = [make_inputs(setting, rank, CPU) for rank in range(3)]
    choices, weights = [i.topk_idx for i in inputs], [i.topk_weights for i in inputs]
    assert all(len(set(row)) == setting.topk for row in choices[0].tolist())
    plain = ref.dispatch([i.x for i in inputs], choices, weights, 12)
    pairs = ref.dispatch([(i.q, i.scales) for i in inputs], choices, weights, 12)
    for rank in range(3):
        e = expect(setting, rank, CPU)
        got = (e.x, e.q.float(), e.scales, e.topk_idx, e.topk_weights, e.src_idx)
        q, scales = pairs[rank].recv_x
        handle = plain[rank].handle
        want = (plain[rank].recv_x, q.float(), scales, plain[rank].recv_topk_idx, plain[rank].recv_topk_weights)
        assert all(map(torch.equal, got, (*want, handle.recv_src_idx)))
        own = int(inputs[rank].in_rank[:, rank].sum())
        assert e.remote == len(handle.recv_src_idx) - own > 0


def test_a_wrong_result_is_told():
    rows = torch.randn(5, 16).bfloat16()
    exact = Job("x", None, "host", lambda: (), {"first": torch.ones(2), "rows": rows})
    tail = torch.cat([rows, torch.full((3, 16), float("nan"), dtype=torch.bfloat16)])
    assert exact.problem((torch.ones(2), None, tail)) is None
    assert replace(exact, want={"rows": rows[:0]}).problem((rows[:0],)) is None
    off = rows.clone()
    off[1:3, 4] *= 1.01
    assert exact.problem((torch.ones(2), off)) == "rows: 2 of 5 rows are wrong"
    assert exact.problem((torch.ones(2), rows[:4])) == "rows: 4 rows, must be 5"
    assert exact.problem((-torch.ones(2), rows)) == "first: 2 of 2 rows are wrong"
    near = Job("x", None, "host", lambda: (), {"rows": rows}, exact=False)
    assert near.problem((rows * (1 + 2**-7),)) is None
    assert near.problem((rows * 1.02,)) == "rows: 5 of 5 rows are wrong"
    off[1, 4] = float("nan")
    assert near.problem((off,)) == "rows: 1 of 5 rows are wrong"
    poisoned = (torch.ones(2), None, rows.clone())
    ep_timing.poison(poisoned)
    assert exact.problem(poisoned) == "first: 2 of 2 rows are wrong"


class FakeLane:
    def __init__(self, us: float, diary: list) -> None:
        self.us, self.diary = us, diary

    def once(self):
        return ()

    def time(self, batches):
        self.diary.append(batches)
        return self.us


class FakeTeam:
    """Another rank is twice as slow."""

    def __init__(self, diary: list) -> None:
        self.diary = diary

    def barrier(self):
        self.diary.append("barrier")

    def gather(self, value):
        return [value, [2 * each for each in value] if isinstance(value, list) else 2 * value]


@pytest.mark.parametrize(("us", "batches"), [(5000.0, 1), (100.0, 3), (0.01, 50)])
def test_every_sample_follows_a_barrier_and_ranks_agree_on_the_calls(us, batches):
    diary: list = []
    samples = ep_timing.samples(FakeLane(us, diary), 5, FakeTeam(diary), 2)  # type: ignore[arg-type]
    assert samples == [[us, us], [2 * us, 2 * us]]
    assert diary == ["barrier", 1, "barrier", batches, "barrier", batches]


def test_events_leave_the_first_call_out(monkeypatch):
    """On the GPU ranks meet in a call before the first event, and a time is per call."""
    diary: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            diary.append("event")

        def elapsed_time(self, end):
            return 6.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: diary.append("synchronize"))
    lane = ep_timing.make_lane("eager", lambda: diary.append("call") or (), 2, torch.device("cuda"))  # type: ignore[arg-type,func-returns-value]
    assert lane.time(3) == pytest.approx(1000)
    assert diary == ["call", "event", *["call"] * 6, "event", "synchronize"]


def test_host_time_is_of_a_batch_behind_another():
    calls: list[int] = []
    lane = ep_timing.make_lane("graph", lambda: calls.append(1) or (), 4, CPU)  # type: ignore[arg-type,func-returns-value]
    assert lane.time(50) > 0
    assert len(calls) == 2 * 4
    assert lane.once() == ()


def synthetic() -> reports.Report:
    moved = dispatch_moves(ONE_GPU, 21736, 19019, BF16)
    header = {
        "date": "2026-01-02T03:04:05+00:00",
        "git_commit": "0123456789abcdef",
        "git_modified": False,
        "command": "python -m tools.bench.ep --ranks 8 --one-gpu",
        "machine": {"device": "H100", "sms": 132, "driver": "1", "torch": "2", "cuda": "13", "python": "3"},
    }
    buffer = {"creation_s": 3.5, "heap_bytes": 529932288, "device_bytes_per_rank": 532676608}
    traffic = {"received_rows": [21736] * 8, "remote_rows": [19019] * 8}
    report = reports.new_report(ONE_GPU, CEILINGS, buffer, traffic, header)
    report["rows"] = [
        record(job("layout", None), 6.2),
        record(job(moved=moved), 1660),
        record(job(sms=8, moved=moved), 3000),
        record(job("combine"), 1301),
        reports.failed_row(job("dispatch-fp8"), [None, "rows: 1 of 9 rows are wrong", *[None] * 6]),
    ]
    return report


def test_table():
    head, layout, bf16, slow, combine, failed, *notes = reports.table(synthetic()).splitlines()
    assert head.split() == " ".join(reports.HEAD).split()
    assert layout.split() == ["layout", "-", "6.2", "±0.0", "-", "-", "-", "-", "62", "10.00", "20", "met"]
    assert bf16.split()[:8] == ["dispatch-bf16", "16", "1660.0", "±0.0", "188", "1673", "101", "386"]
    assert bf16.split()[8:] == ["3301", "1.99", "2000", "met"]
    assert slow.split()[8:] == ["3301", "(16", "SMs)", "1.10", "-"]
    assert combine.split()[-2:] == ["1300", "missed"]
    assert failed.split() == ["dispatch-fp8", "16", "failed", *["-"] * 7]
    assert len({len(line) for line in (head, layout, bf16, slow, combine, failed)}) == 1
    sizes, taken = (
        "8 ranks on one GPU, 4096 tokens each, hidden 7168, top-8 of 256",
        "532,676,608 bytes of GPU memory taken",
    )
    assert notes == [
        f"{sizes}. Rows received per rank: 21736, remote: 19019.",
        "Measured in the same run: memory 2980 GB/s.",
        f"Buffer creation 3.50 s (limit 6 s met); heap 529,932,288 bytes per rank by EpLayout, {taken} per rank.",
        "DeepEP V1: 567632d, same set-up, another run.",
        "dispatch-fp8 failed: rank 1: rows: 1 of 9 rows are wrong",
    ]


def test_markdown_and_file(tmp_path):
    path = tmp_path / "folder" / "ep.json"
    reports.write(synthetic(), path)
    assert [file.name for file in path.parent.iterdir()] == ["ep.json"]
    report = reports.load(path)
    assert report == json.loads(json.dumps(synthetic()))
    head, rule, *others = reports.markdown(report).splitlines()
    assert head == f"| {' | '.join(reports.HEAD)} |"
    assert rule == f"| --- |{' ---: |' * (len(reports.HEAD) - 1)}"
    assert others[1] == "| dispatch-bf16 | 16 | 1660.0 | 188 | 1673 | 101 | 386 | 3301 | 1.99 | 2000 met |"
    assert (
        "H100, driver 1, torch 2, 2026-01-02, commit 0123456789ab: `python -m tools.bench.ep --ranks 8 --one-gpu`."
        in others
    )
    path.write_text('{"schema": 1, "bench": "mla"}')
    with pytest.raises(ValueError, match=r"not a report of tools\.bench\.ep"):
        reports.load(path)


def test_command_line():
    options = ep.parse(["--sms", "24,8", "--rows", "fp8"])
    assert options.setting(2, 2) == Setting(2, 2, experts=64, sms=(24, 8))
    assert options.setting(8, 0).sms == (0,)
    assert options.transports == ("p2p",)
    assert ep.parse(["--transports", "p2p,nvshmem"]).transports == ("p2p", "nvshmem")
    assert ep.parse(["--experts", "16"]).setting(8, 1).experts == 16
    for bad in (["--sms", "8,0"], ["--sms", "x"], ["--repeats", "0"]):
        with pytest.raises(SystemExit):
            ep.parse(bad)


def test_ceilings_of_a_cpu():
    measured = measure(TINY, CPU)
    assert measured.stream_gbs > 0
    assert measured.peer_copy_gbs is None


ROWS = (
    "layout",
    "copy-dispatch-bf16",
    "copy-dispatch-fp8",
    "copy-combine",
    "dispatch-bf16",
    "dispatch-bf16-foreign",
    "dispatch-fp8",
    "dispatch-fp8-foreign",
    "dispatch-fp8-full",
    "dispatch-fp8-static",
    "combine",
    "combine-foreign",
    "combine-weights",
    "host-dispatch-static",
    "host-combine",
)


@pytest.mark.dist
@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU path of the command")
def test_the_command(tmp_path, capfd):
    """From arguments over two ranks to JSON and table."""
    sizes = ["--tokens", "24", "--hidden", "144", "--topk", "3", "--experts", "6", "--repeats", "2"]
    argv = ["--ranks", "2", *sizes, "--out", str(tmp_path / "out")]
    assert ep.main(argv) == 0
    (path,) = (tmp_path / "out").iterdir()
    assert re.fullmatch(r"ep-2x-0gpu-\d{8}T\d{6}\.json", path.name)
    report = reports.load(path)
    assert report["command"] == f"python -m tools.bench.ep {' '.join(argv)}"
    assert tuple(row["name"] for row in report["rows"]) == ROWS
    assert all(row["median_us"] > 0 and len(row["rank_median_us"]) == 2 for row in report["rows"])
    assert sum(report["traffic"]["received_rows"]) >= 2 * 24
    printed = capfd.readouterr().out
    assert printed.endswith(reports.table(report) + "\n")
    assert ep.main(["--from", str(path), "--markdown"]) == 0
    assert capfd.readouterr().out == reports.markdown(report) + "\n"


def run_with_a_wrong_combine(group, rank, path):
    """One rank's combine is off by one bit of one row."""
    right = GlooBuffer._combine

    def wrong(self, *args, **kwargs):
        combined, weights = right(self, *args, **kwargs)
        combined.view(torch.int16)[7, 0] ^= 1
        return combined, weights

    if rank == 1:
        GlooBuffer._combine = wrong  # type: ignore[method-assign]
    try:
        return ep_rank.Bench(TINY, group, CPU, "a test", Path(path), "^(combine|host-combine|dispatch-bf16$)").run()
    finally:
        GlooBuffer._combine = right  # type: ignore[method-assign]


@pytest.mark.dist
def test_a_wrong_row_is_not_timed(cpu_ranks, tmp_path, capsys):
    path = tmp_path / "ep.json"
    first, second = cpu_ranks(2).run(run_with_a_wrong_combine, str(path))
    assert [row["name"] for row in first["rows"]] == [row["name"] for row in second["rows"]]
    failed = {row["name"]: row["failed"] for row in first["rows"]}
    assert failed.pop("dispatch-bf16") is None
    assert failed == dict.fromkeys(
        ("combine", "combine-foreign", "combine-weights", "host-combine"), "rank 1: tokens: 1 of 24 rows are wrong"
    )
    assert ep.main(["--from", str(path)]) == 1
    assert capsys.readouterr().out.count("wrong") == 4
