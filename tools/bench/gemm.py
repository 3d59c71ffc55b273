"""Grouped GEMM, row by row, against torch's: JSON, a table.

Two layers of DeepSeek-V3's experts (7168 -> 2 x 2048 and 2048 -> 7168) with 32 local experts. Prefill rows draw the
expert of every row at random, decode rows are what 8 ranks with so many tokens each send to one of them (top-8 of 256).

Baselines, in the same run and taking turns: torch._grouped_mm, torch._scaled_grouped_mm (one scale per row and per
weight row), and a loop of torch.mm that knows the counts on the host. They only store: SwiGLU rows compare with ours.

TFLOPS count the rows that exist. GB/s and % of the read bandwidth count the weights of experts that have rows.
Exit status 1 if a result was wrong or an implementation failed.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cutehop.ops import moe  # noqa: F401
from cutehop.ref.quant import FP8_MAX, dequantize_fp8, quantize_blocks, quantize_fp8
from tools.bench.roofline import Ceilings
from tools.bench.row_bench import RowBench, columns
from tools.bench.timing import interleave, make_lane

EXPERTS, RANKS, ALL_EXPERTS, TOPK = 32, 8, 256, 8
LAYERS = {"up": (7168, 4096), "down": (2048, 7168)}
OURS, GROUPED, SCALED, LOOP = "cutehop", "grouped_mm", "scaled_grouped_mm", "mm loop"
FP8 = torch.float8_e4m3fn
# Relative Frobenius error against the fp32 product of the values before any cast: bf16 rounds the result; e4m3 rounds
# both operands, by 2.6 % each in the mean, and with swiglu_fp8 the result too.
TOLERANCE = {False: 1e-2, True: 8e-2}


@dataclass(frozen=True)
class Row:
    """rows: of all experts together; with tokens > 0 those that this many per rank send here (masked)."""

    layer: str
    fp8: bool
    rows: int = 0
    tokens: int = 0
    epilogue: str = "store"
    goal_tflops: float | None = None
    goal_ratio: float | None = None  # best peer / ours
    goal_read: float | None = None  # part of the read bandwidth
    sizes: tuple[int, int] | None = None  # K, N other than the layer's

    @property
    def name(self) -> str:
        size = f"t{self.tokens}" if self.tokens else f"m{self.rows}"
        return f"{self.layer}-{'fp8' if self.fp8 else 'bf16'}-{size}-{self.epilogue}"

    @property
    def k(self) -> int:
        return (self.sizes or LAYERS[self.layer])[0]

    @property
    def n(self) -> int:
        return (self.sizes or LAYERS[self.layer])[1]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Rows of each local expert."""
        generator = torch.Generator().manual_seed(4 + self.rows + self.tokens)  # one token: 9 rows, 8 are the mean
        if not self.tokens:
            return tuple(
                torch.randint(0, EXPERTS, (self.rows,), generator=generator).bincount(minlength=EXPERTS).tolist()
            )
        scores = torch.rand(self.tokens * RANKS, ALL_EXPERTS, generator=generator)
        chosen = scores.topk(TOPK).indices.flatten()
        return tuple(chosen.bincount(minlength=ALL_EXPERTS)[:EXPERTS].tolist())

    @property
    def flops(self) -> int:
        return 2 * sum(self.counts) * self.k * self.n

    @property
    def weight_bytes(self) -> int:
        """Weights of the experts that have rows."""
        return sum(count > 0 for count in self.counts) * self.k * self.n * (1 if self.fp8 else 2)


def _rows() -> tuple[Row, ...]:
    found = []
    for fp8 in (False, True):
        for layer in LAYERS:
            found.append(Row(layer, fp8, 32768, goal_tflops=1050 if fp8 else 660))
            found.append(Row(layer, fp8, 4096, goal_ratio=1.4))
            found += [Row(layer, fp8, tokens=tokens, goal_read=0.92) for tokens in (1, 8, 32, 64, 128)]
        found += [Row("up", fp8, 32768, epilogue=epilogue) for epilogue in ("swiglu", "swiglu_fp8")]
    return tuple(found)


ROWS = _rows()


