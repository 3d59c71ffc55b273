"""Rows of the low-latency mode: dispatch (fp8) and combine (bf16) of a few tokens per rank, each in one launch.

A row's name ends with the transport unless it is p2p.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cutehop.comm.ll_base import LowLatencyBuffer
from cutehop.comm.ll_config import LlConfig
from cutehop.ref.ep_ll import weighted_sum
from tools.bench.ep_jobs import Job, Tensors
from tools.bench.ep_setting import Inputs, Moved, Setting, make_inputs

TOKENS = (1, 8, 32, 128)  # of every rank
HEAD_BYTES = 16  # of a record, as DeepEP counts it
GRAPH_CALLS = 20


def config(setting: Setting) -> LlConfig:
    return LlConfig(setting.ranks, setting.hidden, max(TOKENS), setting.experts, setting.topk)


def row_name(what: str, tokens: int, transport: str) -> str:
    return f"ll-{what}-t{tokens}{'' if transport == 'p2p' else f'-{transport}'}"


class LlWork:
    """One rank's buffer, and for each number of tokens the inputs and what must come of them."""

    def __init__(self, setting: Setting, buffer: LowLatencyBuffer, transport: str = "p2p") -> None:
        self.setting, self.buffer, self.transport = setting, buffer, transport
        self.local = setting.experts // setting.ranks
        self.out = buffer.empty_outputs()
        # The row of an expert holds one value, so that a token's sum is known from its choices alone.
        y = torch.empty((self.local, buffer.config.rows, setting.hidden), dtype=torch.bfloat16, device=buffer.device)
        first = buffer.rank * self.local
        self.y = y.copy_(self._value(torch.arange(first, first + self.local, device=buffer.device))[:, None, None])

    def _value(self, experts: Tensor) -> Tensor:
        return (experts % 7 + 1).float()

    def jobs(self) -> list[Job]:
        return [job for tokens in TOKENS for job in self._of(tokens)]

    def _of(self, tokens: int) -> list[Job]:
        setting, buffer = replace(self.setting, tokens=tokens), self.buffer
        given = [make_inputs(setting, rank, buffer.device) for rank in range(setting.ranks)]
        i = given[buffer.rank]
        combined = torch.empty((tokens, setting.hidden), dtype=torch.bfloat16, device=buffer.device)

        def dispatch() -> Tensors:
            got = buffer.dispatch(i.x, i.topk_idx, out=self.out)
            return got.recv_count, got.recv_x[0]

        def pair() -> Tensors:
            got = buffer.dispatch(i.x, i.topk_idx, out=self.out)
            return (buffer.combine(self.y, got.handle, i.topk_idx, i.topk_weights, out=combined),)

        def name(what: str) -> str:
            return row_name(what, tokens, self.transport)

        sms, moved = buffer.num_sms, self._moved(i)
        return [
            Job(name("dispatch"), sms, "graph", dispatch, self._arrives(given), calls=GRAPH_CALLS),
            Job(name("pair"), sms, "graph", pair, {"tokens": self._sums(i)}, calls=GRAPH_CALLS, moved=moved),
        ]

    def _arrives(self, given: list[Inputs]) -> dict[str, Tensor]:
        """How many rows each of my experts has, and the first one's rows."""
        first = self.buffer.rank * self.local
        counts = torch.stack([each.per_expert for each in given]).sum(0)[first : first + self.local]
        tokens = [(each.topk_idx == first).any(1).nonzero()[:, 0] for each in given]
        rows = torch.cat([each.q.view(torch.uint8)[of] for each, of in zip(given, tokens)])
        return {"counts": counts.int(), "rows": rows.view(torch.float8_e4m3fn)}

    def _sums(self, i: Inputs) -> Tensor:
        sums = weighted_sum(self._value(i.topk_idx)[..., None], i.topk_weights, i.topk_idx // self.local)
        return sums.expand(-1, self.setting.hidden).contiguous()

    def _moved(self, i: Inputs) -> Moved:
        """A record is written and read once per rank that a token goes to, a row once per choice on each side."""
        hidden = self.setting.hidden
        record, row = HEAD_BYTES + hidden + hidden // 32, 2 * hidden
        choices = i.topk_idx.numel()
        records, home = int(i.in_rank.sum()), i.topk_idx // self.local == self.buffer.rank
        elsewhere = records - int(i.in_rank[:, self.buffer.rank].sum())
        dispatch = len(i.x) * row + 2 * records * record + choices * record
        combine = 3 * choices * row + len(i.x) * row
        written = records * record + choices * record + choices * row + len(i.x) * row
        remote = elsewhere * record + (choices - int(home.sum())) * row
        moved = dispatch + combine
        return Moved(choices * (record + row), moved, written, moved - written, remote)
