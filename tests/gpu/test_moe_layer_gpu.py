"""ExpertParallelMoE on one H100 without a process group: values, gradients, torch.compile, CUDA graphs, training."""

from __future__ import annotations

import pytest
import torch

from tests import moe_training as training
from tests.moe_layer_cases import Sizes, assert_as_exact, dense, dense_state

pytestmark = pytest.mark.gpu

SIZES = Sizes(hidden=512, inner=256)


def on_gpu(state):
    return {name: value.cuda() for name, value in state.items()}


@pytest.mark.parametrize("n", [0, 1, 33, 700])
def test_values(n):
    layer, state, x = SIZES.layer("cuda"), on_gpu(SIZES.state()), SIZES.tokens(0, n, "cuda")
    with torch.no_grad():
        idx = layer.gate(x)[0]
        assert_as_exact(layer(x), dense(SIZES, state, x, idx), dense(SIZES, state, x.double(), idx))


@torch.no_grad()
def exact(layer, x):
    """The block in float64 on the CPU, with the experts that `layer` chooses for x, and its weights if they are FP8."""
    return dense(SIZES, dense_state(layer), x.cpu().double(), layer.gate(x)[0].cpu())


@pytest.mark.parametrize("n", [1, 33, 700])
@torch.no_grad()
def test_fp8_values(n):
    layer, reference, x = SIZES.layer("cuda").quantize_weights(), SIZES.layer().quantize_weights(), SIZES.tokens(0, n)
    assert_as_exact(layer(x.cuda()).cpu(), reference(x), exact(layer, x.cuda()), factor=1.2)


def test_gradients():
    layer, state, x = SIZES.layer("cuda"), on_gpu(SIZES.state()), SIZES.tokens(0, 200, "cuda")
    upstream = SIZES.tokens(1, 200, "cuda")
    with torch.no_grad():
        idx = layer.gate(x)[0]

    def plain(dtype):
        leaves = {name: value.to(dtype, copy=True).requires_grad_() for name, value in {"x": x, **state}.items()}
        out = dense(SIZES, {name: leaf for name, leaf in leaves.items() if name != "x"}, leaves["x"], idx)
        names = [name for name in leaves if "bias" not in name]
        return dict(zip(names, torch.autograd.grad(out, [leaves[name] for name in names], upstream.to(dtype))))

    same_dtype, exact = plain(torch.bfloat16), plain(torch.float64)
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(upstream)
    assert_as_exact(leaf.grad, same_dtype["x"], exact["x"])
    for name, parameter in layer.named_parameters():
        assert_as_exact(parameter.grad, same_dtype[name], exact[name])


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_compiled_by_inductor(fp8):
    layer = SIZES.layer("cuda")
    if fp8:
        layer.quantize_weights()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        for n in (7, 200):
            x = SIZES.tokens(n, n, "cuda")
            assert_as_exact(compiled(x).cpu(), layer(x).cpu(), exact(layer, x), factor=1.2)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@torch.no_grad()
def test_replays_route_anew(fp8):
    """The same bits as an eager call, for inputs that the capture did not see."""
    layer, x = SIZES.layer("cuda"), SIZES.tokens(0, 64, "cuda")
    if fp8:
        layer.quantize_weights()
    layer(x)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    for seed in range(1, 20):
        x.copy_(SIZES.tokens(seed, 64, "cuda"))
        if seed % 5 == 0:
            x.copy_(x[:1].expand_as(x))  # all tokens to the same experts
        graph.replay()
        assert torch.equal(out, layer(x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_overfits_like_the_dense_block(backend):
    training.assert_same_curve(*training.overfit(training.SIZES.layer("cuda"), "cuda", backend))
