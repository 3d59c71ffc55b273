"""The MLA ops as torch sees them, on the CPU: opcheck, torch.compile, out variants, friendly functions, bad input."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cutehop
from cutehop.ref import mla as ref
from cutehop.ref import mla_plan as planner
from tests.mla_bad_inputs import BAD, BAD_RAGGED, arguments, name_of
from tests.mla_cases import MlaCase, MlaInputs, build_inputs, failures

CASES = [
    MlaCase(2, 2, 100, 16, causal=True),
    MlaCase(3, 4, 60, 6, h_kv=3, page=16, varlen=True, sink=True, split_tokens=64),
    MlaCase(3, 3, 60, 8, tokens_q=(2, 0, 3), causal=True, dtype=torch.float16),
]
OUTPUTS = ("tile_scheduler_metadata", "num_splits")


@pytest.fixture(params=CASES, ids=str)
def inputs(request) -> MlaInputs:
    return build_inputs(request.param)


def empty_outputs(inputs: MlaInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Poisoned out and lse for the out variant."""
    out, lse = inputs.reference()
    return torch.full_like(out, math.nan), torch.full_like(lse, math.nan)


def test_opcheck_plan():
    lengths = torch.tensor([100, 0, 5000], dtype=torch.int32)
    torch.library.opcheck(torch.ops.cutehop.mla_plan.default, (lengths, 2, 64))
    torch.library.opcheck(torch.ops.cutehop.mla_plan.default, (lengths, 2, 64, 2, 100, 512))


def test_opcheck_decode(inputs):
    torch.library.opcheck(torch.ops.cutehop.mla_decode.default, inputs.arguments(), inputs.options())


def test_opcheck_decode_out(inputs):
    out, lse = empty_outputs(inputs)
    options = {**inputs.options(), "out": out, "lse": lse}
    torch.library.opcheck(torch.ops.cutehop.mla_decode_out.default, inputs.arguments(), options)


def test_compiles_without_graph_breaks(inputs):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, k_cache, block_table, cache_seqlens):
        case = inputs.case
        plan = torch.ops.cutehop.mla_plan(cache_seqlens, case.s_q, case.h_q, case.h_kv, split_tokens=case.split_tokens)
        out, lse = torch.ops.cutehop.mla_decode(q, k_cache, block_table, cache_seqlens, *plan, **inputs.options())
        return out + 0, lse + 0

    actual = step(inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens)
    assert not failures(inputs, actual)


def test_friendly_functions_compile():
    inputs = build_inputs(MlaCase(2, 2, 100, 16, causal=True))

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def step(q, k_cache, block_table, cache_seqlens):
        plan = cutehop.get_mla_metadata(cache_seqlens, q.shape[1] * q.shape[2], 1)
        return cutehop.flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, 512, *plan, causal=True)

    assert not failures(inputs, step(inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens))


def test_out_variant_fills_given_tensors(inputs):
    out, lse = empty_outputs(inputs)
    assert torch.ops.cutehop.mla_decode_out(*inputs.arguments(), **inputs.options(), out=out, lse=lse) is None
    assert not failures(inputs, (out, lse))


@pytest.mark.parametrize("given", [("out",), ("lse",), ("out", "lse")], ids=str)
def test_friendly_function_writes_into_given_tensors(inputs, given):
    tensors = {name: t for name, t in zip(("out", "lse"), empty_outputs(inputs)) if name in given}
    options = {**inputs.options(), **tensors}
    result = cutehop.flash_mla_with_kvcache(
        *inputs.arguments()[:4], 512, *inputs.plan(), options.pop("softmax_scale"), options.pop("causal"), **options
    )
    assert not failures(inputs, result)
    for name, tensor in zip(("out", "lse"), result):
        assert name not in given or tensor is tensors[name]


def test_outputs_of_wrong_shape_raise(inputs):
    out, lse = empty_outputs(inputs)
    for wrong in (
        {"out": out[..., :256], "lse": lse},
        {"out": out, "lse": lse[..., :1]},
        {"out": out, "lse": lse.half()},
    ):
        with pytest.raises((ValueError, TypeError), match=r"out|lse"):
            torch.ops.cutehop.mla_decode_out(*inputs.arguments(), **inputs.options(), **wrong)


def test_empty_batch():
    inputs = build_inputs(MlaCase(0, 2, 100, 16))
    out, lse = inputs.decode()
    assert out.shape == (0, 2, 16, 512)
    assert lse.shape == (0, 16, 2)


def test_plan_of_the_friendly_function_is_the_ops():
    lengths = torch.tensor([100, 0, 5000], dtype=torch.int32)
    for s_q, h_q, h_kv in ((1, 128, 1), (2, 16, 1), (4, 128, 8), (2, 9, 3)):
        expected = torch.ops.cutehop.mla_plan(lengths, s_q, h_q, h_kv)
        actual = cutehop.get_mla_metadata(lengths, s_q * h_q // h_kv, h_kv, h_q)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected))


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
def test_correct_arguments_pass(ragged):
    out, _ = torch.ops.cutehop.mla_decode(**arguments("cpu", ragged))
    assert out.isfinite().all()


@pytest.mark.parametrize("entry", [*BAD, *BAD_RAGGED], ids=name_of)
def test_bad_argument(entry):
    name, change, error, message = entry
    correct = arguments("cpu", ragged=entry in BAD_RAGGED)
    with pytest.raises(error, match=re.escape(message)):
        torch.ops.cutehop.mla_decode(**{**correct, name: change(correct)})


@pytest.mark.parametrize("entry", [e for e in [*BAD, *BAD_RAGGED] if "16 bytes" not in e[3]], ids=name_of)
def test_bad_argument_under_fake_tensors(entry):
    """The same errors while torch.compile traces, where no tensor has values (or an address)."""
    name, change, error, message = entry
    correct = arguments("cpu", ragged=entry in BAD_RAGGED)
    bad = {**correct, name: change(correct)}
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in bad.items()}
        with pytest.raises(error, match=re.escape(message)):
            torch.ops.cutehop.mla_decode(**fake)