@dataclass(frozen=True)
class Inputs:
    """a, b: bf16 values before any cast, rows packed by expert."""

    row: Row
    a: Tensor
    b: Tensor
    ends: Tensor


def make_inputs(row: Row, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(sum(row.counts), row.k, generator=generator, device=device, dtype=torch.bfloat16)
    b = torch.empty(len(row.counts), row.n, row.k, device=device, dtype=torch.bfloat16)
    for weights in b:  # not all at once: fp32 of all experts would need gigabytes more
        weights.copy_(torch.randn(row.n, row.k, generator=generator, device=device) / row.k**0.5)
    ends = torch.tensor(row.counts, device=device).cumsum(0).int()
    return Inputs(row, a, b, ends)


def expected(x: Inputs) -> Tensor:
    """float32, rows packed by expert."""
    pieces = [a.float() @ b.float().t() for a, b in zip(x.a.split(x.row.counts), x.b)]
    product = torch.cat(pieces)
    if x.row.epilogue == "store":
        return product
    gate, up = product.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


@dataclass(frozen=True)
class Call:
    """run: what is timed. packed: of what it returned, the rows packed by expert in float32."""

    run: Callable[[], Any]
    packed: Callable[[Any], Tensor]


def _ours(x: Inputs) -> Call:
    ops, row = torch.ops.cutehop, x.row
    block = max(128, *row.counts)
    a, rows, op, mean = x.a, x.ends, ops.grouped_gemm, 0
    if row.tokens:
        op, mean = ops.masked_grouped_gemm, max(1, row.tokens * TOPK * RANKS // ALL_EXPERTS)
        a = x.a.new_full((len(row.counts), block, row.k), torch.nan)
        for e, piece in enumerate(x.a.split(row.counts)):
            a[e, : len(piece)] = piece
        rows = torch.tensor(row.counts, dtype=torch.int32, device=a.device)
    b = x.b
    scales: tuple[Tensor | None, Tensor | None] = (None, None)
    if row.fp8:
        a, a_scales = quantize_fp8(a)
        b, b_scales = _quantize_weights(x.b)
        scales = (a_scales, b_scales)

    def packed(result: tuple[Tensor, Tensor]) -> Tensor:
        out, out_scales = result
        values = dequantize_fp8(out, out_scales) if row.epilogue == "swiglu_fp8" else out.float()
        return torch.cat([v[:count] for v, count in zip(values, row.counts)]) if row.tokens else values

    return Call(lambda: op(a, b, rows, *scales, row.epilogue, mean), packed)


def _quantize_weights(b: Tensor) -> tuple[Tensor, Tensor]:
    pieces = [quantize_blocks(weights) for weights in b]
    return torch.stack([q for q, _ in pieces]), torch.stack([s for _, s in pieces])


def _grouped(x: Inputs) -> Call:
    b = x.b.transpose(1, 2)
    return Call(lambda: torch._grouped_mm(x.a, b, offs=x.ends), Tensor.float)


def _scaled(x: Inputs) -> Call:
    a, a_scales = _by_row(x.a)
    pieces = [_by_row(weights) for weights in x.b]
    b = torch.stack([q for q, _ in pieces]).transpose(1, 2)
    b_scales = torch.stack([s for _, s in pieces])

    def run() -> Tensor:
        return torch._scaled_grouped_mm(
            a, b, a_scales, b_scales, offs=x.ends, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return Call(run, Tensor.float)


def _by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-4) / FP8_MAX
    return (x.float() / scales).to(FP8), scales.squeeze(-1)


def _loop(x: Inputs) -> Call:
    out = x.a.new_empty(len(x.a), x.row.n)
    pieces = [(a, b.t(), o) for a, b, o in zip(x.a.split(x.row.counts), x.b, out.split(x.row.counts)) if len(a)]

    def run() -> Tensor:
        for a, b, o in pieces:
            torch.mm(a, b, out=o)
        return out

    return Call(run, Tensor.float)


def implementations(row: Row) -> Mapping[str, Callable[[Inputs], Call]]:
    """Ours, and where the row only stores, torch's."""
    found = {OURS: _ours}
    if row.epilogue == "store":
        found |= {SCALED: _scaled} if row.fp8 else {GROUPED: _grouped, LOOP: _loop}
    return found


def run_row(row: Row, ceilings: Ceilings, device: torch.device, repeats: int) -> dict[str, Any]:
    """Check every implementation, then time them. One that fails or is wrong is left out and named in "failed"."""
    x = make_inputs(row, device)
    want = expected(x)
    lanes, errors, failed = {}, {}, {}
    for name, prepare in implementations(row).items():
        try:
            call = prepare(x)
            lane = make_lane(call.run, device)
            error = ((call.packed(lane.result) - want).norm() / want.norm()).item()
            if not error <= TOLERANCE[row.fp8 or row.epilogue == "swiglu_fp8"]:
                raise ValueError(f"wrong result: off by {error:.2e} (relative)")
            lanes[name], errors[name] = lane, error
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as problem:
            failed[name] = f"{type(problem).__name__}: {problem}"
    del want
    samples = interleave(lanes, repeats)
    return record(row, {name: statistics.median(values) for name, values in samples.items()}, errors, failed, ceilings)


def record(
    row: Row, medians: dict[str, float], errors: dict[str, float], failed: dict[str, str], ceilings: Ceilings
) -> dict[str, Any]:
    """One row of the report; medians in us."""
    ours = medians.get(OURS)
    peers = [us for name, us in medians.items() if name != OURS]
    found: dict[str, Any] = {"name": row.name, **asdict(row), "counts": row.counts, "median_us": medians}
    found |= {"error": errors, "failed": failed, "tflops": None, "read_percent": None, "ratio": None, "met": None}
    if ours is None:
        return found
    found["tflops"] = row.flops / ours / 1e6
    found["read_percent"] = row.weight_bytes / ours / 1e3 / ceilings.read_gbs * 100
    found["ratio"] = min(peers) / ours if peers else None
    goals = (
        (row.goal_tflops, found["tflops"]),
        (row.goal_ratio, found["ratio"]),
        (row.goal_read, found["read_percent"] / 100),
    )
    kept = [value is not None and value >= goal for goal, value in goals if goal is not None]
    found["met"] = all(kept) if kept else None
    return found


def epilogue_costs(records: Sequence[dict[str, Any]]) -> list[str]:
    """What each fused epilogue costs over storing, in words."""
    times = {r["name"]: r["median_us"].get(OURS) for r in records}
    lines = []
    for name, us in times.items():
        stem, _, epilogue = name.rpartition("-")
        store = times.get(f"{stem}-store")
        if epilogue != "store" and us and store:
            lines.append(f"{stem}: {epilogue} costs {100 * (us / store - 1):+.1f} % over store (goal: at most +3 %)")
    return lines


def table(report: dict[str, Any]) -> str:
    names = [OURS, GROUPED, SCALED, LOOP]
    lines = [["row", *(f"{name} us" for name in names), "TFLOPS", "% of read", "best peer / ours", "goal met"]]
    for r in report["rows"]:
        times = [f"{r['median_us'][name]:.1f}" if name in r["median_us"] else "-" for name in names]
        numbers = [
            "-" if r[key] is None else form.format(r[key])
            for key, form in (("tflops", "{:.0f}"), ("read_percent", "{:.1f}"), ("ratio", "{:.2f}"))
        ]
        met = "" if r["met"] is None else ("yes" if r["met"] else "missed")
        lines.append([r["name"], *times, *numbers, "FAILED" if r["failed"] else met])
    text = columns(lines)
    ceilings = report["ceilings"]
    text.append(f"read {ceilings['read_gbs']:.0f} GB/s, bf16 matmul {ceilings['matmul_tflops']:.0f} TFLOPS")
    return "\n".join([*text, *epilogue_costs(report["rows"])])


def went_wrong(row: dict[str, Any]) -> bool:
    return bool(row["failed"])


def main(argv: Sequence[str] | None = None) -> int:
    bench = RowBench("gemm", __doc__ or "", "m32768.*store", ROWS, run_row, table, went_wrong)
    return bench.main(argv)


if __name__ == "__main__":
    sys.exit(main())
