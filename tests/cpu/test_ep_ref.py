"""The reference of dispatch and combine against loops over single tokens that share no code with it."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import numpy
import pytest
import torch

from cutehop.ref import ep

CASES = [(ranks, seed) for ranks in range(1, 9) for seed in range(4)]


@pytest.fixture(autouse=True)
def _one_thread():
    """The tensors are small: with a thread per core, a busy machine spends its time in the threads' barriers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Inputs:
    """Random routing of R ranks: ragged counts, ranks without tokens, all -1, repeated experts, ids out of range."""

    def __init__(self, ranks: int, seed: int) -> None:
        rng = random.Random(100 * ranks + seed)
        torch.manual_seed(100 * ranks + seed)
        self.ranks, self.local = ranks, rng.choice((1, 2, 5))
        self.experts = ranks * self.local
        self.k = 1 + (3 * ranks + seed) % 9
        self.hidden = rng.choice((8, 24, 128, 200))
        self.counts = [rng.choice((0, 1, 3, 8, 13)) for _ in range(ranks)]
        self.idx_dtype = rng.choice((torch.int32, torch.int64))
        kinds = (
            lambda: rng.randrange(self.experts),
            lambda: -1,
            lambda: rng.choice((-7, self.experts, rng.randrange(self.experts))),
            lambda: self.local * rng.randrange(ranks),  # the same expert again and again
        )
        self.choices = [
            [[kind() for _ in range(self.k)] for kind in (rng.choice(kinds) for _ in range(n))] for n in self.counts
        ]
        self.xs = [torch.randn(n, self.hidden).bfloat16() for n in self.counts]
        self.topk_idxs = [torch.tensor(c, dtype=self.idx_dtype).view(-1, self.k) for c in self.choices]
        self.topk_weights = [torch.rand(n, self.k) + 0.5 for n in self.counts]

    def dispatch(self, **options: int) -> list[ep.Received]:
        return ep.dispatch(self.xs, self.topk_idxs, self.topk_weights, self.experts, **options)

    def owner(self, choice: int) -> int | None:
        return choice // self.local if 0 <= choice < self.experts else None

    def rows_of(self, rank: int) -> list[tuple[int, int]]:
        """(source, token) of every row that a rank receives, in order."""
        return [
            (source, token)
            for source, tokens in enumerate(self.choices)
            for token, choices in enumerate(tokens)
            if any(self.owner(choice) == rank for choice in choices)
        ]


@pytest.mark.parametrize(("ranks", "seed"), CASES)
def test_layout(ranks, seed):
    inputs = Inputs(ranks, seed)
    for choices, topk_idx in zip(inputs.choices, inputs.topk_idxs):
        got = ep.layout(topk_idx, inputs.experts, ranks)
        owners = [{inputs.owner(choice) for choice in token} for token in choices]
        flat = [choice for token in choices for choice in token]
        assert got.num_tokens_per_rank.tolist() == [sum(r in each for each in owners) for r in range(ranks)]
        assert got.num_tokens_per_expert.tolist() == [flat.count(e) for e in range(inputs.experts)]
        assert got.is_token_in_rank.tolist() == [[r in each for r in range(ranks)] for each in owners]
        assert got.num_tokens_per_rank.dtype == got.num_tokens_per_expert.dtype == torch.int32
        assert got.is_token_in_rank.shape == (len(choices), ranks)
        assert got.is_token_in_rank.dtype == torch.bool
        assert got.is_token_in_rank.is_contiguous()


