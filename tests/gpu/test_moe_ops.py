"""MoE kernels on a GPU against the references: bit for bit wherever the reference says in which order to round."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import cutehop.ops.moe  # noqa: F401
from cutehop.ref import moe as ref
from cutehop.ref import quant
from tests.moe_cases import bf16, choices, fp8_pair, generator, logits_with_ties, poison

pytestmark = pytest.mark.gpu
OPS = torch.ops.cutehop


def same(actual: Tensor, expected: Tensor) -> bool:
    """Equal bits, but any NaN is like any other."""
    actual, expected = actual.cpu(), expected.cpu()
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    if actual.is_floating_point():
        actual, expected = actual.float(), expected.float()
        nan = actual.isnan() & expected.isnan()
        actual, expected = actual.masked_fill(nan, 0), expected.masked_fill(nan, 0)
    return torch.equal(actual, expected)


def same_weights(actual: Tensor, expected: Tensor) -> bool:
    """`same`, but a weight may be the float32 beside: the order of a float64 sum can break a tie."""
    actual = actual.cpu()
    beside = [actual == expected.nextafter(torch.full_like(expected, sign * math.inf)) for sign in (-1, 1)]
    return same(torch.where(beside[0] | beside[1], expected, actual), expected)


def strew(logits: Tensor, values: list[float], share: float, seed: int) -> Tensor:
    """Some of the logits replaced by these values."""
    at = torch.rand(logits.shape, generator=generator(seed)) < share
    picked = torch.tensor(values)[torch.randint(0, len(values), logits.shape, generator=generator(seed + 1))]
    return torch.where(at, picked, logits)


ROUTES = [
    # experts, k, groups, kept groups
    (256, 8, 8, 4),
    (256, 8, 1, 1),
    (512, 32, 32, 2),
    (384, 8, 1, 1),
    (160, 6, 8, 3),
    (72, 6, 3, 2),
    (64, 6, 1, 1),
    (40, 1, 5, 1),
    (33, 33 - 1, 1, 1),
    (9, 9, 1, 1),
    (8, 3, 8, 3),
    (1, 1, 1, 1),
]


@pytest.mark.parametrize("scoring", ref.SCORINGS)
@pytest.mark.parametrize("case", ROUTES, ids=str)
@pytest.mark.parametrize("values", ["random", "ties", "special", "large"])
def test_route(case, scoring, values):
    experts, k, groups, kept = case
    for n in (1, 2, 129, 1000):
        logits = torch.randn(n, experts, generator=generator(n)) * 2
        if values == "ties":
            logits = logits_with_ties(n, experts, n)
        elif values == "special":
            logits = strew(logits, [math.nan, math.inf, -math.inf], 0.02, n)
        elif values == "large":
            logits = strew(logits * 100, [3e38, -3e38, 1e-40, 0.0, -0.0], 0.1, n)
        for bias in (None, logits_with_ties(1, experts, 3)[0] / 8, strew(logits[0], [math.inf, -math.inf], 0.3, 4)):
            for dtype, normalize, scale in ((torch.float32, True, 2.5), (torch.bfloat16, False, 1 / 3)):
                args = (k, groups, kept, scoring, normalize, scale)
                given = logits.to(dtype)
                expected = ref.route(given, bias, *args)
                idx, weights = OPS.moe_route(given.cuda(), None if bias is None else bias.cuda(), *args)
                assert same(idx, expected[0])
                assert same_weights(weights, expected[1])


def test_route_of_many_tokens():
    logits, bias = torch.randn(70001, 256, generator=generator(0)), torch.randn(256, generator=generator(1)) / 10
    expected = ref.route(logits, bias, 8, 8, 4)
    assert all(same(a, e) for a, e in zip(OPS.moe_route(logits.cuda(), bias.cuda(), 8, 8, 4), expected))


def test_route_of_no_tokens_and_of_strided_ones():
    idx, weights = OPS.moe_route(torch.empty(0, 64, device="cuda"), None, 8)
    assert idx.shape == weights.shape == (0, 8)
    logits = torch.randn(64, 50, generator=generator(0))
    expected = ref.route(logits.t(), None, 8)
    assert all(same(a, e) for a, e in zip(OPS.moe_route(logits.cuda().t(), None, 8), expected))


def check_permute(x: Tensor, scales: Tensor | None, idx: Tensor, experts: int, num_rows: int) -> None:
    expected = ref.permute(x, scales, idx, experts, num_rows)
    got = OPS.moe_permute(x.cuda(), None if scales is None else scales.cuda(), idx.cuda(), experts, num_rows)
    used = int(expected[2][-1])
    for actual, want in zip(got[:2], expected[:2]):
        assert actual.shape == want.shape
        assert same(actual[:used], want[:used])
    assert same(got[2], expected[2])
    assert same(got[3], expected[3])


PERMUTES = [
    # n, k, experts
    (4096, 8, 32),
    (4095, 8, 256),
    (3000, 6, 1024),
    (1000, 32, 33),
    (128, 8, 64),
    (33, 1, 7),
    (1, 1, 1),
    (1, 8, 256),
    (0, 8, 256),
]


@pytest.mark.parametrize("case", PERMUTES, ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("outside", [False, True])
def test_permute(case, dtype, outside):
    n, k, experts = case
    idx = choices(n, k, experts, none=0.25, outside=outside and dtype == torch.int64).to(dtype)
    x, scales = fp8_pair(n, 256)
    for num_rows in {n * k, n * k // 3, 1, 0, n * k + 100}:
        check_permute(x, scales, idx, experts, num_rows)


@pytest.mark.parametrize("hidden", [8, 16, 24, 512, 4088, 4096, 4104, 7168, 16384, 30008])
def test_permute_any_width(hidden):
    for n in (5, 1200):
        check_permute(bf16(n, hidden), None, choices(n, 3, 16), 16, 3 * n)


@pytest.mark.parametrize("words", [1, 3, 4, 31, 56, 100])
def test_permute_scales_of_any_layout(words):
    n, idx = 300, choices(300, 4, 16)
    x, _ = fp8_pair(n, 128)
    scales = torch.rand(n, words, generator=generator(0))
    check_permute(x, scales, idx, 16, 4 * n)
    check_permute(x, scales.t().contiguous().t(), idx, 16, 4 * n)
    check_permute(x, scales.repeat(1, 2)[:, ::2], idx, 16, 4 * n)
    check_permute(x, scales.view(torch.int32), idx, 16, 4 * n)


def test_permute_all_to_one_expert_and_none_at_all():
    x = bf16(5000, 64)
    for value in (0, 255, -1, 256):
        check_permute(x, None, torch.full((5000, 8), value), 256, 40000)


def test_permute_of_rows_at_odd_places():
    x, idx = bf16(301, 72), choices(300, 4, 16)
    for view in (x[:300, :64], x[1:, :64], x.flatten()[3 : 3 + 300 * 64].view(300, 64)):
        check_permute(view, None, idx, 16, 1200)


def test_permute_writes_no_row_past_the_last():
    """Outputs are carved out of poisoned memory by the body itself."""
    from cutehop.ops import _moe_cuda

    n, k, experts, hidden = 500, 8, 32, 64
    x, idx = bf16(n, hidden).cuda(), choices(n, k, experts).cuda()
    used = int(((idx >= 0) & (idx < experts)).sum())
    for num_rows in (used - 100, used, used + 100):
        memory = torch.full((num_rows + 200, hidden), math.nan, dtype=torch.bfloat16, device="cuda")
        outputs = {
            "row_scales": torch.empty(0, device="cuda"),
            "ends": torch.empty(experts, dtype=torch.int32, device="cuda"),
            "pair_row": torch.empty(n, k, dtype=torch.int32, device="cuda"),
        }
        _moe_cuda.permute(x, None, idx, experts, num_rows, rows=memory[100 : 100 + num_rows], **outputs)
        written = ~memory.isnan().all(1)
        assert written.nonzero().flatten().tolist() == list(range(100, 100 + min(num_rows, used)))


@pytest.mark.parametrize("k", [1, 2, 8, 9, 32])
@pytest.mark.parametrize("hidden", [8, 248, 256, 264, 7168])
@pytest.mark.parametrize("weighted", [False, True])
def test_unpermute(k, hidden, weighted):
    for n in (1, 7, 600):
        idx = choices(n, k, 16, none=0.3)
        pair_row = ref.permute(bf16(n, 8), None, idx, 16, n * k)[3]
        used = int(pair_row.max()) + 1
        y = poison(bf16(n * k + 5, hidden, seed=n), used)
        pair_row[:, 0] = torch.where(torch.arange(n) % 3 == 0, n * k + 5 + 7 * torch.arange(n), pair_row[:, 0]).int()
        weights = torch.randn(n, k, generator=generator(k)) if weighted else None
        out = OPS.moe_unpermute(y.cuda(), pair_row.cuda(), None if weights is None else weights.cuda())
        assert same(out, ref.unpermute(y, pair_row, weights))


def test_unpermute_without_tokens_or_rows():
    none = torch.full((3, 2), -1, dtype=torch.int32, device="cuda")
    y = bf16(4, 16).cuda()
    assert OPS.moe_unpermute(y, none[:0], None).shape == (0, 16)
    assert not OPS.moe_unpermute(y[:0], none + 1, None).any()
    hostile = torch.tensor([[2**31 - 1, -(2**31)]], dtype=torch.int32, device="cuda")
    assert not OPS.moe_unpermute(y, hostile, None).any()


@pytest.mark.parametrize("k", [1, 3, 8, 32])
@pytest.mark.parametrize("hidden", [8, 264, 7168])
@pytest.mark.parametrize("weighted", [False, True])
def test_unpermute_backward(k, hidden, weighted):
    for n, spare in ((1, 0), (300, 77), (0, 20)):
        idx = choices(n, k, 16, none=0.3)
        pair_row = ref.permute(bf16(n, 8), None, idx, 16, n * k)[3]
        grad, y = bf16(n, hidden, seed=1), bf16(n * k + spare, hidden, seed=2)
        weights = torch.randn(n, k, generator=generator(k)) if weighted else None
        expected = ref.unpermute_backward(grad, y, pair_row, weights)
        moved = [None if t is None else t.cuda() for t in (grad, y, pair_row, weights)]
        grad_y, grad_weights = OPS.moe_unpermute_backward(*moved)
        assert same(grad_y, expected[0])
        if expected[1] is not None:
            scale = hidden**0.5  # of a sum of products of normal values
            torch.testing.assert_close(grad_weights.cpu(), expected[1], rtol=1e-5, atol=1e-5 * scale)
        again = OPS.moe_unpermute_backward(*moved)
        assert torch.equal(again[1], grad_weights)


@pytest.mark.parametrize(
    "shape", [(128,), (1, 128), (7, 256), (3, 5, 384), (4096, 7168), (0, 128), (2, 0, 256)], ids=str
)
@pytest.mark.parametrize("round_scale", [False, True])
def test_quantize(shape, round_scale):
    x = bf16(*shape)
    groups = x.view(-1, 128)
    groups *= torch.logspace(-20, 20, len(groups))[:, None].bfloat16() if len(groups) else 1
    if len(groups) > 1:
        groups[0], groups[1, 1:] = 0, 0
    expected = quant.quantize_fp8(x, round_scale)
    q, scales = OPS.quantize_fp8(x.cuda(), round_scale)
    assert same(scales, expected[1])
    assert same(q, expected[0])


def test_quantize_strided():
    x = bf16(64, 7, 256)
    expected = quant.quantize_fp8(x.transpose(0, 1))
    got = OPS.quantize_fp8(x.cuda().transpose(0, 1))
    assert all(same(a, e) for a, e in zip(got, expected))


@pytest.mark.parametrize("epilogue", ["store", "swiglu"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("counts", [[40, 0, 1, 100], [0, 0, 0, 0], [0, 160, 0, 0]], ids=str)
def test_gemm_gradients(epilogue, masked, counts):
    """torch's products on the GPU against those on the CPU; rows that no expert owns are NaN, in gradients too."""
    rows, owned = 160, torch.arange(160) < torch.tensor(counts)[:, None] if masked else torch.arange(160) < sum(counts)
    lead = (4, rows) if masked else (rows,)
    nan = torch.tensor(math.nan, dtype=torch.bfloat16)
    a = torch.where(owned[..., None], bf16(*lead, 128), nan)
    grad = torch.where(owned[..., None], bf16(*lead, 256 if epilogue == "store" else 128, seed=1), nan)
    b, per_expert = bf16(4, 256, 128, seed=2), torch.tensor(counts, dtype=torch.int32)
    op = OPS.masked_grouped_gemm if masked else OPS.grouped_gemm
    per_expert = per_expert if masked else per_expert.cumsum(0, dtype=torch.int32)

    def gradients(device: str) -> tuple[Tensor, ...]:
        inputs = [t.to(device).requires_grad_() for t in (a, b)]
        out, _ = op(*inputs, per_expert.to(device), epilogue=epilogue)
        return torch.autograd.grad(out, inputs, grad.to(device))

    for actual, expected in zip(gradients("cuda"), gradients("cpu")):
        error = (actual.cpu().float() - expected.float()).norm()
        assert error <= 0.01 * expected.float().norm()


