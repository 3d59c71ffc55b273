"""Ways to cut an MLA decode call into pieces, each timed: does the planner choose the fastest?

python -m tools.bench.plans                        387 shapes, two to three minutes on an H100; one with --repeats 6
python -m tools.bench.plans --rows 'b8-.*hq128'

Every plan of `cutehop.ref.mla_plan.candidates` is run by the kernels on a batch of equal sequences, the plans taking
turns. Where two ways give one plan it is timed once. The table shows rows where the chosen way is slower than another
by more than 2 %, with what the planner reckoned, in the time that a partition computes on a block.
Exit status 1 if a plan failed or its result was wrong.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import cutehop  # noqa: F401
from cutehop.ref import mla_plan as planner
from tools.bench.mla import check, reference
from tools.bench.roofline import Ceilings
from tools.bench.row_bench import RowBench, columns
from tools.bench.rows import PAGE, SOFTMAX_SCALE, Row, make_inputs
from tools.bench.timing import interleave, make_lane

NUM_SMS = 132
WAYS = ("many", "fewer", "two", "whole")
SHOWN = 1.02  # chosen / best, from which on the table has the row


@dataclass(frozen=True)
class Shape:
    """A batch of equal sequences, one query token each."""

    b: int
    blocks: int  # of 64 tokens
    h_q: int

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def row(self) -> Row:
        return Row(self.b, 1, self.blocks * PAGE, self.h_q)


SHAPES = tuple(
    Shape(b, blocks, h_q)
    for h_q in (16, 64, 128)
    for blocks in (2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
    for b in (1, 2, 4, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96)
    if b * blocks <= 4096
)


def run_row(shape: Shape, ceilings: Ceilings, device: torch.device, repeats: int) -> dict[str, Any]:
    x, row = make_inputs(shape.row, device), shape.row
    partitions = planner.num_partitions(row.s_q, row.h_q, 1, NUM_SMS)
    found = planner.candidates(list(row.lengths), partitions, row.h_q)
    expected = reference(x)
    lanes, timed_as, failed = {}, {}, {}
    plans: dict[tuple[int, ...], str] = {}
    for way, (_, plan) in found.items():
        tensors = planner.as_tensors(plan, list(row.lengths), partitions)
        timed_as[way] = plans.setdefault(tuple(torch.cat([t.flatten() for t in tensors]).tolist()), way)
        if timed_as[way] != way:
            continue
        args = (x.q, x.k_cache, x.block_table, x.cache_seqlens, *(t.to(device) for t in tensors))
        try:
            lane = make_lane(partial(torch.ops.cutehop.mla_decode, *args, SOFTMAX_SCALE), device)
            check(lane.result, expected)
            lanes[way] = lane
        except (RuntimeError, ValueError) as problem:
            failed[way] = f"{type(problem).__name__}: {problem}"
    medians = {way: statistics.median(samples) for way, samples in interleave(lanes, repeats).items()}
    times = {way: medians[lane] for way, lane in timed_as.items() if lane in medians}
    chosen = min(found, key=lambda way: found[way][0])
    return {
        "name": shape.name,
        "median_us": times,
        "reckoned": {way: cost / planner.COST_UNIT for way, (cost, _) in found.items()},
        "pieces": {way: max(plan[2]) for way, (_, plan) in found.items()},
        "chosen": chosen,
        "chosen_over_best": times[chosen] / min(times.values()) if chosen in times else None,
        "failed": failed,
    }


def table(report: dict[str, Any]) -> str:
    lines = [["row", "chosen", "chosen / best", *(f"{way} us (reckoned, pieces)" for way in WAYS)]]
    ratios = [r["chosen_over_best"] for r in report["rows"] if r["chosen_over_best"]]
    for r in report["rows"]:
        if r["failed"] or r["chosen_over_best"] > SHOWN:
            cells = [
                f"{r['median_us'][way]:.1f} ({r['reckoned'][way]:.1f}, {r['pieces'][way]})"
                if way in r["median_us"]
                else "-"
                for way in WAYS
            ]
            ratio = f"{r['chosen_over_best']:.3f}" if r["chosen_over_best"] else "FAILED"
            lines.append([r["name"], r["chosen"], ratio, *cells])
    text = columns(lines)
    if ratios:
        mean = statistics.geometric_mean(ratios)
        text.append(f"{len(ratios)} shapes: chosen / best {mean:.4f} in the geometric mean, {max(ratios):.3f} at worst")
    return "\n".join(text)


def went_wrong(row: dict[str, Any]) -> bool:
    return bool(row["failed"])


def main(argv: Sequence[str] | None = None) -> int:
    return RowBench("plans", __doc__ or "", "b8-.*hq128", SHAPES, run_row, table, went_wrong).main(argv)


if __name__ == "__main__":
    sys.exit(main())
