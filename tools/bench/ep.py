"""Expert-parallel dispatch and combine: `python -m tools.bench.ep --ranks 8 --one-gpu`. Exit status 1 if a row failed.

Starts the ranks with cutehop.launch; ep_rank.py is what each of them does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from cutehop import launch
from tools.bench import ep_report as reports
from tools.bench.ep_setting import EXPERTS_PER_RANK, Setting
from tools.bench.report import RESULTS


class Options(argparse.Namespace):
    """The command line. experts: None for EXPERTS_PER_RANK on each rank."""

    ranks: int | None
    one_gpu: bool
    tokens: int
    hidden: int
    topk: int
    experts: int | None
    sms: tuple[int, ...]
    repeats: int
    transports: tuple[str, ...]
    rows: str
    out: Path
    source: Path | None
    markdown: bool

    def setting(self, ranks: int, gpus: int) -> Setting:
        """gpus: as a rank sees them."""
        experts = EXPERTS_PER_RANK * ranks if self.experts is None else self.experts
        sms = self.sms if gpus else (0,)  # a CPU has no choice
        return Setting(ranks, gpus, self.tokens, self.hidden, self.topk, experts, sms, self.repeats)


def _transports(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= {"p2p", "nvshmem"}:
        raise ValueError(text)
    return names


def _sms(text: str) -> tuple[int, ...]:
    counts = tuple(int(word) for word in text.split(","))
    if min(counts) < 1:
        raise ValueError(text)
    return counts


def parse(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.ep", description=__doc__.splitlines()[0])
    add, usual = parser.add_argument, Setting(0, 0)
    add("--ranks", type=int, metavar="N", help="how many; default: one per GPU")
    add("--one-gpu", action="store_true", help="all ranks on the first visible GPU, under MPS")
    add("--tokens", type=int, default=usual.tokens, help="of every rank (default %(default)s)")
    add("--hidden", type=int, default=usual.hidden, help="columns, a multiple of 16 (default %(default)s)")
    add("--topk", type=int, default=usual.topk, help="choices per token (default %(default)s)")
    add("--experts", type=int, help=f"of all ranks (default {EXPERTS_PER_RANK} per rank)")
    add("--sms", type=_sms, default=usual.sms, metavar="N,...", help="SMs per rank, in turn (default 16,8,4)")
    add("--repeats", type=int, default=usual.repeats, help="samples of each row (default %(default)s)")
    text = "of low-latency rows, in turn, p2p and nvshmem (default p2p)"
    add("--transports", type=_transports, default=("p2p",), metavar="NAME,...", help=text)
    add("--rows", metavar="REGEX", default="", help="only rows whose name matches, e.g. 'fp8|layout'")
    add("--out", metavar="DIR", type=Path, default=RESULTS, help="where the JSON goes (default %(default)s)")
    add("--markdown", action="store_true", help="print the table as markdown")
    add("--from", metavar="JSON", type=Path, dest="source", help="print this report, measure nothing")
    options = parser.parse_args(argv, namespace=Options())
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1")
    return options


def _measure(options: Options, arguments: Sequence[str]) -> tuple[Path, int]:
    """Run the ranks. The file with their report, if they came to write one, and the exit code."""
    visible = torch.cuda.device_count()
    ranks = options.ranks or visible
    gpus = min(visible, 1 if options.one_gpu else ranks)
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S")
    path = options.out.absolute() / f"ep-{ranks}x-{gpus}gpu-{stamp}.json"
    how = [*(["--ranks", str(ranks)] if ranks else []), *(["--one-gpu"] if options.one_gpu else [])]
    return path, launch.main([*how, "--module", "tools.bench.ep_rank", str(path), *arguments])


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every row was right and timed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)
    path, code = (options.source, 0) if options.source else _measure(options, arguments)
    if not path.exists():
        print("no row was measured", file=sys.stderr)
        return code or 1
    if not options.source:
        print(f"written: {path}", file=sys.stderr, flush=True)
    report = reports.load(path)
    print(reports.markdown(report) if options.markdown else reports.table(report))
    return code or int(any(row["failed"] for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
