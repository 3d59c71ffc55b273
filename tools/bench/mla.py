"""MLA decode against its peers: `python -m tools.bench.mla --peers DIR`. Exit status 1 if a row was wrong or failed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.bench import report as reports
from tools.bench.peers import Implementation, find_peers, ours
from tools.bench.plot import draw
from tools.bench.roofline import Ceilings, measure_ceilings
from tools.bench.rows import SOFTMAX_SCALE, Inputs, Row, make_inputs, select
from tools.bench.timing import interleave, kernel_times, make_lane, sm_clock_mhz

# Relative Frobenius error: output and probabilities are rounded to bf16, each at most 2^-9 off: 4e-3, times 2.5.
OUT_TOLERANCE = 1e-2
LSE_TOLERANCE = 1e-3  # absolute; the lse of these inputs is 7 to 12 and is computed from fp32 scores


@dataclass(frozen=True)
class Options:
    """How to measure; the report carries these."""

    repeats: int = 30
    kernel_only: bool = False
    l2_flush: bool = False


def check(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """The output's relative Frobenius error. ValueError if out or lse is too far off or not finite."""
    out, lse = (t.float() for t in result)
    want, want_lse = (t.float() for t in expected)
    error = ((out - want).norm() / want.norm()).item()
    lse_error = (lse - want_lse).abs().max().item()
    if not (error <= OUT_TOLERANCE and lse_error <= LSE_TOLERANCE):
        raise ValueError(
            f"wrong result: out is off by {error:.2e} (relative, limit {OUT_TOLERANCE:g}), "
            f"lse by {lse_error:.2e} (absolute, limit {LSE_TOLERANCE:g})"
        )
    return error


def reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The specification, fp32 on the inputs' device."""
    from cutehop.ref.mla import mla_decode

    x = inputs
    return mla_decode(x.q, x.k_cache, x.block_table, x.cache_seqlens, softmax_scale=SOFTMAX_SCALE, causal=x.causal)


def run_row(
    row: Row, implementations: Sequence[Implementation], ceilings: Ceilings, device: torch.device, options: Options
) -> Any:
    """Check every implementation, then time them. One that fails or is wrong is left out and named in "failed"."""
    inputs = make_inputs(row, device)
    expected = reference(inputs)
    calls: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {}
    lanes, errors, failed = {}, {}, {}
    for x in implementations:
        try:
            calls[x.name] = x.prepare(inputs)
            lanes[x.name] = make_lane(calls[x.name], device, l2_flush=options.l2_flush)
            errors[x.name] = check(lanes[x.name].result, expected)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as problem:
            lanes.pop(x.name, None)
            failed[x.name] = f"{type(problem).__name__}: {problem}"
    extra: dict[str, Any] = {"failed": failed}
    if options.kernel_only:
        kernels = {name: kernel_times(calls[name], options.repeats, l2_flush=options.l2_flush) for name in lanes}
        samples = {name: max(times.values(), key=sum) for name, times in kernels.items()}
        extra["kernels_us"] = {name: {k: sum(v) / len(v) for k, v in times.items()} for name, times in kernels.items()}
    else:
        samples = interleave(lanes, options.repeats)
    first = next(iter(lanes.values()), None)
    extra["sm_clock_mhz"] = sm_clock_mhz(lambda: first.run(10)) if first and device.type == "cuda" else None
    return reports.row_record(row, samples, errors, ceilings, extra)


def run(
    rows: Sequence[Row], implementations: Sequence[Implementation], device: torch.device, options: Options, out: Path
) -> Any:
    """The ceilings, then every row. The JSON in `out` is rewritten after each, so an interrupted run keeps its rows."""
    print(f"measuring the ceilings of {device}", file=sys.stderr, flush=True)
    ceilings = measure_ceilings(device)
    report = reports.new_report(implementations, ceilings, device, vars(options).copy())
    for i, row in enumerate(rows):
        print(f"[{i + 1}/{len(rows)}] {row.name}", file=sys.stderr, flush=True)
        record = run_row(row, implementations, ceilings, device, options)
        for name, problem in record["failed"].items():
            print(f"  {name}: {problem}", file=sys.stderr, flush=True)
        report["rows"].append(record)
        path = reports.write(report, out)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"written: {path}", file=sys.stderr, flush=True)
    return report


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.mla", description=__doc__)
    add = parser.add_argument
    add("--rows", metavar="REGEX", default="", help="only rows whose name matches, e.g. 'sk4096' or 'varlen'")
    add("--repeats", type=int, default=Options.repeats, help="samples of each implementation (default %(default)s)")
    add("--peers", metavar="DIR", type=Path, help="folder with flash_mla_peer.py and/or fa3_peer.py")
    add("--out", metavar="DIR", type=Path, default=reports.RESULTS, help="where the JSON goes (default %(default)s)")
    add("--kernel-only", action="store_true", help="time the longest kernel of a call (profiler), not the call")
    add("--l2-flush", action="store_true", help="overwrite L2 before every call")
    add("--plot", metavar="FILE", type=Path, help="draw the roofline (.svg or .png) of this run, or of --from")
    add("--markdown", action="store_true", help="print the table as markdown")
    add("--from", metavar="JSON", type=Path, dest="source", help="plot or print this report, measure nothing")
    options = parser.parse_args(argv)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1")
    if options.source and not (options.plot or options.markdown):
        parser.error("--from needs --plot or --markdown")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.source:
        report = reports.load(args.source)
        if args.plot:
            draw(report, args.plot)
        if args.markdown:
            print(reports.markdown(report))
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.kernel_only and device.type != "cuda":
        raise SystemExit("--kernel-only: needs a GPU; leave it out to time the CPU reference")
    options = Options(args.repeats, args.kernel_only, args.l2_flush)
    report = run(select(args.rows), [ours(), *find_peers(args.peers)], device, options, args.out)
    if args.plot:
        draw(report, args.plot)
    print(reports.markdown(report) if args.markdown else reports.table(report))
    return int(any(row["failed"] for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
