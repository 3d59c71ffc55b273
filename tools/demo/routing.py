"""What routers chose, recorded, imposed on another model, and judged against exact scores.

A router compares scores, so rounding can change which expert runs, and then everything behind it changes by more than
rounding. So a generation is judged in two steps: are its choices those of exact scores, up to rounding? And are its
logits those of an exact model that makes the same choices?
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def recorded(gates: Sequence[nn.Module]) -> Iterator[list[tuple[Tensor, ...]]]:
    """What each router returned last, by layer. Of a captured call: the tensors that replays write."""
    latest: list[tuple[Tensor, ...]] = [()] * len(gates)

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
            latest[layer] = output

        return hook

    handles = [gate.register_forward_hook(keep(layer)) for layer, gate in enumerate(gates)]
    try:
        yield latest
    finally:
        for handle in handles:
            handle.remove()


def choices(output: tuple[Tensor, ...]) -> Tensor:
    """The experts that a router returned, (tokens, k), cutehop's or transformers'."""
    (chosen,) = (each for each in output if each.dtype == torch.int64)
    return chosen


@contextmanager
def imposed(gates: Sequence[Any], routes: Tensor) -> Iterator[list[Tensor]]:
    """Transformers' routers choose `routes` (layers, tokens, k) in their next call. Yields the scores (tokens, E) that
    they computed, before the bias, by layer."""
    computed: list[Tensor] = [torch.empty(0)] * len(gates)

    def impose(layer: int) -> Any:
        def hook(gate: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            computed[layer] = scores = output[0].sigmoid()
            weights = scores.gather(1, routes[layer])
            weights = weights / weights.sum(-1, keepdim=True) * gate.routed_scaling_factor
            return output[0], weights, routes[layer]

        return hook

    handles = [gate.register_forward_hook(impose(layer)) for layer, gate in enumerate(gates)]
    try:
        yield computed
    finally:
        for handle in handles:
            handle.remove()


def regret(choice_scores: Tensor, chosen: Tensor, num_groups: int, topk_groups: int) -> Tensor:
    """By how much each token's choice is worse than the best one, (tokens,); 0 for the best.

    choice_scores: (tokens, E).  chosen: (tokens, k).
    The largest of two differences: of the worst chosen expert's score to the best that was passed over in the groups
    chosen from, and half that of the worst of those groups, which is scored by two experts, to the last that qualifies.
    """
    tokens, experts = choice_scores.shape
    grouped = choice_scores.view(tokens, num_groups, -1)
    group_scores = grouped.topk(2, -1).values.sum(-1)
    qualifies = group_scores.topk(topk_groups, -1).values[:, -1]
    groups = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, chosen // (experts // num_groups), True)
    worst_group = group_scores.masked_fill(~groups, torch.inf).amin(1)
    passed_over = torch.zeros_like(choice_scores, dtype=torch.bool).scatter_(1, chosen, True).view_as(grouped)
    passed_over = ~passed_over & groups[..., None]
    best_passed = grouped.masked_fill(~passed_over, -torch.inf).amax((1, 2))
    by_expert = best_passed - choice_scores.gather(1, chosen).amin(1)
    return torch.maximum(by_expert, (qualifies - worst_group) / 2).clamp(min=0)
