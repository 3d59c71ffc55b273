"""Greedy generation with either attention, and the judgement whether two generations are the same."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM, DynamicCache

from cutehop.layers import PagedMlaCache
from tools.demo.model import paged_attention

PREFILL_CHUNK = 64  # several multi-token steps on top of cached tokens, instead of one big one


@dataclass(frozen=True)
class Generation:
    """tokens: (b, n) int64. logits: (b, n, vocabulary) fp32 they were chosen from. Times in milliseconds."""

    tokens: Tensor
    logits: Tensor
    prefill_ms: float
    step_ms: float


@dataclass(frozen=True)
class Divergence:
    """The first differing token of one sequence.

    gap: difference of the two tokens' logits in fp32. The rounding of the model's own bf16 path moves a logit by up to
    `error`, so it can swap two tokens that are up to twice as far apart.
    """

    sequence: int
    index: int
    own: int
    ours: int
    gap: float
    error: float

    @property
    def explained(self) -> bool:
        return self.gap <= 2 * self.error


@dataclass(frozen=True)
class Comparison:
    """own_error, our_error: largest distance of a logit from the fp32 model's, over all steps in the same context."""

    own_error: float
    our_error: float
    divergences: list[Divergence]

    @property
    def ok(self) -> bool:
        """Our error is at most twice that of transformers' path in the same dtype, all divergences are explained."""
        return self.our_error <= 2 * self.own_error and all(d.explained for d in self.divergences)


def generate_own(model: DeepseekV3ForCausalLM, prompts: Tensor, count: int) -> Generation:
    """With the model's own attention and transformers' cache."""
    past = DynamicCache(config=model.config)

    def forward(ids: Tensor) -> Tensor:
        return model(ids, past_key_values=past, use_cache=True, logits_to_keep=1).logits[:, -1]

    return _greedy(forward, [prompts], count)


def generate_paged(
    model: DeepseekV3ForCausalLM, prompts: Tensor, count: int, follow: Tensor | None = None
) -> Generation:
    """With cutehop's paged cache and op, prompt included.

    follow: (b, count) tokens to go on with whatever was chosen, so that every step has a known context.
    """
    batch, tokens = prompts.shape
    limit = tokens + count
    page_size = 64
    cache = PagedMlaCache(
        num_layers=model.config.num_hidden_layers,
        num_pages=1 + batch * -(-limit // page_size),
        max_seqs=batch,
        max_seq_tokens=limit,
        page_size=page_size,
        dtype=model.dtype,
        device=model.device,
    )
    with paged_attention(model, cache) as forward:
        return _greedy(forward, list(prompts.split(PREFILL_CHUNK, dim=1)), count, follow)


@torch.inference_mode()
def _greedy(
    forward: Callable[[Tensor], Tensor], chunks: list[Tensor], count: int, follow: Tensor | None = None
) -> Generation:
    start = time.perf_counter()
    for chunk in chunks:
        logits = forward(chunk)
    chosen, all_logits = [logits.argmax(-1)], [logits.float()]
    chosen[0].cpu()  # waits for the device, as a reader of the token would
    times = [time.perf_counter()]
    for i in range(count - 1):
        logits = forward((chosen[-1] if follow is None else follow[:, i])[:, None])
        chosen.append(logits.argmax(-1))
        all_logits.append(logits.float())
        chosen[-1].cpu()
        times.append(time.perf_counter())
    steps = [1e3 * (b - a) for a, b in pairwise(times)]
    prefill_ms = 1e3 * (times[0] - start)
    return Generation(torch.stack(chosen, 1), torch.stack(all_logits, 1), prefill_ms, statistics.median(steps))


@torch.inference_mode()
def compare(
    model: DeepseekV3ForCausalLM, prompts: Tensor, own: Generation, ours: Generation, followed: Generation
) -> Comparison:
    """Judge by the same weights in fp32, fed with the tokens that transformers' attention chose.

    own, ours: the two free generations; their tokens are compared.
    followed: ours made to follow own's tokens; its logits and own's are compared with fp32 at every step.
    """
    exact = copy.deepcopy(model).float()
    logits = exact(torch.cat([prompts, own.tokens[:, :-1]], dim=1), use_cache=False).logits[:, prompts.shape[1] - 1 :]
    own_error = (own.logits - logits).abs().max().item()
    our_error = (followed.logits - logits).abs().max().item()
    differs = own.tokens != ours.tokens
    divergences = []
    for sequence in differs.any(1).nonzero().flatten().tolist():
        index = int(differs[sequence].int().argmax())
        a, b = int(own.tokens[sequence, index]), int(ours.tokens[sequence, index])
        gap = (logits[sequence, index, a] - logits[sequence, index, b]).abs().item()
        divergences.append(Divergence(sequence, index, a, b, gap, own_error))
    return Comparison(own_error, our_error, divergences)
