"""ExpertParallelMoE against transformers' DeepseekV3MoE: values, real gating and ties, shared weights, checkpoints."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from cutehop.layers import ExpertParallelMoE
from cutehop.ref.quant import dequantize_blocks, quantize_blocks
from tests.moe_layer_cases import Sizes, assert_as_exact

SIZES = Sizes()
FP8 = torch.float8_e4m3fn


def block(state: dict[str, torch.Tensor] | None = None, **options) -> DeepseekV3MoE:
    """Transformers' block in bfloat16 with float32 bias, as it loads a model."""
    fields = {name: value for name, value in vars(SIZES.config).items() if name != "initializer_range"}
    config = DeepseekV3Config(**fields | options)
    config._experts_implementation = "eager"
    made = DeepseekV3MoE(config).bfloat16()
    made.gate.e_score_correction_bias = made.gate.e_score_correction_bias.float()
    made.load_state_dict(SIZES.state() if state is None else state)
    return made


@torch.no_grad()
def compare(own: DeepseekV3MoE, x: torch.Tensor) -> None:
    """Against the block in float32. Its router computes in float32 in either case, so the choices are the same."""
    ours = ExpertParallelMoE.from_moe(own)(x)
    assert_as_exact(ours, own(x), copy.deepcopy(own).float()(x.float()))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("groups", [(4, 2), (1, 1), (8, 3)], ids=str)
def test_values(groups, normalize):
    own = block(n_group=groups[0], topk_group=groups[1], norm_topk_prob=normalize)
    compare(own, SIZES.tokens(0, 60).view(3, 20, -1))


def test_ties():
    """Experts come in pairs that are equal, scores and bias included: whichever of two is chosen, the result is one."""
    state = SIZES.state()
    for name in ("gate.weight", "gate.e_score_correction_bias", "experts.gate_up_proj", "experts.down_proj"):
        state[name] = state[name][::2].repeat_interleave(2, 0)
    own, x = block(state), SIZES.tokens(0, 60)
    idx, _ = ExpertParallelMoE.from_moe(own).gate(x)
    scores = own.gate(x)[0].sigmoid() + state["gate.e_score_correction_bias"]
    assert (scores.gather(1, idx).diff(dim=1) == 0).any(1).all()
    compare(own, x)
    scores = torch.zeros_like(state["gate.weight"])
    own.gate.weight.data.copy_(scores)  # now all scores are equal but for the bias, which is in pairs too
    compare(own, x)


def test_weights_are_shared():
    own = block()
    layer = ExpertParallelMoE.from_moe(own)
    assert layer.experts.gate_up_proj is own.experts.gate_up_proj
    assert layer.gate.weight is own.gate.weight
    assert layer.shared_experts is own.shared_experts
    buffer = SimpleNamespace(name="fake", rank=1, ranks=2, config=SimpleNamespace(
        num_experts=16, max_topk=4, hidden=256, recv_rows=80
    ))  # fmt: skip
    half = ExpertParallelMoE.from_moe(own, buffer=buffer)
    assert half.experts.down_proj.data_ptr() == own.experts.down_proj[8].data_ptr()
    assert half.experts.down_proj.shape == (8, SIZES.hidden, SIZES.inner)
    assert half.experts.down_proj.requires_grad
    own.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="hidden_act 'gelu', supported 'silu'"):
        ExpertParallelMoE.from_moe(own)


def test_state_dicts_go_both_ways():
    own, layer = block(), SIZES.layer()
    layer.load_state_dict(own.state_dict())
    again = block({name: torch.zeros_like(value) for name, value in own.state_dict().items()})
    again.load_state_dict(layer.state_dict())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in own.state_dict().items())


def published(fp8: bool) -> dict[str, torch.Tensor]:
    """As the published checkpoints have it: expert by expert, FP8 weights with the scales of their blocks."""
    state = {name: value for name, value in SIZES.state().items() if "experts." not in name[:8]}
    for key in [key for key in state if fp8 and key.startswith("shared_experts.")]:
        state[key], state[key + "_scale_inv"] = quantize_blocks(state[key])
    up, down = SIZES.state()["experts.gate_up_proj"], SIZES.state()["experts.down_proj"]
    for e in range(SIZES.experts):
        for name, weight in zip(("gate_proj", "up_proj", "down_proj"), (*up[e].chunk(2), down[e])):
            key = f"experts.{e}.{name}.weight"
            state[key] = weight
            if fp8:
                state[key], state[key + "_scale_inv"] = quantize_blocks(weight)
    return state


def test_a_published_checkpoint_loads():
    layer = SIZES.layer(state=published(fp8=False))
    assert all(torch.equal(value, SIZES.state()[name]) for name, value in layer.state_dict().items())


def test_a_published_fp8_checkpoint_loads():
    layer = ExpertParallelMoE.from_config(SIZES.config, dtype=FP8)
    layer.load_state_dict(published(fp8=True))
    weights, scales = layer.experts.gate_up_proj, layer.experts.gate_up_proj_scale_inv
    assert weights.dtype == FP8
    torch.testing.assert_close(
        dequantize_blocks(weights, scales), SIZES.state()["experts.gate_up_proj"].float(), rtol=2**-4, atol=1e-3
    )
    assert all(weight.dtype == FP8 for weight in layer.shared_experts.parameters())
    same, x = SIZES.layer().quantize_weights(), SIZES.tokens(0, 9)
    with torch.no_grad():
        assert torch.equal(layer(x), same(x))  # blocks of 128 rows never hold rows of gate and up


def test_checkpoints_of_the_other_dtype_are_refused():
    with pytest.raises(RuntimeError, match=r"Unexpected key.*gate_up_proj_scale_inv"):
        SIZES.layer(state=published(fp8=True))
    layer = ExpertParallelMoE.from_config(SIZES.config, dtype=FP8)
    with pytest.raises(RuntimeError, match=r"Missing key.*gate_up_proj_scale_inv"):
        layer.load_state_dict(published(fp8=False))


def test_a_missing_expert_is_refused():
    state = published(fp8=False)
    del state["experts.3.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*experts.gate_up_proj"):
        SIZES.layer(state=state)
