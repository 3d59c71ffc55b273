"""Plans that are not of their call: every call ends, says what was wrong at the next one, and spoils none after it."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cutehop.cute_kernels.mla import config as cfg
from cutehop.ref import mla_plan as planner
from tests.mla_cases import MlaCase, MlaInputs, build_inputs, failures

pytestmark = pytest.mark.gpu

Plan = tuple[Tensor, Tensor]
LIMIT_S = 20.0  # a call takes less than 1 ms, the longest wait in a kernel 2 s


@pytest.fixture(autouse=True)
def no_fault_is_left():
    """Faults of an earlier test would show up in this one."""
    yield
    torch.cuda.synchronize()
    inputs = build_inputs(MlaCase(2, 1, 100, 16), "cuda")
    assert not failures(inputs, inputs.decode())


def finish() -> None:
    """Wait for the GPU, but not for ever."""
    done = torch.cuda.Event()
    done.record()
    deadline = time.monotonic() + LIMIT_S
    while not done.query():
        assert time.monotonic() < deadline, "the GPU hangs"
        time.sleep(0.001)


def decode_badly(inputs: MlaInputs, plan: Plan, split_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """A call with a wrong plan; the results were -7 before."""
    out, lse = (torch.full_like(t, -7.0) for t in inputs.reference())
    options = {**inputs.options(), "split_tokens": split_tokens}
    torch.ops.cutehop.mla_decode_out(*inputs.arguments(plan), **options, out=out, lse=lse)
    finish()
    return out, lse


def check_reported(inputs: MlaInputs, message: str) -> None:
    """The next call raises, the ones after it are right: with one piece, two and many."""
    with pytest.raises(RuntimeError, match=message):
        inputs.decode()
    for case in (inputs.case, MlaCase(64, 1, 3000, 64, varlen=True), MlaCase(1, 1, 9000, 128), MlaCase(9, 1, 500, 16)):
        after = build_inputs(case, "cuda")
        for _ in range(3):
            assert not failures(after, after.decode())
    finish()


def all_nan(result: tuple[Tensor, Tensor]) -> bool:
    return bool(result[0].isnan().all()) and bool(result[1].isnan().all())


CASES = [
    MlaCase(9, 1, 3000, 64, varlen=True),
    MlaCase(40, 2, 1500, 128, varlen=True, causal=True),
    MlaCase(3, 1, 9000, 16),
    MlaCase(6, 3, 2000, 16, tokens_q=(1, 0, 3, 2, 3, 0)),
]


@pytest.mark.parametrize(("planned", "called"), [(0, 512), (512, 0), (64, 128), (64, 0)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_other_split_tokens(case, planned, called):
    inputs = build_inputs(case, "cuda")
    plan = replace(inputs, case=replace(case, split_tokens=planned)).plan()
    result = decode_badly(inputs, plan, called)
    assert all_nan(result)
    check_reported(inputs, "other split_tokens")


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_plan_of_another_batch(case):
    """Both tensors cannot be, as num_splits has the batch's length; the metadata can."""
    inputs = build_inputs(case, "cuda")
    for b in (case.b + 3, case.b - 1):
        other, _ = build_inputs(replace(case, b=b), "cuda").plan()
        assert all_nan(decode_badly(inputs, (other, inputs.plan()[1])))
        check_reported(inputs, "another batch size")


@pytest.mark.parametrize("split_tokens", [0, 256])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tensors_of_two_plans(case, split_tokens):
    """What a sequence gets is right or NaN."""
    inputs = build_inputs(replace(case, split_tokens=split_tokens), "cuda")
    other = torch.ones_like(inputs.cache_seqlens)
    other[-1] = 5000
    metadata, num_splits = inputs.plan()
    _, wrong = replace(inputs, cache_seqlens=other).plan()
    assert not torch.equal(wrong, num_splits)
    out, lse = decode_badly(inputs, (metadata, wrong), split_tokens)
    expected = inputs.reference()
    assert out.isnan().any()
    right = (out.isnan() | ((out - expected[0]).abs() < 1e-2)).all()
    assert right
    assert (lse.isnan() | lse.isinf() | ((lse - expected[1]).abs() < 1e-2)).all()
    check_reported(inputs, "num_splits does not fit")