@pytest.mark.parametrize(("ranks", "seed"), CASES)
@pytest.mark.parametrize("alignment", [1, 4])
def test_dispatch(ranks, seed, alignment):
    inputs = Inputs(ranks, seed)
    for rank, got in enumerate(inputs.dispatch(expert_alignment=alignment)):
        rows = inputs.rows_of(rank)
        assert got.recv_x.shape == (len(rows), inputs.hidden)
        assert got.recv_topk_idx.shape == got.recv_topk_weights.shape == (len(rows), inputs.k)
        assert (got.recv_topk_idx.dtype, got.recv_topk_weights.dtype) == (inputs.idx_dtype, torch.float32)
        hits = [0] * inputs.local
        for i, (source, token) in enumerate(rows):
            assert torch.equal(got.recv_x[i], inputs.xs[source][token])
            for j, choice in enumerate(inputs.choices[source][token]):
                mine = inputs.owner(choice) == rank
                hits[choice % inputs.local] += mine
                assert got.recv_topk_idx[i, j] == (choice - rank * inputs.local if mine else -1)
                assert got.recv_topk_weights[i, j] == (inputs.topk_weights[source][token, j] if mine else 0)
        assert got.num_recv_tokens_per_expert_list == [math.ceil(n / alignment) * alignment for n in hits]
        ends = [sum(source <= last for source, _ in rows) for last in range(ranks)]
        assert got.handle.rank_prefix_matrix[:, rank].tolist() == ends
        assert got.handle.recv_src_idx.tolist() == [token for _, token in rows]
        assert got.handle.recv_src_idx.dtype == got.handle.rank_prefix_matrix.dtype == torch.int32
        assert got.handle.is_token_in_rank.shape == (inputs.counts[rank], ranks)
        assert torch.equal(got.handle.rank_prefix_matrix, inputs.dispatch()[0].handle.rank_prefix_matrix)


@pytest.mark.parametrize(("ranks", "seed"), CASES)
def test_combine_is_the_ordered_sum(ranks, seed):
    inputs = Inputs(ranks, seed)
    received = inputs.dispatch()
    dtype = (torch.bfloat16, torch.float16, torch.float32)[seed % 3]
    # Exponents far apart: another order of the additions gives other bits.
    ys = [(torch.randn(r.recv_x.shape) * 2.0 ** torch.randint(-9, 9, r.recv_x.shape)).to(dtype) for r in received]
    weights = [torch.randn(r.recv_topk_weights.shape) for r in received]
    new = [torch.randn(2, n, inputs.hidden).to(dtype) for n in inputs.counts]
    bias: list[ep.Bias] = [(None, pair[0], (pair[0], pair[1]))[(seed + r) % 3] for r, pair in enumerate(new)]
    combined, combined_weights = ep.combine(ys, [r.handle for r in received], weights, bias)
    assert combined_weights is not None
    rows = [{key: i for i, key in enumerate(inputs.rows_of(rank))} for rank in range(ranks)]
    for home in range(ranks):
        assert combined[home].shape == (inputs.counts[home], inputs.hidden)
        assert combined_weights[home].shape == (inputs.counts[home], inputs.k)
        for token in range(inputs.counts[home]):
            given = bias[home]
            total = torch.zeros(inputs.hidden)
            for each in given if isinstance(given, tuple) else [] if given is None else [given]:
                total = total + each[token].float()
            weight = torch.zeros(inputs.k)
            for rank in range(ranks):
                if (home, token) in rows[rank]:
                    total = total + ys[rank][rows[rank][home, token]].float()
                    weight = weight + weights[rank][rows[rank][home, token]]
            assert torch.equal(combined[home][token], total.to(dtype))
            assert torch.equal(combined_weights[home][token], weight)


def one_token_everywhere(ranks: int) -> list[ep.Handle]:
    """Rank 0 has one token, which every rank receives."""
    return ep.make_handles([torch.full((int(rank == 0), ranks), True) for rank in range(ranks)])


def combine_column(values: list[float], bias: ep.Bias, dtype: torch.dtype) -> torch.Tensor:
    ys = [torch.tensor([[value]], dtype=dtype) for value in values]
    biases = [bias, *[None] * (len(values) - 1)]
    return ep.combine(ys, one_token_everywhere(len(values)), bias=biases)[0][0]


def test_combine_order_in_figures():
    big = 2.0**24  # from here on fp32 does not hold odd integers
    assert combine_column([big, 1.0, -big], None, torch.float32).tolist() == [[0.0]]
    assert combine_column([big, -big, 1.0], None, torch.float32).tolist() == [[1.0]]
    one, two = torch.tensor([[1.0]]), torch.tensor([[-big]])
    assert combine_column([big, 1.0], one, torch.float32).tolist() == [[big]], "(1 + big) + 1, not 1 + 1 + big"
    assert combine_column([big], (one, two), torch.float32).tolist() == [[1.0]], "(1 - big) + big"


