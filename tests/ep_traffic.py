"""Random expert-parallel traffic of all ranks and what must come of it, both on the device of the rank that asks.

Quick enough to compare every call of a long run, without a copy to the CPU: every rank draws the same numbers, and sums
and orders follow cutehop.ref.ep (tests/dist/test_ep_soak.py compares the two). What a call must not read is NaN: the
row behind a rank's tokens, rows past the received ones, weights of choices that are none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cutehop.comm.base import Buffer, Dispatched

NAN_BYTE = 0xFF  # bytes of 0xFF are NaN in bf16, e4m3 and f32, and -1 as an integer


@dataclass(frozen=True)
class Sizes:
    """tokens: of every rank. rows: "bf16" | "f32" | "int32", the last two being bytes with such scales. dtype: that
    those bytes go by. routing: "random" | "one_rank" | "none" | "hostile" (ids out of any range, NaN weights)."""

    tokens: tuple[int, ...]
    hidden: int = 256
    local_experts: int = 4
    k: int = 4
    rows: str = "bf16"
    dtype: torch.dtype = torch.float8_e4m3fn
    idx_dtype: torch.dtype = torch.int64
    column_major: bool = False
    routing: str = "random"

    @property
    def experts(self) -> int:
        return len(self.tokens) * self.local_experts

    @property
    def scale_columns(self) -> int:
        return -(-self.hidden // (128 if self.rows == "f32" else 512))


class Rows(NamedTuple):
    """What a rank must receive, in the order of its rows. x: bf16 or bytes."""

    x: Tensor
    scales: Tensor | None
    topk_idx: Tensor
    topk_weights: Tensor
    src_idx: Tensor


class Traffic:
    """Tensors of all ranks, (ranks, tokens of the busiest rank + 1, ...)."""

    def __init__(self, sizes: Sizes, seed: int, device: torch.device | str) -> None:
        self.sizes, self.ranks = sizes, len(sizes.tokens)
        self.rng = torch.Generator(device).manual_seed(seed)
        self.device = self.rng.device
        shape = (self.ranks, max(sizes.tokens) + 1)
        self.token = torch.arange(shape[1], dtype=torch.int32, device=device).expand(shape)
        self.real = self.token < torch.tensor(sizes.tokens, device=device)[:, None]
        self.x = self._rows(shape)
        self.scales = self._scales(shape)
        self.topk_idx = self._choices((*shape, sizes.k))
        valid = (self.topk_idx >= 0) & (self.topk_idx < sizes.experts) & self.real[..., None]
        self.home = torch.where(valid, self.topk_idx // sizes.local_experts, -1)  # rank of each choice
        self.in_rank = (self.home[..., None] == torch.arange(self.ranks, device=device)).any(2)
        self.topk_weights = torch.where(valid, self._uniform((*shape, sizes.k)) + 0.5, torch.nan)
        self.bias = self._normal((2, *shape, sizes.hidden)).bfloat16()
        # Far apart, so that another order of the additions gives other bits.
        self.factor = (self._normal((self.ranks,)) * 2.0 ** self._integers(-6, 7, (self.ranks,))).bfloat16()

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.rng, device=self.device)

    def _uniform(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=self.rng, device=self.device)

    def _integers(self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, dtype=dtype, generator=self.rng, device=self.device)

    def _rows(self, shape: tuple[int, int]) -> Tensor:
        nobodys = ~self.real[..., None]
        if self.sizes.rows != "bf16":
            return self._integers(0, 256, (*shape, self.sizes.hidden), torch.uint8).masked_fill_(nobodys, NAN_BYTE)
        x = self._normal((*shape, self.sizes.hidden)).bfloat16()
        x[..., :4] = torch.tensor([-0.0, 1e-40, -3e-39, 0.0])  # a sum of -0 is +0, and what is subnormal stays
        return x.masked_fill_(nobodys, torch.nan)

    def _scales(self, shape: tuple[int, int]) -> Tensor | None:
        columns = self.sizes.scale_columns
        if self.sizes.rows == "bf16":
            return None
        if self.sizes.rows == "f32":
            return self._normal((*shape, columns))
        return self._integers(-(2**31), 2**31, (*shape, columns), torch.int32)

    def _choices(self, shape: tuple[int, int, int]) -> Tensor:
        """Expert ids; a token may name an expert twice."""
        sizes, experts = self.sizes, self.sizes.experts
        low = experts - sizes.local_experts if sizes.routing == "one_rank" else 0
        ids = self._integers(low, experts, shape)
        if sizes.routing == "none":
            ids.fill_(-1)
        if sizes.routing == "hostile":
            bad = [-1, -2, -experts, experts, experts + 1, 2**31 - 1, -(2**31)]
            if sizes.idx_dtype == torch.int64:  # their lower words look like experts
                bad += [2**32, 2**32 + experts - 1, 2**40 + 1, -(2**32), -(2**63), 2**63 - 1]
            odd = torch.tensor(bad, device=self.device)[self._integers(0, len(bad), shape)]
            ids = torch.where(self._uniform(shape) < 0.4, odd, ids)
        return ids.to(sizes.idx_dtype)

    def arguments(self, rank: int) -> tuple[Tensor | None, ...]:
        """The tensors of Buffer.dispatch, in their order; layout by the op."""
        own = slice(0, self.sizes.tokens[rank])
        x, idx = self.x[rank, own], self.topk_idx[rank, own]
        scales = None if self.scales is None else self.scales[rank, own]
        if scales is not None and self.sizes.column_major:
            scales = scales.t().contiguous().t()
        _, per_expert, in_rank = torch.ops.cutehop.ep_layout(idx, self.sizes.experts, self.ranks)
        x = x if x.dtype == torch.bfloat16 else x.view(self.sizes.dtype)
        return x, scales, idx, self.topk_weights[rank, own], in_rank, per_expert

    def rows_of(self, rank: int) -> int:
        """How many rows a rank receives; waits for the device."""
        return int(self.in_rank[..., rank].sum())

    def received(self, rank: int) -> Rows:
        mask, local = self.in_rank[..., rank], self.sizes.local_experts
        here = self.home == rank
        return Rows(
            self.x[mask],
            None if self.scales is None else self.scales[mask],
            torch.where(here, self.topk_idx - rank * local, -1)[mask],
            torch.where(here, self.topk_weights, 0)[mask],
            self.token[mask],
        )

    def expert(self, x: Tensor, rank: int) -> Tensor:
        """y of rows that the rank received, bf16: each a multiple of its row's values or bytes."""
        return (x if x.dtype == torch.bfloat16 else x.view(torch.uint8).bfloat16()) * self.factor[rank]

    def outgoing_weights(self, weights: Tensor, rank: int) -> Tensor:
        """What goes home beside y, from the weights of the received rows."""
        return (weights + 1) * self.factor[rank].float()

    def combined(self, rank: int, biases: int) -> tuple[Tensor, Tensor]:
        """combined_x and combined_topk_weights of `expert` and `outgoing_weights`."""
        own = slice(0, self.sizes.tokens[rank])
        x, home, weights = self.x[rank, own], self.home[rank, own], self.topk_weights[rank, own]
        total_x = torch.zeros(x.shape, device=self.device)
        for bias in self.bias[:biases, rank, own]:
            total_x = total_x + bias.float()
        total_weights = torch.zeros(weights.shape, device=self.device)
        for r in range(self.ranks):
            there = self.in_rank[rank, own, r, None]
            total_x = torch.where(there, total_x + self.expert(x, r).float(), total_x)
            returned = self.outgoing_weights(torch.where(home == r, weights, 0), r)
            total_weights = torch.where(there, total_weights + returned, total_weights)
        return total_x.bfloat16(), total_weights


