"""The expert-parallel ops on several ranks: gradients, torch.compile, effects. The functions take a device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ep_cases import MAX_TOKENS, EpCase, EpInputs, make_buffer, same_bits

pytestmark = pytest.mark.dist
ops = torch.ops.cutehop


class Toy:
    """A small MoE in integers, so that bf16 and float64 agree exactly: expert e multiplies by c[e], a token's result is
    bias_0 + bias_1 + sum_j w[j] c[e_j] x, beside it the routing weights come back times 3."""

    def __init__(self, case: EpCase, rank: int, device: str) -> None:
        self.inputs, self.case, self.rank = EpInputs(case), case, rank
        rng = torch.Generator().manual_seed(rank)
        n, h, k = case.count(rank), case.hidden, case.k

        def ints(low: int, high: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.randint(low, high + 1, shape, generator=rng).to(dtype).to(device)

        self.x, self.w = ints(-2, 2, n, h), ints(0, 2, n, k, dtype=torch.float32)
        self.bias_0, self.bias_1 = ints(-3, 3, n, h), ints(-3, 3, n, h)
        self.grad_x, self.grad_w = ints(-1, 1, n, h), ints(-5, 5, n, k, dtype=torch.float32)
        self.idx = self.inputs.topk_idx[rank].to(device)
        self.leaves = (self.x, self.w, self.bias_0, self.bias_1)

    def forward(self, buffer: str, worst: int, *leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        case, (x, w, bias_0, bias_1) = self.case, leaves
        _, per_expert, in_rank = ops.ep_layout(self.idx, case.experts, case.ranks)
        recv_x, _, recv_idx, recv_w, _, prefix, src, row = ops.ep_dispatch(
            x, None, self.idx, w, in_rank, per_expert, buffer, worst
        )
        c = 1 + (recv_idx + self.rank * case.local_experts) % 2
        received = (recv_idx >= 0).any(1, keepdim=True)
        factor = (recv_w * c * (recv_idx >= 0)).sum(1, keepdim=True)
        y = torch.where(received, recv_x, 0) * factor.bfloat16()
        return ops.ep_combine(y, 3 * recv_w, bias_0, bias_1, prefix, src, in_rank, row, buffer)

    def dense(self, *leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for this rank's tokens, without any rank."""
        x, w, bias_0, bias_1 = leaves
        valid = (self.idx >= 0) & (self.idx < self.case.experts)
        factor = (w * (1 + self.idx % 2) * valid).sum(1, keepdim=True)
        return bias_0 + bias_1 + factor * x, 3 * w * valid

    def gradients(self, function, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """Both results, then the gradients of x, w and the biases."""
        leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in self.leaves]
        results = function(*leaves)
        upstream = [grad.to(result.dtype) for grad, result in zip((self.grad_x, self.grad_w), results)]
        return [*(result.detach() for result in results), *torch.autograd.grad(results, leaves, upstream)]


TOYS = [
    EpCase(hidden=16, k=3, routing="some", tokens=(16, 0, 9, 48)),
    EpCase(hidden=24, k=4, routing="repeated"),
    EpCase(hidden=8, k=1, tokens=(3, 48)),
]


def check_gradients(group, rank, case, device, compiled, worst):
    toy = Toy(case, rank, device)
    buffer = make_buffer(group, case.config(), device)
    worst = case.ranks * MAX_TOKENS if worst else 0

    def forward(*leaves):
        return toy.forward(buffer.name, worst, *leaves)

    torch.compiler.reset()
    got = toy.gradients(torch.compile(forward, backend="aot_eager", fullgraph=True) if compiled else forward)
    want = toy.gradients(toy.dense, torch.float64)
    for name, g, w in zip(("out", "weights", "x", "w", "bias_0", "bias_1"), got, want):
        assert torch.equal(g.double(), w), name
    buffer.destroy()


@pytest.mark.parametrize("worst", [False, True], ids=["exact", "worst"])
@pytest.mark.parametrize("case", TOYS, ids=str)
def test_gradients(cpu_ranks, case, worst):
    for ranks in (2, 4):
        cpu_ranks(ranks).run(check_gradients, replace(case, ranks=ranks), "cpu", False, worst)


