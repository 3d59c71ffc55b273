"""Greedy generation with either implementation, and the judgement whether two generations are the same."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import DeepseekV3ForCausalLM, DynamicCache

from cutehop.layers import PagedMlaCache
from tools.demo.model import Buffers, Decoder, PagedModel, routers
from tools.demo.routing import choices, imposed, recorded, regret

PREFILL_CHUNK = 64  # several multi-token steps on top of cached tokens, instead of one big one
PAGE_SIZE = 64


@dataclass(frozen=True)
class Generation:
    """tokens: (b, n) int64. logits: (b, n, vocabulary) fp32 they were chosen from. Times in milliseconds.

    routes: (layers with experts, b, prompt + n - 1, k) int64, the experts of every token that was read.
    scores: (layers with experts, b, prompt + n - 1, E) fp32, before the bias, where the routers tell; else None.
    """

    tokens: Tensor
    logits: Tensor
    routes: Tensor
    scores: Tensor | None
    prefill_ms: float
    step_ms: float


@dataclass(frozen=True)
class Errors:
    """Of a generation, against the model in fp32 that reads the same tokens and takes the same experts.

    logits: largest distance of a logit.  token: how far a chosen token's exact logit lies below the best one, at most.
    routes: the same for chosen experts and their scores, see routing.regret.  rerouted: tokens, times layers, whose
    experts are others than the exact scores would have chosen.
    scores: largest distance of a router's score, where they are known.
    """

    logits: float
    token: float
    routes: float
    rerouted: int
    scores: float | None


@dataclass(frozen=True)
class Divergence:
    """The first differing token of one sequence, and how many of the tokens read so far went to other experts."""

    sequence: int
    index: int
    own: int
    ours: int
    rerouted: int


@dataclass(frozen=True)
class Comparison:
    """decisions: of routers, in one generation."""

    own: Errors
    ours: Errors
    decisions: int
    divergences: list[Divergence]

    @property
    def logits_ok(self) -> bool:
        """Our error is at most twice that of transformers' path in the same dtype."""
        return self.ours.logits <= 2 * self.own.logits

    @property
    def tokens_ok(self) -> bool:
        """Every token that we chose is the exact model's, or rounding explains it: two logits may each be off by the
        error of transformers' path. Then any divergence between two generations is explained as well."""
        return self.ours.token <= 2 * self.own.logits

    @property
    def routes_ok(self) -> bool:
        """The same for experts and the error of the scores in transformers' path."""
        assert self.own.scores is not None
        return self.ours.routes <= 2 * self.own.scores

    @property
    def ok(self) -> bool:
        return self.logits_ok and self.tokens_ok and self.routes_ok


def generate_own(model: DeepseekV3ForCausalLM, prompts: Tensor, count: int) -> Generation:
    """With the model's own attention and experts and transformers' cache."""
    past = DynamicCache(config=model.config)

    def forward(ids: Tensor) -> Tensor:
        return model(ids, past_key_values=past, use_cache=True, logits_to_keep=1).logits[:, -1]

    return _greedy(forward, routers(model), [prompts], count)


def generate_paged(
    model: DeepseekV3ForCausalLM, prompts: Tensor, count: int, buffers: Buffers | None = None
) -> Generation:
    """With cutehop's layers, prompt included. With buffers: collective, each rank with as many prompts of its own."""
    batch, tokens = prompts.shape
    limit = tokens + count
    cache = PagedMlaCache(
        num_layers=model.config.num_hidden_layers,
        num_pages=1 + batch * -(-limit // PAGE_SIZE),
        max_seqs=batch,
        max_seq_tokens=limit,
        page_size=PAGE_SIZE,
        dtype=model.dtype,
        device=model.device,
    )
    paged = PagedModel(model, cache, buffers)
    return _greedy(Decoder(paged), paged.routers, list(prompts.split(PREFILL_CHUNK, dim=1)), count)


@torch.inference_mode()
def _greedy(
    forward: Callable[[Tensor], Tensor], gates: Sequence[nn.Module], chunks: list[Tensor], count: int
) -> Generation:
    chosen: list[Tensor] = []
    all_logits: list[Tensor] = []
    routes: list[Tensor] = []
    scores: list[Tensor] = []
    times = [time.perf_counter()]
    with recorded(gates) as latest:
        for i in range(count):
            for ids in chunks if i == 0 else [chosen[-1][:, None]]:
                logits = forward(ids)
                routes.append(torch.stack([choices(each).view(*ids.shape, -1) for each in latest]))
                if len(latest[0]) == 3:  # transformers' return the products, before the sigmoid
                    scores.append(torch.stack([each[0].sigmoid().view(*ids.shape, -1) for each in latest]))
            chosen.append(logits.argmax(-1))
            all_logits.append(logits.float())
            chosen[-1].cpu()  # waits for the device, as a reader of the token would
            times.append(time.perf_counter())
    prefill_ms, *steps = (1e3 * (b - a) for a, b in pairwise(times))
    return Generation(
        torch.stack(chosen, 1),
        torch.stack(all_logits, 1),
        torch.cat(routes, 2),
        torch.cat(scores, 2) if scores else None,
        prefill_ms,
        statistics.median(steps),
    )


@torch.inference_mode()
def compare(model: DeepseekV3ForCausalLM, prompts: Tensor, own: Generation, ours: Generation) -> Comparison:
    """Judge `ours` by the model's own generation and by the model in fp32."""
    exact = copy.deepcopy(model).float()
    divergences = []
    differs = own.tokens != ours.tokens
    for sequence in differs.any(1).nonzero().flatten().tolist():
        index = int(differs[sequence].int().argmax())
        read = prompts.shape[1] + index
        a, b = (each.routes[:, sequence, :read].sort(-1).values for each in (own, ours))
        rerouted = int((a != b).any(-1).any(0).sum())
        pair = int(own.tokens[sequence, index]), int(ours.tokens[sequence, index])
        divergences.append(Divergence(sequence, index, *pair, rerouted))
    decisions = own.routes[..., 0].numel()
    return Comparison(_errors(exact, prompts, own), _errors(exact, prompts, ours), decisions, divergences)


def _errors(exact: DeepseekV3ForCausalLM, prompts: Tensor, run: Generation) -> Errors:
    gates, config = routers(exact), exact.config
    routes = run.routes.flatten(1, 2)
    with imposed(gates, routes) as imposed_scores:
        ids = torch.cat([prompts, run.tokens[:, :-1]], dim=1)
        logits = exact(ids, use_cache=False).logits[:, prompts.shape[1] - 1 :]
    exact_scores = torch.stack(imposed_scores)
    regrets = torch.stack(
        [
            regret(scores + gate.e_score_correction_bias, chosen, config.n_group, config.topk_group)
            for gate, scores, chosen in zip(gates, exact_scores, routes, strict=True)
        ]
    )
    token = logits.amax(-1) - logits.gather(-1, run.tokens[..., None]).squeeze(-1)
    return Errors(
        _distance(run.logits, logits),
        token.max().item(),
        regrets.max().item(),
        int((regrets > 0).sum()),
        None if run.scores is None else _distance(run.scores.flatten(1, 2), exact_scores),
    )


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
