"""The bench's result as a JSON document, a table for a terminal and markdown. README.md lists the JSON's fields."""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from tools.bench.peers import OURS, Implementation
from tools.bench.roofline import Ceilings
from tools.bench.rows import Row

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]

Report = dict[str, Any]


def new_report(
    implementations: Sequence[Implementation], ceilings: Ceilings, device: torch.device, settings: Report
) -> Report:
    """Everything but the rows: when, where, what, how."""
    status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "schema": SCHEMA,
        "bench": "mla",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_commit": git("rev-parse", "HEAD"),
        "git_modified": None if status is None else bool(status),
        "command": f"python -m tools.bench.mla {' '.join(sys.argv[1:])}".strip(),
        "machine": machine_of(device),
        "settings": settings,
        "implementations": [{"name": x.name, "version": x.version} for x in implementations],
        "ceilings": {
            "copy_gbs": ceilings.copy_gbs,
            "read_gbs": ceilings.read_gbs,
            "matmul_tflops": ceilings.matmul_tflops,
        },
        "rows": [],
    }


def row_record(
    row: Row, samples: Mapping[str, Sequence[float]], errors: Report, ceilings: Ceilings, extra: Report
) -> Report:
    """One row. samples: us per call by implementation; errors: its distance from the reference, same keys."""
    results = {name: _result(row, values, ceilings) | {"error": errors[name]} for name, values in samples.items()}
    peers = {name: result["median_us"] for name, result in results.items() if name != OURS}
    best = min(peers, key=lambda name: peers[name]) if peers else None
    ratio = peers[best] / results[OURS]["median_us"] if best is not None and OURS in results else None
    return {
        "name": row.name,
        "b": row.b,
        "s_q": row.s_q,
        "s_k": row.s_k,
        "h_q": row.h_q,
        "varlen": row.varlen,
        "causal": row.causal,
        "limit_us": row.limit_us,
        "tokens": sum(row.lengths),
        "flops": row.flops,
        "bytes": row.bytes,
        "results": results,
        "best_peer": best,
        "ratio_to_best_peer": ratio,
        **extra,
    }


def _result(row: Row, values: Sequence[float], ceilings: Ceilings) -> Report:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {
        "median_us": median,
        "q1_us": q1,
        "q3_us": q3,
        "samples": len(values),
        "tflops": row.flops / median / 1e6,
        "gbs": row.bytes / median / 1e3,
        "roofline_percent": 100 * ceilings.attainable_us(row) / median,
    }


def geometric_mean(ratios: Sequence[float]) -> float | None:
    """None of nothing."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def summarise(report: Report) -> Report:
    """The report with its geometric mean and worst row over the rows that have a ratio."""
    ratios = {row["name"]: row["ratio_to_best_peer"] for row in report["rows"] if row["ratio_to_best_peer"]}
    worst = min(ratios, key=lambda name: ratios[name]) if ratios else None
    return report | {"geometric_mean_ratio": geometric_mean(list(ratios.values())), "worst_row": worst}


def write(report: Report, folder: Path) -> Path:
    """Write mla-<date>.json in `folder`, by a rename so that a reader never sees half of it. Returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = report["date"].replace(":", "").replace("-", "").split("+")[0]
    path = folder / f"mla-{stamp}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(summarise(report), indent=1) + "\n")
    part.replace(path)
    return path


def load(path: Path) -> Report:
    """A report written by `write`. ValueError if it is something else."""
    report = json.loads(path.read_text())
    if not isinstance(report, dict) or report.get("schema") != SCHEMA or report.get("bench") != "mla":
        raise ValueError(f"{path}: not a report of tools.bench.mla with schema {SCHEMA}; make one with --out")
    return report


def table(report: Report) -> str:
    """The report for a terminal: one line a row, times in us (median, and half the spread of the middle half)."""
    names = [x["name"] for x in report["implementations"]]
    head = ["row", *(f"{name} us" for name in names), "TFLOPS", "GB/s", "% roof", "best peer / ours", "limit us", "MHz"]
    lines = [head, *(_cells(row, names) for row in report["rows"])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        f"{line[0]:<{widths[0]}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(line[1:], widths[1:])) for line in lines
    ]
    ceilings, mean = report["ceilings"], summarise(report)["geometric_mean_ratio"]
    text.append(
        f"ceilings: copy {ceilings['copy_gbs']:.0f} GB/s, read {ceilings['read_gbs']:.0f} GB/s, "
        f"bf16 matmul {ceilings['matmul_tflops']:.0f} TFLOPS on {report['machine']['device']}"
    )
    if mean is not None:
        text.append(f"geometric mean of best peer / ours: {mean:.3f} (worst row: {summarise(report)['worst_row']})")
    return "\n".join(text)


