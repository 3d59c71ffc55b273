"""The demo on an H100, and a decode step of MlaDecode captured into a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cutehop.layers import MlaDecode, PagedMlaCache

pytestmark = pytest.mark.gpu

HEADS, HIDDEN, NOPE, V = 16, 256, 128, 128


def test_demo_runs_on_the_gpu(capsys):
    pytest.importorskip("transformers")
    from tools.demo import __main__ as demo
    from tools.demo import kernels

    code = demo.main(["--device", "cuda"])
    output = capsys.readouterr().out
    assert code == 0, output
    assert f"8 ranks, {torch.cuda.get_device_name()}, decode in a CUDA graph" in output
    assert output.count(": ok") == 3
    lines = output.split(kernels.HEADER)[1].strip().splitlines()
    assert len(lines) == len(kernels.ROWS)
    assert all(line.endswith(" ok") for line in lines)


def build_layer(device: str) -> MlaDecode:
    torch.manual_seed(0)
    query = nn.Linear(HIDDEN, HEADS * (NOPE + 64), bias=False)
    kv_a, norm = nn.Linear(HIDDEN, 576, bias=False), nn.RMSNorm(512)
    kv_b, out = nn.Linear(512, HEADS * (NOPE + V), bias=False), nn.Linear(HEADS * V, HIDDEN, bias=False)
    layer = MlaDecode(query, kv_a, norm, kv_b, out, num_heads=HEADS, v_head_dim=V, softmax_scale=(NOPE + 64) ** -0.5)
    return layer.to(device, torch.bfloat16)


def rope(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    frequency = 10000.0 ** (-torch.arange(0, 64, 2, device=positions.device) / 64)
    angle = (positions[..., None] * frequency).repeat(1, 1, 2)
    return angle.cos().bfloat16(), angle.sin().bfloat16()


def new_cache(device: str) -> PagedMlaCache:
    """Two sequences, one of them about to need another page; a third one idle."""
    cache = PagedMlaCache(1, 16, 3, 256, device=device)
    # Unwritten rows of these sequences are part of what is attended to, so both machines need the same.
    cache.pages.copy_(torch.randn(cache.pages.shape, generator=torch.Generator().manual_seed(0)))
    cache.append({0: 126, 2: 7})
    return cache


@torch.no_grad()
def run_step(layer: MlaDecode, cache: PagedMlaCache, hidden: torch.Tensor) -> torch.Tensor:
    step = cache.plan_step(HEADS)
    return layer(hidden, *rope(step.positions), cache, 0, step)


def test_a_decode_step_replays_from_a_graph_as_lengths_grow():
    eager_layer, layer = build_layer("cpu"), build_layer("cuda")
    eager_cache, cache = new_cache("cpu"), new_cache("cuda")
    hidden = torch.zeros(3, 1, HIDDEN, dtype=torch.bfloat16, device="cuda")

    cache.append({0: 1, 2: 1})
    run_step(layer, cache, hidden)  # loads the kernels, which a capture must not; its rows are written again below
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run_step(layer, cache, hidden)

    generator = torch.Generator().manual_seed(2)
    for i in range(6):  # sequence 0 starts its third page on the way
        tokens = {0: 1, 2: 1}
        eager_cache.append(tokens)
        if i > 0:
            cache.append(tokens)
        new = torch.randn(3, 1, HIDDEN, generator=generator).bfloat16()
        hidden.copy_(new)
        graph.replay()
        expected = run_step(eager_layer, eager_cache, new)
        live = [0, 2]
        torch.testing.assert_close(out[live].cpu().float(), expected[live].float(), rtol=2e-2, atol=4e-3)
    assert cache.lengths == eager_cache.lengths == [132, 0, 13]
