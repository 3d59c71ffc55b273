"""Random low-latency traffic of all ranks and what must come of it, on the device of the rank that asks.

As tests/ep_traffic.py, quick enough to compare every call of a long run. Values are e4m3 numbers times a power of two
for each 128 columns, the largest of them 448, so that quantising them is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from cutehop.comm.ll_base import LlDispatched, LowLatencyBuffer
from cutehop.comm.ll_config import GROUP, LlConfig
from cutehop.ref.ep_ll import logfmt_decode, logfmt_encode
from tests.ep_ll_cases import FORMATS

LARGEST, NAN = 0x7E, 0x7F  # of e4m3


@dataclass(frozen=True)
class LlSizes:
    """tokens: of every rank. rows: a key of FORMATS. routing: "random" | "one_rank" | "none" | "some" (ids that are no
    expert among them)."""

    tokens: tuple[int, ...]
    k: int
    rows: str
    routing: str = "random"
    idx_dtype: torch.dtype = torch.int64


class Wanted(NamedTuple):
    """Of one rank's experts, (L, all tokens) in the order of the rows, and how many are real."""

    token: Tensor
    choice: Tensor
    count: Tensor


def power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent.int() + 127) << 23).view(torch.float32)


class LlTraffic:
    """Tensors of all ranks, (ranks, tokens of the busiest rank, ...)."""

    def __init__(self, config: LlConfig, sizes: LlSizes, seed: int, device: torch.device | str) -> None:
        self.config, self.sizes, self.ranks = config, sizes, config.ranks
        self.rng = torch.Generator(device).manual_seed(seed)
        self.device = self.rng.device
        self.shape = (self.ranks, max(1, *sizes.tokens))
        real = torch.arange(self.shape[1], device=device) < torch.tensor(sizes.tokens, device=device)[:, None]
        codes = self._integers(0, 256, (*self.shape, config.hidden), torch.uint8)
        codes = torch.where((codes & NAN) == NAN, codes - 1, codes)
        codes[..., ::GROUP] = LARGEST
        self.codes = codes
        self.exponent = self._integers(-6, 7, (*self.shape, config.hidden // GROUP))
        scale = power_of_two(self.exponent).repeat_interleave(GROUP, 2)
        self.x = (codes.view(torch.float8_e4m3fn).float() * scale).bfloat16()
        self.topk_idx = self._choices(sizes.k)
        valid = (self.topk_idx >= 0) & (self.topk_idx < config.num_experts) & real[..., None]
        self.expert = torch.where(valid, self.topk_idx.long(), -1)
        self.weights = torch.randn(self.topk_idx.shape, generator=self.rng, device=device)
        self.factor = (1.5 * 2.0 ** self._integers(-6, 3, (self.ranks,))).bfloat16()

    def _integers(self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, dtype=dtype, generator=self.rng, device=self.device)

    def _uniform(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=self.rng, device=self.device)

    def _choices(self, k: int) -> Tensor:
        """Different experts for a token; what is no expert may come twice."""
        experts, routing = self.config.num_experts, self.sizes.routing
        ids = self._uniform((*self.shape, experts)).argsort(2)[..., :k]
        if routing == "none":
            ids.fill_(-1)
        if routing == "one_rank":
            ids = torch.where(ids < experts - self.config.experts_per_rank, -1, ids)
        if routing == "some":
            odd = torch.tensor([-1, -(2**31), experts, 2**31 - 1], device=self.device)
            ids = torch.where(self._uniform(ids.shape) < 0.4, odd[ids % 4], ids)
        return ids.to(self.sizes.idx_dtype).contiguous()

    def arguments(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, topk_idx, topk_weights."""
        own = slice(0, self.sizes.tokens[rank])
        return self.x[rank, own], self.topk_idx[rank, own], self.weights[rank, own]

    def wanted(self, rank: int) -> Wanted:
        local = self.config.experts_per_rank
        mine = torch.arange(local, device=self.device)[:, None, None] + rank * local
        hits = self.expert.flatten(0, 1) == mine  # (L, all tokens, k)
        hit = hits.any(2)
        token = (~hit).int().argsort(dim=1, stable=True)
        return Wanted(token, hits.int().argmax(2).gather(1, token), hit.sum(1, dtype=torch.int32))

    @cached_property
    def scales(self) -> Tensor:
        """(all tokens, S)."""
        exponent = self.exponent.flatten(0, 1)
        if self.sizes.rows != "ue8m0":
            return power_of_two(exponent)
        padded = torch.nn.functional.pad(exponent + 127, (0, -exponent.shape[1] % 4)).to(torch.uint8)
        return padded.view(torch.int32)

    def wrong_rows(self, rank: int, got: LlDispatched) -> Tensor:
        """bool (): something that a dispatch returned is not as it has to be."""
        c, want = self.config, self.wanted(rank)
        most = want.token.shape[1]
        real = torch.arange(most, device=self.device) < want.count[:, None]
        source, token = want.token // self.shape[1], want.token % self.shape[1]
        of_source = (real[..., None] & (source[..., None] == torch.arange(self.ranks, device=self.device))).sum(1)
        first = of_source.cumsum(1) - of_source
        rows = self.x if self.sizes.rows == "bf16" else self.codes
        got_x = got.recv_x.view(torch.int16 if self.sizes.rows == "bf16" else torch.uint8)
        pairs = [
            (got_x, rows.view(got_x.dtype).flatten(0, 1)[want.token]),
            (got.handle.src_info[..., None], token[..., None]),
            (got.handle.send_slot[..., None], ((source * c.max_tokens + token) * c.max_topk + want.choice)[..., None]),
        ]
        assert (got.recv_scales is None) == (self.sizes.rows == "bf16")
        if got.recv_scales is not None:
            pairs.append((got.recv_scales, self.scales[want.token]))
        differences = [((mine[:, :most] != theirs) & real[..., None]).any() for mine, theirs in pairs]
        differences.append((got.recv_count != want.count).any())
        differences.append((got.handle.layout_range != (first << 32 | of_source)).any())
        origin = torch.where(real, source * c.max_tokens + token, c.rows)  # what is not real goes to one more row
        choice_rows = torch.full((c.rows + 1, c.max_topk), -1, device=self.device)
        row = torch.arange(c.experts_per_rank * c.rows, device=self.device).view(-1, c.rows)
        choice_rows[origin, want.choice] = row[:, :most]
        choice_rows = choice_rows[: c.rows]
        differences.append(((got.handle.choice_rows != choice_rows) & (choice_rows >= 0).any(1, keepdim=True)).any())
        return torch.stack(differences).any()

    def outputs(self, rank: int, got: LlDispatched) -> Tensor:
        """y of what the rank received; NaN past it."""
        x, scales = got.recv_x, got.recv_scales
        if scales is not None:
            if scales.dtype == torch.int32:
                octets = (scales[..., None] >> torch.arange(0, 32, 8, device=self.device)) & 255
                scales = (octets.flatten(2)[..., : x.shape[2] // GROUP].int() << 23).view(torch.float32)
            x = (x.float() * scales.repeat_interleave(GROUP, 2)).bfloat16()
        past = torch.arange(x.shape[1], device=self.device) >= got.recv_count[:, None]
        return (x * self.factor[rank]).masked_fill(past[..., None], torch.nan)

    def combined(self, rank: int, use_logfmt: bool = False) -> Tensor:
        own = slice(0, self.sizes.tokens[rank])
        x, expert, weights = self.x[rank, own], self.expert[rank, own], self.weights[rank, own]
        home = expert // self.config.experts_per_rank  # of none -1
        total = torch.zeros(x.shape, device=self.device)
        for peer in range(self.ranks):
            row = x * self.factor[peer]
            values = row.float()
            if use_logfmt:  # on the CPU, where the reference's results do not depend on a GPU
                host = row.cpu()
                values = logfmt_decode(*logfmt_encode(host), host).to(self.device)
            part = torch.zeros_like(total)
            for j in range(expert.shape[1]):
                part = torch.where(home[:, j, None] == peer, part + weights[:, j, None] * values, part)
            total = total + part
        return total.bfloat16()


def send(buffer: LowLatencyBuffer, traffic: LlTraffic) -> Tensor:
    x, topk_idx, _ = traffic.arguments(buffer.rank)
    return buffer.dispatch_send(x, topk_idx, **FORMATS[traffic.sizes.rows])


def receive(buffer: LowLatencyBuffer, traffic: LlTraffic, epoch: Tensor) -> tuple[LlDispatched, Tensor]:
    """What came, and whether it is wrong."""
    options = FORMATS[traffic.sizes.rows]
    chosen = {name: options[name] for name in ("use_fp8", "use_ue8m0") if name in options}
    got = buffer.dispatch_receive(epoch, num_topk=traffic.sizes.k, **chosen)
    return got, traffic.wrong_rows(buffer.rank, got)


def differ(got: Tensor, want: Tensor) -> Tensor:
    """bool (): any bit differs."""
    return (got.view(torch.int16) != want.view(torch.int16)).any()
