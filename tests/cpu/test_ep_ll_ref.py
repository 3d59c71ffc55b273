"""The low-latency reference against loops that follow its docstring, and LogFMT against its formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cutehop.ref import ep, ep_ll
from tests.ep_ll_cases import CASES, FORMATS, LlCase, LlInputs, same_bits

MASKED = [
    LlCase(ranks=3, masked=((0, 1),)),
    LlCase(ranks=4, tokens=(16,), masked=((0, 1), (1, 0), (3, 2)), spare_topk=2),
]


def expected_rows(case: LlCase, inputs: LlInputs, expert: int) -> list[tuple[int, int, int]]:
    """(source, token, choice) of every row of an expert, counted through the group."""
    home = expert // case.local_experts
    return [
        (source, token, choice)
        for source, idx in enumerate(inputs.topk_idx)
        if not {(source, home), (home, source)} & set(case.masked)
        for token, chosen in enumerate(idx.tolist())
        for choice, id_ in enumerate(chosen)
        if id_ == expert
    ]


@pytest.mark.parametrize("case", [replace(case, ranks=ranks) for case in CASES for ranks in (1, 3)] + MASKED, ids=str)
def test_dispatch(case):
    inputs = LlInputs(case)
    options = {name: value for name, value in FORMATS[case.rows].items() if name != "use_fp8"}
    for expert in range(case.experts):
        got, local = inputs.received[expert // case.local_experts], expert % case.local_experts
        want = expected_rows(case, inputs, expert)
        count = len(want)
        assert count <= case.ranks * case.max_tokens
        assert got.recv_count[local] == count
        assert got.handle.src_info[local, :count].tolist() == [token for _, token, _ in want]
        slots = [(source * case.max_tokens + token) * case.max_topk + choice for source, token, choice in want]
        assert got.handle.send_slot[local, :count].tolist() == slots
        rows = [got.handle.choice_rows[source * case.max_tokens + token, choice] for source, token, choice in want]
        assert rows == [local * case.ranks * case.max_tokens + row for row in range(count)]
        for source, packed in enumerate(got.handle.layout_range[local].tolist()):
            rows = [row for row, (s, _, _) in enumerate(want) if s == source]
            assert packed % 2**32 == len(rows)
            assert not rows or packed >> 32 == rows[0]
        if not want:
            continue
        x = torch.stack([inputs.xs[source][token] for source, token, _ in want])
        if case.rows == "bf16":
            assert got.recv_scales is None
            assert same_bits(got.recv_x[local, :count], x)
        else:
            q, scales = ep_ll.quantize(x, **options)
            assert same_bits(got.recv_x[local, :count], q)
            assert same_bits(got.recv_scales[local, :count], scales)
    for got in inputs.received:
        assert got.handle.choice_rows.shape == (case.ranks * case.max_tokens, case.max_topk)
        assert (got.handle.choice_rows >= 0).sum() == got.recv_count.sum(), "all other places hold -1"
        assert got.handle.choice_rows.min() >= -1


def test_choice_rows():
    """Two ranks of two experts, T = 2, up to 3 choices: rank 0 sees rows 0 to 3 of expert 0, 4 to 7 of expert 1."""
    ids = [torch.tensor([[1, 2], [3, -1]]), torch.tensor([[0, 1]])]
    zero, one = (handle.choice_rows.tolist() for handle in ep_ll.make_handles(ids, 4, 2, max_topk=3))
    none = [-1, -1, -1]
    assert zero == [[4, -1, -1], none, [0, 5, -1], none]
    assert one == [[-1, 0, -1], [4, -1, -1], none, none]
    zero, one = (handle.choice_rows.tolist() for handle in ep_ll.make_handles(ids, 4, 2, masked=[(0, 1)]))
    assert zero == [[4, -1], *[[-1, -1]] * 3]
    assert one == [[-1, -1]] * 4


@pytest.mark.parametrize("case", [replace(case, ranks=2) for case in CASES] + MASKED, ids=str)
def test_combine(case):
    """Adding one row after the other, rank by rank, with a rounding after every step, ends at the same bits."""
    inputs = LlInputs(case)
    rows = {}
    for expert in range(case.experts):
        for row, (source, token, _) in enumerate(expected_rows(case, inputs, expert)):
            rows[source, token, expert] = inputs.ys[expert // case.local_experts][expert % case.local_experts, row]
    for rank, got in enumerate(inputs.combined()):
        assert got.shape == (case.count(rank), case.hidden)
        for token, chosen in enumerate(inputs.topk_idx[rank].tolist()):
            total = torch.zeros(case.hidden)
            for first in range(0, case.experts, case.local_experts):
                part = torch.zeros(case.hidden)
                for weight, expert in zip(inputs.topk_weights[rank][token], chosen):
                    if first <= expert < first + case.local_experts and (rank, token, expert) in rows:
                        part = part + weight * rows[rank, token, expert].float()
                total = total + part
            assert same_bits(got[token], total.bfloat16())


@pytest.mark.parametrize(
    ("chosen", "values", "want"),
    [
        # Choices 0 and 2 are on rank 0: (2^24 - 2^24) + 1. In the order of the choices: 2^24 + 1 is rounded to 2^24.
        ([0, 3, 1], [2.0**24, 1.0, -(2.0**24)], 1.0),
        # Ranks ascending: (2^24 + 1) - 2^24, the first sum rounded. As they come: (2^24 - 2^24) + 1.
        ([0, 6, 3], [2.0**24, -(2.0**24), 1.0], 0.0),
        # On a rank in the order of the choices: (2^24 + 1) - 2^24. In that of the experts: (1 - 2^24) + 2^24 = 1.
        ([5, 3, 4], [2.0**24, 1.0, -(2.0**24)], 0.0),
        # From +0.
        ([0, -1, 8], [-0.0, 1.0, -0.0], 0.0),
    ],
)
def test_order_of_the_sum(chosen, values, want):
    """One token of rank 0, three ranks of three experts."""
    ids = [torch.tensor([chosen]), *[torch.empty((0, 3), dtype=torch.int64)] * 2]
    ys = [torch.zeros(3, 3, 128).bfloat16() for _ in range(3)]
    for expert, value in zip(chosen, values):
        if expert >= 0:
            ys[expert // 3][expert % 3, 0] = value
    weights = [torch.ones(idx.shape) for idx in ids]
    got = ep_ll.combine(ys, ep_ll.make_handles(ids, 9, 1), ids, weights, 9, 1)
    assert same_bits(got[0], torch.full((1, 128), want).bfloat16())
    assert [each.shape for each in got[1:]] == [(0, 128)] * 2


def test_quantize():
    x = torch.randn(5, 640, generator=torch.Generator().manual_seed(0)).bfloat16() * 37
    q, scales = ep_ll.quantize(x)
    assert all(same_bits(a, b) for a, b in zip((q, scales), ep.quantize_fp8(x)))
    rounded, powers = ep_ll.quantize(x, round_scale=True)
    assert same_bits(powers, 2.0 ** scales.log2().ceil())
    packed_q, packed = ep_ll.quantize(x, round_scale=True, use_ue8m0=True)
    assert same_bits(packed_q, rounded)
    exponents = packed.view(torch.uint8).int()
    assert torch.equal(exponents[:, :5], powers.log2().int() + 127)
    assert not exponents[:, 5:].any()
    assert same_bits(ep_ll.quantize(x, use_ue8m0=True)[1], packed)
    for data, scale in ((q, scales), (rounded, powers), (packed_q, packed)):
        error = (ep.dequantize_fp8(data, scale, torch.float32) - x.float()).abs()
        assert (error <= x.float().abs() * 2**-4 + 37e-3).all()


GOOD = {"xs": [torch.zeros(3, 128).bfloat16()] * 2, "topk_idxs": [torch.tensor([[0, 3]] * 3)] * 2, "num_experts": 4}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_experts": 5}, ValueError, "5 experts, needs a positive multiple of the 2 ranks"),
        ({"xs": [torch.zeros(3, 100).bfloat16()] * 2}, ValueError, "hidden 100"),
        ({"xs": [torch.zeros(3, 128)] * 2}, TypeError, r"xs\[0\] is torch.float32"),
        ({"xs": [torch.zeros(3, 128).bfloat16(), torch.zeros(3, 256).bfloat16()]}, ValueError, r"xs\[1\] has shape"),
        ({"topk_idxs": [torch.zeros(3, 17).long()] * 2}, ValueError, "17 choices per token"),
        ({"topk_idxs": [torch.tensor([[1, 1]] * 3)] * 2}, ValueError, "rank 0 chooses an expert twice"),
        ({"topk_idxs": [torch.tensor([[0.0, 1]] * 3)] * 2}, TypeError, "topk_idxs"),
        ({"topk_idxs": [torch.tensor([[0, 3]] * 3)]}, ValueError, "2 xs, 1 topk_idxs"),
        ({"max_tokens": 2}, ValueError, "3 tokens on rank 0, max_tokens is 2"),
    ],
)
def test_bad_arguments_raise(changes, error, message):
    with pytest.raises(error, match=message):
        ep_ll.dispatch(**{**GOOD, "max_tokens": 4, **changes})


def test_bad_arguments_of_combine_raise():
    inputs = LlInputs(LlCase())
    handles = [got.handle for got in inputs.received]
    good = (inputs.ys, handles, inputs.topk_idx, inputs.topk_weights, 8, 16)
    with pytest.raises(ValueError, match="handles has 1 entries, ys has 2"):
        ep_ll.combine(good[0], handles[:1], *good[2:])
    with pytest.raises(ValueError, match=r"ys\[0\] has shape"):
        ep_ll.combine(*good[:5], 17)
    with pytest.raises(TypeError, match=r"topk_weights\[0\] is torch.float64"):
        ep_ll.combine(*good[:3], [w.double() for w in inputs.topk_weights], 8, 16)


def test_repeated_choices():
    def repeated(*ids: int) -> bool:
        return ep_ll.has_repeated_choice(torch.tensor([[0, 1, 2, 3], ids]), 4)

    assert repeated(3, 1, 0, 3)
    assert not repeated(-1, 2, -1, 0)
    assert not repeated(7, 2, 7, 0)


def logfmt_of_one(values: torch.Tensor) -> tuple[list[int], list[float]]:
    """Codes and decoded magnitudes of 128 values, by the formulas, in double precision."""
    magnitudes = values.double().abs().tolist()
    la = math.log2(max(magnitudes))
    li = max(math.log2(min(magnitudes)) if min(magnitudes) else -math.inf, la - 32)
    step = (la - li) / 510
    rounding = 2 - math.log2((1 + 2**step) / 2) / step
    codes = [math.floor(max((math.log2(m) / step if m else -math.inf) + rounding - li / step, 0)) for m in magnitudes]
    return codes, [2 ** ((code - 1) * step + li) if code else 0.0 for code in codes]


def random_rows(n: int, hidden: int, scale: float = 0.1) -> torch.Tensor:
    return (torch.randn(n, hidden, generator=torch.Generator().manual_seed(hidden)) * scale).bfloat16()


def unpacked(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and signs, (n, H), from the bytes as one little-endian number per 16 values."""
    numbers = [[int.from_bytes(bytes(unit), "little") for unit in row] for row in packed.tolist()]
    codes = [[number >> 9 * j & 511 for number in row for j in range(16)] for row in numbers]
    signs = [[number >> 144 + j & 1 for number in row for j in range(16)] for row in numbers]
    return torch.tensor(codes), torch.tensor(signs)