def differ(got: Tensor, want: Tensor) -> Tensor:
    """bool (): any bit differs. AssertionError for another shape or dtype. Does not wait for the device."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    return (got.contiguous().view(torch.uint8) != want.contiguous().view(torch.uint8)).any()


def wrong_rows(traffic: Traffic, rank: int, got: Dispatched, worst: int = 0) -> Tensor:
    """bool (): something that a dispatch returned is not as it has to be."""
    sizes, want = traffic.sizes, traffic.received(rank)
    m, own = len(want.x), slice(0, sizes.tokens[rank])
    assert len(got.recv_x) == len(got.handle.recv_src_idx) == (worst or m)
    assert got.recv_topk_idx is not None
    assert got.recv_topk_weights is not None
    assert got.recv_x.dtype == (torch.bfloat16 if sizes.rows == "bf16" else sizes.dtype)
    local = torch.arange(sizes.local_experts, device=traffic.device)
    per_expert = (want.topk_idx.flatten()[:, None] == local).sum(0, dtype=torch.int32)
    assert got.num_recv_tokens_per_expert_list == ([] if worst else per_expert.tolist())
    in_rank = traffic.in_rank[rank, own]
    send_row = (in_rank.cumsum(0, dtype=torch.int32) - 1).masked_fill(~in_rank, -1)
    handle = got.handle
    differences = [
        differ(got.recv_x[:m].view(want.x.dtype), want.x),
        differ(got.recv_topk_idx[:m], want.topk_idx),
        (got.recv_topk_idx[m:] != -1).any(),
        differ(got.recv_topk_weights[:m], want.topk_weights),
        differ(got.num_recv_tokens_per_expert, per_expert),
        differ(handle.rank_prefix_matrix, traffic.in_rank.sum(1).cumsum(0, dtype=torch.int32)),
        differ(handle.recv_src_idx[:m], want.src_idx),
        differ(handle.is_token_in_rank, in_rank),
        differ(handle.send_row, send_row),
    ]
    assert (got.recv_scales is None) == (want.scales is None)
    if got.recv_scales is not None and want.scales is not None:
        differences.append(differ(got.recv_scales[:m], want.scales))
    return torch.stack(differences).any()


def go_home(buffer: Buffer, traffic: Traffic, got: Dispatched, biases: int = 0, weights: bool = True) -> Tensor:
    """Combine what a dispatch brought; bool (): the result is wrong. Rows past the received ones are NaN."""
    rank, own = buffer.rank, slice(0, traffic.sizes.tokens[buffer.rank])
    assert got.recv_topk_weights is not None
    y = traffic.expert(got.recv_x, rank)
    outgoing = traffic.outgoing_weights(got.recv_topk_weights, rank)
    past = (torch.arange(len(y), device=traffic.device) >= got.handle.rank_prefix_matrix[-1, rank])[:, None]
    y.masked_fill_(past, torch.nan)
    outgoing.masked_fill_(past, torch.nan)
    given = traffic.bias[:biases, rank, own]
    combined_x, combined_weights = buffer.combine(y, got.handle, outgoing if weights else None, *given)
    want_x, want_weights = traffic.combined(rank, biases)
    wrong = differ(combined_x, want_x)
    assert (combined_weights is not None) == weights
    return wrong if combined_weights is None else wrong | differ(combined_weights, want_weights)


def round_trip(
    buffer: Buffer, traffic: Traffic, worst: int = 0, biases: int = 0, weights: bool = True, cached: bool = False
) -> Tensor:
    """Dispatch, cached dispatch if asked for, combine; bool (): something is wrong."""
    arguments = traffic.arguments(buffer.rank)
    got = buffer.dispatch(*arguments, num_worst_tokens=worst)  # type: ignore[arg-type]
    wrong = wrong_rows(traffic, buffer.rank, got, worst)
    if cached:
        x, scales, *_ = arguments
        recv_x, recv_scales = buffer.dispatch_cached(x, scales, got.handle)  # type: ignore[arg-type]
        again = got._replace(recv_x=recv_x, recv_scales=recv_scales)
        wrong = wrong | wrong_rows(traffic, buffer.rank, again, worst)
    return wrong | go_home(buffer, traffic, got, biases, weights)