def one_step(x: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    """All kernels, one after the other."""
    idx, weights = OPS.moe_route(logits, None, 4, 4, 2)
    q, scales = OPS.quantize_fp8(x)
    fp8_rows = OPS.moe_permute(q, scales, idx, 32, 4 * len(x))
    rows, _, ends, pair_row = OPS.moe_permute(x, None, idx, 32, 4 * len(x))
    out = OPS.moe_unpermute(rows, pair_row, weights)
    grads = OPS.moe_unpermute_backward(x, rows, pair_row, weights)
    return idx, weights, q, scales, *fp8_rows, rows, ends, pair_row, out, *grads


def step_inputs(seed: int) -> tuple[Tensor, Tensor]:
    return bf16(500, 256, seed=seed).cuda(), torch.randn(500, 32, generator=generator(seed)).cuda()


def test_graph_replays_with_other_inputs():
    x, logits = step_inputs(0)
    one_step(x, logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = one_step(x, logits)
    for seed in range(1, 4):
        other = step_inputs(seed)
        x.copy_(other[0])
        logits.copy_(other[1])
        graph.replay()
        assert all(same(a, e) for a, e in zip(captured, one_step(*other)))


def test_runs_repeat_bit_for_bit():
    first = one_step(*step_inputs(0))
    for _ in range(20):
        assert all(same(a, e) for a, e in zip(one_step(*step_inputs(0)), first))


def test_compiled_without_graph_breaks():
    inputs = step_inputs(0)
    compiled = torch.compile(one_step, fullgraph=True, backend="aot_eager")
    assert all(same(a, e) for a, e in zip(compiled(*inputs), one_step(*inputs)))


def test_other_stream():
    expected = one_step(*step_inputs(3))
    inputs = step_inputs(3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = one_step(*inputs)
    stream.synchronize()
    assert all(same(a, e) for a, e in zip(got, expected))
