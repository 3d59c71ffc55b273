"""ExpertParallelMoE on several ranks: values, gradients, both modes, torch.compile, training. Work takes a device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests import moe_training as training
from tests.moe_layer_cases import Sizes, assert_as_exact, dense

pytestmark = pytest.mark.dist

SIZES = Sizes()
COUNTS = (33, 0, 40, 1, 7, 40, 12, 3)  # tokens of each rank


def tokens(sizes: Sizes, ranks: int, device: str = "cpu") -> list[Tensor]:
    """Of every rank."""
    return [sizes.tokens(rank, COUNTS[rank], device) for rank in range(ranks)]


def wait(group) -> None:
    """Nobody frees memory that a peer still reads."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    dist.barrier(group)


def check_values(group, rank, device, fp8, exact_rows):
    """Against the dense block; with FP8 weights against the layer on one rank, which casts the same values."""
    buffer = SIZES.open_buffer(group, device, scales="f32" if fp8 else None)
    options = {"num_worst_tokens": 0} if exact_rows else {}
    layer, alone = SIZES.layer(device, buffer=buffer, **options), SIZES.layer(device)
    x = tokens(SIZES, group.size(), device)[rank]
    with torch.no_grad():
        idx = layer.gate(x)[0]
        if fp8:
            out, want = layer.quantize_weights()(x), alone.quantize_weights()(x)
            torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)  # sums of ranks are rounded once more
        else:
            state = {name: value.to(device) for name, value in SIZES.state().items()}
            out = layer(x)
            assert_as_exact(out, dense(SIZES, state, x, idx), dense(SIZES, state, x.double(), idx))
    wait(group)
    buffer.destroy()


