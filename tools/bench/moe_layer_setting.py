"""The MoE layer that is timed: its sizes, its weights, its result in fp32, and the same layer in torch ops."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cutehop.layers import ExpertParallelMoE
from cutehop.layers.moe_weights import FP8
from cutehop.ref.quant import FP8_MAX

# Relative Frobenius error against fp32 products of bf16 values: bf16 rounds inner rows and results; e4m3 rounds rows
# and weights by 2.6 % each in the mean, twice in a row.
TOLERANCE = {False: 1e-2, True: 8e-2}


@dataclass(frozen=True)
class Setting:
    """DeepSeek-V3's layer with fewer experts, so that one GPU holds them. tokens: of every rank."""

    tokens: int
    fp8: bool = False
    hidden: int = 7168
    inner: int = 2048
    experts: int = 64
    topk: int = 8
    groups: int = 8
    topk_groups: int = 4

    @property
    def name(self) -> str:
        return f"{'fp8' if self.fp8 else 'bf16'}-t{self.tokens}"

    @property
    def flops(self) -> int:
        """Of one rank's tokens, routed and shared experts; the router's are left out."""
        return 6 * self.tokens * (self.topk + 1) * self.hidden * self.inner

    def make_layer(self, device: torch.device, **options: Any) -> ExpertParallelMoE:
        """In bf16, equal for all ranks but the experts, which are drawn one by one by their id."""
        config = SimpleNamespace(
            hidden_size=self.hidden, moe_intermediate_size=self.inner, n_routed_experts=self.experts,
            num_experts_per_tok=self.topk, n_group=self.groups, topk_group=self.topk_groups, n_shared_experts=1,
            norm_topk_prob=True, routed_scaling_factor=2.5,
        )  # fmt: skip
        torch.manual_seed(0)
        layer = ExpertParallelMoE.from_config(config, device=device, **options).requires_grad_(False)
        experts = layer.experts
        for local in range(experts.num_local):
            up, down = self.expert(experts.first + local, device)
            experts.gate_up_proj[local], experts.down_proj[local] = up, down
        return layer

    def expert(self, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Weights of an expert, the same on every rank: gate over up (2 * inner, hidden), down (hidden, inner)."""
        generator = torch.Generator(device).manual_seed(1 + number)
        options: Any = {"generator": generator, "device": device, "dtype": torch.bfloat16}
        up = torch.randn(2 * self.inner, self.hidden, **options)
        return up * self.hidden**-0.5, torch.randn(self.hidden, self.inner, **options) * self.inner**-0.5

    def make_tokens(self, rank: int, device: torch.device) -> Tensor:
        generator = torch.Generator(device).manual_seed(1000 + rank)
        return torch.randn(self.tokens, self.hidden, generator=generator, device=device, dtype=torch.bfloat16)


@torch.no_grad()
def expected(setting: Setting, layer: ExpertParallelMoE, x: Tensor) -> Tensor:
    """float32 results for x of the whole layer before any cast; the choices are those of the layer's router."""
    idx, weights = layer.gate(x)
    out = torch.zeros_like(x, dtype=torch.float32)
    for e in range(setting.experts):  # made one by one: a rank has no memory for all of them
        token, choice = (idx == e).nonzero(as_tuple=True)
        out.index_add_(0, token, _swiglu(x[token].float(), *setting.expert(e, x.device)) * weights[token, choice, None])
    shared: Any = layer.shared_experts
    up = torch.cat([shared.gate_proj.weight, shared.up_proj.weight])
    return out + _swiglu(x.float(), up, shared.down_proj.weight)


def _swiglu(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gate, value = (x @ up.float().t()).chunk(2, -1)
    return (functional.silu(gate) * value) @ down.float().t()


class TorchMoE(nn.Module):
    """The layer on one rank, in torch ops that torch.compile takes without a graph break and a CUDA graph can hold.

    With fp8 it uses torch's own scaled products: one scale per row of activations, one per row of weights.
    """

    def __init__(self, layer: ExpertParallelMoE, fp8: bool) -> None:
        """layer: in bf16, its weights are shared."""
        super().__init__()
        self.gate, self.routing = layer.gate, layer.gate.routing
        shared: Any = layer.shared_experts
        self.shared = Fp8Swiglu(shared) if fp8 else shared
        weights = layer.experts.gate_up_proj, layer.experts.down_proj
        (self.up, self.up_scales), (self.down, self.down_scales) = map(_weights_by_row if fp8 else _unscaled, weights)

    def forward(self, x: Tensor) -> Tensor:
        idx, weights = self._route(x)
        n, k = idx.shape
        chosen, order = idx.flatten().sort(stable=True)
        ends = torch.searchsorted(chosen, torch.arange(len(self.up), device=x.device), right=True).int()
        gate, value = self._product(x[order // k], self.up, self.up_scales, ends).chunk(2, -1)
        y = self._product(functional.silu(gate) * value, self.down, self.down_scales, ends)
        row = torch.empty_like(order).scatter_(0, order, torch.arange(n * k, device=x.device))
        out = (y[row].view(n, k, -1) * weights[..., None]).sum(1)
        return (out + self.shared(x)).to(x.dtype)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r, bias = self.routing, self.gate.e_score_correction_bias
        scores = functional.linear(x.float(), self.gate.weight.float()).sigmoid()
        groups = (scores if bias is None else scores + bias).view(len(x), r.num_groups, -1)
        kept = groups.topk(2, -1).values.sum(-1).topk(r.topk_groups, -1).indices
        mask = torch.zeros(groups.shape[:2], dtype=torch.bool, device=x.device).scatter(1, kept, True)
        idx = groups.masked_fill(~mask[..., None], -torch.inf).flatten(1).topk(r.topk, -1).indices
        weights = scores.gather(1, idx)
        return idx, weights / (weights.sum(-1, keepdim=True) + 1e-20) * r.scale

    def _product(self, a: Tensor, b: Tensor, b_scales: Tensor | None, ends: Tensor) -> Tensor:
        b = b.transpose(1, 2)
        if b_scales is None:
            return torch._grouped_mm(a, b, offs=ends)
        a, a_scales = _by_row(a)
        return torch._scaled_grouped_mm(
            a, b, a_scales, b_scales, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
        )


class Fp8Swiglu(nn.Module):
    """A shared expert by torch._scaled_mm."""

    def __init__(self, shared: Any) -> None:
        super().__init__()
        self.up = _by_row(torch.cat([shared.gate_proj.weight, shared.up_proj.weight]))
        self.down = _by_row(shared.down_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self._product(x, *self.up).chunk(2, -1)
        return self._product(functional.silu(gate) * value, *self.down)

    def _product(self, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        rows, row_scales = _by_row(x)
        return torch._scaled_mm(
            rows, weight.t(), row_scales[:, None], scales[None], out_dtype=torch.bfloat16, use_fast_accum=True
        )


def _by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-4) / FP8_MAX
    return (x.float() / scales).to(FP8), scales.squeeze(-1)


def _unscaled(weights: Tensor) -> tuple[Tensor, Tensor | None]:
    return weights, None


def _weights_by_row(weights: Tensor) -> tuple[Tensor, Tensor | None]:
    pieces = [_by_row(each) for each in weights]
    return torch.stack([q for q, _ in pieces]), torch.stack([s for _, s in pieces])