@pytest.mark.parametrize(
    "values", [[-1] * 10, [1 << 30] * 10, list(range(0, 10000, 1000)), [5, 3, 1, 5, 3, 1, 9, 9, 0, 2]]
)
def test_num_splits_that_no_planner_makes(values):
    inputs = build_inputs(CASES[0], "cuda")
    metadata, _ = inputs.plan()
    decode_badly(inputs, (metadata, torch.tensor(values, dtype=torch.int32, device="cuda")))
    check_reported(inputs, "num_splits does not fit")


@pytest.mark.parametrize("split_tokens", [0, 64, 256])
@pytest.mark.parametrize("factor", [0.5, 0.0, 1.7])
@pytest.mark.parametrize("h_q", [16, 128])
def test_lengths_that_changed(h_q, factor, split_tokens):
    """Results are right for the new lengths, or NaN."""
    inputs = build_inputs(MlaCase(12, 1, 0, h_q, lengths=(4000, 100, 2000) * 4, split_tokens=split_tokens), "cuda")
    new = inputs.cache_seqlens.clone()
    old = (new.float() * factor).int()
    plan = replace(inputs, cache_seqlens=old).plan()
    out, _ = decode_badly(inputs, plan, split_tokens)
    expected, _ = inputs.reference()
    good = ((out - expected).abs() < 1e-2).flatten(1).all(1)
    assert (good | out.isnan().flatten(1).all(1)).all()
    assert not good.all()
    check_reported(inputs, "cache_seqlens")


def test_two_pieces_one_of_which_finds_a_fault():
    """The two CTAs meet all the same, so the ticket is back at 0, and the result is NaN in both orders."""
    inputs = build_inputs(MlaCase(64, 1, 1024, 64), "cuda")
    plan = inputs.plan()
    assert (plan[1].diff() == cfg.MERGE_MAX).any()
    inputs.cache_seqlens[5] = 1000
    for _ in range(20):
        out, _ = decode_badly(inputs, plan)
        cut = (plan[1].diff() == cfg.MERGE_MAX).cpu()
        if cut[5]:
            assert out[5].isnan().all()
        assert out[6:].isfinite().all()
        with pytest.raises(RuntimeError, match=r"cache_seqlens\[5\]"):
            inputs.decode()
    inputs.cache_seqlens[5] = 1024
    assert not failures(inputs, inputs.decode(plan))


def test_fault_of_a_graph_is_seen_at_the_next_eager_call():
    inputs = build_inputs(MlaCase(9, 1, 3000, 64), "cuda")
    plan = inputs.plan()
    inputs.decode(plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = inputs.decode(plan)
    graph.replay()
    assert not failures(inputs, result)
    right = plan[1].clone()
    for _ in range(3):
        plan[1].copy_(plan[1].flip(0))
        graph.replay()
        finish()
        with pytest.raises(RuntimeError, match=r"a CUDA graph had a wrong plan"):
            inputs.decode()
        plan[1].copy_(right)
        result[0].fill_(math.nan)
        graph.replay()
        finish()
        assert not failures(inputs, result)


def test_a_fault_is_reported_on_its_own_stream():
    inputs = build_inputs(CASES[0], "cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        inputs.decode()
        metadata, num_splits = inputs.plan()
        decode_badly(inputs, (metadata, num_splits.flip(0).contiguous()))
    stream.synchronize()
    assert not failures(inputs, inputs.decode())
    with torch.cuda.stream(stream), pytest.raises(RuntimeError, match="earlier call on this stream"):
        inputs.decode()
    torch.cuda.synchronize()


def test_plans_at_the_limits_of_the_cut_column():
    """More pieces of one sequence than the column can say, and the longest split."""
    for split_tokens in (64, 1 << 24):
        inputs = build_inputs(MlaCase(2, 1, 0, 1, lengths=(64 * 4200, 70), split_tokens=split_tokens), "cuda")
        for actual, expected in zip(
            inputs.plan(), planner.mla_plan(inputs.cache_seqlens.cpu(), 1, 1, 1, 132, split_tokens)
        ):
            assert torch.equal(actual.cpu(), expected)
        assert not failures(inputs, inputs.decode())
