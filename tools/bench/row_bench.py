"""What the one-process benchmarks of single kernels share: the command line, the report file, the table's columns."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from tools.bench.report import RESULTS, git, machine_of
from tools.bench.roofline import Ceilings, measure_ceilings

Report = dict[str, Any]


@dataclass(frozen=True)
class RowBench:
    """A benchmark `python -m tools.bench.<name>`.

    doc: of its module. example: a regular expression for --rows. rows: each with a `name`.
    run_row: (row, ceilings, device, repeats) -> what the report says of it, with `failed`: problem by implementation.
    table: of a report, for a terminal. went_wrong: whether a row of the report makes the exit status 1.
    """

    name: str
    doc: str
    example: str
    rows: Sequence[Any]
    run_row: Callable[[Any, Ceilings, torch.device, int], Report]
    table: Callable[[Report], str]
    went_wrong: Callable[[Report], bool]

    def main(self, argv: Sequence[str] | None = None) -> int:
        parser = argparse.ArgumentParser(
            prog=f"python -m tools.bench.{self.name}", description=self.doc.partition("\n")[0]
        )
        parser.add_argument(
            "--rows", metavar="REGEX", default="", help=f"only rows whose name matches, e.g. {self.example!r}"
        )
        parser.add_argument(
            "--repeats", type=int, default=20, help="samples of each implementation (default %(default)s)"
        )
        parser.add_argument(
            "--out", metavar="DIR", type=Path, default=RESULTS, help="where the JSON goes (default %(default)s)"
        )
        options = parser.parse_args(argv)
        rows = [row for row in self.rows if re.search(options.rows, row.name)]
        if not rows or options.repeats < 1:
            parser.error(
                f"--rows {options.rows!r} matches {len(rows)} rows, --repeats {options.repeats}: at least 1 of each; "
                f"names look like {self.rows[0].name}"
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        report = self.run(rows, device, options.repeats, options.out)
        print(self.table(report))
        return int(any(map(self.went_wrong, report["rows"])))

    def run(self, rows: Sequence[Any], device: torch.device, repeats: int, out: Path) -> Report:
        """These rows; <name>-<date>.json in `out` is rewritten after each."""
        ceilings = measure_ceilings(device)
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        report: Report = {
            "schema": 1,
            "bench": self.name,
            "date": date,
            "git_commit": git("rev-parse", "HEAD"),
            "git_modified": bool(git("status", "--porcelain", "--untracked-files=no")),
            "machine": machine_of(device),
            "settings": {"repeats": repeats},
            "ceilings": asdict(ceilings),
            "rows": [],
        }
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{self.name}-{re.sub('[-:]', '', date).split('+')[0]}.json"
        for i, row in enumerate(rows):
            print(f"[{i + 1}/{len(rows)}] {row.name}", file=sys.stderr, flush=True)
            found = self.run_row(row, ceilings, device, repeats)
            for name, problem in found["failed"].items():
                print(f"  {name}: {problem}", file=sys.stderr, flush=True)
            report["rows"].append(found)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(report, indent=1) + "\n")
            part.replace(path)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        print(f"written: {path}", file=sys.stderr, flush=True)
        return report


def columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells as text: the first column to the left, the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    left, *right = widths
    return ["  ".join([f"{line[0]:<{left}}", *(f"{cell:>{w}}" for cell, w in zip(line[1:], right))]) for line in lines]
