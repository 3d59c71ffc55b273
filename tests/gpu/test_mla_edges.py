"""MLA decode kernels at the edges: block and page boundaries, every piece count, strides, sinks, ragged queries."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch

from tests.mla_cases import HEAD_PAIRS, MlaCase, blocks_by_pieces, build_inputs, failures

pytestmark = pytest.mark.gpu

BOUNDARIES = (0, 1, 63, 64, 65, 127, 128, 129)
DTYPES = (torch.bfloat16, torch.float16)
PAGES = (16, 32, 64, 128)


def check(*cases: MlaCase) -> None:
    found = []
    for case in cases:
        inputs = build_inputs(case, "cuda")
        found += failures(inputs, inputs.decode())
    assert not found, "\n".join(found)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("s_q", [1, 2, 4])
def test_lengths_around_blocks(s_q, causal):
    base = MlaCase(len(BOUNDARIES), s_q, 0, 16, lengths=BOUNDARIES, causal=causal)
    alone = [replace(base, b=1, lengths=(n,), h_q=h) for n in BOUNDARIES for h in (1, 64, 128)]
    together = [replace(base, h_q=h, page=page) for h in (1, 16, 64, 128) for page in PAGES]
    check(*alone, *together)


@pytest.mark.parametrize("h_q", [1, 16, 64, 128])
def test_causal_tokens_that_see_nothing(h_q):
    lengths = (0, 1, 2, 3, 4, 5, 64, 66)
    check(
        *(
            MlaCase(8, s_q, 0, h_q, lengths=lengths, causal=True, empty_lse_neg_inf=n)
            for s_q in (2, 4, 8)
            for n in (0, 1)
        )
    )


@pytest.mark.parametrize("h_q", [16, 64, 128])
def test_one_long_among_many_short(h_q):
    lengths = (*(100 + 7 * i for i in range(40)), 60000, *(i for i in range(20)))
    check(MlaCase(61, 1, 0, h_q, lengths=lengths), MlaCase(61, 2, 0, h_q, lengths=lengths[::-1], causal=True))


@pytest.mark.parametrize("h_q", [16, 128])
def test_every_piece_count(h_q):
    free = [MlaCase(1, 1, 0, h_q, lengths=(64 * n - n % 3,)) for n in blocks_by_pieces(h_q).values()]
    short = [
        MlaCase(1, 1, 0, h_q, lengths=(64 * n - n % 3,), split_tokens=64) for n in (*range(1, 9), *range(9, 133, 7))
    ]
    check(*free, *short)


def test_long_single_sequence():
    check(*(MlaCase(1, s_q, 65536, h_q, causal=True) for s_q, h_q in ((1, 16), (1, 128), (2, 128), (4, 128))))


@pytest.mark.parametrize("h_q", [2, 8, 16, 32, 48, 96])
def test_other_head_counts(h_q):
    check(*(MlaCase(5, s_q, 600, h_q, varlen=True, causal=True) for s_q in (1, 2, 3, 5)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page", PAGES)
def test_pages_and_dtypes(page, dtype):
    base = MlaCase(6, 2, 900, 64, varlen=True, causal=True, page=page, dtype=dtype)
    check(*(replace(base, h_q=h_q, h_kv=h_kv) for h_q, h_kv in HEAD_PAIRS), replace(base, s_k=20), replace(base, b=64))


@pytest.mark.parametrize(("h_q", "h_kv"), [(16, 1), (128, 1), (128, 8), (9, 3)])
@pytest.mark.parametrize("s_q", [1, 2])
def test_strided_views(s_q, h_q, h_kv):
    base = MlaCase(5, s_q, 500, h_q, h_kv, varlen=True, causal=True, strided=True)
    check(*(replace(base, page=page, dtype=dtype) for page in PAGES for dtype in DTYPES))


@pytest.mark.parametrize("offset", [1, 4])
def test_q_that_tma_cannot_read(offset):
    """Strides or an address off the 16-byte grid: q is copied, the result is the same."""
    inputs = build_inputs(MlaCase(5, 2, 300, 16, varlen=True), "cuda")
    expected = inputs.decode()
    wide = inputs.q.new_full((*inputs.q.shape[:-1], 576 + offset), math.nan)
    wide[..., offset:] = inputs.q
    actual = replace(inputs, q=wide[..., offset:]).decode()
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("h_q", [1, 16, 64, 128])
def test_attn_sink(h_q):
    base = MlaCase(8, 2, 700, h_q, varlen=True, causal=True, sink=True, zero_fraction=0.3)
    check(base, replace(base, b=1, s_k=8000), replace(base, split_tokens=128), replace(base, seed=5))


def test_constant_sinks():
    inputs = build_inputs(MlaCase(3, 1, 5000, 16, sink=True), "cuda")
    plain = replace(inputs, attn_sink=None).decode()
    inputs.attn_sink.fill_(-math.inf)
    without_effect = inputs.decode()
    assert torch.equal(without_effect[0], plain[0])
    inputs.attn_sink.fill_(math.inf)
    nothing_left = inputs.decode()
    assert not nothing_left[0].any()
    assert torch.equal(nothing_left[1], plain[1])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("h_q", "h_kv"), [(4, 1), (24, 8), (16, 1), (128, 1), (126, 3), (128, 8)])
def test_ragged(h_q, h_kv, causal):
    base = MlaCase(6, 4, 600, h_q, h_kv, varlen=True, causal=causal, tokens_q=(1, 0, 4, 2, 3, 0))
    short = replace(base, lengths=(0, 5, 3, 1, 64, 0))
    check(base, short, replace(base, sink=True, page=16), replace(base, split_tokens=64), replace(base, strided=True))
    check(replace(base, b=1, tokens_q=(3,), s_k=9000), replace(base, b=2, tokens_q=(0, 0)))


def test_ragged_with_rows_of_no_sequence():
    """A q padded at its end, as a captured graph has it: the padding may be NaN and does not leak."""
    inputs = build_inputs(MlaCase(3, 4, 600, 16, varlen=True, tokens_q=(4, 1, 2)), "cuda")
    padding = inputs.q.new_full((5, *inputs.q.shape[1:]), math.nan)
    out, lse = replace(inputs, q=torch.cat([inputs.q, padding])).decode()
    assert not failures(inputs, (out[:7].clone(), lse[:, :7].clone()))


@pytest.mark.parametrize("h_q", [16, 128])
def test_large_scores(h_q):
    cases = [MlaCase(4, 1, 900, h_q, varlen=True, score_scale=scale) for scale in (30.0, 3000.0)]
    check(*cases, *(replace(case, split_tokens=64) for case in cases))


def test_scores_far_below_zero():
    """Every score near -1e3: a running maximum that starts at 0 would lose them all."""
    inputs = build_inputs(MlaCase(2, 1, 900, 16), "cuda")
    inputs.q.fill_(1.0)
    inputs.k_cache.nan_to_num_().abs_().neg_().clamp_(max=-0.05).mul_(500)
    _, lse = inputs.decode()
    assert lse.max() < -300
    assert not failures(inputs, inputs.decode())


# many pieces, and two that CTAs merge among themselves
CUT = (MlaCase(2, 1, 5000, 16), MlaCase(2, 2, 5000, 64), MlaCase(64, 1, 1024, 64), MlaCase(33, 1, 1024, 128))


@pytest.mark.parametrize("case", CUT, ids=str)
def test_values_of_any_size(case):
    """Partial results are fp16 with a power of two for each row, so scaling by one shows in no other bit."""
    inputs = build_inputs(case, "cuda")
    assert (inputs.plan()[1].diff() > 1).all()
    out, lse = inputs.decode()
    q, k = inputs.q.clone(), inputs.k_cache.clone()
    for exponent in (-90, -20, 20, 90):
        inputs.k_cache.copy_(k * 2.0**exponent)
        inputs.q.copy_(q * 2.0**-exponent)
        scaled, same = inputs.decode()
        assert torch.equal(scaled, out * 2.0**exponent)
        assert torch.equal(same, lse)


@pytest.mark.parametrize("case", CUT, ids=str)
def test_one_column_far_larger_than_the_others(case):
    """fp16 reaches 2^-39 of the largest value: values 2^20 below it keep their digits, those far below them some."""
    inputs = build_inputs(case, "cuda")
    inputs.q[..., 7] = 0
    expected, _ = inputs.decode()
    inputs.k_cache[..., 7] *= 2.0**20
    out, _ = inputs.decode()
    expected[..., 7] *= 2.0**20
    usual = expected.abs().float().median().item()
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-18 * usual)


@pytest.mark.parametrize("tokens_q", [None, (2, 0, 1)], ids=["even", "ragged"])
def test_every_output_element_is_written(tokens_q):
    for lengths, h_q in itertools.product([(0, 0, 0), (1, 0, 100), (9000, 64, 0)], (3, 16, 64, 128)):
        inputs = build_inputs(MlaCase(3, 2, 0, h_q, lengths=lengths, tokens_q=tokens_q, causal=True), "cuda")
        expected = inputs.reference()
        out, lse = (torch.full_like(t, math.nan) for t in expected)
        torch.ops.cutehop.mla_decode_out(*inputs.arguments(), **inputs.options(), out=out, lse=lse)
        assert not failures(inputs, (out, lse), expected)


def test_empty_inputs():
    check(MlaCase(0, 2, 100, 16), MlaCase(3, 1, 0, 16, lengths=(0, 0, 0)), MlaCase(2, 3, 9, 16, tokens_q=(0, 0)))
    inputs = build_inputs(MlaCase(2, 1, 0, 16, lengths=(0, 0)), "cuda")
    out, lse = replace(inputs, block_table=inputs.block_table[:, :0]).decode()
    assert not out.any()
    assert lse.isposinf().all()


def random_case(rng: random.Random) -> MlaCase:
    """Any combination of options that is legal."""
    h_q, h_kv = rng.choice((*HEAD_PAIRS, (16, 1), (32, 2), (16, 16), (128, 128)))
    b, s_q = rng.choice((1, 2, 7, 33, 140)), rng.choice((1, 1, 2, 3, 7))
    tokens_q = tuple(rng.randint(0, s_q) for _ in range(b)) if rng.random() < 0.3 else None
    return MlaCase(
        b=b,
        s_q=s_q,
        s_k=rng.choice((1, 30, 200, 1500)),
        h_q=h_q,
        h_kv=h_kv,
        varlen=rng.random() < 0.7,
        causal=rng.random() < 0.5,
        page=rng.choice(PAGES),
        dtype=rng.choice(DTYPES),
        tokens_q=tokens_q,
        zero_fraction=rng.choice((0.0, 0.2)),
        sink=rng.random() < 0.3,
        split_tokens=rng.choice((0, 0, 64, 192, 1024)),
        strided=rng.random() < 0.3,
        score_scale=rng.choice((1.0, 1.0, 100.0)),
        empty_lse_neg_inf=rng.random() < 0.3,
        seed=rng.randrange(1 << 30),
    )


@pytest.mark.parametrize("seed", range(20))
def test_random_combinations(seed):
    rng = random.Random(seed)
    check(*(random_case(rng) for _ in range(15)))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_cache_of_more_than_2_to_31_elements(page):
    inputs = build_inputs(MlaCase(4, 2, 3000, 64, varlen=True, causal=True, page=page), "cuda")
    expected = inputs.reference()
    first = (1 << 31) // (page * 576) + 1
    big = inputs.k_cache.new_full((first + inputs.k_cache.shape[0], page, 1, 576), math.nan)
    big[first:] = inputs.k_cache
    table = torch.where(inputs.block_table < first, inputs.block_table + first, inputs.block_table)
    far = replace(inputs, k_cache=big, block_table=table)
    assert not failures(far, far.decode(), expected)


@pytest.mark.slow
def test_q_of_more_than_2_to_31_elements():
    inputs = build_inputs(MlaCase(30000, 1, 40, 128), "cuda")
    out, lse = inputs.decode()
    last = slice(-64, None)  # the float64 comparison of all of it would not fit the GPU
    tail = replace(
        inputs, q=inputs.q[last], block_table=inputs.block_table[last], cache_seqlens=inputs.cache_seqlens[last]
    )
    assert not failures(tail, (out[last], lse[last]))
