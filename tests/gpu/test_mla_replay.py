"""MLA decode in a program: plans, CUDA graphs, streams, bitwise repeatability, torch.compile, and wrong arguments."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import cutehop
from cutehop.ref import mla_plan as planner
from tests.mla_bad_inputs import BAD, BAD_RAGGED, arguments, name_of
from tests.mla_cases import MlaCase, MlaInputs, build_inputs, failures

pytestmark = pytest.mark.gpu

Result = tuple[Tensor, Tensor]


def capture(step: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of `step` and the tensors that its replays write."""
    step()  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def same_bits(a: Result, b: Result) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_plan_equals_the_reference():
    rng = random.Random(0)
    for _ in range(150):
        b = rng.choice((1, 2, 5, 31, 32, 33, 128, 300))
        longest = rng.choice((0, 64, 700, 5000, 60000))
        lengths = torch.tensor([rng.randint(0, longest) for _ in range(b)], dtype=torch.int32, device="cuda")
        shape = rng.choice(((1, 1), (1, 16), (2, 16), (1, 128), (2, 128), (4, 128), (1, 128, 8), (2, 9, 3)))
        h_kv = shape[2] if len(shape) == 3 else 1
        options = {"num_sms": rng.choice((132, 132, 66, 5, 1)), "split_tokens": rng.choice((0, 0, 64, 320, 4096))}
        actual = torch.ops.cutehop.mla_plan(lengths, *shape[:2], h_kv, **options)
        expected = planner.mla_plan(lengths.cpu(), *shape[:2], h_kv, **options)
        for a, e in zip(actual, expected):
            assert torch.equal(a.cpu(), e), f"b={b} longest={longest} shape={shape} {options}"


def test_plan_of_an_empty_batch():
    lengths = torch.zeros(0, dtype=torch.int32, device="cuda")
    for a, e in zip(torch.ops.cutehop.mla_plan(lengths, 1, 16), planner.mla_plan(lengths.cpu(), 1, 16)):
        assert torch.equal(a.cpu(), e)


@pytest.mark.parametrize("num_sms", [1, 20, 66])
def test_plan_for_fewer_sms(num_sms):
    inputs = build_inputs(MlaCase(9, 1, 3000, 16, varlen=True), "cuda")
    plan = cutehop.get_mla_metadata(inputs.cache_seqlens, 16, 1, num_sms=num_sms)
    assert plan[0].shape[0] == num_sms
    assert not failures(inputs, inputs.decode(plan))


@pytest.mark.parametrize("split_tokens", [0, 512])
@pytest.mark.parametrize(("h_q", "s_q"), [(16, 1), (128, 1), (128, 2)])
def test_graph_replays_with_other_lengths(h_q, s_q, split_tokens):
    """One graph holds the planner and the decode; lengths and pages change between replays."""
    inputs = build_inputs(MlaCase(6, s_q, 6000, h_q, causal=True, split_tokens=split_tokens), "cuda")
    graph, result = capture(inputs.decode)
    rng = random.Random(0)
    for lengths in ([6000] * 6, [0] * 6, *([rng.randint(0, 6000) for _ in range(6)] for _ in range(6)), [6000] * 6):
        inputs.cache_seqlens.copy_(torch.tensor(lengths))
        inputs.block_table.copy_(inputs.block_table.roll(1, 0))
        graph.replay()
        replayed = tuple(t.clone() for t in result)
        assert not failures(inputs, replayed), lengths
        assert same_bits(replayed, inputs.decode()), lengths


@pytest.mark.parametrize(
    "case",
    [
        MlaCase(1, 1, 4096, 16),
        MlaCase(1, 1, 65536, 128),
        MlaCase(16, 1, 4096, 128, varlen=True),
        MlaCase(64, 1, 1024, 64),
        MlaCase(128, 2, 2048, 128, varlen=True, causal=True),
        MlaCase(9, 4, 3000, 126, h_kv=3, varlen=True, sink=True, page=16),
        MlaCase(9, 1, 3000, 64, varlen=True, split_tokens=256),
    ],
    ids=str,
)
def test_bits_repeat(case):
    inputs = build_inputs(case, "cuda")
    first = inputs.decode()
    graph, result = capture(inputs.decode)
    for _ in range(20):
        assert same_bits(first, inputs.decode())
        result[0].fill_(math.nan)
        result[1].fill_(math.nan)
        graph.replay()
        assert same_bits(first, result)


def alone(inputs: MlaInputs, i: int) -> MlaInputs:
    """Sequence i as a batch of one."""
    one = slice(i, i + 1)
    case = replace(inputs.case, b=1, lengths=None)
    tensors = {name: getattr(inputs, name)[one].clone() for name in ("q", "block_table", "cache_seqlens")}
    if case.tokens_q is not None:
        first, tokens = sum(case.tokens_q[:i]), case.tokens_q[i]
        case = replace(case, s_q=tokens, tokens_q=(tokens,))
        tensors["q"] = inputs.q[first : first + tokens].clone()
        tensors["cu_seqlens_q"] = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    return replace(inputs, case=case, **tensors)


@pytest.mark.parametrize("split_tokens", [64, 256, 2048])
@pytest.mark.parametrize(("h_q", "s_q"), [(16, 1), (64, 2), (128, 1)])
def test_fixed_cuts_make_results_independent_of_the_batch(h_q, s_q, split_tokens):
    lengths = (700, 3000, 0, 64, 1, 5000, 2048, *range(100, 2000, 190))
    case = MlaCase(len(lengths), s_q, 0, h_q, lengths=lengths, causal=True, split_tokens=split_tokens)
    inputs = build_inputs(case, "cuda")
    out, lse = inputs.decode()
    for i in range(len(lengths)):
        assert same_bits(alone(inputs, i).decode(), (out[i : i + 1], lse[i : i + 1])), f"sequence {i} of {lengths}"