def test_device_mismatch():
    real = arguments("cpu")
    with FakeTensorMode() as mode:
        correct = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in real.items()}
        for name in ("k_cache", "block_table", "cache_seqlens", *OUTPUTS):
            moved = {**correct, name: torch.empty_like(correct[name], device="cuda")}
            with pytest.raises(Exception, match=r"device|on cuda"):
                torch.ops.cutehop.mla_decode(**moved)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"s_q": 0}, "s_q 0"),
        ({"h_q": 0}, "h_q 0"),
        ({"h_q": 129}, "h_q 129"),
        ({"h_kv": 3}, "h_kv 3 does not divide h_q 16"),
        ({"num_sms": 0}, "num_sms 0"),
        ({"split_tokens": -64}, "split_tokens -64"),
        ({"split_tokens": 65}, "split_tokens 65"),
        ({"cache_seqlens": torch.zeros(2, 2, dtype=torch.int32)}, "cache_seqlens shape"),
    ],
    ids=str,
)
def test_bad_plan_arguments(changed, message):
    correct = {"cache_seqlens": torch.zeros(2, dtype=torch.int32), "s_q": 1, "h_q": 16}
    with pytest.raises(ValueError, match=re.escape(message)):
        torch.ops.cutehop.mla_plan(**{**correct, **changed})


def test_plan_dtype():
    with pytest.raises(TypeError, match="cache_seqlens dtype"):
        torch.ops.cutehop.mla_plan(torch.zeros(2, dtype=torch.int64), 1, 16)


def test_head_dim_v():
    inputs = build_inputs(CASES[0])
    with pytest.raises(ValueError, match="head_dim_v 576, supported 512"):
        cutehop.flash_mla_with_kvcache(*inputs.arguments()[:4], 576, *inputs.plan())


def test_reference_refuses_a_short_block_table():
    inputs = build_inputs(CASES[0])
    with pytest.raises(ValueError, match=r"cache_seqlens\[0\] is 100, the block table holds 1 pages"):
        ref.mla_decode(inputs.q, inputs.k_cache, inputs.block_table[:, :1], inputs.cache_seqlens, softmax_scale=0.1)


class TestValidate:
    """validate=True of the friendly function: values that the kernels trust."""

    def call(self, inputs: MlaInputs, plan=None) -> None:
        options = inputs.options()
        cutehop.flash_mla_with_kvcache(
            *inputs.arguments()[:4],
            512,
            *(plan or inputs.plan()),
            options.pop("softmax_scale"),
            options.pop("causal"),
            **options,
            validate=True,
        )

    def test_correct_calls_pass(self, inputs):
        self.call(inputs)

    def test_several_kv_heads(self):
        """Their number is part of what merging costs."""
        case = MlaCase(4, 1, 256, 16, h_kv=8)
        rows, partitions = case.h_q // case.h_kv, planner.num_partitions(1, case.h_q, case.h_kv, 132)
        lengths = [case.s_k] * case.b
        several = planner.schedule(lengths, partitions, rows, 0, case.h_kv)
        assert several != planner.schedule(lengths, partitions, rows), "the case does not tell"
        self.call(build_inputs(case))

    @pytest.mark.parametrize("length", [-1, 100000])
    def test_lengths(self, inputs, length):
        plan = inputs.plan()
        inputs.cache_seqlens[1] = length
        with pytest.raises(ValueError, match=rf"cache_seqlens\[1\] is {length}, 0\.\."):
            self.call(inputs, plan)

    @pytest.mark.parametrize("page", [-1, 1000])
    def test_page_ids(self, inputs, page):
        inputs.block_table[0, 0] = page
        with pytest.raises(ValueError, match=rf"block_table\[0\] holds page {page}"):
            self.call(inputs)

    def test_plan_of_other_lengths(self, inputs):
        case = inputs.case
        longer = inputs.cache_seqlens + 640
        plan = torch.ops.cutehop.mla_plan(longer, case.s_q, case.h_q, case.h_kv, split_tokens=case.split_tokens)
        with pytest.raises(ValueError, match="belong to other lengths"):
            self.call(inputs, plan)

    @pytest.mark.parametrize("starts", [[0, 2, 1, 5], [1, 2, 2, 5], [0, 2, 2, 6], [0, 0, 1, 5]], ids=str)
    def test_ragged_starts(self, starts):
        inputs = build_inputs(CASES[2])
        inputs.cu_seqlens_q.copy_(torch.tensor(starts))
        with pytest.raises(ValueError, match="cu_seqlens_q"):
            self.call(inputs)
