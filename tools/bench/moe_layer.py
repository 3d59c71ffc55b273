"""The MoE layer, DeepSeek-V3's with 64 experts, for 128 and 4096 tokens: JSON, a table.

python -m tools.bench.moe_layer                        one rank, against the same layer in torch ops, eager and compiled
python -m tools.bench.moe_layer --ranks 8 --one-gpu    eight ranks, where the time goes

On one rank the implementations take turns, replayed from CUDA graphs; then every stage of ours is timed by itself.
Exit status 1 if a result was wrong or an implementation failed.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutehop import launch
from cutehop.layers import ExpertParallelMoE
from tools.bench.moe_layer_setting import TOLERANCE, Setting, TorchMoE, expected
from tools.bench.report import RESULTS, git, machine_of
from tools.bench.timing import interleave, make_lane

OURS, EAGER, COMPILED = "cutehop", "torch", "torch.compile"
GOAL = 2.0  # torch.compile / ours
SETTINGS = tuple(Setting(tokens, fp8) for fp8 in (False, True) for tokens in (128, 4096))
Report = dict[str, Any]
_ops = torch.ops.cutehop


def stages(layer: ExpertParallelMoE, x: Tensor) -> dict[str, Callable[[], Any]]:
    """The calls that a layer on one rank consists of, each on what the one before it returned."""
    experts, (idx, weights) = layer.experts, layer.gate(x)
    fp8, pairs, mean = experts.is_fp8, idx.numel(), layer._expected_rows(idx)
    rows, scales = layer._as_rows(x)
    local = (rows, scales, idx, experts.num_local, pairs)
    sorted_rows, sorted_scales, ends, pair_row = _ops.moe_permute(*local)
    up = (sorted_rows, experts.gate_up_proj, ends, sorted_scales if fp8 else None, experts.gate_up_proj_scale_inv)
    inner, inner_scales = _ops.grouped_gemm(*up, "swiglu_fp8" if fp8 else "swiglu", mean)
    down = (inner, experts.down_proj, ends, inner_scales if fp8 else None, experts.down_proj_scale_inv)
    y, _ = _ops.grouped_gemm(*down, "store", mean)
    found: dict[str, Callable[[], Any]] = {"route": lambda: layer.gate(x)}
    if fp8:
        found["cast"] = lambda: _ops.quantize_fp8(x)
    found |= {
        "permute": lambda: _ops.moe_permute(*local),
        "GEMM up": lambda: _ops.grouped_gemm(*up, "swiglu_fp8" if fp8 else "swiglu", mean),
        "GEMM down": lambda: _ops.grouped_gemm(*down, "store", mean),
        "unpermute": lambda: _ops.moe_unpermute(y, pair_row, weights),
    }
    if layer.shared_experts is not None:
        found["shared"] = lambda: layer._shared(x, rows, scales)
    return found


@torch.inference_mode()
def run_row(setting: Setting, device: torch.device, repeats: int) -> Report:
    """Check every implementation, then time them. One that fails or is wrong is left out and named in "failed"."""
    layer, x = setting.make_layer(device), setting.make_tokens(0, device)
    want = expected(setting, layer, x)
    plain = TorchMoE(layer, setting.fp8)
    if setting.fp8:
        layer.quantize_weights()
    calls: dict[str, Callable[[Tensor], Tensor]] = {OURS: layer, EAGER: plain}
    calls[COMPILED] = torch.compile(plain, fullgraph=True)
    lanes, errors, failed = {}, {}, {}
    for name, call in calls.items():
        try:
            lane = make_lane(lambda call=call: call(x), device)  # type: ignore[misc]
            error = ((lane.result.float() - want).norm() / want.norm()).item()
            if not error <= TOLERANCE[setting.fp8]:
                raise ValueError(f"wrong result: off by {error:.2e} (relative)")
            lanes[name], errors[name] = lane, error
        except Exception as problem:  # of any compiler too
            failed[name] = f"{type(problem).__name__}: {str(problem).splitlines()[0]}"
    del want
    times = {name: statistics.median(us) for name, us in interleave(lanes, repeats).items()}
    parts: dict[str, float] = {}
    if OURS in times:
        lanes = {name: make_lane(call, device) for name, call in stages(layer, x).items()}
        parts = {name: statistics.median(us) for name, us in interleave(lanes, repeats).items()}
    return record(setting, times, parts, errors, failed)


def record(
    setting: Setting,
    times: dict[str, float],
    parts: dict[str, float],
    errors: dict[str, float],
    failed: dict[str, str],
) -> Report:
    """One row of the report; times in us."""
    ours, peer = times.get(OURS), times.get(COMPILED)
    ratio = peer / ours if ours and peer else None
    return {
        "name": setting.name, **asdict(setting), "median_us": times, "stages_us": parts, "error": errors,
        "failed": failed, "tflops": setting.flops / ours / 1e6 if ours else None, "ratio": ratio,
        "met": None if ratio is None else ratio >= GOAL,
    }  # fmt: skip


def new_report(device: torch.device, repeats: int, ranks: int) -> Report:
    """Everything but the rows."""
    return {
        "schema": 1, "bench": "moe_layer", "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_commit": git("rev-parse", "HEAD"),
        "git_modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        "machine": machine_of(device), "settings": {"repeats": repeats, "ranks": ranks}, "rows": [],
    }  # fmt: skip


def write(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)


def table(report: Report) -> str:
    """Whole calls, then the stages of ours."""
    ranks, rows = report["settings"]["ranks"], report["rows"]
    names = [OURS] if ranks > 1 else [OURS, EAGER, COMPILED]
    lines = [["row", *(f"{name} us" for name in names), "TFLOPS", "compiled / ours", "goal met"]]
    for r in rows:
        times = [f"{r['median_us'][name]:.1f}" if name in r["median_us"] else "-" for name in names]
        tflops, ratio = ("-" if r[key] is None else f"{r[key]:.{d}f}" for key, d in (("tflops", 0), ("ratio", 2)))
        met = "" if r["met"] is None else ("yes" if r["met"] else "missed")
        lines.append([r["name"], *times, tflops, ratio, "FAILED" if r["failed"] else met])
    text = _aligned(lines)
    stage_names = list(dict.fromkeys(name for r in rows for name in r["stages_us"]))
    lines = [["stage, us", *stage_names, "sum"]]
    for r in rows:
        found = r["stages_us"]
        cells = [f"{found[name]:.1f}" if name in found else "-" for name in stage_names]
        lines.append([r["name"], *cells, f"{sum(found.values()):.1f}"])
    return "\n".join([*text, "", *_aligned(lines)])


def _aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join([f"{line[0]:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(line[1:], widths[1:]))])
        for line in lines
    ]


def run(settings: Sequence[Setting], device: torch.device, repeats: int, path: Path) -> Report:
    """All rows on one rank; `path` is rewritten after each."""
    report = new_report(device, repeats, 1)
    for setting in settings:
        print(setting.name, file=sys.stderr, flush=True)
        row = run_row(setting, device, repeats)
        for name, problem in row["failed"].items():
            print(f"  {name}: {problem}", file=sys.stderr, flush=True)
        report["rows"].append(row)
        write(report, path)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return report


def chosen(pattern: str) -> list[Setting]:
    return [setting for setting in SETTINGS if re.search(pattern, setting.name)]


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every row was right and timed."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.moe_layer", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--ranks", type=int, default=1, metavar="N", help="above 1: where the time goes on several ranks")
    add("--one-gpu", action="store_true", help="all ranks on the first visible GPU, under MPS")
    add("--rows", metavar="REGEX", default="", help="only rows whose name matches, e.g. 'fp8|t128'")
    add("--repeats", type=int, default=20, help="samples of each row (default %(default)s)")
    add("--out", metavar="DIR", type=Path, default=RESULTS, help="where the JSON goes (default %(default)s)")
    options = parser.parse_args(argv)
    if not chosen(options.rows) or options.repeats < 1 or options.ranks < 1:
        parser.error(
            f"--rows {options.rows!r} matches {len(chosen(options.rows))} rows, --repeats {options.repeats}, --ranks "
            f"{options.ranks}: at least 1 of each"
        )
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S")
    path = options.out.absolute() / f"moe-layer-{options.ranks}x-{stamp}.json"
    code = 0
    if options.ranks == 1:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        run(chosen(options.rows), device, options.repeats, path)
    else:
        how = ["--ranks", str(options.ranks), *(["--one-gpu"] if options.one_gpu else [])]
        arguments = [str(path), str(options.repeats), options.rows]
        code = launch.main([*how, "--module", "tools.bench.moe_layer_rank", *arguments])
    if not path.exists():
        print("no row was measured", file=sys.stderr)
        return code or 1
    print(f"written: {path}", file=sys.stderr, flush=True)
    report = json.loads(path.read_text())
    print(table(report))
    return code or int(any(row["failed"] for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
