"""A tiny model around a MoE block, and its training: with the layer, or with the same block dense."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from cutehop.layers import ExpertParallelMoE
from tests.moe_layer_cases import Sizes, dense

TOKENS, VOCABULARY, STEPS = 80, 32, 50
SIZES = Sizes(hidden=128, inner=64, experts=8, topk=2, max_tokens=TOKENS)


class Tiny(nn.Module):
    """A normalised residual block between an embedding that stays and a head that learns."""

    def __init__(self, block: nn.Module, device: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        embed = torch.randn(VOCABULARY, SIZES.hidden, generator=generator).bfloat16()
        self.register_buffer("embed", embed.to(device))
        head = (torch.randn(VOCABULARY, SIZES.hidden, generator=generator) * 0.05).bfloat16()
        self.head = nn.Parameter(head.to(device))
        self.block = block

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """This share of the mean loss of all tokens."""
        x = self.embed[ids]
        x = x + self.block(functional.rms_norm(x, x.shape[-1:]))
        return functional.cross_entropy(functional.linear(x, self.head).float(), targets, reduction="sum") / TOKENS


class Dense(nn.Module):
    """`dense` with the parameters and the choices of a layer that has all experts."""

    def __init__(self, layer: ExpertParallelMoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            idx = self.layer.gate(x)[0]
        return dense(SIZES, self.layer.state_dict(keep_vars=True), x, idx)


def batch(device: str) -> tuple[Tensor, Tensor]:
    """ids and targets (TOKENS,); the target is a function of the token."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator).to(device)
    return ids, torch.randint(0, VOCABULARY, (VOCABULARY,), generator=generator).to(device)[ids]


def train(model: nn.Module, step: Callable[[], Tensor], group: dist.ProcessGroup | None = None) -> list[float]:
    """Losses of STEPS steps of Adam; with a group summed over its ranks, as gradients of all but the experts are."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(STEPS):
        loss = step()
        loss.backward()
        total = loss.detach().cpu()
        if group is not None:
            dist.all_reduce(total, group=group)
            for name, parameter in model.named_parameters():
                if ".experts." not in name and parameter.grad is not None:
                    grad = parameter.grad.cpu()  # what gloo takes
                    dist.all_reduce(grad, group=group)
                    parameter.grad.copy_(grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses


def assert_same_curve(got: list[float], want: list[float]) -> None:
    """Both learn everything, the one like the other."""
    assert want[0] > 3
    assert want[-1] < 0.1
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=0.1, atol=0.02)


def overfit(
    layer: ExpertParallelMoE, device: str, backend: str, group: dist.ProcessGroup | None = None
) -> tuple[list[float], list[float]]:
    """Losses of the layer, compiled, each rank of a group with its share of the tokens; and of the dense block."""
    ids, targets = batch(device)
    rank, ranks = (group.rank(), group.size()) if group is not None else (0, 1)
    share = ids.chunk(ranks)[rank], targets.chunk(ranks)[rank]
    ours, theirs = Tiny(layer, device), Tiny(Dense(SIZES.layer(device)), device)
    torch.compiler.reset()
    # Inductor forgets the order of communication without it, see cutehop.ops.ep.
    options = {"options": {"reorder_for_peak_memory": False}} if backend == "inductor" else {}
    compiled = torch.compile(ours, fullgraph=True, backend=backend, **options)
    return train(ours, lambda: compiled(*share), group), train(theirs, lambda: theirs(ids, targets))