@pytest.mark.parametrize("h_q", [4, 16, 64])
def test_fixed_cuts_make_ragged_results_independent_of_the_batch(h_q):
    """Alone, a sequence has fewer rows than the longest of the batch, for which there may be another kernel."""
    tokens, lengths = (1, 4, 2, 20, 1, 3), (3000, 700, 64, 5000, 1, 2048)
    case = MlaCase(6, 20, 0, h_q, lengths=lengths, tokens_q=tokens, causal=True, split_tokens=256)
    inputs = build_inputs(case, "cuda")
    out, lse = inputs.decode()
    first = 0
    for i, n in enumerate(tokens):
        rows = slice(first, first + n)
        assert same_bits(alone(inputs, i).decode(), (out[rows], lse[:, rows])), f"sequence {i}"
        first += n


def test_one_plan_serves_many_layers():
    inputs = build_inputs(MlaCase(9, 1, 3000, 64, varlen=True), "cuda")
    plan = inputs.plan()
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        layer = replace(inputs, q=torch.randn(inputs.q.shape, generator=generator, device="cuda").to(inputs.q.dtype))
        assert not failures(layer, layer.decode(plan))


def test_two_streams():
    inputs = [build_inputs(MlaCase(3, 1, 9000, h_q, varlen=True, seed=h_q), "cuda") for h_q in (16, 128)]
    plans = [i.plan() for i in inputs]
    expected = [i.decode(plan) for i, plan in zip(inputs, plans)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results: list[list[Result]] = [[], []]
    for _ in range(30):
        for k, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[k].append(inputs[k].decode(plans[k]))
    torch.cuda.synchronize()
    for k in range(2):
        assert all(same_bits(expected[k], result) for result in results[k])


def test_two_graphs_replay_side_by_side():
    inputs = [build_inputs(MlaCase(3, 1, 9000, h_q, varlen=True, seed=h_q), "cuda") for h_q in (16, 128)]
    expected = [i.decode() for i in inputs]
    graphs = [capture(i.decode) for i in inputs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(30):
        for stream, (graph, _) in zip(streams, graphs):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(same_bits(e, result) for e, (_, result) in zip(expected, graphs))


def test_opcheck():
    for case in (MlaCase(2, 2, 100, 16, causal=True), MlaCase(3, 3, 60, 8, tokens_q=(2, 0, 3), sink=True)):
        inputs = build_inputs(case, "cuda")
        torch.library.opcheck(torch.ops.cutehop.mla_plan.default, (inputs.cache_seqlens, case.s_q, case.h_q))
        torch.library.opcheck(torch.ops.cutehop.mla_decode.default, inputs.arguments(), inputs.options())
        out, lse = (torch.full_like(t, math.nan) for t in inputs.decode())
        options = {**inputs.options(), "out": out, "lse": lse}
        torch.library.opcheck(torch.ops.cutehop.mla_decode_out.default, inputs.arguments(), options)


def test_compiled_step():
    inputs = build_inputs(MlaCase(3, 2, 600, 16, varlen=True, causal=True), "cuda")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, k_cache, block_table, cache_seqlens):
        plan = cutehop.get_mla_metadata(cache_seqlens, q.shape[1] * q.shape[2], 1)
        return cutehop.flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, 512, *plan, causal=True)

    assert not failures(inputs, step(inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens))


def test_validate():
    inputs = build_inputs(MlaCase(3, 2, 600, 16, varlen=True), "cuda")
    tensors, plan = inputs.arguments()[:4], inputs.plan()
    assert not failures(inputs, cutehop.flash_mla_with_kvcache(*tensors, 512, *plan, validate=True))
    inputs.cache_seqlens[1] = 100000
    with pytest.raises(ValueError, match=r"cache_seqlens\[1\] is 100000"):
        cutehop.flash_mla_with_kvcache(*tensors, 512, *plan, validate=True)


@pytest.mark.parametrize("entry", [*BAD, *BAD_RAGGED], ids=name_of)
def test_bad_argument(entry):
    """The errors of the CPU op, from the functional op and from the out variant."""
    name, change, error, message = entry
    correct = arguments("cuda", ragged=entry in BAD_RAGGED)
    out, lse = torch.ops.cutehop.mla_decode(**correct)
    bad = {**correct, name: change(correct)}
    with pytest.raises(error, match=re.escape(message)):
        torch.ops.cutehop.mla_decode(**bad)
    with pytest.raises(error, match=re.escape(message)):
        torch.ops.cutehop.mla_decode_out(**bad, out=out, lse=lse)


def test_bad_outputs():
    correct = arguments("cuda")
    out, lse = torch.ops.cutehop.mla_decode(**correct)
    for wrong in (
        {"out": out[..., :256]},
        {"out": out.float()},
        {"out": out.transpose(1, 2).contiguous().transpose(1, 2)},
        {"out": out.cpu()},
        {"lse": lse[:2]},
        {"lse": lse.half()},
    ):
        with pytest.raises((ValueError, TypeError, NotImplementedError), match=next(iter(wrong))):
            torch.ops.cutehop.mla_decode_out(**correct, **{"out": out, "lse": lse, **wrong})


@pytest.mark.parametrize("name", ["k_cache", "block_table", "cache_seqlens", "tile_scheduler_metadata", "num_splits"])
def test_argument_on_another_device(name):
    correct = arguments("cuda")
    with pytest.raises(ValueError, match=rf"{name} on cpu, q on cuda"):
        torch.ops.cutehop.mla_decode(**{**correct, name: correct[name].cpu()})
