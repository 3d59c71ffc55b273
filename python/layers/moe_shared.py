"""The shared expert of a MoE layer, which every token has: in the precision of training, or cast to FP8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cutehop.layers.moe_weights import MoeExperts, StateDict

PARTS = ("gate_proj", "up_proj", "down_proj")
_ops = torch.ops.cutehop


class SharedExpert(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)): the expert that every token has, on every rank."""

    def __init__(self, hidden: int, intermediate: int, **options: Any) -> None:
        """options: of torch.nn.Linear, dtype and device."""
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False, **options)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False, **options)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))

    def quantized(self) -> Fp8SharedExpert:
        """The same expert in FP8. H and the columns in between are multiples of 128."""
        gate, up, down = (getattr(self, part).weight.detach() for part in PARTS)
        return Fp8SharedExpert(MoeExperts(torch.cat([gate, up])[None], down[None]).quantized())


class Fp8SharedExpert(nn.Module):
    """The same with weights in float8_e4m3fn, one float32 factor per 128 x 128 block of them; no gradients.

    expert: MoeExperts of the one expert, so that parameters are `expert.gate_up_proj` (1, 2 * I, H) and so on.
    load_state_dict also takes the names of published checkpoints, "gate_proj.weight", "gate_proj.weight_scale_inv", ...
    """

    def __init__(self, expert: MoeExperts) -> None:
        super().__init__()
        self.expert = expert

    def forward(self, x: Tensor) -> Tensor:
        """bfloat16 (n, H) of x bfloat16 (n, H)."""
        return self.of_rows(*_ops.quantize_fp8(x))

    def of_rows(self, rows: Tensor, scales: Tensor) -> Tensor:
        """The same of rows that `quantize_fp8` has cast."""
        ends = torch.full((1,), rows.shape[0], dtype=torch.int32, device=rows.device)
        return self.expert(rows, scales, ends, rows.shape[0])

    def _load_from_state_dict(self, state_dict: StateDict, prefix: str, *args: Any) -> None:
        """Called by load_state_dict with a dictionary of its own, before the expert's."""
        for part in PARTS:
            for leaf in ("weight", "weight_scale_inv"):
                value = state_dict.pop(f"{prefix}{part}.{leaf}", None)
                if value is not None:
                    state_dict[f"{prefix}expert.0.{part}.{leaf}"] = value
        super()._load_from_state_dict(state_dict, prefix, *args)
