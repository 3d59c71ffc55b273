"""The low-latency ops under torch.compile on several ranks: values, and that calls run once each, in order."""

from __future__ import annotations

import pytest
import torch

from cutehop.ops import ep_ll  # noqa: F401  (registers the ops)
from cutehop.ref.ep_ll import home_ranks, weighted_sum
from tests.ep_ll_cases import LlCase, LlInputs, make_buffer, same_bits

pytestmark = pytest.mark.dist
ops = torch.ops.cutehop


def layer(buffer: str, k: int, x, topk_idx, weights, scale):
    """Dispatch, experts that scale their rows, combine."""
    epoch = ops.ep_ll_dispatch_send(x, topk_idx, buffer, use_fp8=False)
    recv_x, _, count, src_info, layout_range, *places = ops.ep_ll_dispatch_recv(epoch, buffer, k, use_fp8=False)
    epoch = ops.ep_ll_combine_send(recv_x * scale, src_info, layout_range, count, *places, buffer, k)
    return ops.ep_ll_combine_recv(epoch, topk_idx, weights, buffer)


def layer_of_wholes(buffer: str, k: int, x, topk_idx, weights, scale):
    """The same with both halves of each in one op."""
    recv_x, _, count, src_info, layout_range, *places = ops.ep_ll_dispatch(x, topk_idx, buffer, use_fp8=False)
    return ops.ep_ll_combine(recv_x * scale, src_info, layout_range, count, *places, topk_idx, weights, buffer)


def compiled_layer(group, rank, device, backend):
    """Batches of several sizes through one graph; experts double their rows, so all of a token are known."""
    case = LlCase(tokens=(16, 7), rows="bf16", routing="some")
    inputs, buffer = LlInputs(case), make_buffer(group, case.config(), device)
    x, topk_idx, weights, _ = inputs.on(rank, buffer.device)
    scale = torch.full((1,), 2.0, dtype=torch.bfloat16, device=buffer.device)
    torch.compiler.reset()
    for each in (layer, layer_of_wholes):
        step = torch.compile(each, backend=backend, fullgraph=True, dynamic=True)
        for n in (len(x), 5, 2):
            got = step(buffer.name, case.k, x[:n], topk_idx[:n], weights[:n], scale)
            rows = (2 * x[:n]).float()[:, None].expand(-1, case.k, -1)
            home = home_ranks(topk_idx[:n], case.experts, case.local_experts)
            assert same_bits(got, weighted_sum(rows, weights[:n], home).cpu())
    assert buffer.outstanding == 0
    buffer.destroy()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layer(cpu_ranks, backend):
    cpu_ranks(2).run(compiled_layer, "cpu", backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("ranks", [2, 8])
def test_compiled_layer_on_gpus(gpu_ranks, ranks, backend):
    gpu_ranks(ranks).run(compiled_layer, "cuda", backend)


def calls_in_order(group, rank, device):
    """Rank 0 uses no result and sends twice with equal arguments; all calls run, in the order of the program."""
    case = LlCase(rows="bf16")
    inputs, buffer = LlInputs(case), make_buffer(group, case.config(), device)
    x, topk_idx, weights, y = inputs.on(rank, buffer.device)
    calls = []
    for method in ("_dispatch_send", "_dispatch_receive", "_combine_send", "_combine_receive"):
        original = getattr(buffer, method)
        wrapper = lambda *a, m=method, o=original, **k: (calls.append(m), o(*a, **k))[1]  # noqa: E731
        setattr(buffer, method, wrapper)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x, topk_idx, weights, y):
        first = ops.ep_ll_dispatch_send(x, topk_idx, buffer.name, use_fp8=False)
        second = ops.ep_ll_dispatch_send(x, topk_idx, buffer.name, use_fp8=False)
        _, _, count, *rest = ops.ep_ll_dispatch_recv(first, buffer.name, case.k, use_fp8=False)
        src_info, layout_range, *places = rest
        ops.ep_ll_dispatch_recv(second, buffer.name, case.k, use_fp8=False)
        home = ops.ep_ll_combine_send(y, src_info, layout_range, count, *places, buffer.name, case.k)
        combined = ops.ep_ll_combine_recv(home, topk_idx, weights, buffer.name)
        return x + 1 if rank == 0 else combined

    torch.compiler.reset()
    got = step(x, topk_idx, weights, y)
    sends, receives = ["_dispatch_send"] * 2, ["_dispatch_receive"] * 2
    assert calls == [*sends, *receives, "_combine_send", "_combine_receive"]
    if rank:
        assert same_bits(got, inputs.combined()[rank])
    buffer.destroy()


def test_unused_and_equal_calls_run_in_order(cpu_ranks):
    cpu_ranks(2).run(calls_in_order, "cpu")