def markdown(report: Report) -> str:
    """The report for a README: one line a row, medians in us, and how the project's goals were met."""
    names = [x["name"] for x in report["implementations"]]
    head = ["row", *(f"{name} us" for name in names), "best peer / ours", "limit us", "TFLOPS", "GB/s", "% of roofline"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *(_markdown_cells(row, names) for row in report["rows"])]
    text = [f"| {' | '.join(line)} |" for line in lines]
    machine, ceilings, summary = report["machine"], report["ceilings"], summarise(report)
    date, commit = report["date"][:10], (report["git_commit"] or "unknown")[:12]
    stream, matmul = max(ceilings["copy_gbs"], ceilings["read_gbs"]), ceilings["matmul_tflops"]
    text.append(
        f"\n{machine['device']}, driver {machine['driver']}, torch {machine['torch']}, {date}, commit {commit}"
        f"{' with changes' if report['git_modified'] else ''}: `{report['command']}`. "
        f"Roofline of the same run: {stream:.0f} GB/s, {matmul:.0f} TFLOPS."
    )
    met = [_met(row) for row in report["rows"] if row["limit_us"] is not None]
    if met:
        text.append(f"Limits met: {sum(met)} of {len(met)}.")
    if summary["geometric_mean_ratio"] is not None:
        rows = sum(row["ratio_to_best_peer"] is not None for row in report["rows"])
        text.append(
            f"Geometric mean of best peer / ours over {rows} rows: {summary['geometric_mean_ratio']:.3f}; worst row: "
            f"{summary['worst_row']}."
        )
    return "\n".join(text)


def _met(row: Report) -> bool:
    """Whether we are within the row's limit; not if we failed."""
    return OURS in row["results"] and row["results"][OURS]["median_us"] <= row["limit_us"]


def _markdown_cells(row: Report, names: Sequence[str]) -> list[str]:
    results, own = row["results"], row["results"].get(OURS)
    times = [f"{results[name]['median_us']:.1f}" if name in results else "failed" for name in names]
    ratio = f"{row['ratio_to_best_peer']:.2f}" if row["ratio_to_best_peer"] else "-"
    goal = "-" if row["limit_us"] is None else f"{row['limit_us']:g} {'met' if _met(row) else 'missed'}"
    rates = [f"{own['tflops']:.0f}", f"{own['gbs']:.0f}", f"{own['roofline_percent']:.0f}"] if own else ["-"] * 3
    return [row["name"], *times, ratio, goal, *rates]


def _cells(row: Report, names: Sequence[str]) -> list[str]:
    results = row["results"]
    times = [_time(results[name]) if name in results else "-" for name in names]
    own = results.get(OURS)
    rates = [f"{own['tflops']:.0f}", f"{own['gbs']:.0f}", f"{own['roofline_percent']:.0f}"] if own else ["-"] * 3
    ratio = f"{row['ratio_to_best_peer']:.3f}" if row["ratio_to_best_peer"] else "-"
    limit = "-" if row["limit_us"] is None else f"{row['limit_us']:g}"
    if own and row["limit_us"] is not None and own["median_us"] > row["limit_us"]:
        limit += " missed"
    return [row["name"], *times, *rates, ratio, limit, str(row["sm_clock_mhz"] or "-")]


def _time(result: Report) -> str:
    return f"{result['median_us']:.1f} ±{(result['q3_us'] - result['q1_us']) / 2:.1f}"


def machine_of(device: torch.device) -> Report:
    machine: Report = {"device": platform.processor() or platform.machine(), "sms": None, "driver": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"device": properties.name, "sms": properties.multi_processor_count, "driver": _driver()}
    return machine | {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}


def _driver() -> str | None:
    return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def git(*args: str) -> str | None:
    return _output(["git", "-C", str(ROOT), *args])


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