def test_combine_rounds_once():
    # Rounding to bf16 (8 bits) after each addition would leave 256 three times.
    assert combine_column([256.0, 1.0, 1.0], None, torch.bfloat16).tolist() == [[258.0]]


def test_combine_signed_zero():
    minus = torch.tensor([[-0.0]])
    for bias, sign in ((None, False), (minus, False), ((minus, minus), True)):
        assert torch.signbit(combine_column([-0.0, -0.0], bias, torch.float32)).item() is sign


@pytest.mark.parametrize(("ranks", "seed"), CASES)
def test_round_trip_with_identity_experts(ranks, seed):
    """Small integers and eighths: every sum is exact in fp32, so the weighted sum must come back bit for bit."""
    inputs = Inputs(ranks, seed)
    inputs.xs = [torch.randint(-64, 64, x.shape).float() for x in inputs.xs]
    inputs.topk_weights = [torch.randint(1, 32, w.shape) / 8 for w in inputs.topk_weights]
    received = inputs.dispatch()
    ys = [r.recv_topk_weights.sum(1, keepdim=True) * r.recv_x for r in received]
    weights = [r.recv_topk_weights for r in received]
    combined, combined_weights = ep.combine(ys, [r.handle for r in received], weights)
    assert combined_weights is not None
    for rank in range(ranks):
        used = (inputs.topk_idxs[rank] >= 0) & (inputs.topk_idxs[rank] < inputs.experts)
        expected = inputs.topk_weights[rank] * used
        assert torch.equal(combined_weights[rank], expected)
        assert torch.equal(combined[rank], expected.sum(1, keepdim=True) * inputs.xs[rank])


@pytest.mark.parametrize(("ranks", "seed"), CASES)
def test_cached_dispatch_and_adjoint(ranks, seed):
    """<dispatch(x), y> == <x, combine(y)>, exact in integers: each is the gradient of the other."""
    inputs = Inputs(ranks, seed)
    received = inputs.dispatch()
    handles = [r.handle for r in received]
    for again, first in zip(ep.dispatch_cached(inputs.xs, handles), received):
        assert torch.equal(again, first.recv_x)
    xs = [torch.randint(-8, 8, (n, 3)).float() for n in inputs.counts]
    ys = [torch.randint(-8, 8, (len(r.recv_x), 3)).float() for r in received]
    there = sum((a * y).sum() for a, y in zip(ep.dispatch_cached(xs, handles), ys))
    back = sum((x * b).sum() for x, b in zip(xs, ep.combine(ys, handles)[0]))
    assert there == back


@pytest.mark.parametrize(("ranks", "seed"), CASES)
def test_worst_tokens(ranks, seed):
    """The same rows, then rows that combine must not read and whose choices are -1."""
    inputs = Inputs(ranks, seed)
    exact, worst = inputs.dispatch(), inputs.dispatch(num_worst_tokens=ranks * 13)
    for few, many in zip(exact, worst):
        n = len(few.recv_x)
        assert many.num_recv_tokens_per_expert_list == []
        assert many.recv_x.shape[0] == len(many.handle.recv_src_idx) == ranks * 13
        assert torch.equal(many.recv_x[:n], few.recv_x)
        assert torch.equal(many.recv_topk_idx[:n], few.recv_topk_idx)
        assert torch.equal(many.recv_topk_weights[:n], few.recv_topk_weights)
        assert (many.recv_topk_idx[n:] == -1).all()
        assert torch.equal(many.handle.rank_prefix_matrix, few.handle.rank_prefix_matrix)
        many.recv_x[n:] = math.nan
        many.recv_topk_weights[n:] = math.nan
    results = [
        ep.combine([r.recv_x for r in each], [r.handle for r in each], [r.recv_topk_weights for r in each])
        for each in (exact, worst)
    ]
    for few, many in zip(*[[*xs, *weights] for xs, weights in results]):
        assert torch.equal(few, many)