@pytest.mark.parametrize("spread", [1.0, 2.0**-40])
def test_logfmt_codes(spread):
    """Two groups, the second with a zero and magnitudes so small that they become 0."""
    x = random_rows(3, 256)
    x[:, 128] = 0
    x[:, 129] *= spread
    limits, packed = ep_ll.logfmt_encode(x)
    codes, signs = unpacked(packed)
    values = ep_ll.logfmt_decode(limits, packed, x)
    assert torch.equal(signs, (x < 0).long())
    for row in range(3):
        for group in (slice(0, 128), slice(128, 256)):
            want_codes, want = logfmt_of_one(x[row, group])
            # In single precision a value between two codes may go to either.
            assert (codes[row, group] - torch.tensor(want_codes)).abs().max() <= 1
            assert (codes[row, group] != torch.tensor(want_codes)).sum() <= 2
            decoded = torch.tensor(want).where(x[row, group] >= 0, -torch.tensor(want))
            same = codes[row, group] == torch.tensor(want_codes)
            torch.testing.assert_close(values[row, group][same], decoded[same].float(), rtol=1e-5, atol=0)
    assert (codes[:, :128].amax(1) == 511).all()
    assert (codes[:, :128].amin(1) == 1).all()
    assert (codes[:, 128] == 0).all()
    assert (limits[:, :, 0] == x.view(3, 2, 128).abs().amax(2)).all()
    assert (limits[:, :, 1] == x.view(3, 2, 128).abs().amin(2)).all()


