"""Gradients of the MoE ops, as functions of tensors that torch.compile traces.

Products of gradients are torch._grouped_mm and torch.bmm, which accumulate in fp32. The rest is our ops or elementwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cutehop.ref import moe as ref

_OPS = torch.ops.cutehop


def register() -> None:
    """Once, after the ops are defined."""
    for op, setup_context, backward in (
        ("moe_route", _setup_route, _route_backward),
        ("moe_permute", _setup_permute, _permute_backward),
        ("moe_unpermute", _setup_unpermute, _unpermute_backward),
        ("grouped_gemm", _setup_gemm, _grouped_backward),
        ("masked_grouped_gemm", _setup_gemm, _masked_backward),
    ):
        torch.library.register_autograd(f"cutehop::{op}", backward, setup_context=setup_context)


def _setup_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, _, _, _, ctx.scoring, ctx.normalize, ctx.scale = inputs
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(logits, output[0])


def _route_backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Any, ...]:
    """Through w = s[idx] / sum * scale and the scores; the choice itself has no gradient."""
    logits, idx = ctx.saved_tensors
    exact = logits.double()
    s = exact.sigmoid() if ctx.scoring == "sigmoid" else exact.softmax(-1)
    chosen = s.gather(1, idx)
    g = grad.double() * ctx.scale
    if ctx.normalize:
        total = chosen.sum(-1, keepdim=True) + ref.NORMALIZE_EPS
        g = (g - (g * chosen).sum(-1, keepdim=True) / total) / total
    g = torch.zeros_like(s).scatter(1, idx, g)
    g = g * s * (1 - s) if ctx.scoring == "sigmoid" else s * (g - (g * s).sum(-1, keepdim=True))
    return g.to(logits.dtype), None, None, None, None, None, None, None


def _setup_permute(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[3])


def _permute_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    (pair_row,) = ctx.saved_tensors
    return _OPS.moe_unpermute(grad.contiguous(), pair_row, None), None, None, None, None


def _setup_unpermute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, pair_row, weights = inputs
    ctx.save_for_backward(y, pair_row, weights)


def _unpermute_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    y, pair_row, weights = ctx.saved_tensors
    grad_y, grad_weights = _OPS.moe_unpermute_backward(grad.contiguous(), y, pair_row, weights)
    return grad_y, None, None if weights is None else grad_weights


def _setup_gemm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, per_expert, _, _, ctx.epilogue, ctx.expected_rows = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(a, b, per_expert)


def _grouped_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    a, b, ends = ctx.saved_tensors
    grad = _product_grad(ctx, grad, _OPS.grouped_gemm)
    grad_a = torch._grouped_mm(grad, b, offs=ends)
    owned = torch.arange(len(a), device=a.device)[:, None] < ends[-1]
    return torch.where(owned, grad_a, 0), torch._grouped_mm(grad.t(), a, offs=ends), None, None, None, None, None


def _masked_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    a, b, counts = ctx.saved_tensors
    valid = (torch.arange(a.shape[1], device=a.device) < counts[:, None])[..., None]
    grad = torch.where(valid, _product_grad(ctx, grad, _OPS.masked_grouped_gemm), 0)
    grad_b = torch.bmm(grad.transpose(1, 2), torch.where(valid, a, 0))
    return torch.bmm(grad, b), grad_b, None, None, None, None, None


def _product_grad(ctx: Any, grad: Tensor, gemm: Any) -> Tensor:
    """Gradient of the product that the epilogue took, (..., N)."""
    a, b, per_expert = ctx.saved_tensors
    if a.dtype != torch.bfloat16 or ctx.epilogue == "swiglu_fp8":
        raise NotImplementedError(
            f"{gemm._qualified_op_name}: gradient of {a.dtype} with epilogue {ctx.epilogue!r}, supported bfloat16 with "
            "store|swiglu; train in bfloat16"
        )
    if ctx.epilogue == "store":
        return grad.contiguous()
    product, _ = gemm(a, b, per_expert, expected_rows=ctx.expected_rows)
    gate, up = product.float().chunk(2, -1)
    g = grad.float()
    s = gate.sigmoid()
    silu = gate * s
    return torch.cat([g * up * (s + silu * (1 - s)), g * silu], -1).to(a.dtype)
