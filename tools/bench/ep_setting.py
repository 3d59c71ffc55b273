"""The setting of an expert-parallel run: sizes, inputs of every rank, what a rank must receive, bytes of a call."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from cutehop.comm.config import EpConfig
from cutehop.ref import ep as ref

EXPERTS_PER_RANK = 32  # of DeepEP V1's benchmark: 256 on 8 ranks


@dataclass(frozen=True)
class Setting:
    """gpus: 0 on a CPU, 1 if all ranks share it, else one per rank. tokens: of every rank. sms: per rank, in turn."""

    ranks: int
    gpus: int
    tokens: int = 4096
    hidden: int = 7168
    topk: int = 8
    experts: int = 256
    sms: tuple[int, ...] = (16, 8, 4)
    repeats: int = 20

    @property
    def shared(self) -> bool:
        """All ranks read and write one memory."""
        return self.gpus < max(self.ranks, 2)

    @property
    def usual(self) -> bool:
        """The sizes for which published figures and the project's limits exist."""
        sizes = (self.tokens, self.hidden, self.topk, self.experts)
        return sizes == (4096, 7168, 8, EXPERTS_PER_RANK * self.ranks)

    @property
    def config(self) -> EpConfig:
        """A buffer for bf16 rows and for fp8 rows with a scale per 128 columns."""
        return EpConfig(self.ranks, self.hidden, self.tokens, self.experts, self.topk, scales="f32")

    def check_sms(self, available: int) -> None:
        """ValueError if the CTAs of all ranks do not fit the GPU side by side: ranks that wait would block others."""
        needed = max(self.sms) * (self.ranks if self.shared else 1)
        if needed > available:
            raise ValueError(
                f"--sms {max(self.sms)}: {needed} CTAs that wait for each other on a GPU of {available} SMs; "
                f"take at most {available // (needed // max(self.sms))}"
            )

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Inputs:
    """Of one rank: x (n, H) bf16, q (n, H) e4m3 with scales (n, H / 128), topk_idx int64 (n, k), weights (n, k), and
    where they go: in_rank bool (n, R), per_expert int32 (E,), by the reference."""

    x: Tensor
    q: Tensor
    scales: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    in_rank: Tensor
    per_expert: Tensor


def make_inputs(setting: Setting, rank: int, device: torch.device) -> Inputs:
    """Standard normal rows, every token to `topk` different experts drawn uniformly. Any rank can make any rank's."""
    generator = torch.Generator(device).manual_seed(rank)
    n, k = setting.tokens, setting.topk
    x = torch.randn((n, setting.hidden), generator=generator, device=device, dtype=torch.bfloat16)
    draw = torch.rand((n, setting.experts), generator=generator, device=device)
    topk_idx = draw.argsort(dim=1, stable=True)[:, :k].contiguous()
    topk_weights = torch.rand((n, k), generator=generator, device=device)
    layout = ref.layout(topk_idx, setting.experts, setting.ranks)
    return Inputs(
        x, *ref.quantize_fp8(x), topk_idx, topk_weights, layout.is_token_in_rank, layout.num_tokens_per_expert
    )


@dataclass(frozen=True)
class Expected:
    """What a rank receives, in row order. remote: rows from other ranks."""

    x: Tensor
    q: Tensor
    scales: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    src_idx: Tensor
    remote: int


def expect(setting: Setting, rank: int, device: torch.device) -> Expected:
    """From the inputs of all ranks, made here one after the other."""
    parts: list[tuple[Tensor, ...]] = []
    local = setting.experts // setting.ranks
    remote = 0
    for source in range(setting.ranks):
        given = make_inputs(setting, source, device)
        tokens = given.in_rank[:, rank].nonzero()[:, 0]
        remote += len(tokens) if source != rank else 0
        idx = given.topk_idx[tokens] - rank * local
        elsewhere = (idx < 0) | (idx >= local)
        weights = given.topk_weights[tokens].masked_fill(elsewhere, 0)
        q = given.q.view(torch.uint8)[tokens].view(given.q.dtype)  # not every torch indexes e4m3
        idx = idx.masked_fill(elsewhere, -1)
        parts.append((given.x[tokens], q, given.scales[tokens], idx, weights, tokens.int()))
    x, q, scales, topk_idx, topk_weights, src_idx = map(_concatenate, zip(*parts))
    return Expected(x, q, scales, topk_idx, topk_weights, src_idx, remote)


def _concatenate(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)


@dataclass(frozen=True)
class Moved:
    """Bytes that one rank moves in one call.

    logical: rows received times the bytes of a row, which DeepEP's GB/s are about.
    memory: read and written at least, in the memory of whichever GPU.
    written, read: of those, what the call's SMs write and read. A copy of a foreign input is not in them, for which a
        call takes more.
    remote: what comes from other ranks.
    Flags, counts and lists are in none of them.
    """

    logical: int
    memory: int
    written: int
    read: int
    remote: int

    @property
    def sent(self) -> float:
        """Bytes that the call's SMs send: what they write, and 32 to ask for each 128 that they read."""
        return self.written + self.read / 4


def dispatch_moves(setting: Setting, received: int, remote: int, row: int, foreign: bool = False) -> Moved:
    """Every received row is read at its source and written once; a foreign input is copied before."""
    copied = setting.tokens * row if foreign else 0
    moved = received * row
    return Moved(moved, 2 * (moved + copied), moved, moved, remote * row)


def combine_moves(setting: Setting, received: int, pulled: int, remote: int, row: int, foreign: bool = False) -> Moved:
    """Every row is read by its home rank, every token written once; foreign expert outputs are copied before.

    received: rows at this rank.  pulled, remote: rows of this rank's tokens on any, on other ranks.
    """
    out, read, copied = setting.tokens * row, pulled * row, received * row if foreign else 0
    return Moved(received * row, read + out + 2 * copied, out, read, remote * row)
