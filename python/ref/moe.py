"""Mixture of experts on one rank in plain torch: routing, permutation, grouped GEMM. The specification.

n tokens with k choices each, E experts, H columns of a token; M rows sorted by expert, K columns, N columns of the
product, I = N / 2 for the SwiGLU epilogues.

    route        choose k of E experts per token, and weights
    permute      one copy of a token's row for each of its choices, sorted by expert, then token, then choice
    grouped_gemm each expert's rows times its weights, rows of all experts in one matrix
    masked_grouped_gemm   the same, every expert with a block of T rows of its own
    unpermute    out[t] = ((w[t, 0] * y_0) + w[t, 1] * y_1) + ...   in fp32, product and sum each rounded

Rows that no expert owns are undefined (0 here), in results and gradients alike they are never read.
Source of behaviour: DeepSeek-V3's gate and experts; torch._grouped_mm for `ends`; DeepGEMM for the FP8 scales.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .quant import dequantize_fp8, expand_scales, quantize_fp8

EPILOGUES = ("store", "swiglu", "swiglu_fp8")
SCORINGS = ("sigmoid", "softmax")
NORMALIZE_EPS = 1e-20
Scales = Tensor | None


def route(
    logits: Tensor,
    bias: Tensor | None,
    topk: int,
    num_groups: int = 1,
    topk_groups: int = 1,
    scoring: str = "sigmoid",
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose `topk` experts for every token.

    logits: float32 or bfloat16 (n, E).  bias: float32 (E,) or None.
        s = sigmoid or softmax of logits, rounded once to float32        c = s + bias, the choice scores
    With groups, the E / num_groups experts of each compete as a group first: its score is the sum of its two best c,
    and the topk_groups best stay. Of their experts those with the best c are chosen. Ties go to the lower index, and a
    NaN counts as -inf everywhere in the choice.
        w = s of the chosen, divided by (their sum + 1e-20) if `normalize`, times `scale`; rounded once to float32

    Returns topk_idx int64 (n, k), best c first, and topk_weights float32 (n, k), NaN where s is (with `normalize`: in
    all weights of that token).
    """
    s = scores(logits, scoring)
    n, num_experts = s.shape
    choice = _nan_is_last(s if bias is None else s + bias)
    per_group = num_experts // num_groups
    groups = choice.view(n, num_groups, per_group)
    best = groups.topk(min(2, per_group), -1).values.sum(-1)
    kept = _nan_is_last(best).argsort(dim=-1, descending=True, stable=True)[:, :topk_groups].sort(-1).values
    candidates = (kept[:, :, None] * per_group + torch.arange(per_group, device=s.device)).flatten(1)
    order = choice.gather(1, candidates).argsort(dim=-1, descending=True, stable=True)[:, :topk]
    topk_idx = candidates.gather(1, order)
    return topk_idx, route_weights(s.gather(1, topk_idx), normalize, scale)


def scores(logits: Tensor, scoring: str) -> Tensor:
    """s of `route`, float32 (n, E). By way of float64: every correct implementation gets the same bits."""
    exact = logits.double()
    return (exact.sigmoid() if scoring == "sigmoid" else exact.softmax(-1)).float()


def route_weights(chosen: Tensor, normalize: bool, scale: float) -> Tensor:
    """w of `route` from s of the chosen experts, float32 (n, k)."""
    exact = chosen.double()
    if normalize:
        exact = exact / (exact.sum(-1, keepdim=True) + NORMALIZE_EPS)
    return (exact * scale).float()


