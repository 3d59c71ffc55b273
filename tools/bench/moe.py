"""Routing, permutation and FP8 cast of a MoE layer, row by row, against the same in torch: JSON, a table.

DeepSeek-V3: hidden 7168, 256 experts in 8 groups, top-8 of 4 groups. t128, t4096: tokens. permute sorts the pairs and
copies rows, all to 256 experts of one rank. Baselines, in the same run and taking turns: the operation written with
torch ops, eager and under torch.compile.

GB/s and % of the copy bandwidth count each input and output row once: permute reads x and writes a row per choice.
Exit status 1 if a result was wrong or ours failed. A machine without a compiler has no torch.compile column.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from cutehop.ops import moe  # noqa: F401
from cutehop.ref import moe as ref
from cutehop.ref.quant import FP8_GROUP, FP8_MAX, FP8_MIN_AMAX, dequantize_fp8, quantize_fp8
from tools.bench.roofline import Ceilings
from tools.bench.row_bench import RowBench, columns
from tools.bench.timing import interleave, make_lane

HIDDEN, EXPERTS, TOPK, GROUPS, KEPT_GROUPS = 7168, 256, 8, 8, 4
OURS, EAGER, COMPILED = "cutehop", "torch", "torch.compile"
TOLERANCE = 1e-2  # relative Frobenius error of the baselines, which round in other places; ours is bit for bit
Result = tuple[Tensor, ...]


@dataclass(frozen=True)
class Sizes:
    tokens: int
    hidden: int = HIDDEN
    experts: int = EXPERTS


@dataclass(frozen=True)
class Job:
    """One operation on one set of inputs.

    ours, plain: what is timed.  values: of what they return, one float tensor to compare; rows that are undefined are
    left out.  expected: the reference's, on the inputs' device.  bytes: read and written, at least.
    """

    ours: Callable[[], Result]
    plain: Callable[[], Result]
    values: Callable[[Result], Tensor]
    expected: Tensor
    bytes: int


@dataclass(frozen=True)
class Row:
    operation: str
    sizes: Sizes
    goal_us: float | None = None
    goal_factor: float | None = None  # of the time that the bytes take at the read bandwidth

    @property
    def name(self) -> str:
        return f"{self.operation}-t{self.sizes.tokens}"


def _logits(s: Sizes, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(s.tokens, s.experts, generator=generator, device=device)


def _x(rows: int, s: Sizes, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(rows, s.hidden, generator=generator, device=device, dtype=torch.bfloat16)


def _route(s: Sizes, device: torch.device) -> Job:
    logits = _logits(s, device)
    bias = torch.linspace(-0.1, 0.1, s.experts, device=device)

    def plain() -> Result:
        scores = logits.sigmoid()
        choice = scores + bias
        best = choice.view(-1, GROUPS, s.experts // GROUPS).topk(2, sorted=False).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(KEPT_GROUPS, sorted=False).indices, True)
        choice = choice.masked_fill(~kept.repeat_interleave(s.experts // GROUPS, 1), -torch.inf)
        idx = choice.topk(TOPK).indices
        weights = scores.gather(1, idx)
        return idx, weights / (weights.sum(1, keepdim=True) + 1e-20) * 2.5

    args = (logits, bias, TOPK, GROUPS, KEPT_GROUPS, "sigmoid", True, 2.5)
    return Job(
        ours=lambda: torch.ops.cutehop.moe_route(*args),
        plain=plain,
        values=lambda result: torch.zeros_like(logits).scatter(1, *result),
        expected=torch.zeros_like(logits).scatter(1, *ref.route(*args)),
        bytes=logits.nbytes + s.tokens * TOPK * 12,
    )


def _permute(s: Sizes, device: torch.device) -> Job:
    return _permute_rows(_x(s.tokens, s, device), None, s)


def _permute_fp8(s: Sizes, device: torch.device) -> Job:
    return _permute_rows(*quantize_fp8(_x(s.tokens, s, device)), s)


def _permute_rows(x: Tensor, scales: Tensor | None, s: Sizes) -> Job:
    idx, _ = ref.route(_logits(s, x.device), None, TOPK)
    pairs = idx.numel()

    def plain() -> Result:
        flat = idx.flatten()
        order = flat.argsort(stable=True)
        ends = torch.zeros(s.experts, dtype=torch.int64, device=x.device).scatter_add(0, flat, torch.ones_like(flat))
        pair_row = torch.empty_like(order).scatter(0, order, torch.arange(pairs, device=x.device))
        tokens = order // TOPK
        row_scales = x.new_empty(0, dtype=torch.float32) if scales is None else scales[tokens]
        return x.view(torch.uint8)[tokens].view(x.dtype), row_scales, ends.cumsum(0).int(), pair_row.int()

    def values(result: Result) -> Tensor:
        return result[0].float() if scales is None else dequantize_fp8(result[0], result[1])

    moved = s.tokens * (x.shape[1] * x.itemsize + (0 if scales is None else scales.shape[1] * 4))
    return Job(
        ours=lambda: torch.ops.cutehop.moe_permute(x, scales, idx, s.experts, pairs),
        plain=plain,
        values=values,
        expected=values(ref.permute(x, scales, idx, s.experts, pairs)),
        bytes=moved * (1 + TOPK),
    )


def _sorted_rows(s: Sizes, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """y, pair_row and weights of unpermute."""
    idx, weights = ref.route(_logits(s, device), None, TOPK)
    pair_row = ref.permute(_x(s.tokens, Sizes(s.tokens, 8), device), None, idx, s.experts, idx.numel())[3]
    return _x(idx.numel(), s, device), pair_row, weights


def _unpermute(s: Sizes, device: torch.device) -> Job:
    y, pair_row, weights = _sorted_rows(s, device)

    def plain() -> Result:
        rows = y[pair_row.flatten()].view(*pair_row.shape, -1)
        return ((rows.float() * weights[..., None]).sum(1).bfloat16(),)

    return Job(
        ours=lambda: (torch.ops.cutehop.moe_unpermute(y, pair_row, weights),),
        plain=plain,
        values=lambda result: result[0].float(),
        expected=ref.unpermute(y, pair_row, weights).float(),
        bytes=y.nbytes + y.nbytes // TOPK,
    )


def _unpermute_backward(s: Sizes, device: torch.device) -> Job:
    y, pair_row, weights = _sorted_rows(s, device)
    grad = _x(s.tokens, s, device)

    def plain() -> Result:
        flat = pair_row.flatten().long()
        spread = (grad.float()[:, None] * weights[..., None]).bfloat16().flatten(0, 1)
        grad_y = torch.empty_like(y).index_copy(0, flat, spread)
        return grad_y, (y[flat].view(*pair_row.shape, -1).float() * grad.float()[:, None]).sum(-1)

    def values(result: Result) -> Tensor:
        return result[0].float()

    return Job(
        ours=lambda: torch.ops.cutehop.moe_unpermute_backward(grad, y, pair_row, weights),
        plain=plain,
        values=values,
        expected=ref.unpermute_backward(grad, y, pair_row, weights)[0].float(),
        bytes=2 * y.nbytes + grad.nbytes,
    )


def _quantize(s: Sizes, device: torch.device) -> Job:
    x = _x(s.tokens, s, device)

    def plain() -> Result:
        groups = x.float().unflatten(1, (-1, FP8_GROUP))
        amax = groups.abs().amax(-1).clamp_min(FP8_MIN_AMAX)
        return (groups * (FP8_MAX / amax)[..., None]).to(torch.float8_e4m3fn).flatten(1), amax / FP8_MAX

    return Job(
        ours=lambda: torch.ops.cutehop.quantize_fp8(x),
        plain=plain,
        values=lambda result: dequantize_fp8(*result),
        expected=dequantize_fp8(*quantize_fp8(x)),
        bytes=x.nbytes + x.nbytes // 2 + x.numel() // FP8_GROUP * 4,
    )


OPERATIONS: dict[str, Callable[[Sizes, torch.device], Job]] = {
    "route": _route,
    "permute": _permute,
    "permute-fp8": _permute_fp8,
    "unpermute": _unpermute,
    "unpermute-backward": _unpermute_backward,
    "quantize": _quantize,
}
ROWS = (
    Row("route", Sizes(128), goal_us=4),
    Row("route", Sizes(4096), goal_us=12),
    Row("permute", Sizes(128)),
    Row("permute", Sizes(4096), goal_factor=1.25),
    Row("permute-fp8", Sizes(4096), goal_factor=1.25),
    Row("unpermute", Sizes(128)),
    Row("unpermute", Sizes(4096), goal_factor=1.25),
    Row("unpermute-backward", Sizes(4096)),
    Row("quantize", Sizes(128)),
    Row("quantize", Sizes(4096), goal_factor=1.15),
)


def run_row(row: Row, ceilings: Ceilings, device: torch.device, repeats: int) -> dict[str, Any]:
    """Check every implementation, then time them. One that fails or is wrong is left out and named in "failed"."""
    torch._dynamo.reset()
    job = OPERATIONS[row.operation](row.sizes, device)
    lanes, failed = {}, {}
    for name, call in ((OURS, job.ours), (EAGER, job.plain), (COMPILED, torch.compile(job.plain))):
        try:
            lane = make_lane(call, device)
            error = ((job.values(lane.result) - job.expected).norm() / job.expected.norm()).item()
            if not error <= (0 if name == OURS else TOLERANCE):
                raise ValueError(f"wrong result: off by {error:.2e} (relative)")
            lanes[name] = lane
        except Exception as problem:  # torch.compile's errors have no common class
            failed[name] = f"{type(problem).__name__}: {str(problem).strip().splitlines()[0]}"
    samples = interleave(lanes, repeats)
    return record(row, job.bytes, {name: statistics.median(v) for name, v in samples.items()}, failed, ceilings)


def record(
    row: Row, moved: int, medians: dict[str, float], failed: dict[str, str], ceilings: Ceilings
) -> dict[str, Any]:
    """One row of the report; medians in us."""
    ours = medians.get(OURS)
    peers = [us for name, us in medians.items() if name != OURS]
    least = moved / ceilings.stream_gbs / 1e3
    goal = row.goal_us if row.goal_factor is None else row.goal_factor * least
    return {
        "name": row.name,
        "operation": row.operation,
        **asdict(row.sizes),
        "bytes": moved,
        "median_us": medians,
        "failed": failed,
        "gbs": None if ours is None else moved / ours / 1e3,
        "roofline_percent": None if ours is None else least / ours * 100,
        "ratio": min(peers) / ours if peers and ours is not None else None,
        "goal_us": goal,
        "met": None if goal is None else ours is not None and ours <= goal,
    }


def table(report: dict[str, Any]) -> str:
    names = [OURS, EAGER, COMPILED]
    lines = [["row", *(f"{name} us" for name in names), "GB/s", "% of stream", "best peer / ours", "goal us"]]
    for r in report["rows"]:
        times = [f"{r['median_us'][name]:.1f}" if name in r["median_us"] else "-" for name in names]
        numbers = [
            "-" if r[key] is None else form.format(r[key])
            for key, form in (("gbs", "{:.0f}"), ("roofline_percent", "{:.0f}"), ("ratio", "{:.2f}"))
        ]
        goal = "-" if r["goal_us"] is None else f"{r['goal_us']:.1f} {'met' if r['met'] else 'missed'}"
        lines.append([r["name"], *times, *numbers, goal])
    text = columns(lines)
    ceilings = report["ceilings"]
    return "\n".join([*text, f"copy {ceilings['copy_gbs']:.0f} GB/s, read {ceilings['read_gbs']:.0f} GB/s"])


def went_wrong(row: dict[str, Any]) -> bool:
    """Ours failed, or anybody's result was wrong. A baseline that cannot run is no failure."""
    return OURS in row["failed"] or any("wrong" in problem for problem in row["failed"].values())


def main(argv: Sequence[str] | None = None) -> int:
    bench = RowBench("moe", __doc__ or "", "permute.*4096", ROWS, run_row, table, went_wrong)
    return bench.main(argv)


if __name__ == "__main__":
    sys.exit(main())
