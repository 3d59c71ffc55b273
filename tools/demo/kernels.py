"""The decode op at DeepSeek-V3's real head sizes on an H100: correctness, time, share of the machine's roofline.

A few rows with the benchmark's own inputs, checks and clock; `python -m tools.bench.mla` has all rows, and the peers.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from tools.bench.mla import check, reference
from tools.bench.peers import ours
from tools.bench.roofline import Ceilings
from tools.bench.rows import Row, make_inputs
from tools.bench.timing import interleave, make_lane

HEADS = 128
ROWS = (
    Row(1, 1, 4096, HEADS),
    Row(1, 1, 65536, HEADS),
    Row(16, 1, 4096, HEADS),
    Row(64, 1, 4096, HEADS),
    Row(128, 1, 4096, HEADS),
    Row(128, 2, 4096, HEADS, causal=True),
)
REPEATS = 20
HEADER = f"{'b':>4} {'s_q':>4} {'s_k':>6} {'h_q':>4} {'us':>9} {'TFLOPS':>8} {'GB/s':>7} {'% of roofline':>14}   output"


@dataclass(frozen=True)
class Result:
    """us: median time of a call, planner outside as one plan serves all layers. wrong: empty if the output is right."""

    row: Row
    us: float
    roofline_us: float
    wrong: str

    def __str__(self) -> str:
        r = self.row
        return (
            f"{r.b:>4} {r.s_q:>4} {r.s_k:>6} {r.h_q:>4} {self.us:>9.1f} {r.flops / self.us / 1e6:>8.0f} "
            f"{r.bytes / self.us / 1e3:>7.0f} {100 * self.roofline_us / self.us:>14.0f}   {self.wrong or 'ok'}"
        )


def run_rows(rows: Iterable[Row], ceilings: Ceilings, device: torch.device, repeats: int = REPEATS) -> Iterator[Result]:
    """Check the op against the reference and time it, row by row."""
    for row in rows:
        inputs = make_inputs(row, device)
        lane = make_lane(ours().prepare(inputs), device)
        wrong = ""
        try:
            check(lane.result, reference(inputs))
        except ValueError as error:
            wrong = str(error)
        us = statistics.median(interleave({"ours": lane}, repeats)["ours"])
        yield Result(row, us, ceilings.attainable_us(row), wrong)
