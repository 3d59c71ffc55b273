"""Expert-parallel inputs of all ranks and what must come out, from cutehop.ref.ep; checks of one rank against it.

Every rank's process builds the inputs of all ranks from the case's seed, on the CPU, and takes its own part.
`check_case` works for any Buffer on any device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cutehop.comm.base import Buffer, Dispatched
from cutehop.comm.config import EpConfig
from cutehop.comm.gloo import GlooBuffer
from cutehop.ref import ep as ref

MAX_TOKENS = 48


@dataclass(frozen=True)
class EpCase:
    """tokens: per rank, repeated for more ranks. routing: see `_choices`. rows: "bf16" | "f32" | "ue8m0", the last two
    being fp8 rows with such scales. column_major: strides of the scales. topk: whether ids and weights travel."""

    ranks: int = 2
    tokens: tuple[int, ...] = (16, 24, 9, 48)
    hidden: int = 256
    local_experts: int = 4
    k: int = 4
    routing: str = "random"
    rows: str = "bf16"
    column_major: bool = False
    idx_dtype: torch.dtype = torch.int64
    topk: bool = True
    seed: int = 0

    def __str__(self) -> str:
        default = EpCase()
        changed = [f"{n}={v}" for n, v in vars(self).items() if v != getattr(default, n)]
        return ",".join(changed).replace("torch.", "").replace(" ", "") or "default"

    def count(self, rank: int) -> int:
        return self.tokens[rank % len(self.tokens)]

    @property
    def experts(self) -> int:
        return self.ranks * self.local_experts

    def config(self, **changes: object) -> EpConfig:
        """A buffer that takes this case, and bf16 rows too."""
        scales = None if self.rows == "bf16" else self.rows
        config = EpConfig(self.ranks, self.hidden, MAX_TOKENS, self.experts, max_topk=8, scales=scales)
        return replace(config, **changes)


CASES = [
    EpCase(),
    EpCase(seed=1, idx_dtype=torch.int32, topk=False),
    EpCase(routing="skewed"),
    EpCase(tokens=(0, 30, 17, 1)),
    EpCase(tokens=(0,)),
    EpCase(tokens=(48, 1, 0, 5), k=8, routing="one_rank"),
    EpCase(routing="none"),
    EpCase(k=1, local_experts=1),
    EpCase(hidden=200, k=3, routing="some"),  # 400 bytes: a multiple of 16, of no power of two above
    EpCase(hidden=8, k=5, routing="repeated", idx_dtype=torch.int32),
    EpCase(rows="f32", hidden=512),
    EpCase(rows="f32", hidden=208, column_major=True, routing="some"),
    EpCase(rows="ue8m0", hidden=640, column_major=True),
    EpCase(rows="ue8m0", hidden=1024, tokens=(7, 0, 48, 2), topk=False),
]


def _choices(case: EpCase, n: int, rng: torch.Generator) -> Tensor:
    """Expert ids (n, k)."""
    shape, experts = (n, case.k), case.experts
    if case.routing == "none":
        return torch.full(shape, -1)
    if case.routing == "one_rank":
        return torch.randint(experts - case.local_experts, experts, shape, generator=rng)
    if case.routing == "repeated":
        return torch.randint(0, experts, (n, 1), generator=rng).expand(shape).clone()
    if case.routing == "skewed":
        odds = (1.0 / torch.arange(1, experts + 1) ** 2).expand(max(n, 1), -1)
        return torch.multinomial(odds, case.k, generator=rng)[:n]
    ids = torch.rand((n, experts), generator=rng).argsort(1)[:, : case.k]
    if case.routing == "some":  # a third is no choice, ids that exist nowhere among them
        none = torch.rand(shape, generator=rng) < 1 / 3
        ids = torch.where(none, torch.where(ids % 2 == 0, -1, experts + ids), ids)
    return ids


class EpInputs:
    """Inputs of all ranks, lists by rank; and what the reference makes of them."""

    def __init__(self, case: EpCase) -> None:
        self.case = case
        rng = torch.Generator().manual_seed(1000 + case.seed)
        counts = [case.count(rank) for rank in range(case.ranks)]
        plain = [torch.randn((n, case.hidden), generator=rng).bfloat16() for n in counts]
        pairs = [ref.quantize_fp8(x, case.rows == "ue8m0") for x in plain]
        self.xs = plain if case.rows == "bf16" else [q for q, _ in pairs]
        self.scales = [None if case.rows == "bf16" else self._strided(s) for _, s in pairs]
        self.topk_idx = [_choices(case, n, rng).to(case.idx_dtype).contiguous() for n in counts]
        self.topk_weights = [torch.rand((n, case.k), generator=rng) + 0.5 for n in counts]
        self.layouts = [ref.layout(idx, case.experts, case.ranks) for idx in self.topk_idx]
        self.bias_0 = [torch.randn((n, case.hidden), generator=rng).bfloat16() for n in counts]
        self.bias_1 = [torch.randn((n, case.hidden), generator=rng).bfloat16() for n in counts]
        # Exponents far apart: another order of the additions gives other bits.
        rows = [(len(got.handle.recv_src_idx), case.hidden) for got in self.received]
        self.ys = [
            (torch.randn(shape, generator=rng) * 2.0 ** torch.randint(-9, 9, shape, generator=rng)).bfloat16()
            for shape in rows
        ]
        self.y_weights = [torch.randn((m, case.k), generator=rng) for m, _ in rows]

    def _strided(self, scales: Tensor) -> Tensor:
        return scales.t().contiguous().t() if self.case.column_major else scales

    @cached_property
    def received(self) -> list[ref.Received]:
        rows = [x if s is None else (x, s) for x, s in zip(self.xs, self.scales)]
        return ref.dispatch(rows, self.topk_idx, self.topk_weights, self.case.experts)

    def combined(self, biases: int, weights: bool) -> tuple[list[Tensor], list[Tensor] | None]:
        """combined_x and combined_topk_weights of all ranks for ys with 0, 1 or 2 biases."""
        bias = [None, self.bias_0, list(zip(self.bias_0, self.bias_1))][biases]
        return ref.combine(self.ys, [got.handle for got in self.received], self.y_weights if weights else None, bias)

    def arguments(self, rank: int, device: torch.device) -> tuple[Tensor | None, ...]:
        """The tensors of Buffer.dispatch and ep_dispatch, in their order."""
        topk = (self.topk_idx[rank], self.topk_weights[rank]) if self.case.topk else (None, None)
        _, per_expert, in_rank = self.layouts[rank]
        given = (self.xs[rank], self.scales[rank], *topk, in_rank, per_expert)
        return tuple(None if each is None else _keep_strides(each, device) for each in given)


def _keep_strides(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(tensor, device=device).copy_(tensor)


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Equal shape, dtype and bytes: -0 is not 0, and a NaN is itself."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    return torch.equal(got.contiguous().view(torch.uint8).cpu(), want.contiguous().view(torch.uint8))


def check_received(inputs: EpInputs, rank: int, got: Dispatched, worst: int = 0) -> None:
    """Everything that a dispatch returns, bit for bit; with `worst`, the rows that are defined."""
    case, want = inputs.case, inputs.received[rank]
    want_x, want_scales = want.recv_x if isinstance(want.recv_x, tuple) else (want.recv_x, None)
    m = len(want_x)
    assert got.recv_x.shape[0] == got.handle.recv_src_idx.shape[0] == (worst or m)
    assert same_bits(got.recv_x[:m], want_x)
    assert (got.recv_scales is None) == (want_scales is None)
    if got.recv_scales is not None and want_scales is not None:
        assert got.recv_scales.is_contiguous()
        assert same_bits(got.recv_scales[:m], want_scales)
    if case.topk:
        assert got.recv_topk_idx is not None
        assert got.recv_topk_weights is not None
        assert same_bits(got.recv_topk_idx[:m], want.recv_topk_idx)
        assert same_bits(got.recv_topk_weights[:m], want.recv_topk_weights)
        assert bool((got.recv_topk_idx[m:] == -1).all())
    else:
        assert got.recv_topk_idx is None
        assert got.recv_topk_weights is None
    per_expert = torch.tensor(want.num_recv_tokens_per_expert_list, dtype=torch.int32)
    assert same_bits(got.num_recv_tokens_per_expert, per_expert)
    assert got.num_recv_tokens_per_expert_list == ([] if worst else per_expert.tolist())
    assert same_bits(got.handle.rank_prefix_matrix, want.handle.rank_prefix_matrix)
    assert same_bits(got.handle.recv_src_idx[:m], want.handle.recv_src_idx)
    assert same_bits(got.handle.is_token_in_rank, want.handle.is_token_in_rank)
    send_row = torch.full(want.handle.is_token_in_rank.shape, -1, dtype=torch.int32)
    for peer in range(case.ranks):
        tokens = [t for t, sent in enumerate(want.handle.is_token_in_rank[:, peer].tolist()) if sent]
        send_row[tokens, peer] = torch.arange(len(tokens), dtype=torch.int32)
    assert same_bits(got.handle.send_row, send_row)


def check_case(buffer: Buffer, inputs: EpInputs) -> None:
    """Dispatch (exact and worst case), cached dispatch and combine of this rank against the reference."""
    rank, device, case = buffer.rank, buffer.device, inputs.case
    arguments = inputs.arguments(rank, device)
    got = buffer.dispatch(*arguments)
    check_received(inputs, rank, got)
    if case.topk:
        worst = case.ranks * MAX_TOKENS
        check_received(inputs, rank, buffer.dispatch(*arguments, num_worst_tokens=worst), worst)
    x, scales = arguments[:2]
    assert x is not None
    recv_x, recv_scales = buffer.dispatch_cached(x, scales, got.handle)
    assert same_bits(recv_x, got.recv_x.cpu())
    assert recv_scales is got.recv_scales is None or same_bits(recv_scales, got.recv_scales.cpu())
    y, y_weights = inputs.ys[rank].to(device), inputs.y_weights[rank].to(device)
    biases = inputs.bias_0[rank].to(device), inputs.bias_1[rank].to(device)
    for count, weights in ((0, None), (1, y_weights), (2, None)):
        combined_x, combined_weights = buffer.combine(y, got.handle, weights, *biases[:count])
        want_x, want_weights = inputs.combined(count, weights is not None)
        assert same_bits(combined_x, want_x[rank])
        assert (combined_weights is None) == (want_weights is None)
        assert combined_weights is None or same_bits(combined_weights, want_weights[rank])


def make_buffer(group: ProcessGroup, config: EpConfig, device: str, timeout_s: float = 30) -> Buffer:
    """The buffer for "cpu" or "cuda", the rank's current one."""
    if device == "cpu":
        return GlooBuffer(group, config, timeout_s=timeout_s)
    from cutehop.comm.buffer import CudaBuffer

    return CudaBuffer(group, config, timeout_s=timeout_s)
