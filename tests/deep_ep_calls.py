"""What the ranks of a pool do in tests/dist/test_deep_ep_compat.py: DeepEP V1's own checks against cutehop.ref.ep.

Every rank makes the inputs of all ranks from a seed, so that each can compute what it has to receive. `device` is "cpu"
or "cuda" (the rank's current GPU).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cutehop.compat.deep_ep import Buffer, Config, EventOverlap
from cutehop.ref import ep as ref

FEW_SMS = 8  # of each rank: ranks that share a GPU must all find room on it


@dataclass(frozen=True)
class Problem:
    """tokens: of each rank.  routing: "random" | "holes" (random with -1) | "first rank" | "none" (all -1)."""

    tokens: tuple[int, ...]
    hidden: int = 256
    experts: int = 16
    topk: int = 4
    routing: str = "random"

    @property
    def ranks(self) -> int:
        return len(self.tokens)

    @property
    def worst(self) -> int:
        return self.ranks * max(1, *self.tokens)


@dataclass(frozen=True)
class Inputs:
    """Of all ranks, on the CPU. rows: what is dispatched.  values: what it stands for, bf16."""

    rows: list[ref.Rows]
    values: list[Tensor]
    topk_idx: list[Tensor]
    topk_weights: list[Tensor]


@lru_cache(maxsize=16)
def make(problem: Problem, kind: str = "random") -> Inputs:
    """constant: the rank's number everywhere, as in V1's tests.  fp8, ue8m0: with column-major scales."""
    generator = torch.Generator().manual_seed(problem.experts + sum(problem.tokens))
    values, topk_idx, topk_weights = [], [], []
    for rank, n in enumerate(problem.tokens):
        x = torch.randn(n, problem.hidden, generator=generator)
        values.append((torch.full_like(x, rank) if kind == "constant" else x).bfloat16())
        topk_idx.append(_route(problem, n, generator))
        topk_weights.append(torch.rand(n, problem.topk, generator=generator))
    if kind not in ("fp8", "ue8m0"):
        return Inputs(values, values, topk_idx, topk_weights)
    pairs = [ref.quantize_fp8(x, ue8m0=kind == "ue8m0") for x in values]
    rows = [(q, scales.t().contiguous().t()) for q, scales in pairs]
    return Inputs(rows, [ref.dequantize_fp8(*pair) for pair in pairs], topk_idx, topk_weights)


def _route(problem: Problem, n: int, generator: torch.Generator) -> Tensor:
    experts = problem.experts // problem.ranks if problem.routing == "first rank" else problem.experts
    scores = torch.randn(n, experts, generator=generator).abs() + 1
    chosen = torch.topk(scores, problem.topk, dim=-1, sorted=False).indices
    if problem.routing == "holes":
        chosen[torch.rand(chosen.shape, generator=generator) < 0.3] = -1
    return torch.full_like(chosen, -1) if problem.routing == "none" else chosen


@lru_cache(maxsize=16)
def expected_dispatch(problem: Problem, kind: str, expert_alignment: int) -> list[ref.Received]:
    inputs = make(problem, kind)
    return ref.dispatch(inputs.rows, inputs.topk_idx, inputs.topk_weights, problem.experts, expert_alignment)


def few_sms(device: str) -> None:
    """First statement of what a rank runs: what calls without a Config take."""
    if device == "cuda":
        Buffer.set_num_sms(FEW_SMS)


def on(device: str, value: Any) -> Any:
    """A tensor, or a pair of them, on the rank's device; strides stay."""
    if isinstance(value, tuple):
        return tuple(on(device, part) for part in value)
    return value.to(device)


def same(got: Any, expected: Any) -> None:
    """Equal bit for bit, with dtype and shape."""
    if isinstance(expected, tuple):
        assert isinstance(got, tuple)
        for each, part in zip(got, expected, strict=True):
            same(each, part)
        return
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    raw = torch.uint8 if expected.element_size() == 1 else expected.dtype
    assert torch.equal(got.cpu().view(raw), expected.view(raw))