@pytest.mark.parametrize("ue8m0", [False, True])
def test_dispatch_of_fp8_pairs(ue8m0):
    """Bytes and scales travel unchanged, also from column-major scales, and arrive row-major."""
    inputs = Inputs(4, 3)
    pairs = [ep.quantize_fp8(torch.randn(n, 640), ue8m0) for n in inputs.counts]
    column_major = [(q, scales.t().contiguous().t()) for q, scales in pairs]
    received = ep.dispatch(column_major, inputs.topk_idxs, inputs.topk_weights, inputs.experts)
    assert sum(len(r.recv_topk_idx) for r in received) > 0
    for rank, got in enumerate(received):
        q, scales = got.recv_x
        rows = inputs.rows_of(rank)
        assert (q.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.int32 if ue8m0 else torch.float32)
        assert q.shape == (len(rows), 640)
        assert scales.shape == (len(rows), 2 if ue8m0 else 5)
        assert q.is_contiguous()
        assert scales.is_contiguous()
        for i, (source, token) in enumerate(rows):
            assert torch.equal(q[i].view(torch.uint8), pairs[source][0][token].view(torch.uint8))
            assert torch.equal(scales[i], pairs[source][1][token])


# All finite e4m3 values by their bits: 4 exponent bits with bias 7, 3 mantissa bits, no infinity, 0x7f is NaN.
E4M3 = [(m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)][:-1]


def nearest_e4m3(value: float) -> float:
    """Nearest of the table; of two, the one with the even mantissa, which has an even position."""
    best = min(range(len(E4M3)), key=lambda i: (abs(E4M3[i] - abs(value)), i % 2))
    return math.copysign(E4M3[best], value)


def hard_rows(hidden: int) -> torch.Tensor:
    """Magnitudes over the whole range, zeros, groups below the floor, and amax at and beside 448 * 2 ** j."""
    torch.manual_seed(hidden)
    rows = torch.randn(7, hidden) * torch.tensor([1.0, 1e-3, 3e4, 1e30, 0.0, 1e-6, 1e-30])[:, None]
    rows[:, ::3] *= 1e-2
    edges = torch.tensor([448.0, 7.0, 449.75, 446.0, 3.5 * (1 + 2**-23), 3.5 * (1 - 2**-24)])
    exact = torch.rand(len(edges), hidden) * edges[:, None]
    exact[:, ::128] = -edges[:, None]
    # Where amax is no power of two times 7, ties of e4m3 that one rounding more or less would decide the other way.
    midpoints = torch.tensor([(low + high) / 2 for low, high in pairwise(E4M3)])
    ties = torch.arange(3.0, 40.0, 2.0)[:, None] * midpoints[torch.randint(len(midpoints), (19, hidden))] / 448
    ties[:, ::128] = torch.arange(3.0, 40.0, 2.0)[:, None]
    return torch.cat([rows, exact, ties])


