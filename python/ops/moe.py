"""Ops of mixture of experts on one rank: routing, permutation, FP8 cast, grouped GEMM.

n tokens, k choices each, E experts, H columns of a token; M rows sorted by expert, K columns of them, N columns of the
product, I = N / 2. cutehop.ref.moe and cutehop.ref.quant define the values. Nothing waits for the GPU.

moe_route(logits, bias, topk, num_groups=1, topk_groups=1, scoring="sigmoid", normalize=True, scale=1.0)
        -> (topk_idx, topk_weights)
    logits                   float32 | bfloat16 (n, E), E 1..512.
    bias                     float32 (E,), added to the scores for the choice only, or None.
    topk                     k, 1..32, at most the experts of topk_groups groups.
    num_groups, topk_groups  of num_groups groups of E / num_groups experts (1..32) only topk_groups are chosen from.
    scoring                  "sigmoid" (DeepSeek-V3) | "softmax".
    normalize, scale         weights are divided by their sum, then multiplied by scale.
    Returns int64 (n, k), best first, ties to the lower index; float32 (n, k). A NaN is chosen last: ids are in range.

moe_permute(x, scales, topk_idx, num_experts, num_rows) -> (rows, row_scales, ends, pair_row)
    x                        (n, H) bfloat16 | float8_e4m3fn, H * itemsize a multiple of 16 bytes.
    scales                   float32 | int32 (n, S), any strides, with float8 only; or None.
    topk_idx                 int64 | int32 (n, k), k 1..32; an id outside [0, num_experts) is no choice.
    num_experts              1..1024.
    num_rows                 M, static: n * k always suffices; pairs that do not fit are dropped.
    Returns rows (M, H), one copy per choice sorted by expert, token, choice; row_scales (M, S) or (0,); int32 ends (E,)
    as for grouped_gemm; int32 pair_row (n, k), -1 for no row. Rows at or past ends[-1] are undefined.

moe_unpermute(y, pair_row, weights) -> out
    y                        bfloat16 (M, H), H a multiple of 8.
    pair_row                 int32 (n, k), contiguous; an index outside [0, M) is no row. For gradients no row twice.
    weights                  float32 (n, k), None for 1.
    Returns bfloat16 (n, H): ((w_0 * y_0) + w_1 * y_1) + ... in fp32, each step rounded; 0 without rows.

quantize_fp8(x, round_scale=False) -> (q, scales)
    x                        bfloat16 (..., H), finite, H a multiple of 128.  round_scale: powers of two.
    Returns float8_e4m3fn (..., H), float32 (..., H / 128).

grouped_gemm(a, b, ends, a_scales=None, b_scales=None, epilogue="store", expected_rows=0) -> (out, out_scales)
    a                        (M, K) bfloat16 | float8_e4m3fn, sorted by expert; rows a multiple of 16 bytes apart.
    b                        (E, N, K) of a's dtype, as torch.nn.Linear has it.
    ends                     int32 (E,): expert e owns rows ends[e - 1] to ends[e]. Empty experts are allowed.
    a_scales                 float32 (M, K / 128), any strides; with float8 only.
    b_scales                 float32 (E, ceil(N / 128), K / 128); with float8 only.
    epilogue                 "store": bfloat16 (M, N). "swiglu": bfloat16 (M, I), silu of the first I columns times the
                             others, in fp32. "swiglu_fp8": its quantize_fp8, (M, I) and float32 (M, I / 128).
    expected_rows            mean rows per expert, a hint for speed; 0: M / E.
    K and N are multiples of 8, with float8 of 128. I is a multiple of 64, with float8 in or out of 128.
    out_scales is float32 (0,) but for swiglu_fp8. Rows at or past ends[-1] are undefined.

masked_grouped_gemm(a, b, counts, a_scales=None, b_scales=None, epilogue="store", expected_rows=0) -> (out, out_scales)
    The same with a (E, T, K) and int32 counts (E,): the first counts[e] rows of expert e (clamped to 0..T) are valid.
    a_scales (E, T, K / 128), out (E, T, N | I), out_scales (E, T, I / 128). expected_rows 0: T.

Gradients, all deterministic: of topk_weights to logits; x <-> rows of bfloat16 permute; y and weights of unpermute; a
and b of both GEMMs in bfloat16 with "store" and "swiglu" (which computes its product once more). Where rows are
undefined, no gradient depends on them, and theirs is 0.

Errors: TypeError for dtypes, ValueError for the rest; each names the value, the limit and the cure.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cutehop.ops import _moe_checks as checks
from cutehop.ops import _moe_gradients as gradients
from cutehop.ops._define import define
from cutehop.ref import moe as ref
from cutehop.ref import quant as ref_quant

Outputs = tuple[Tensor, ...]


def _allocate_route(
    logits: Tensor,
    bias: Tensor | None,
    topk: int,
    num_groups: int = 1,
    topk_groups: int = 1,
    scoring: str = "sigmoid",
    normalize: bool = True,
    scale: float = 1.0,
) -> Outputs:
    checks.check_route(logits, bias, topk, num_groups, topk_groups, scoring)
    shape = (logits.shape[0], topk)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)


def _allocate_permute(x: Tensor, scales: Tensor | None, topk_idx: Tensor, num_experts: int, num_rows: int) -> Outputs:
    checks.check_permute(x, scales, topk_idx, num_experts, num_rows)
    return (
        x.new_empty((num_rows, x.shape[1])),
        x.new_empty((0,), dtype=torch.float32) if scales is None else scales.new_empty((num_rows, scales.shape[1])),
        x.new_empty((num_experts,), dtype=torch.int32),
        x.new_empty(topk_idx.shape, dtype=torch.int32),
    )


def _allocate_unpermute(y: Tensor, pair_row: Tensor, weights: Tensor | None) -> Tensor:
    checks.check_unpermute(y, pair_row, weights)
    return y.new_empty((pair_row.shape[0], y.shape[1]))


def _allocate_unpermute_backward(grad: Tensor, y: Tensor, pair_row: Tensor, weights: Tensor | None) -> Outputs:
    shape = (0,) if weights is None else pair_row.shape
    return y.new_empty(y.shape), y.new_empty(shape, dtype=torch.float32)


def _unpermute_backward_cpu(grad: Tensor, y: Tensor, pair_row: Tensor, weights: Tensor | None) -> Outputs:
    grad_y, grad_weights = ref.unpermute_backward(grad, y, pair_row, weights)
    return grad_y, y.new_empty((0,), dtype=torch.float32) if grad_weights is None else grad_weights


def _allocate_quantize(x: Tensor, round_scale: bool = False) -> Outputs:
    checks.check_quantize(x)
    scales = x.new_empty((*x.shape[:-1], x.shape[-1] // ref_quant.FP8_GROUP), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=checks.FP8), scales


def _allocate_grouped(
    a: Tensor,
    b: Tensor,
    ends: Tensor,
    a_scales: Tensor | None = None,
    b_scales: Tensor | None = None,
    epilogue: str = "store",
    expected_rows: int = 0,
) -> Outputs:
    checks.check_grouped("grouped_gemm", a, b, ("ends", ends), a_scales, b_scales, epilogue, expected_rows)
    return _gemm_outputs(a, b.shape[1], epilogue)


def _allocate_masked(
    a: Tensor,
    b: Tensor,
    counts: Tensor,
    a_scales: Tensor | None = None,
    b_scales: Tensor | None = None,
    epilogue: str = "store",
    expected_rows: int = 0,
) -> Outputs:
    checks.check_grouped("masked_grouped_gemm", a, b, ("counts", counts), a_scales, b_scales, epilogue, expected_rows)
    return _gemm_outputs(a, b.shape[1], epilogue)


def _gemm_outputs(a: Tensor, columns: int, epilogue: str) -> Outputs:
    shape = a.shape[:-1]
    columns = columns if epilogue == "store" else columns // 2
    fp8 = epilogue == "swiglu_fp8"
    out = a.new_empty((*shape, columns), dtype=checks.FP8 if fp8 else torch.bfloat16)
    groups = columns // ref_quant.FP8_GROUP
    return out, a.new_empty((*shape, groups) if fp8 else (0,), dtype=torch.float32)


def _grouped_cpu(
    a: Tensor,
    b: Tensor,
    ends: Tensor,
    a_scales: Tensor | None = None,
    b_scales: Tensor | None = None,
    epilogue: str = "store",
    expected_rows: int = 0,
) -> Outputs:
    return ref.grouped_gemm(a, b, ends, a_scales, b_scales, epilogue)


def _masked_cpu(
    a: Tensor,
    b: Tensor,
    counts: Tensor,
    a_scales: Tensor | None = None,
    b_scales: Tensor | None = None,
    epilogue: str = "store",
    expected_rows: int = 0,
) -> Outputs:
    return ref.masked_grouped_gemm(a, b, counts, a_scales, b_scales, epilogue)


define(
    "moe_route",
    "(Tensor logits, Tensor? bias, int topk, int num_groups=1, int topk_groups=1, str scoring='sigmoid',"
    " bool normalize=True, float scale=1.0) -> (Tensor topk_idx, Tensor topk_weights)",
    allocate=_allocate_route,
    cpu=ref.route,
    cuda="cutehop.ops._moe_cuda:route",
)
define(
    "moe_permute",
    "(Tensor x, Tensor? scales, Tensor topk_idx, int num_experts, SymInt num_rows)"
    " -> (Tensor rows, Tensor row_scales, Tensor ends, Tensor pair_row)",
    allocate=_allocate_permute,
    cpu=ref.permute,
    cuda="cutehop.ops._moe_cuda:permute",
)
define(
    "moe_unpermute",
    "(Tensor y, Tensor pair_row, Tensor? weights) -> Tensor out",
    allocate=_allocate_unpermute,
    cpu=ref.unpermute,
    cuda="cutehop.ops._moe_cuda:unpermute",
)
define(
    "moe_unpermute_backward",
    "(Tensor grad, Tensor y, Tensor pair_row, Tensor? weights) -> (Tensor grad_y, Tensor grad_weights)",
    allocate=_allocate_unpermute_backward,
    cpu=_unpermute_backward_cpu,
    cuda="cutehop.ops._moe_cuda:unpermute_backward",
)
define(
    "quantize_fp8",
    "(Tensor x, bool round_scale=False) -> (Tensor q, Tensor scales)",
    allocate=_allocate_quantize,
    cpu=ref_quant.quantize_fp8,
    cuda="cutehop.ops._moe_cuda:quantize_fp8",
)
_GEMM_OPTIONS = (
    "Tensor? a_scales=None, Tensor? b_scales=None, str epilogue='store', SymInt expected_rows=0)"
    " -> (Tensor out, Tensor out_scales)"
)
define(
    "grouped_gemm",
    f"(Tensor a, Tensor b, Tensor ends, {_GEMM_OPTIONS}",
    allocate=_allocate_grouped,
    cpu=_grouped_cpu,
    cuda="cutehop.ops._gemm_cuda:grouped_gemm",
)
define(
    "masked_grouped_gemm",
    f"(Tensor a, Tensor b, Tensor counts, {_GEMM_OPTIONS}",
    allocate=_allocate_masked,
    cpu=_masked_cpu,
    cuda="cutehop.ops._gemm_cuda:masked_grouped_gemm",
)
gradients.register()