def head(value: Any, rows: int) -> Any:
    return tuple(part[:rows] for part in value) if isinstance(value, tuple) else value[:rows]


def calc_diff(x: Tensor, y: Tensor) -> float:
    """V1's measure of how much two tensors differ."""
    x, y = x.double() + 1, y.double() + 1
    return 0.0 if x.numel() == 0 else (1 - 2 * (x * y).sum() / (x * x + y * y).sum()).item()


@dataclass(frozen=True)
class Case:
    """How one round trip is made. alignment: V1's expert_alignment."""

    kind: str = "random"
    with_topk: bool = True
    previous: bool = False
    async_finish: bool = False
    allocate: bool = False
    alignment: int = 1
    biases: int = 0
    dispatch_config: Config | None = None
    combine_config: Config | None = None

    def streams(self) -> dict[str, Any]:
        return {
            "previous_event": Buffer.capture() if self.previous else None,
            "async_finish": self.async_finish,
            "allocate_on_comm_stream": self.allocate,
        }

    def wait(self, event: EventOverlap) -> None:
        assert (event.event is not None) == self.async_finish
        with event:
            pass


class Trip:
    """One dispatch, its checks, and later its combine."""

    def __init__(self, buffer: Buffer, rank: int, device: str, problem: Problem, case: Case) -> None:
        self.buffer, self.rank, self.device, self.problem, self.case = buffer, rank, device, problem, case
        inputs = make(problem, case.kind)
        self.x = on(device, inputs.rows[rank])
        self.topk_idx, self.topk_weights = on(device, (inputs.topk_idx[rank], inputs.topk_weights[rank]))
        self.expected = expected_dispatch(problem, case.kind, case.alignment)
        self.routing = self._layout()
        self.recv_x, self.recv_weights, self.handle = self._dispatch()

    def _layout(self) -> dict[str, Tensor]:
        per_rank, per_node, per_expert, in_rank, event = self.buffer.get_dispatch_layout(
            self.topk_idx, self.problem.experts, **self.case.streams()
        )
        self.case.wait(event)
        assert per_node is None
        idx = make(self.problem, self.case.kind).topk_idx[self.rank]
        same((per_rank, per_expert, in_rank), tuple(ref.layout(idx, self.problem.experts, self.problem.ranks)))
        return {
            "num_tokens_per_rank": per_rank,
            "num_tokens_per_rdma_rank": per_node,
            "is_token_in_rank": in_rank,
            "num_tokens_per_expert": per_expert,
        }

    def _call(self, **options: Any) -> tuple:
        out = self.buffer.dispatch(
            self.x,
            config=self.case.dispatch_config,
            expert_alignment=self.case.alignment,
            **options,
            **self.case.streams(),
        )
        self.case.wait(out[-1])
        return out

    def _dispatch(self) -> tuple[Any, Tensor | None, tuple]:
        case, expected = self.case, self.expected[self.rank]
        choices = {"topk_idx": self.topk_idx, "topk_weights": self.topk_weights} if case.with_topk else {}
        recv_x, recv_idx, recv_weights, counts, handle, _ = self._call(**self.routing, **choices)
        same(recv_x, expected.recv_x)
        assert counts == expected.num_recv_tokens_per_expert_list
        self._check_handle(handle)
        if case.kind == "constant":
            ends = [0, *handle[0][:, self.rank].tolist()]
            for source in range(self.problem.ranks):
                assert (recv_x[ends[source] : ends[source + 1]] == source).all()
        if case.with_topk:
            same((recv_idx, recv_weights), (expected.recv_topk_idx, expected.recv_topk_weights))
            self._check_worst(choices)
        else:
            assert recv_idx is recv_weights is None
            again, *nothing, _ = self._call(handle=handle)
            same(again, expected.recv_x)
            assert nothing == [None] * 4
        return recv_x, recv_weights, handle

    def _check_handle(self, handle: tuple) -> None:
        expected, in_rank = self.expected[self.rank].handle, self.routing["is_token_in_rank"].cpu()
        send_row = (in_rank.cumsum(0) - 1).masked_fill(~in_rank, -1).int()
        zero = torch.zeros(self.problem.ranks, 1, dtype=torch.int32)
        sent = in_rank.sum(0, dtype=torch.int32)[:, None]
        same(handle, (expected.rank_prefix_matrix, sent, zero, expected.recv_src_idx, in_rank, send_row))

    def _check_worst(self, choices: dict[str, Tensor]) -> None:
        expected, rows = self.expected[self.rank], self.problem.worst
        recv_x, recv_idx, recv_weights, counts, handle, _ = self._call(**self.routing, **choices, num_worst_tokens=rows)
        m = len(expected.recv_topk_idx)
        assert counts == []
        assert len(recv_idx) == len(recv_weights) == len(handle[3]) == rows
        same(head(recv_x, m), expected.recv_x)
        same((recv_idx[:m], recv_weights[:m]), (expected.recv_topk_idx, expected.recv_topk_weights))
        assert (recv_idx[m:] == -1).all()

    def combine(self) -> None:
        """Unmodified rows come back as the token times the number of ranks that had it; bits as in the reference."""
        case, inputs = self.case, make(self.problem, self.case.kind)
        values = [_values(each.recv_x) for each in self.expected]
        bias = [_ones(x, case.biases) for x in inputs.values]
        handles = [each.handle for each in self.expected]
        weights = [each.recv_topk_weights for each in self.expected] if case.with_topk else None
        expected_x, expected_weights = ref.combine(values, handles, weights, bias)
        mine = bias[self.rank]
        combined_x, combined_weights, event = self.buffer.combine(
            on(self.device, values[self.rank]),
            self.handle,
            topk_weights=self.recv_weights,
            bias=None if mine is None else on(self.device, mine),
            config=case.combine_config,
            **case.streams(),
        )
        case.wait(event)
        same(combined_x, expected_x[self.rank])
        in_rank = self.routing["is_token_in_rank"].cpu()
        mean = (combined_x.cpu().float() - case.biases) / in_rank.sum(1, keepdim=True).clamp(min=1)
        some = in_rank.any(1)
        assert calc_diff(mean[some], inputs.values[self.rank][some]) < (1e-4 if case.biases else 5e-6)
        if expected_weights is None:
            assert combined_weights is None
            return
        same(combined_weights, expected_weights[self.rank])
        own = inputs.topk_weights[self.rank].masked_fill(inputs.topk_idx[self.rank] < 0, 0)
        assert torch.equal(combined_weights.cpu(), own)  # each choice has its weight on one rank, 0 on the others


