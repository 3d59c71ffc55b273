"""What is timed: every row's call, what must come out of it and the bytes that it moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cutehop.comm.base import Buffer, Dispatched, EpHandle
from tools.bench.ep_known import COPY
from tools.bench.ep_setting import Expected, Inputs, Moved, Setting, combine_moves, dispatch_moves

Tensors = tuple[Tensor | None, ...]
ID_BYTES, WEIGHT_BYTES = 8, 4  # of one choice
TOLERANCE = 2**-6  # relative: four times what one rounding to bf16 may do, as eight ranks' partial sums are all rounded


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Job:
    """One row.

    sms: CTAs of the call, None if that is not ours to choose.
    how: "graph" | "eager" | "host" (time of the host alone).
    call: the call, collective; returns new tensors.
    want: their right first rows, by name, in the order of what call returns.
    calls: in one batch.
    moved: of this rank, None for a row that is not about bytes.
    prepare: writes the inputs that the call does not write itself.
    exact: to the bit; else within TOLERANCE.
    """

    name: str
    sms: int | None
    how: str
    call: Callable[[], Tensors]
    want: Mapping[str, Tensor]
    calls: int = 5
    moved: Moved | None = None
    prepare: Callable[[], None] = field(default=_nothing)
    exact: bool = True

    def problem(self, got: Tensors) -> str | None:
        """What is wrong with the result, or None."""
        for (name, want), given in zip(self.want.items(), (each for each in got if each is not None), strict=True):
            if len(given) < len(want):
                return f"{name}: {len(given)} rows, must be {len(want)}"
            head = given[: len(want)]
            if self.exact:
                wrong = (_bytes(head) != _bytes(want)).any(1)
            else:
                near = (head.float() - want.float()).abs() <= TOLERANCE * want.float().abs()
                wrong = ~near.flatten(1).all(1)
            if bool(wrong.any()):
                return f"{name}: {int(wrong.sum())} of {len(want)} rows are wrong"
        return None


def _bytes(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8).view(len(tensor), tensor.stride(0) * tensor.itemsize)


class Work:
    """One rank's buffer, inputs and expectations, and the handle of a dispatch."""

    def __init__(self, setting: Setting, buffer: Buffer, inputs: Inputs, expected: Expected, handle: EpHandle) -> None:
        self.setting, self.buffer, self.inputs, self.expected, self.handle = setting, buffer, inputs, expected, handle
        self.received = len(expected.src_idx)
        self.pulled = int(inputs.in_rank.sum())
        self.pulled_remote = self.pulled - int(inputs.in_rank[:, buffer.rank].sum())

    def jobs(self) -> list[Job]:
        """All rows of the buffer, in the order of the table."""
        rows = [self._layout(), *self._copies()]
        for sms in self.setting.sms:
            rows += [*self._cached(sms), *self._full(sms), *self._combine(sms)]
        combine = next(job for job in rows if job.name == "combine-foreign")
        host_combine = replace(combine, name="host-combine", how="host", calls=20, moved=None)
        return [*rows, self._host(self.setting.sms[0]), host_combine]

    def full(self, x: Tensor, scales: Tensor | None, worst: int, sms: int | None = None) -> Dispatched:
        """A dispatch of x with this rank's choices."""
        i = self.inputs
        topk = (i.topk_idx, i.topk_weights)
        return self.buffer.dispatch(
            x, scales, *topk, i.in_rank, i.per_expert, num_worst_tokens=worst, num_sms=sms or None
        )

    def _layout(self) -> Job:
        i, setting = self.inputs, self.setting
        tokens_per_rank = i.in_rank.sum(0, dtype=torch.int32)
        want = {"tokens per rank": tokens_per_rank, "tokens per expert": i.per_expert, "token in rank": i.in_rank}

        def call() -> Tensors:
            return torch.ops.cutehop.ep_layout(i.topk_idx, setting.experts, setting.ranks)

        return Job("layout", None, "graph", call, want, calls=20)

    def _copies(self) -> list[Job]:
        """One local copy, on all ranks at once, of what a call with rows from elsewhere copies."""
        i, e = self.inputs, self.expected
        return [_copy(name, rows) for name, rows in (("dispatch-bf16", i.x), ("dispatch-fp8", i.q), ("combine", e.x))]

    def _fill_input(self, rows: Tensor) -> Callable[[], None]:
        def fill() -> None:
            self.buffer.dispatch_input(len(rows), dtype=rows.dtype).copy_(rows)

        return fill

    def _cached(self, sms: int) -> list[Job]:
        """Dispatch with a handle: bf16 and fp8, each with rows that lie in symmetric memory or elsewhere."""
        i, e, buffer = self.inputs, self.expected, self.buffer
        jobs = []
        for kind, rows, scales, want in (
            ("bf16", i.x, None, {"rows": e.x}),
            ("fp8", i.q, i.scales, {"rows": e.q, "scales": e.scales}),
        ):

            def in_place(rows: Tensor = rows, scales: Tensor | None = scales) -> Tensors:
                view = buffer.dispatch_input(len(rows), dtype=rows.dtype)
                return buffer.dispatch_cached(view, scales, self.handle, num_sms=sms or None)

            def foreign(rows: Tensor = rows, scales: Tensor | None = scales) -> Tensors:
                return buffer.dispatch_cached(rows, scales, self.handle, num_sms=sms or None)

            bytes_of_row = _row_bytes(rows, scales)
            moves = [
                dispatch_moves(self.setting, self.received, e.remote, bytes_of_row, elsewhere)
                for elsewhere in (False, True)
            ]
            name, fill = f"dispatch-{kind}", self._fill_input(rows)
            jobs.append(Job(name, sms, "graph", in_place, want, moved=moves[0], prepare=fill))
            jobs.append(Job(f"{name}-foreign", sms, "graph", foreign, want, moved=moves[1]))
        return jobs

    def _full_call(self, worst: int, sms: int | None) -> Callable[[], Tensors]:
        i = self.inputs

        def call() -> Tensors:
            view = self.buffer.dispatch_input(len(i.q), dtype=i.q.dtype)
            got = self.full(view, i.scales, worst, sms)
            return (*got[:4], got.handle.recv_src_idx)

        return call

    def _full(self, sms: int) -> list[Job]:
        """fp8 with choices and counts: the CPU waits for the number of rows, or takes as many as there may be."""
        i, e, setting = self.inputs, self.expected, self.setting
        want = {
            "rows": e.q,
            "scales": e.scales,
            "choices": e.topk_idx,
            "weights": e.topk_weights,
            "source index": e.src_idx,
        }
        row = _row_bytes(i.q, i.scales) + setting.topk * (ID_BYTES + WEIGHT_BYTES)
        moved = dispatch_moves(setting, self.received, e.remote, row)
        fill, worst = self._fill_input(i.q), setting.ranks * setting.tokens
        return [
            Job("dispatch-fp8-full", sms, "eager", self._full_call(0, sms), want, moved=moved, prepare=fill),
            Job("dispatch-fp8-static", sms, "graph", self._full_call(worst, sms), want, moved=moved, prepare=fill),
        ]

    def _host(self, sms: int) -> Job:
        """A static dispatch once more, but the time that Python takes for it."""
        i, worst = self.inputs, self.setting.ranks * self.setting.tokens
        want = {"rows": self.expected.q, "scales": self.expected.scales}
        return Job(
            "host-dispatch-static", sms, "host", lambda: self.full(i.q, i.scales, worst, sms)[:2], want, calls=20
        )

    def _combine(self, sms: int) -> list[Job]:
        """Rows as they were received, so that a token comes back multiplied by the number of ranks it was on."""
        i, e, buffer, num_sms = self.inputs, self.expected, self.buffer, sms or None
        total = i.x.float() * i.in_rank.sum(1, keepdim=True) + 0.0  # sums begin at +0, so none of them is -0
        want = {"tokens": total.bfloat16()}
        with_weights = want | {"weights": i.topk_weights}

        def fill() -> None:
            buffer.combine_input(self.handle).copy_(e.x)

        def in_place() -> Tensors:
            return buffer.combine(buffer.combine_input(self.handle), self.handle, num_sms=num_sms)[:1]

        def foreign() -> Tensors:
            return buffer.combine(e.x, self.handle, num_sms=num_sms)[:1]

        def weighted() -> Tensors:
            view = buffer.combine_input(self.handle)
            return buffer.combine(view, self.handle, e.topk_weights, num_sms=num_sms)

        def moves(weights: int = 0, foreign: bool = False) -> Moved:
            row = _row_bytes(e.x, None) + weights * WEIGHT_BYTES
            return combine_moves(self.setting, self.received, self.pulled, self.pulled_remote, row, foreign)

        return [
            Job("combine", sms, "graph", in_place, want, moved=moves(), prepare=fill),
            Job("combine-foreign", sms, "graph", foreign, want, moved=moves(foreign=True)),
            Job(
                "combine-weights", sms, "graph", weighted, with_weights, moved=moves(i.topk_idx.shape[1]), prepare=fill
            ),
        ]


def _copy(name: str, rows: Tensor) -> Job:
    moved = Moved(rows.nbytes, 2 * rows.nbytes, rows.nbytes, rows.nbytes, 0)
    return Job(f"{COPY}{name}", None, "graph", lambda: (rows.clone(),), {"rows": rows}, moved=moved)


def _row_bytes(rows: Tensor, scales: Tensor | None) -> int:
    return rows.shape[1] * rows.itemsize + (0 if scales is None else scales.shape[1] * scales.itemsize)
