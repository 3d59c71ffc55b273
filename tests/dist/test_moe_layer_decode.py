"""Decode steps of the demo's whole model, attention and experts, replayed from a CUDA graph while lengths and routing
change: the same tokens as eager steps. On one GPU without a process group, and on ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from cutehop.layers import PagedMlaCache
from tools.demo.model import VOCABULARY, Buffers, Decoder, PagedModel, build_model, make_buffers

SEQUENCES, LONGEST, PROMPT = 3, 200, 64


class Pair:
    """The same sequences twice: steps of `replayed` are replays on a GPU, those of `eager` are not."""

    def __init__(self, device: str, buffers: Buffers | None) -> None:
        model = build_model(torch.device(device))
        self.eager, replayed = (PagedModel(model, self.new_cache(model), buffers) for _ in range(2))
        self.replayed = Decoder(replayed)
        self.models = (self.eager, replayed)
        self.device = device

    @staticmethod
    def new_cache(model) -> PagedMlaCache:
        pages = 1 + SEQUENCES * -(-LONGEST // 64)
        layers = model.config.num_hidden_layers
        return PagedMlaCache(layers, pages, SEQUENCES, LONGEST, dtype=model.dtype, device=model.device)

    def read(self, prompts: dict[int, int], generator: torch.Generator) -> None:
        """New prompts of so many tokens for these sequences; the others wait. Collective, with any prompts."""
        ids = torch.randint(0, VOCABULARY, (SEQUENCES, PROMPT), generator=generator).to(self.device)
        for model in self.models:
            for sequence in prompts:
                model.cache.release(sequence)
            model.cache.append(prompts)
            model.forward(ids)

    def step(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the next token, of both."""
        self.eager.append(ids)
        return self.eager.forward(ids), self.replayed(ids)


@torch.inference_mode()
def run_steps(group, rank, device, steps):
    """Greedy, but for a token drawn at random now and then; sequences begin anew, all of different lengths."""
    buffers = None
    if group is not None:
        buffers = make_buffers(group, torch.device(device), SEQUENCES * PROMPT, SEQUENCES)
    generator = torch.Generator().manual_seed(rank)
    pair = Pair(device, buffers)
    pair.read({0: 64, 1: 1, 2: 33 + rank}, generator)
    ids = torch.zeros(SEQUENCES, 1, dtype=torch.int64, device=device)
    wrong = torch.zeros((), dtype=torch.bool, device=device)
    for number in range(steps):
        if number % 40 == 39:  # 64 + 3 * 40 tokens at most
            pair.read({number // 40 % SEQUENCES: 1 + (7 * number + rank) % PROMPT}, generator)
        want, got = pair.step(ids)
        wrong |= (got.argmax(-1) != want.argmax(-1)).any() | (got != want).any()
        ids = want.argmax(-1, keepdim=True)
        if number % 5 == 0:
            ids[number % SEQUENCES] = int(torch.randint(0, VOCABULARY, (1,), generator=generator))
    lengths = [model.cache.lengths for model in pair.models]
    assert lengths[0] == lengths[1]
    if group is not None:
        if device == "cuda":
            torch.cuda.synchronize()
        dist.barrier(group)
        assert buffers is not None
        buffers.destroy()
    return bool(wrong)


def test_steps_on_a_cpu():
    """Without a graph: that the sequences of the test are legal, and that steps repeat to the bit."""
    assert not run_steps(None, 0, "cpu", 100)


@pytest.mark.dist
def test_steps_on_cpu_ranks(cpu_ranks):
    assert not any(cpu_ranks(2).run(run_steps, "cpu", 50))


@pytest.mark.gpu
def test_replayed_steps():
    assert not run_steps(None, 0, "cuda", 1000)


@pytest.mark.gpu
@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 8])
def test_replayed_steps_on_ranks(gpu_ranks, ranks):
    assert not any(gpu_ranks(ranks).run(run_steps, "cuda", 1000, timeout=300))