@pytest.mark.parametrize("hidden", [16, 128, 200, 640])
@pytest.mark.parametrize("ue8m0", [False, True])
def test_quantize_value_by_value(hidden, ue8m0):
    x = hard_rows(hidden)
    q, scales = ep.quantize_fp8(x, ue8m0)
    groups = math.ceil(hidden / 128)
    assert q.shape == x.shape
    assert scales.shape == (len(x), math.ceil(groups / 4) if ue8m0 else groups)
    for row, got_row, scale_row in zip(x.numpy(), q.float().tolist(), scales.tolist()):
        for g in range(groups):
            values, got = row[128 * g : 128 * g + 128], got_row[128 * g : 128 * g + 128]
            amax = max(numpy.float32(1e-4), abs(values).max())
            if ue8m0:
                exponent = next(e for e in range(-30, 128) if 2.0**e >= amax / numpy.float32(448))
                assert scale_row[g // 4] >> 8 * (g % 4) & 0xFF == exponent + 127
                scaled = [float(value) / 2.0**exponent for value in values]
            else:
                assert scale_row[g] == amax / numpy.float32(448)
                scaled = [float(value * (numpy.float32(448) / amax)) for value in values]
            assert got == [nearest_e4m3(value) for value in scaled]
        if ue8m0:
            assert all(scale_row[g // 4] >> 8 * (g % 4) & 0xFF == 0 for g in range(groups, 4 * len(scale_row)))


@pytest.mark.parametrize("hidden", [16, 128, 200, 640])
@pytest.mark.parametrize("ue8m0", [False, True])
def test_quantize_round_trip_bound(hidden, ue8m0):
    """Half a step of e4m3: 1/16 of the value, or 2 ** -10 of the scale among the subnormals."""
    x = hard_rows(hidden)
    q, scales = ep.quantize_fp8(x, ue8m0)
    back = ep.dequantize_fp8(q, scales.t().contiguous().t(), torch.float32)
    amax = torch.nn.functional.pad(x.abs(), (0, -hidden % 128)).unflatten(1, (-1, 128)).amax(-1).clamp_min(1e-4)
    largest_scale = amax.double() / 448 * (2 if ue8m0 else 1)
    step = largest_scale.repeat_interleave(128, 1)[:, :hidden] * 2**-10
    size, error = x.double().abs(), (back.double() - x.double()).abs()
    assert (error <= torch.maximum(size / 16, step) + size * 1e-6).all(), "and three roundings in fp32"
    assert torch.equal(ep.dequantize_fp8(q, scales), back.bfloat16())


@pytest.mark.parametrize("n", [0, 5])
def test_nothing_is_sent(n):
    """No tokens, or no choices: a token gets zeros, or its bias."""
    xs, none, ones = [torch.ones(n, 16)] * 2, [torch.full((n, 3), -1)] * 2, [torch.ones(n, 3)] * 2
    received = ep.dispatch(xs, none, ones, 4, expert_alignment=8)
    assert [(r.recv_x.shape, r.num_recv_tokens_per_expert_list) for r in received] == [((0, 16), [0, 0])] * 2
    ys, handles, weights = ([r[i] for r in received] for i in (0, 4, 2))
    bias = torch.randn(n, 16)
    combined, combined_weights = ep.combine(ys, handles, weights, [None, bias])
    assert combined_weights is not None
    for got, expected in zip([*combined, combined_weights[0]], [torch.zeros(n, 16), bias, torch.zeros(n, 3)]):
        assert torch.equal(got, expected)
    q, scales = ep.quantize_fp8(torch.zeros(n, 256), ue8m0=True)
    assert (q.shape, scales.shape) == ((n, 256), (n, 1))
    assert torch.equal(ep.dequantize_fp8(q, scales, torch.float32), torch.zeros(n, 256))


def good() -> dict:
    """Arguments of a dispatch on two ranks with three tokens each."""
    return {
        "xs": [torch.zeros(3, 16) for _ in range(2)],
        "topk_idxs": [torch.tensor([[0, 3], [1, -1], [2, 3]]) for _ in range(2)],
        "topk_weights": [torch.ones(3, 2) for _ in range(2)],
        "num_experts": 4,
    }


FP8 = (torch.zeros(3, 128, dtype=torch.float8_e4m3fn), torch.ones(3, 1))
DISPATCH_ERRORS = [
    ({"num_experts": 5}, ValueError, "5 experts, needs a positive multiple of the 2 ranks"),
    ({"xs": []}, ValueError, "0 ranks, needs at least 1"),
    ({"xs": [torch.zeros(3, 16)] * 3, "num_experts": 6}, ValueError, "topk_idxs has 2 entries, xs has 3"),
    ({"xs": [torch.zeros(3, 16), torch.zeros(3, 8)]}, ValueError, r"x\[1\] has shape \(3, 8\), needs \(3, 16\)"),
    ({"xs": [torch.zeros(3, 16), torch.zeros(3, 16).half()]}, TypeError, r"x\[1\] is torch.float16"),
    ({"xs": [torch.zeros(2, 16)] * 2}, ValueError, r"topk_idx\[0\] has shape \(3, 2\), needs \(2, 2\)"),
    ({"xs": [FP8, torch.zeros(3, 128)]}, TypeError, "pair on 1 of 2 ranks"),
    ({"xs": [(torch.zeros(3, 128), FP8[1])] * 2}, TypeError, "x.0. is torch.float32, supported torch.float8_e4m3fn"),
    ({"xs": [(FP8[0], FP8[1].double())] * 2}, TypeError, "scales are torch.float64, supported torch.float32"),
    ({"xs": [(FP8[0], FP8[1][:2])] * 2}, ValueError, r"scales\[0\] has shape \(2, 1\), needs \(3, 1\)"),
    ({"topk_idxs": [torch.zeros(3, 2)] * 2}, TypeError, "topk_idx is torch.float32, supported torch.int64|torch.int32"),
    ({"topk_idxs": [torch.zeros(3, 33).long()] * 2}, ValueError, r"shape \(3, 33\), needs \(n, k\) with k 1..32"),
    ({"topk_weights": [torch.ones(3, 1)] * 2}, ValueError, r"topk_weights\[0\] has shape \(3, 1\), needs \(3, 2\)"),
    ({"topk_weights": [torch.ones(3, 2).half()] * 2}, TypeError, "supported torch.float32; cast it"),
    ({"expert_alignment": 0}, ValueError, "expert_alignment 0, needs >= 1"),
    ({"num_worst_tokens": -1}, ValueError, "num_worst_tokens -1, needs >= 0"),
    ({"num_worst_tokens": 3}, ValueError, "rank 0 receives 4 tokens, num_worst_tokens is 3; pass at least"),
]


@pytest.mark.parametrize(("change", "error", "message"), DISPATCH_ERRORS)
def test_dispatch_errors(change, error, message):
    with pytest.raises(error, match="^ep_dispatch: .*" + message):
        ep.dispatch(**(good() | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ys": [torch.zeros(4, 16)]}, ValueError, "ys has 1 entries, handles has 2"),
        ({"ys": [torch.zeros(4, 16), torch.zeros(5, 16)]}, ValueError, r"ys\[1\] has shape \(5, 16\), needs \(4, 16\)"),
        ({"ys": [torch.zeros(4, 16).double()] * 2}, TypeError, r"ys\[0\] is torch.float64, supported torch.bfloat16"),
        ({"topk_weights": [torch.zeros(3, 2)] * 2}, ValueError, r"topk_weights\[0\] has shape \(3, 2\)"),
        ({"topk_weights": [torch.zeros(4, 2).half()] * 2}, TypeError, "supported torch.float32"),
        ({"bias": [None]}, ValueError, "bias has 1 entries"),
        ({"bias": [None, torch.zeros(3, 8)]}, ValueError, r"bias\[1\] has shape \(3, 8\), needs \(3, 16\)"),
        (
            {"bias": [torch.zeros(3, 16).half(), None]},
            TypeError,
            r"bias\[0\] is torch.float16, supported torch.float32",
        ),
    ],
)
def test_combine_errors(change, error, message):
    handles = [r.handle for r in ep.dispatch(**good())]
    with pytest.raises(error, match="^ep_combine: .*" + message):
        ep.combine(**({"ys": [torch.zeros(4, 16)] * 2, "handles": handles} | change))


def test_other_errors():
    handles = [r.handle for r in ep.dispatch(**good())]
    with pytest.raises(ValueError, match=r"ep_dispatch: x\[0\] has shape \(2, 16\), needs \(3, 16\)"):
        ep.dispatch_cached([torch.zeros(2, 16)] * 2, handles)
    with pytest.raises(ValueError, match=r"is_token_in_rank\[0\] has shape \(3, 2\), needs \(n, 1\) for 1 ranks"):
        ep.make_handles([handles[0].is_token_in_rank])
    with pytest.raises(ValueError, match="scales cover 128 columns, x has 256"):
        ep.dequantize_fp8(torch.zeros(1, 256, dtype=torch.float8_e4m3fn), torch.ones(1, 1))
    with pytest.raises(TypeError, match=r"scales are torch\.bfloat16"):
        ep.dequantize_fp8(FP8[0], FP8[1].bfloat16())
