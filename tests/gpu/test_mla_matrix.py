"""FlashMLA's dense correctness matrix, kernels against the fp32 reference on the same GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.mla_cases import HEAD_PAIRS, MlaCase, build_inputs, failures, matrix

pytestmark = pytest.mark.gpu


def check_with_and_without_causal(case: MlaCase) -> list[str]:
    """Failures of a case under both masks; inputs and plan are shared, the plan does not depend on the mask."""
    inputs = build_inputs(case, "cuda")
    plan = inputs.plan()
    found = []
    for causal in (False, True):
        masked = replace(inputs, case=replace(case, causal=causal))
        found += failures(masked, masked.decode(plan))
    return found


@pytest.mark.parametrize("b", [1, 2, 6, 64])
@pytest.mark.parametrize("pair", HEAD_PAIRS, ids=str)
def test_matrix(pair, b):
    found = [
        text for case in matrix((b,), pairs=(pair,)) if not case.causal for text in check_with_and_without_causal(case)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("pair", HEAD_PAIRS, ids=str)
def test_many_empty_sequences(pair):
    found = check_with_and_without_causal(MlaCase(128, 2, 4096, *pair, varlen=True, zero_fraction=0.5))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("s_q", [1, 2])
@pytest.mark.parametrize("s_k", [8192, 32768])
def test_large_batches(s_k, s_q):
    found = check_with_and_without_causal(MlaCase(64, s_q, s_k, 128, varlen=True))
    assert not found, "\n".join(found)