@pytest.mark.parametrize("hidden", [128, 384, 512, 1024, 1536, 7168])
def test_logfmt_accuracy(hidden):
    x = random_rows(16, hidden)
    limits, packed = ep_ll.logfmt_encode(x)
    assert packed.shape == (16, hidden // 16, 20)
    assert ep_ll.logfmt_applies(limits).all()
    got = ep_ll.logfmt_decode(limits, packed, x)
    assert ((got - x.float()).abs() <= 0.016 * x.float().abs()).all()
    a, b = got.double() + 1, x.double() + 1
    assert 1 - 2 * (a * b).sum() / (a * a + b * b).sum() < 1e-6


@pytest.mark.parametrize(("hidden", "chunk"), [(1024, 1024), (1536, 512), (768, 256), (384, 128)])
@pytest.mark.parametrize("why", ["large", "equal", "zero"])
def test_logfmt_leaves_chunks_as_they_are(hidden, chunk, why):
    """One group that cannot be encoded takes its chunk with it and no other."""
    x = random_rows(2, hidden)
    x[1, 0:128] = {"large": 1.0, "equal": 0.25, "zero": 0.0}[why]
    x[1, 1] *= -1
    if why == "large":
        x[1, 2:128] *= torch.linspace(0.1, 0.9, 126).bfloat16()
    limits, packed = ep_ll.logfmt_encode(x)
    want = torch.ones(2, hidden // chunk, dtype=torch.bool)
    want[1, 0] = False
    assert torch.equal(ep_ll.logfmt_applies(limits), want)
    got = ep_ll.logfmt_decode(limits, packed, x)
    assert torch.equal(got[1, :chunk], x[1, :chunk].float())
    assert not torch.equal(got[0], x[0].float())
    assert torch.isfinite(got).all()