def permute(
    x: Tensor, scales: Scales, topk_idx: Tensor, num_experts: int, num_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copy every token once per choice, sorted by expert, within an expert by token, then choice.

    x: (n, H) of any dtype.  scales: (n, S) that go along, or None.
    topk_idx: integers (n, k), an id outside [0, num_experts) is no choice.
    num_rows: rows of the result; pairs that would come to lie behind them are left out.

    Returns rows (num_rows, H), row_scales (num_rows, S) or (0,), ends int32 (E,): expert e owns rows ends[e - 1] to
    ends[e], and pair_row int32 (n, k): the row of each choice, -1 for none.
    """
    n, k = topk_idx.shape
    flat = topk_idx.reshape(-1).long()
    valid = (flat >= 0) & (flat < num_experts)
    counts = torch.bincount(flat[valid], minlength=num_experts)
    order = torch.where(valid, flat, num_experts).argsort(stable=True)[: int(valid.sum())][:num_rows]
    pair_row = torch.full((n * k,), -1, dtype=torch.int32, device=x.device)
    pair_row[order] = torch.arange(len(order), dtype=torch.int32, device=x.device)
    tokens = order // max(k, 1)
    gathered = [x.new_zeros((num_rows, x.shape[1])), x.new_zeros((0,), dtype=torch.float32)]
    if scales is not None:
        gathered[1] = scales.new_zeros((num_rows, scales.shape[1]))
        gathered[1][: len(order)] = scales[tokens]
    gathered[0][: len(order)] = x[tokens]
    return gathered[0], gathered[1], counts.cumsum(0).clamp_max(num_rows).int(), pair_row.view(n, k)


def unpermute(y: Tensor, pair_row: Tensor, weights: Tensor | None) -> Tensor:
    """Each token's weighted sum over the rows of its choices, in order of the choices, rounded once to y's dtype.

    y: (M, H).  pair_row: int32 (n, k), an index outside [0, M) is no row.  weights: float32 (n, k), None for 1.

    Returns (n, H), 0 for a token without rows.
    """
    n, k = pair_row.shape
    total = torch.zeros((n, y.shape[1]), device=y.device)
    for j in range(k):
        valid, rows = pair_rows(pair_row[:, j], y)
        term = rows if weights is None else weights[:, j, None] * rows
        total = torch.where(valid[:, None], total + term, total)
    return total.to(y.dtype)


def unpermute_backward(
    grad: Tensor, y: Tensor, pair_row: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of unpermute: of y, rounded to its dtype, 0 in rows that no pair names; of weights, float32.

    grad: (n, H). No row may belong to two pairs.
    """
    k = pair_row.shape[1]
    grad_y = y.new_zeros((len(y) + 1, y.shape[1]))  # the last row takes what has no row
    grad_weights = None if weights is None else torch.zeros_like(weights)
    for j in range(k):
        valid, rows = pair_rows(pair_row[:, j], y)
        term = grad.float() if weights is None else weights[:, j, None] * grad.float()
        grad_y[torch.where(valid, pair_row[:, j], len(y))] = term.to(y.dtype)
        if grad_weights is not None:
            grad_weights[:, j] = torch.where(valid, (grad.float() * rows).sum(1), 0.0)
    return grad_y[:-1].contiguous(), grad_weights


def pair_rows(column: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of one choice per token, int32 (n,): which have a row of y, bool (n,), and those rows, float32 (n, H)."""
    valid = (column >= 0) & (column < len(y))
    if len(y) == 0:
        return valid, torch.zeros((len(column), y.shape[1]), device=y.device)
    return valid, y[torch.where(valid, column, 0)].float()


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    ends: Tensor,
    a_scales: Scales = None,
    b_scales: Scales = None,
    epilogue: str = "store",
) -> tuple[Tensor, Tensor]:
    """Rows of each expert times its weights, accumulated in fp32.

    a: bfloat16 (M, K), or e4m3 with a_scales float32 (M, K / 128).
    b: a's dtype (E, N, K), with e4m3 b_scales float32 (E, ceil(N / 128), K / 128).
    ends: int32 (E,), expert e owns rows ends[e - 1] to ends[e] of a; clamped to 0..M, and what decreases is empty.
    epilogue: as `finish`.

    Returns out (M, N or I) and out_scales as `finish`; rows at or past ends[-1] undefined (0 here).
    """
    product = torch.zeros((a.shape[0], b.shape[1]), device=a.device)
    begin = 0
    for e, end in enumerate(ends.clamp(0, a.shape[0]).tolist()):
        if end > begin:
            rows = slice(begin, end)
            product[rows] = expert_product(a[rows], b[e], _row(a_scales, rows), _row(b_scales, e))
            begin = end
    return finish(product, epilogue)


def masked_grouped_gemm(
    a: Tensor,
    b: Tensor,
    counts: Tensor,
    a_scales: Scales = None,
    b_scales: Scales = None,
    epilogue: str = "store",
) -> tuple[Tensor, Tensor]:
    """As grouped_gemm, for a (E, T, K) of which the first counts[e] rows (clamped to 0..T) of expert e are valid.

    a_scales: (E, T, K / 128).  Returns out (E, T, N or I), out_scales (E, T, I / 128); other rows undefined (0 here).
    """
    experts, rows, _ = a.shape
    product = torch.zeros((experts, rows, b.shape[1]), device=a.device)
    for e, count in enumerate(counts.clamp(0, rows).tolist()):
        if count:
            scales = None if a_scales is None else a_scales[e, :count]
            product[e, :count] = expert_product(a[e, :count], b[e], scales, _row(b_scales, e))
    return finish(product, epilogue)


def expert_product(a: Tensor, b: Tensor, a_scales: Scales, b_scales: Scales) -> Tensor:
    """float32 (m, N) of a (m, K) and b (N, K), each dequantised where it has scales."""
    left = a.float() if a_scales is None else dequantize_fp8(a, a_scales)
    right = b.float() if b_scales is None else b.float() * expand_scales(b_scales, *b.shape)
    return left @ right.t()


def finish(product: Tensor, epilogue: str) -> tuple[Tensor, Tensor]:
    """From float32 (..., N) what an epilogue stores.

    store        bfloat16 (..., N)
    swiglu       bfloat16 (..., I): silu(gate) * up in fp32, gate the first I columns, up the others
    swiglu_fp8   quantize_fp8 of that in fp32: e4m3 (..., I) and scales float32 (..., I / 128)
    The second result is float32 (0,) for the first two.
    """
    none = product.new_empty((0,))
    if epilogue == "store":
        return product.bfloat16(), none
    gate, up = product.chunk(2, -1)
    activated = functional.silu(gate) * up
    return (activated.bfloat16(), none) if epilogue == "swiglu" else quantize_fp8(activated)


def _nan_is_last(choice: Tensor) -> Tensor:
    return choice.masked_fill(choice.isnan(), -torch.inf)


def _row(scales: Scales, index: int | slice) -> Scales:
    return None if scales is None else scales[index]
