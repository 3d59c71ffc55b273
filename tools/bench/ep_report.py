"""The expert-parallel bench's result as a JSON document, a table for a terminal and markdown. README.md: the fields."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.bench.ep_ceilings import EpCeilings
from tools.bench.ep_jobs import Job
from tools.bench.ep_known import COPY, DEEPEP_SOURCE, FOREIGN, SM_SEND_GBS, creation_limit_s, deepep, limit_us
from tools.bench.ep_setting import Moved, Setting

SCHEMA = 1
Report = dict[str, Any]


def new_report(setting: Setting, ceilings: EpCeilings, buffer: Report, traffic: Report, header: Report) -> Report:
    """Everything but the rows. header: when, where and how. buffer: its creation and memory. traffic: rows by rank."""
    return {
        "schema": SCHEMA,
        "bench": "ep",
        **header,
        "setting": setting.json() | {"shared": setting.shared},
        "ceilings": {
            "stream_gbs": ceilings.stream_gbs,
            "peer_copy_gbs": ceilings.peer_copy_gbs,
            "sm_send_gbs": SM_SEND_GBS,
        },
        "deepep": DEEPEP_SOURCE,
        "traffic": traffic,
        "buffer": buffer | {"creation_limit_s": creation_limit_s(setting)},
        "rows": [],
    }


def failed_row(job: Job, problems: Sequence[str | None]) -> Report:
    """A row that was wrong on some rank and therefore not timed. problems: by rank."""
    words = "; ".join(f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem)
    return {"name": job.name, "sms": job.sms or None, "how": job.how, "failed": words}


def row_record(
    job: Job,
    samples: Sequence[Sequence[float]],
    moved: Sequence[Moved | None],
    setting: Setting,
    ceilings: EpCeilings,
    before: Sequence[Report],
) -> Report:
    """One row. samples: us per call, of every rank, one a repeat; moved: of every rank; before: the rows above it."""
    slowest = [max(of_ranks) for of_ranks in zip(*samples)]
    quartiles = statistics.quantiles(slowest, n=4, method="inclusive") if len(slowest) > 1 else slowest * 3
    q1, median, q3 = quartiles
    every = [m for m in moved if m is not None]
    logical = statistics.mean(m.logical for m in every) if every else None
    floors = _floors(every, job.sms, setting, ceilings) if every else {}
    known = deepep(setting, job.name, job.sms)
    row = {
        "name": job.name,
        "sms": job.sms or None,
        "how": job.how,
        "failed": None,
        "median_us": median,
        "q1_us": q1,
        "q3_us": q3,
        "samples_us": slowest,
        "rank_median_us": [statistics.median(of_rank) for of_rank in samples],
        "bytes_per_rank": logical,
        "gbs": None if logical is None else logical / median / 1e3,
        "memory_floor_us": floors.get("memory"),
        "wire_floor_us": floors.get("wire"),
        "sm_floor_us": floors.get("sm"),
        "floor_us": None,
        "floor_percent": None,
        "deepep_us": known[0] if known else None,
        "deepep_sms": known[1] if known else None,
        "deepep_ratio": known[0] / median if known else None,
        "limit_us": limit_us(setting, job.name, job.sms, logical),
    }
    if floors:
        floor = max(floors["memory"], floors.get("wire", 0.0))
        row |= {"floor_us": floor, "floor_percent": 100 * floor / median}
    if job.name.endswith(FOREIGN) and setting.gpus:
        row["limit_us"] = _foreign_limit_us(row, before)
    return row


def _floors(moved: Sequence[Moved], sms: int | None, setting: Setting, ceilings: EpCeilings) -> dict[str, float]:
    """Least us that the bytes leave: through memory, over the link, and out of the SMs that the call may use."""
    through_one_memory = sum if setting.shared else max
    floors = {"memory": through_one_memory(m.memory for m in moved) / ceilings.stream_gbs / 1e3}
    if ceilings.peer_copy_gbs is not None:
        floors["wire"] = max(m.remote for m in moved) / ceilings.peer_copy_gbs / 1e3
    if sms:
        floors["sm"] = max(m.sent for m in moved) / (sms * SM_SEND_GBS) / 1e3
    return floors


def _foreign_limit_us(row: Report, before: Sequence[Report]) -> float | None:
    """The same call's time with inputs in symmetric memory, and that of one local copy. None without their rows."""
    name = row["name"].removesuffix(FOREIGN)
    us = {(other["name"], other["sms"]): other["median_us"] for other in before if other["failed"] is None}
    in_place, copy = us.get((name, row["sms"])), us.get((COPY + name, None))
    return None if in_place is None or copy is None else in_place + copy


