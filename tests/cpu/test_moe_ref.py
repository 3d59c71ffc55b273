"""The references of the MoE ops against plain loops, float64 and transformers' DeepSeek-V3 gate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cutehop.ref import moe as ref
from cutehop.ref import quant
from tests.moe_cases import bf16, choices, ends_of, fp8_pair, fp8_weights, generator, logits_with_ties, poison

ROUTES = [
    # n, experts, k, groups, kept groups
    (50, 256, 8, 8, 4),
    (50, 64, 6, 1, 1),
    (50, 40, 1, 5, 1),
    (50, 9, 9, 1, 1),
    (50, 8, 3, 8, 3),
    (1, 512, 32, 32, 2),
    (0, 16, 2, 4, 2),
]


def chosen_by_hand(choice: list[float], k: int, groups: int, kept: int) -> list[int]:
    """The choice of one token, in Python's sort, which is stable."""
    choice = [-math.inf if math.isnan(c) else c for c in choice]
    size = len(choice) // groups
    best = [sum(sorted(choice[g * size : (g + 1) * size], reverse=True)[:2]) for g in range(groups)]
    best = [-math.inf if math.isnan(b) else b for b in best]
    winners = sorted(range(groups), key=lambda g: -best[g])[:kept]
    candidates = [e for e in range(len(choice)) if e // size in winners]
    return sorted(candidates, key=lambda e: -choice[e])[:k]


@pytest.mark.parametrize("case", ROUTES, ids=str)
@pytest.mark.parametrize("scoring", ref.SCORINGS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("values", ["random", "ties", "nan"])
def test_route(case, scoring, biased, values):
    n, experts, k, groups, kept = case
    logits = logits_with_ties(n, experts) if values == "ties" else torch.randn(n, experts, generator=generator(0)) * 3
    if values == "nan":
        special = torch.tensor([math.nan, math.inf, -math.inf, 1e30])
        at = torch.rand(n, experts, generator=generator(1)) < 0.3
        logits[at] = special[torch.randint(0, 4, (int(at.sum()),), generator=generator(2))]
    bias = logits_with_ties(1, experts, seed=3)[0] / 8 if biased else None
    idx, weights = ref.route(logits, bias, k, groups, kept, scoring, normalize=True, scale=2.5)
    s = ref.scores(logits, scoring)
    choice = s if bias is None else s + bias
    assert idx.tolist() == [chosen_by_hand(row, k, groups, kept) for row in choice.tolist()]
    chosen = s.gather(1, idx).double()
    expected = 2.5 * chosen / (chosen.sum(1, keepdim=True) + 1e-20)
    torch.testing.assert_close(weights, expected.float(), equal_nan=True)
    raw = ref.route(logits, bias, k, groups, kept, scoring, normalize=False)[1]
    assert torch.equal(raw.nan_to_num(-1), chosen.float().nan_to_num(-1))


def test_scores_are_torchs():
    logits = torch.randn(100, 64, generator=generator(0)) * 5
    torch.testing.assert_close(ref.scores(logits, "sigmoid"), logits.sigmoid())
    torch.testing.assert_close(ref.scores(logits, "softmax"), logits.softmax(-1))
    assert torch.equal(ref.scores(logits.bfloat16(), "sigmoid"), ref.scores(logits.bfloat16().float(), "sigmoid"))


def test_route_is_the_gate_of_transformers():
    """Equal choices where no two scores are as close as rounding; the gate there takes sigmoid in float32."""
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = modeling.DeepseekV3Config(
        hidden_size=32, n_routed_experts=64, num_experts_per_tok=8, n_group=8, topk_group=4, routed_scaling_factor=2.5
    )
    gate = modeling.DeepseekV3TopkRouter(config)
    gate.weight.data = torch.randn(64, 32, generator=generator(1))
    gate.e_score_correction_bias.copy_(torch.rand(64, generator=generator(2)))
    logits, expected_weights, expected_idx = gate(torch.randn(500, 32, generator=generator(3)))
    idx, weights = ref.route(logits, gate.e_score_correction_bias, 8, 8, 4, scale=2.5)
    s = logits.double().sigmoid() + gate.e_score_correction_bias.double()
    gaps = s.sort(1).values.diff(dim=1).min(1).values
    clear = gaps > 1e-6
    assert clear.float().mean() > 0.9
    order, expected_order = idx.argsort(1), expected_idx.argsort(1)
    assert torch.equal(idx.gather(1, order)[clear], expected_idx.gather(1, expected_order)[clear])
    torch.testing.assert_close(weights.gather(1, order)[clear], expected_weights.gather(1, expected_order)[clear])


@pytest.mark.parametrize("num_rows", [0, 1, 37, 60, 100])
@pytest.mark.parametrize("shape", [(20, 3, 5), (1, 1, 1), (0, 4, 3), (20, 4, 33)], ids=str)
def test_permute(num_rows, shape):
    n, k, experts = shape
    idx = choices(n, k, experts, outside=True)
    x, scales = fp8_pair(n, 256)
    rows, row_scales, ends, pair_row = ref.permute(x, scales, idx, experts, num_rows)
    pairs = [(t, j) for e in range(experts) for t in range(n) for j in range(k) if idx[t, j] == e]
    expected = torch.full((n, k), -1, dtype=torch.int32)
    for row, (t, j) in enumerate(pairs[:num_rows]):
        assert torch.equal(rows[row].float(), x[t].float())
        assert torch.equal(row_scales[row], scales[t])
        expected[t, j] = row
    assert torch.equal(pair_row, expected)
    counts = [int((idx == e).sum()) for e in range(experts)]
    assert torch.equal(ends, ends_of(counts).clamp_max(num_rows))


@pytest.mark.parametrize("weighted", [False, True])
def test_unpermute(weighted):
    pair_row = ref.permute(bf16(20, 8), None, choices(20, 3, 5), 5, 60)[3]
    y = bf16(50, 16)
    pair_row[0] = torch.tensor([-1, 50, 2**31 - 1])  # none of them is a row
    weights = torch.rand(20, 3, generator=generator(1)) if weighted else None
    out = ref.unpermute(poison(y, int(pair_row[1:].clamp_max(49).max()) + 1), pair_row, weights)
    expected = torch.zeros(20, 16, dtype=torch.float64)
    for t in range(20):
        for j in range(3):
            if 0 <= pair_row[t, j] < 50:
                expected[t] += (1.0 if weights is None else float(weights[t, j])) * y[pair_row[t, j]].double()
    torch.testing.assert_close(out, expected.bfloat16(), rtol=2**-8, atol=1e-6)
    assert not out[0].any()


def activated(product: Tensor) -> Tensor:
    gate, up = product.chunk(2, -1)
    return gate * gate.sigmoid() * up


@pytest.mark.parametrize("epilogue", ref.EPILOGUES)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_grouped_gemm(epilogue, fp8, masked):
    counts = [3, 0, 6, 2]
    shape = (4, 6, 256) if masked else (13, 256)
    a, a_scales = fp8_pair(*shape) if fp8 else (bf16(*shape), None)
    b, b_scales = fp8_weights(4, 256, 256, seed=1) if fp8 else (bf16(4, 256, 256, seed=1), None)
    left = a.double() if a_scales is None else quant.dequantize_fp8(a, a_scales).double()
    right = b.double() if b_scales is None else quant.dequantize_blocks(b, b_scales).double()
    if masked:
        given = torch.tensor([3, -5, 6, 2], dtype=torch.int32)  # a negative count is none
        got = ref.masked_grouped_gemm(a, b, given, a_scales, b_scales, epilogue)
        out, scales = (t if t.numel() == 0 else torch.cat([t[e, :c] for e, c in enumerate(counts)]) for t in got)
        rows = [left[e, :c] for e, c in enumerate(counts)]
    else:
        out, scales = ref.grouped_gemm(a, b, ends_of(counts), a_scales, b_scales, epilogue)
        out, scales = out[:11], scales[:11]
        rows = list(left[:11].split(counts))
    product = torch.cat([r @ right[e].t() for e, r in enumerate(rows)])
    expected = product if epilogue == "store" else activated(product)
    assert out.dtype == (torch.float8_e4m3fn if epilogue == "swiglu_fp8" else torch.bfloat16)
    actual = quant.dequantize_fp8(out, scales) if epilogue == "swiglu_fp8" else out
    tolerance = 0.04 if epilogue == "swiglu_fp8" else 0.003
    assert (actual.double() - expected).norm() < tolerance * expected.norm()


def test_ends_that_decrease_or_exceed():
    a, b = bf16(10, 16), bf16(4, 8, 16)
    out, _ = ref.grouped_gemm(a, b, torch.tensor([4, -7, 3, 1000], dtype=torch.int32))
    expected, _ = ref.grouped_gemm(a, b, torch.tensor([4, 4, 4, 10], dtype=torch.int32))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("shape", [(256, 384), (3, 200, 130), (2, 2, 1, 1)], ids=str)
def test_quantize_blocks(shape):
    w = bf16(*shape)
    q, scales = quant.quantize_blocks(w)
    assert q.shape == w.shape
    assert scales.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    back = quant.dequantize_blocks(q, scales)
    worst = w.float().abs().amax()
    assert (back - w.float()).abs().max() <= worst / 448 * 16  # half a step between the largest e4m3 values
    assert q.float().abs().flatten(-2).amax() == 448


def test_quantize_fp8_round_scale():
    x = bf16(3, 5, 256) * 7
    q, scales = quant.quantize_fp8(x, round_scale=True)
    assert torch.equal(scales.log2(), scales.log2().round())
    exact = x.float().unflatten(-1, (-1, 128)).abs().amax(-1) / 448
    assert ((scales >= exact) & (scales < 2 * exact)).all()
    assert (quant.dequantize_fp8(q, scales) - x.float()).abs().max() <= x.float().abs().max() / 448 * 32
