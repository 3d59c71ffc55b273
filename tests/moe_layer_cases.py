"""Small MoE blocks for tests of the layer: their weights, and the same block dense in any dtype."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional

from cutehop.comm.base import Buffer
from cutehop.comm.config import EpConfig
from cutehop.comm.ll_base import LowLatencyBuffer
from cutehop.comm.ll_config import LlConfig
from cutehop.layers import ExpertParallelMoE
from cutehop.ref.quant import dequantize_blocks

State = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """A block, and the most tokens that a rank brings."""

    hidden: int = 256
    inner: int = 128
    experts: int = 16
    topk: int = 4
    groups: int = 4
    topk_groups: int = 2
    shared: int = 1
    max_tokens: int = 40

    @property
    def config(self) -> SimpleNamespace:
        """With the names of transformers' DeepseekV3Config."""
        return SimpleNamespace(
            hidden_size=self.hidden, moe_intermediate_size=self.inner, n_routed_experts=self.experts,
            num_experts_per_tok=self.topk, n_group=self.groups, topk_group=self.topk_groups,
            n_shared_experts=self.shared, norm_topk_prob=True, routed_scaling_factor=2.5, initializer_range=0.05,
        )  # fmt: skip

    def state(self, seed: int = 0) -> State:
        """Of all experts. Scores are spread, and the bias matters."""
        generator = torch.Generator().manual_seed(seed)

        def normal(std: float, *shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) * std).bfloat16()

        h, i, e = self.hidden, self.inner, self.experts
        state = {
            "gate.weight": normal(0.1, e, h),
            "gate.e_score_correction_bias": normal(0.1, e).float(),
            "experts.gate_up_proj": normal(0.06, e, 2 * i, h),
            "experts.down_proj": normal(0.08, e, h, i),
        }
        if self.shared:
            state["shared_experts.gate_proj.weight"] = normal(0.06, i * self.shared, h)
            state["shared_experts.up_proj.weight"] = normal(0.06, i * self.shared, h)
            state["shared_experts.down_proj.weight"] = normal(0.08, h, i * self.shared)
        return state

    def layer(self, device: str = "cpu", state: State | None = None, **options) -> ExpertParallelMoE:
        """With `state`'s weights; options: of the constructor."""
        layer = ExpertParallelMoE.from_config(self.config, device=device, **options)
        layer.load_state_dict(self.state() if state is None else state)
        return layer

    def tokens(self, seed: int, n: int, device: str = "cpu") -> Tensor:
        generator = torch.Generator().manual_seed(100 + seed)
        return torch.randn(n, self.hidden, generator=generator).bfloat16().to(device)

    def open_buffer(self, group, device: str, timeout_s: float = 120, scales: str | None = None) -> Buffer:
        """scales: "f32" if FP8 rows will travel."""
        config = EpConfig(group.size(), self.hidden, self.max_tokens, self.experts, self.topk, scales=scales)
        if device == "cpu":
            from cutehop.comm.gloo import GlooBuffer

            return GlooBuffer(group, config, timeout_s=timeout_s)
        from cutehop.comm.buffer import CudaBuffer

        return CudaBuffer(group, config, timeout_s=timeout_s, num_sms=6)

    def open_ll_buffer(self, group, device: str, timeout_s: float = 120) -> LowLatencyBuffer:
        config = LlConfig(group.size(), self.hidden, self.max_tokens, self.experts, self.topk)
        if device == "cpu":
            from cutehop.comm.ll_gloo import GlooLowLatencyBuffer

            return GlooLowLatencyBuffer(group, config, timeout_s=timeout_s)
        from cutehop.comm.ll_buffer import CudaLowLatencyBuffer

        return CudaLowLatencyBuffer(group, config, timeout_s=timeout_s, num_sms=6)


def dense_state(layer: ExpertParallelMoE) -> State:
    """What `dense` takes, on the CPU: the layer's weights, multiplied by their scales where they are FP8."""
    state = {name: value.cpu() for name, value in layer.state_dict().items()}
    for name in [name for name in state if f"{name}_scale_inv" in state]:
        state[name] = dequantize_blocks(state[name], state.pop(f"{name}_scale_inv"))
    if layer.experts.is_fp8 and layer.shared_experts is not None:
        gate, up = state.pop("shared_experts.expert.gate_up_proj")[0].chunk(2)
        down = state.pop("shared_experts.expert.down_proj")[0]
        state |= {f"shared_experts.{part}_proj.weight": w for part, w in zip(("gate", "up", "down"), (gate, up, down))}
    return state


def dense(sizes: Sizes, state: State, x: Tensor, topk_idx: Tensor) -> Tensor:
    """The block in x's dtype, choices given, every product over all tokens and no ops of ours.

    In bfloat16 it rounds where transformers' block does; router scores and weights are at least float32 there too.
    """
    dtype = x.dtype
    high = torch.promote_types(dtype, torch.float32)
    w = {name: tensor.to(dtype) for name, tensor in state.items()}
    scores = functional.linear(x.to(high), w["gate.weight"].to(high)).sigmoid()
    chosen = scores.gather(1, topk_idx)
    weights = chosen / (chosen.sum(1, keepdim=True) + 1e-20) * sizes.config.routed_scaling_factor
    out = torch.zeros_like(x)
    for e in range(sizes.experts):
        gate, up = functional.linear(x, w["experts.gate_up_proj"][e]).chunk(2, -1)
        y = functional.linear(functional.silu(gate) * up, w["experts.down_proj"][e])
        factor = (weights * (topk_idx == e)).sum(1, keepdim=True)
        out = out + (y * factor).to(dtype)
    if sizes.shared:
        gate, up = (functional.linear(x, w[f"shared_experts.{part}_proj.weight"]) for part in ("gate", "up"))
        out = out + functional.linear(functional.silu(gate) * up, w["shared_experts.down_proj.weight"])
    return out


def assert_as_exact(ours: Tensor, same_dtype: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """The error of ours is at most `factor` times that of the path in the same dtype (and 1e-6 for what is equal)."""
    exact = exact.double()
    error, limit = ((each.double() - exact).norm() for each in (ours, same_dtype))
    assert error <= factor * limit + 1e-6 * exact.norm(), f"error {error:.3e}, same dtype {limit:.3e}"