@pytest.mark.parametrize("worst", [False, True], ids=["exact", "worst"])
def test_gradients_under_compile(cpu_ranks, worst):
    cpu_ranks(2).run(check_gradients, TOYS[0], "cpu", True, worst)


def check_fp8_gradients(group, rank, device):
    """Rows of one byte have no gradient, the weights that travel with them do."""
    case = EpCase(rows="f32", hidden=128, routing="some")
    inputs, buffer = EpInputs(case), make_buffer(group, case.config(), device)
    x, scales, idx, weights, *rest = inputs.arguments(rank, torch.device(device))
    weights = weights.clone().requires_grad_()
    recv_x, recv_scales, _, recv_weights, *_ = ops.ep_dispatch(x, scales, idx, weights, *rest, buffer.name)
    assert not recv_x.requires_grad
    assert not recv_scales.requires_grad
    (grad,) = torch.autograd.grad((recv_weights**2).sum(), weights)
    valid = (idx >= 0) & (idx < case.experts)
    assert torch.equal(grad, 2 * weights.detach() * valid)
    buffer.destroy()


def test_gradients_of_weights_beside_fp8(cpu_ranks):
    cpu_ranks(2).run(check_fp8_gradients, "cpu")


def check_unread_rows(group, rank, device):
    """combine reads nothing past the received rows, so they have gradient 0, whatever cached dispatch leaves there."""
    case = EpCase(k=3)
    inputs, buffer = EpInputs(case), make_buffer(group, case.config(), device)
    arguments = inputs.arguments(rank, torch.device(device))
    out = ops.ep_dispatch(*arguments, buffer.name, MAX_TOKENS * case.ranks)
    y = torch.full_like(out[0], float("nan"), requires_grad=True)
    weights = torch.full_like(out[3], float("nan"), requires_grad=True)
    results = ops.ep_combine(y, weights, None, None, out[5], out[6], arguments[4], out[7], buffer.name)
    grads = torch.autograd.grad(results, (y, weights), [torch.ones_like(each) for each in results])
    m = len(inputs.ys[rank])
    assert all(bool((grad[:m] == 1).all() and (grad[m:] == 0).all()) for grad in grads)
    buffer.destroy()


def test_gradients_of_unread_rows(cpu_ranks):
    cpu_ranks(2).run(check_unread_rows, "cpu")


def check_effects(group, rank, device, backend, worst):
    """Rank 0 uses no result and calls twice with equal arguments; all calls run, in the order of the program."""
    case = EpCase()
    inputs, buffer = EpInputs(case), make_buffer(group, case.config(), device)
    arguments = inputs.arguments(rank, torch.device(device))
    calls = []
    for method in ("_dispatch", "_dispatch_cached", "_combine"):
        original = getattr(buffer, method)
        wrapper = lambda *a, m=method, o=original, **k: (calls.append(m), o(*a, **k))[1]  # noqa: E731
        setattr(buffer, method, wrapper)

    # Without the option, inductor of torch 2.13 orders calls that no tensor connects by their memory.
    options = {"reorder_for_peak_memory": False} if backend == "inductor" else None

    @torch.compile(backend=backend, fullgraph=True, options=options)
    def step(x, *others):
        first = ops.ep_dispatch(x, *others, buffer.name, worst)
        handle = (first[5], first[6], others[3], first[7])
        second = ops.ep_dispatch(x, *others, buffer.name, worst)
        again, _ = ops.ep_dispatch_cached(x, None, *handle, buffer.name)
        combined, _ = ops.ep_combine(first[0], None, None, None, *handle, buffer.name)
        ops.ep_dispatch(x, *others, buffer.name, worst)
        return x + 1 if rank == 0 else (first[0], second[0], again, combined)

    torch.compiler.reset()
    got = step(*arguments)
    assert calls == ["_dispatch", "_dispatch", "_dispatch_cached", "_combine", "_dispatch"]
    if rank:
        want = inputs.received[rank].recv_x
        assert all(same_bits(each[: len(want)], want) for each in got[:3])
    buffer.destroy()


@pytest.mark.parametrize(("backend", "worst"), [("aot_eager", 0), ("aot_eager", 100), ("inductor", 100)])
def test_unused_and_equal_calls_run_in_order(cpu_ranks, backend, worst):
    cpu_ranks(2).run(check_effects, "cpu", backend, worst)