def _values(rows: ref.Rows) -> Tensor:
    return ref.dequantize_fp8(*rows) if isinstance(rows, tuple) else rows


def _ones(like: Tensor, count: int) -> ref.Bias:
    one = torch.ones_like(like)
    return (None, one, (one, one))[count]


def round_trips(group: Any, rank: int, device: str, problems: list[Problem], cases: list[Case], **options: Any) -> int:
    """Every case of every problem, all on one Buffer; the number of round trips made."""
    few_sms(device)
    buffer = Buffer(group, explicitly_destroy=True, device=device, **options)
    for problem in problems:
        for case in cases:
            Trip(buffer, rank, device, problem, case).combine()
    buffer.destroy()
    return len(problems) * len(cases)


def interleaved(group: Any, rank: int, device: str, problems: list[Problem]) -> None:
    """Two Buffers, several dispatches before the first combine, handles combined in the opposite order."""
    few_sms(device)
    buffers = [Buffer(group, 2**22, explicitly_destroy=True, device=device) for _ in range(2)]
    trips = [
        Trip(buffer, rank, device, problem, Case(kind, with_topk=kind != "fp8", async_finish=True))
        for problem in problems
        for buffer, kind in zip(buffers, ("fp8", "random"))
    ]
    for trip in reversed(trips):
        trip.combine()
    for buffer in buffers:
        buffer.destroy()
