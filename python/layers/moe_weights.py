"""The weights of the experts of one rank: as transformers holds them, cut out of a checkpoint, or cast to FP8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cutehop.cute_kernels.errors import check
from cutehop.ref.quant import quantize_blocks

FP8 = torch.float8_e4m3fn
StateDict = dict[str, Any]
_ops = torch.ops.cutehop


class MoeExperts(nn.Module):
    """SwiGLU experts first .. first + L - 1 of E, each down(silu(gate(x)) * up(x)) of H columns with I in between.

    gate_up_proj: (L, 2 * I, H), gate's rows first; down_proj: (L, H, I). bfloat16, with gradients; or float8_e4m3fn,
    then with one float32 factor per 128 x 128 block of weights in gate_up_proj_scale_inv (L, 2 * I / 128, H / 128) and
    down_proj_scale_inv (L, H / 128, I / 128). These are the names of transformers' DeepseekV3 experts.

    load_state_dict keeps the local experts of a state dict that holds all E, stacked like these parameters or one by
    one as in the published checkpoints ("7.gate_proj.weight", "7.up_proj.weight_scale_inv", ...).
    """

    gate_up_proj_scale_inv: Tensor | None
    down_proj_scale_inv: Tensor | None

    def __init__(
        self,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        gate_up_scales: Tensor | None = None,
        down_scales: Tensor | None = None,
        *,
        first: int = 0,
        num_experts: int | None = None,
    ) -> None:
        """The tensors are shared, not copied; a Parameter stays the same object. num_experts: E, by default L.

        ValueError for shapes that do not fit together.
        """
        super().__init__()
        local, hidden, intermediate = down_proj.shape
        check(
            gate_up_proj.shape == (local, 2 * intermediate, hidden),
            f"MoeExperts: gate_up_proj has shape {tuple(gate_up_proj.shape)} beside a down_proj of "
            f"{tuple(down_proj.shape)}, needs {(local, 2 * intermediate, hidden)}; stack gate over up per expert",
        )
        self.first = first
        self.num_experts = local if num_experts is None else num_experts
        check(
            0 <= first <= self.num_experts - local,
            f"MoeExperts: experts {first} to {first + local - 1} of {self.num_experts}; pass the id of the first one",
        )
        self.gate_up_proj = _parameter(gate_up_proj)
        self.down_proj = _parameter(down_proj)
        self.register_buffer("gate_up_proj_scale_inv", gate_up_scales)
        self.register_buffer("down_proj_scale_inv", down_scales)

    @property
    def num_local(self) -> int:
        """L."""
        return self.down_proj.shape[0]

    @property
    def hidden(self) -> int:
        """H."""
        return self.down_proj.shape[1]

    @property
    def is_fp8(self) -> bool:
        return self.down_proj.dtype == FP8

    def forward(self, rows: Tensor, scales: Tensor | None, limits: Tensor, expected_rows: int) -> Tensor:
        """bfloat16 outputs of the experts, in the order of `rows`.

        rows: (M, H) sorted by expert with limits = ends, or (L, T, H) with limits = counts, as for `grouped_gemm` and
        `masked_grouped_gemm`; of the weights' dtype, with scales where that is FP8.
        expected_rows: mean rows of an expert, a hint.
        """
        gemm = _ops.masked_grouped_gemm if rows.dim() == 3 else _ops.grouped_gemm
        middle = "swiglu_fp8" if self.is_fp8 else "swiglu"
        inner, inner_scales = gemm(
            rows, self.gate_up_proj, limits, scales, self.gate_up_proj_scale_inv, middle, expected_rows
        )
        inner_scales = inner_scales if self.is_fp8 else None
        return gemm(inner, self.down_proj, limits, inner_scales, self.down_proj_scale_inv, "store", expected_rows)[0]

    def quantized(self) -> MoeExperts:
        """The same experts in FP8, by cutehop.ref.quant.quantize_blocks; no gradients. H and I are multiples of 128."""
        check(not self.is_fp8, "MoeExperts.quantized: the weights are FP8 already; use them as they are")
        # One expert after the other: float32 copies of all of them would take twice the memory of the weights.
        up = [quantize_blocks(weight) for weight in self.gate_up_proj.detach()]
        down = [quantize_blocks(weight) for weight in self.down_proj.detach()]
        (up_q, up_scales), (down_q, down_scales) = (tuple(map(torch.stack, zip(*pairs))) for pairs in (up, down))
        return MoeExperts(up_q, down_q, up_scales, down_scales, first=self.first, num_experts=self.num_experts)

    def _load_from_state_dict(self, state_dict: StateDict, prefix: str, *args: Any) -> None:
        """Called by load_state_dict with a dictionary of its own."""
        for suffix in ("", "_scale_inv"):
            self._stack(state_dict, prefix, f"gate_up_proj{suffix}", ("gate_proj", "up_proj"), f"weight{suffix}")
            self._stack(state_dict, prefix, f"down_proj{suffix}", ("down_proj",), f"weight{suffix}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _stack(self, state: StateDict, prefix: str, name: str, parts: tuple[str, ...], leaf: str) -> None:
        """Make state[name] what this rank holds of it."""
        local = range(self.first, self.first + self.num_local)
        names = {e: [f"{prefix}{e}.{part}.{leaf}" for part in parts] for e in range(self.num_experts)}
        if all(key in state for e in local for key in names[e]):
            state[prefix + name] = torch.stack([torch.cat([state[key] for key in names[e]]) for e in local])
        elif prefix + name in state and len(state[prefix + name]) == self.num_experts:
            state[prefix + name] = state[prefix + name][local.start : local.stop]
        for keys in names.values():
            for key in keys:
                state.pop(key, None)


def local_slice(weights: Tensor, first: int, count: int) -> Tensor:
    """Experts first .. first + count - 1 of (E, ...): the same object if that is all of them, else a view."""
    return weights if count == len(weights) else weights.detach()[first : first + count]


def _parameter(weights: Tensor) -> nn.Parameter:
    return weights if isinstance(weights, nn.Parameter) else nn.Parameter(weights, weights.dtype != FP8)