@pytest.mark.parametrize("exact_rows", [False, True], ids=["static", "exact"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_values(cpu_ranks, ranks, fp8, exact_rows):
    cpu_ranks(ranks).run(check_values, "cpu", fp8, exact_rows)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("ranks", [2, 8])
def test_values_on_gpus(gpu_ranks, ranks, fp8):
    gpu_ranks(ranks).run(check_values, "cuda", fp8, False)


def check_gradients(group, rank, device, compiled):
    """Of a rank's tokens and router from its own loss, of its experts from the losses of all ranks."""
    buffer, ranks = SIZES.open_buffer(group, device), group.size()
    layer = SIZES.layer(device, buffer=buffer)
    state = {name: value.to(device) for name, value in SIZES.state().items()}
    xs = tokens(SIZES, ranks, device)
    upstream = [SIZES.tokens(50 + r, len(x), device) for r, x in enumerate(xs)]
    with torch.no_grad():
        idx = [layer.gate(x)[0] for x in xs]

    def plain(dtype, losses):
        """Gradients of the sum of the losses of those ranks."""
        leaves = {name: value.to(dtype, copy=True).requires_grad_() for name, value in state.items()}
        leaves["x"] = xs[rank].to(dtype, copy=True).requires_grad_()
        given = [leaves["x"] if r == rank else x.to(dtype) for r, x in enumerate(xs)]
        weights = {name: leaf for name, leaf in leaves.items() if name != "x"}
        total = sum((dense(SIZES, weights, given[r], idx[r]) * upstream[r].to(dtype)).sum() for r in losses)
        names = [name for name in leaves if "bias" not in name]
        grads = torch.autograd.grad(total, [leaves[name] for name in names])
        local = slice(layer.experts.first, layer.experts.first + layer.experts.num_local)
        return {name: grad[local] if "experts." in name[:8] else grad for name, grad in zip(names, grads)}

    torch.compiler.reset()
    step = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    leaf = xs[rank].clone().requires_grad_()
    step(leaf).backward(upstream[rank])
    ours = {"x": leaf.grad, **{name: parameter.grad for name, parameter in layer.named_parameters()}}
    for losses, mine in (([rank], False), (range(ranks), True)):
        same_dtype, exact = plain(torch.bfloat16, losses), plain(torch.float64, losses)
        for name, grad in ours.items():
            if name.startswith("experts.") == mine:
                assert_as_exact(grad, same_dtype[name], exact[name])
    wait(group)
    buffer.destroy()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients(cpu_ranks, compiled):
    cpu_ranks(2).run(check_gradients, "cpu", compiled)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("ranks", [2, 8])
def test_gradients_on_gpus(gpu_ranks, ranks, compiled):
    gpu_ranks(ranks).run(check_gradients, "cuda", compiled, timeout=280)


def check_low_latency(group, rank, device, fp8, backend):
    """Equal to the normal mode but for one rounding of each sum; batches of several sizes."""
    buffer = SIZES.open_buffer(group, device, scales="f32")
    few = SIZES.open_ll_buffer(group, device)
    layer = SIZES.layer(device, buffer=buffer, low_latency_buffer=few)
    if fp8:
        layer.quantize_weights()
    torch.compiler.reset()
    step = layer if backend is None else torch.compile(layer, fullgraph=True, backend=backend)
    x = tokens(SIZES, group.size(), device)[rank]
    with torch.no_grad():
        for count in (40, 5):
            out, want = step(x[:count], low_latency=True), layer(x[:count])
            torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
    assert few.outstanding == 0
    wait(group)
    buffer.destroy()
    few.destroy()


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "aot_eager"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_low_latency_equals_normal(cpu_ranks, fp8, backend):
    cpu_ranks(4).run(check_low_latency, "cpu", fp8, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "inductor"], ids=["eager", "inductor"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("ranks", [2, 8])
def test_low_latency_equals_normal_on_gpus(gpu_ranks, ranks, fp8, backend):
    gpu_ranks(ranks).run(check_low_latency, "cuda", fp8, backend, timeout=280)


def check_few_pairs(group, rank, device):
    """Where a rank has no row for a choice, its token comes home as NaN; the other tokens are right."""
    buffer = SIZES.open_buffer(group, device)
    layer = SIZES.layer(device, buffer=buffer, max_pairs=8 if rank == 0 else None)
    plenty = SIZES.layer(device, buffer=buffer)
    x = tokens(SIZES, group.size(), device)[rank]
    with torch.no_grad():
        out, want = layer(x), plenty(x)
        elsewhere = (layer.gate(x)[0] >= 8).all(1)  # no choice on rank 0
    lost = out.isnan().all(1)
    assert torch.equal(out[~lost], want[~lost])
    assert not (lost & elsewhere).any()
    wait(group)
    buffer.destroy()
    return int(lost.sum())


def test_pairs_that_do_not_fit_show(cpu_ranks):
    assert sum(cpu_ranks(2).run(check_few_pairs, "cpu")) > 0


def check_overfit(group, rank, device, backend):
    """50 steps on the tokens of all ranks: the loss goes where the dense block's goes, which sees them all at once."""
    buffer = training.SIZES.open_buffer(group, device)
    losses = training.overfit(training.SIZES.layer(device, buffer=buffer), device, backend, group)
    wait(group)
    buffer.destroy()
    return losses


@pytest.mark.parametrize("ranks", [1, 2])
def test_overfits_like_the_dense_block(cpu_ranks, ranks):
    for losses in cpu_ranks(ranks).run(check_overfit, "cpu", "aot_eager"):
        training.assert_same_curve(*losses)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 8])
def test_overfits_like_the_dense_block_on_gpus(gpu_ranks, ranks):
    for losses in gpu_ranks(ranks).run(check_overfit, "cuda", "inductor", timeout=280):
        training.assert_same_curve(*losses)


def test_a_rank_keeps_its_experts_of_a_state_dict(cpu_ranks):
    cpu_ranks(2).run(check_loading)


def check_loading(group, rank):
    sizes = replace(SIZES, shared=0)
    buffer, state = sizes.open_buffer(group, "cpu"), sizes.state()
    layer = sizes.layer(buffer=buffer, state=state)
    half = slice(8 * rank, 8 * rank + 8)
    assert torch.equal(layer.experts.gate_up_proj, state["experts.gate_up_proj"][half])
    assert torch.equal(layer.experts.down_proj, state["experts.down_proj"][half])
    own = layer.state_dict()
    assert own["experts.down_proj"].shape == (8, sizes.hidden, sizes.inner)
    layer.load_state_dict(own)
    assert torch.equal(layer.experts.down_proj, state["experts.down_proj"][half])
    buffer.destroy()
