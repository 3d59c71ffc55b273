"""The reference of MLA decode against a brute force in float64 that shares no code with it."""

from __future__ import annotations

import math

import pytest
import torch

from tests.mla_cases import HEAD_PAIRS, LSE_TOLERANCE, OUT_TOLERANCE, MlaCase, MlaInputs, build_inputs, matrix, mismatch

NEG_INF = -math.inf


@pytest.fixture(autouse=True)
def _one_thread():
    """The tensors are small: with a thread per core, a busy machine spends its time in the threads' barriers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def brute_force(inputs: MlaInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention one query token at a time, keys fetched one token at a time, in float64."""
    case, q = inputs.case, inputs.q.double()
    lengths, table = inputs.cache_seqlens.tolist(), inputs.block_table.tolist()
    cache = inputs.k_cache.double()
    starts = inputs.cu_seqlens_q.tolist() if inputs.cu_seqlens_q is not None else None
    rows = q if starts else q.reshape(-1, case.h_q, 576)
    out = torch.zeros(rows.shape[0], case.h_q, 512, dtype=torch.float64)
    lse = torch.full(rows.shape[:2], math.nan, dtype=torch.float64)
    for i, length in enumerate(lengths):
        first, tokens = (starts[i], starts[i + 1] - starts[i]) if starts else (i * case.s_q, case.s_q)
        keys = torch.zeros(length, case.h_kv, 576, dtype=torch.float64)
        for j in range(length):
            keys[j] = cache[table[i][j // case.page], j % case.page]
        for t in range(first, first + tokens):
            seen = max(length - (first + tokens - 1 - t), 0) if case.causal else length
            if not seen:
                lse[t] = NEG_INF if case.empty_lse_neg_inf else math.inf
                continue
            per_group = rows[t].view(case.h_kv, case.h_q // case.h_kv, 576)
            scores = torch.einsum("jgd,ghd->ghj", keys[:seen], per_group) * inputs.softmax_scale
            top = scores.max(-1, keepdim=True).values
            weights = (scores - top).exp()
            total = weights.sum(-1, keepdim=True)
            lse[t] = (top + total.log()).flatten()
            out[t] = torch.einsum("ghj,jgd->ghd", weights / total, keys[:seen, :, :512]).flatten(0, 1)
            if inputs.attn_sink is not None:
                out[t] /= (1 + (inputs.attn_sink.double() - lse[t]).exp())[:, None]
    if starts:
        return out, lse.t()
    return out.view(case.b, case.s_q, case.h_q, 512), lse.view(case.b, case.s_q, case.h_q).transpose(1, 2)


def check(case: MlaCase) -> None:
    inputs = build_inputs(case)
    out, lse = inputs.decode()
    expected_out, expected_lse = brute_force(inputs)
    found = (
        mismatch("out", out.double(), expected_out, OUT_TOLERANCE),
        mismatch("lse", lse.double(), expected_lse, LSE_TOLERANCE),
    )
    assert not any(found), f"{found} in {case}"


@pytest.mark.parametrize("pair", HEAD_PAIRS, ids=str)
def test_matrix(pair):
    for case in matrix((1, 2, 6) if pair[0] <= 9 else (1, 2), (1, 2, 4), (20, 140), (pair,)):
        check(case)


@pytest.mark.parametrize(
    "case",
    [
        MlaCase(8, 1, 0, 3, lengths=(0, 1, 63, 64, 65, 127, 128, 129)),
        MlaCase(8, 1, 0, 3, lengths=(0, 1, 63, 64, 65, 127, 128, 129), empty_lse_neg_inf=True),
        MlaCase(4, 4, 0, 2, causal=True, lengths=(0, 1, 3, 4)),
        MlaCase(3, 2, 50, 4, h_kv=2, page=16, varlen=True),
        MlaCase(3, 2, 50, 4, h_kv=2, page=32, varlen=True, causal=True),
        MlaCase(3, 2, 200, 4, page=128, varlen=True),
        MlaCase(3, 2, 70, 5, dtype=torch.float16, varlen=True),
        MlaCase(3, 2, 70, 5, sink=True, zero_fraction=0.5, seed=3),
        MlaCase(4, 4, 70, 5, tokens_q=(0, 1, 4, 2), varlen=True),
        MlaCase(4, 4, 70, 6, h_kv=2, tokens_q=(3, 0, 4, 2), lengths=(0, 9, 2, 70), causal=True, sink=True),
        MlaCase(3, 2, 70, 6, h_kv=2, strided=True, varlen=True, causal=True),
        MlaCase(2, 1, 70, 4, score_scale=3000.0),
    ],
    ids=str,
)
def test_additions(case):
    check(case)


def test_every_visible_row_counts():
    """The comparator sees one wrong key among many, so a kernel that skips one cannot pass."""
    inputs = build_inputs(MlaCase(1, 1, 140, 4))
    shorter = build_inputs(MlaCase(1, 1, 140, 4))
    shorter.cache_seqlens.sub_(1)
    out, lse = inputs.decode()
    fewer_out, fewer_lse = shorter.decode()
    assert mismatch("out", fewer_out, out, OUT_TOLERANCE)
    assert mismatch("lse", fewer_lse, lse, LSE_TOLERANCE)


def test_comparator_rejects_what_it_should():
    good = torch.tensor([1.0, 2.0, math.inf])
    assert mismatch("x", good, good.clone(), LSE_TOLERANCE) == ""
    assert "NaN/inf" in mismatch("x", good, torch.tensor([1.0, 2.0, NEG_INF]), LSE_TOLERANCE)
    assert "NaN/inf" in mismatch("x", torch.tensor([1.0, math.nan, math.inf]), good, LSE_TOLERANCE)
    assert "1 of 3 values" in mismatch("x", torch.tensor([1.0, 2.1, math.inf]), good, LSE_TOLERANCE)
    assert "expected" in mismatch("x", good.half(), good, LSE_TOLERANCE)
    close = good + torch.tensor([1e-5, 0.0, 0.0])
    assert mismatch("x", close, good, LSE_TOLERANCE) == ""