def write(report: Report, path: Path) -> None:
    """By a rename, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)


def load(path: Path) -> Report:
    """A report written by `write`. ValueError if it is something else."""
    report = json.loads(path.read_text())
    if not isinstance(report, dict) or report.get("schema") != SCHEMA or report.get("bench") != "ep":
        raise ValueError(f"{path}: not a report of tools.bench.ep with schema {SCHEMA}; make one with --out")
    return report


HEAD = ("row", "SMs", "us", "GB/s", "floor us", "% of floor", "SM floor us", "DeepEP V1 us", "V1 / ours", "limit us")


def table(report: Report) -> str:
    """The report for a terminal."""
    lines = [HEAD, *(_cells(row, spread=True) for row in report["rows"])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    text = [
        f"{line[0]:<{widths[0]}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(line[1:], widths[1:])) for line in lines
    ]
    return "\n".join([*text, *_notes(report)])


def markdown(report: Report) -> str:
    """The report for a README."""
    lines = [HEAD, ("---", *["---:"] * (len(HEAD) - 1)), *(_cells(row, spread=False) for row in report["rows"])]
    machine, commit = report["machine"], (report["git_commit"] or "unknown")[:12]
    origin = (
        f"{machine['device']}, driver {machine['driver']}, torch {machine['torch']}, {report['date'][:10]}, commit "
        f"{commit}{' with changes' if report['git_modified'] else ''}: `{report['command']}`."
    )
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", origin, *_notes(report)])


def _cells(row: Report, spread: bool) -> tuple[str, ...]:
    sms = str(row["sms"] or "-")
    if row["failed"]:
        return (row["name"], sms, "failed", *["-"] * (len(HEAD) - 3))
    time = f"{row['median_us']:.1f}" + (f" ±{(row['q3_us'] - row['q1_us']) / 2:.1f}" if spread else "")
    known = "-" if row["deepep_us"] is None else f"{row['deepep_us']:g}"
    if row["deepep_us"] is not None and row["sms"] not in (None, row["deepep_sms"]):
        known += f" ({row['deepep_sms']} SMs)"
    limit = "-"
    if row["limit_us"] is not None:
        limit = f"{row['limit_us']:.4g} {'met' if row['median_us'] <= row['limit_us'] else 'missed'}"
    numbers = [_number(row[key]) for key in ("gbs", "floor_us", "floor_percent", "sm_floor_us")]
    ratio = "-" if row["deepep_ratio"] is None else f"{row['deepep_ratio']:.2f}"
    return (row["name"], sms, time, *numbers, known, ratio, limit)


def _number(value: float | None) -> str:
    """Three digits, or all of them before the point."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _notes(report: Report) -> list[str]:
    setting, ceilings, buffer = report["setting"], report["ceilings"], report["buffer"]
    where = {0: "one CPU (gloo; no measure of speed)", 1: "one GPU"}.get(setting["gpus"], f"{setting['gpus']} GPUs")
    sizes = (
        f"{setting['tokens']} tokens each, hidden {setting['hidden']}, top-{setting['topk']} of {setting['experts']}"
    )
    received, remote = (statistics.mean(report["traffic"][key]) for key in ("received_rows", "remote_rows"))
    peer = "" if ceilings["peer_copy_gbs"] is None else f", peer copy {ceilings['peer_copy_gbs']:.0f} GB/s"
    created = f"Buffer creation {buffer['creation_s']:.2f} s{_creation_verdict(buffer)}"
    notes = [
        f"{setting['ranks']} ranks on {where}, {sizes}. Rows received per rank: {received:.0f}, remote: {remote:.0f}.",
        f"Measured in the same run: memory {ceilings['stream_gbs']:.0f} GB/s{peer}.",
        f"{created}; heap {buffer['heap_bytes']:,} bytes per rank by EpLayout{_taken(buffer)}.",
    ]
    if any(not row["failed"] and row["deepep_us"] is not None for row in report["rows"]):
        notes.append(f"DeepEP V1: {report['deepep'].partition(' V1 ')[2]}.")
    notes += [f"{row['name']} failed: {row['failed']}" for row in report["rows"] if row["failed"]]
    return notes


def _creation_verdict(buffer: Report) -> str:
    limit = buffer["creation_limit_s"]
    return "" if limit is None else f" (limit {limit:g} s {'met' if buffer['creation_s'] <= limit else 'missed'})"


def _taken(buffer: Report) -> str:
    taken = buffer["device_bytes_per_rank"]
    return "" if taken is None else f", {taken:,} bytes of GPU memory taken per rank"
