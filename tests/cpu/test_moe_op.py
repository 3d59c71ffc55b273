"""The MoE ops as torch sees them, on the CPU: opcheck, torch.compile, gradients, bad input."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import cutehop.ops.moe  # noqa: F401
from cutehop.ref import moe as ref
from tests.moe_cases import bf16, choices, ends_of, fp8_pair, fp8_weights, generator, poison

OPS = torch.ops.cutehop
ENDS = ends_of([5, 0, 9, 2])
COUNTS = torch.tensor([3, 0, 6, 9], dtype=torch.int32)
ROWS = torch.rand(16, 24, generator=generator(0))
A8, A8_SCALES = fp8_pair(18, 256)
B8, B8_SCALES = fp8_weights(4, 256, 256)
M8, M8_SCALES = fp8_pair(4, 6, 256)
PAIR_ROW = ref.permute(bf16(7, 8), None, choices(7, 3, 4), 4, 21)[3]

CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("moe_route", (ROWS, None, 4), {}),
    ("moe_route", (ROWS, ROWS[0], 4, 6, 2, "softmax", False, 2.5), {}),
    ("moe_permute", (bf16(7, 8), None, choices(7, 3, 4), 4, 21), {}),
    ("moe_permute", (A8, A8_SCALES.t().contiguous().t(), choices(18, 2, 4).int(), 4, 9), {}),
    ("moe_unpermute", (bf16(21, 8), PAIR_ROW, torch.rand(7, 3)), {}),
    ("moe_unpermute", (bf16(21, 8), PAIR_ROW, None), {}),
    ("moe_unpermute_backward", (bf16(7, 8), bf16(21, 8), PAIR_ROW, torch.rand(7, 3)), {}),
    ("moe_unpermute_backward", (bf16(7, 8), bf16(21, 8), PAIR_ROW, None), {}),
    ("quantize_fp8", (bf16(3, 5, 256),), {"round_scale": True}),
    ("grouped_gemm", (bf16(18, 16), bf16(4, 24, 16), ENDS), {}),
    ("grouped_gemm", (bf16(18, 32)[:, :16], bf16(4, 128, 16), ENDS), {"epilogue": "swiglu", "expected_rows": 7}),
    ("grouped_gemm", (A8, B8, ENDS, A8_SCALES, B8_SCALES), {"epilogue": "swiglu_fp8"}),
    ("masked_grouped_gemm", (bf16(4, 6, 16), bf16(4, 24, 16), COUNTS), {}),
    ("masked_grouped_gemm", (bf16(4, 6, 16), bf16(4, 128, 16), COUNTS), {"epilogue": "swiglu"}),
    ("masked_grouped_gemm", (M8, B8, COUNTS, M8_SCALES, B8_SCALES), {"epilogue": "swiglu_fp8"}),
]


def differentiable(call: tuple[str, tuple[Any, ...], dict[str, Any]]) -> tuple[Any, ...]:
    """The arguments, with a gradient wanted where the op has one.

    Not of route: opcheck adds up the outputs in place, beginning with its integers. test_route_gradient has it.
    """
    name, args, _ = call
    wanted = {"moe_permute": [0], "moe_unpermute": [0, 2], "grouped_gemm": [0, 1], "masked_grouped_gemm": [0, 1]}
    wanted = wanted.get(name, [])
    if A8.dtype in [a.dtype for a in args if isinstance(a, Tensor)]:
        return args
    return tuple(
        a.detach().clone().requires_grad_() if i in wanted and isinstance(a, Tensor) else a for i, a in enumerate(args)
    )


@pytest.mark.parametrize("call", CALLS, ids=lambda c: c[0])
def test_opcheck(call):
    name, args, options = call
    fp8 = A8.dtype in [a.dtype for a in args if isinstance(a, Tensor)]  # test_schema multiplies; CPUs don't, in fp8
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    more = {"test_utils": checks} if fp8 else {}
    torch.library.opcheck(getattr(OPS, name).default, differentiable(call), options, **more)


@pytest.mark.parametrize("call", CALLS, ids=lambda c: c[0])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(call, dynamic):
    torch._dynamo.reset()  # its limit of recompilations counts all parameters of this test
    name, args, options = call
    op = getattr(OPS, name)
    compiled = torch.compile(lambda *a: op(*a, **options), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for actual, expected in zip(as_tuple(compiled(*args)), as_tuple(op(*args, **options))):
        assert torch.equal(actual.float(), expected.float())


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def test_one_layer_compiles_and_trains_like_a_dense_one():
    """route -> permute -> SwiGLU -> product -> unpermute against every expert on every token, in float64."""
    n, hidden, inter, experts, k = 40, 32, 64, 8, 3
    x, gate = bf16(n, hidden, seed=1), torch.randn(experts, hidden, generator=generator(2))
    w1, w2 = bf16(experts, 2 * inter, hidden, seed=3) * 0.2, bf16(experts, hidden, inter, seed=4) * 0.2
    grad = bf16(n, hidden, seed=5)

    def ours(x, gate, w1, w2):
        idx, weights = OPS.moe_route(x.float() @ gate.t(), None, k, 4, 2, scale=2.0)
        rows, _, ends, pair_row = OPS.moe_permute(x, None, idx, experts, n * k)
        h, _ = OPS.grouped_gemm(rows, w1, ends, epilogue="swiglu")
        y, _ = OPS.grouped_gemm(h, w2, ends)
        return OPS.moe_unpermute(y, pair_row, weights)

    def dense(x, gate, w1, w2):
        s = (x @ gate.t()).sigmoid()
        idx, _ = ref.route((x @ gate.t()).float(), None, k, 4, 2)
        weights = torch.zeros_like(s).scatter(1, idx, s.gather(1, idx))
        weights = 2 * weights / weights.sum(1, keepdim=True)
        left, right = torch.einsum("nh,eih->nei", x, w1).chunk(2, -1)
        return torch.einsum("nei,ehi,ne->nh", torch.nn.functional.silu(left) * right, w2, weights)

    expected = gradients(dense, [t.double() for t in (x, gate, w1, w2)], grad.double())
    for function in (ours, torch.compile(ours, fullgraph=True, backend="aot_eager")):
        actual = gradients(function, [x, gate, w1, w2], grad)
        for a, e in zip(actual, expected):
            assert (a.double() - e).norm() < 0.02 * e.norm()


def gradients(function, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output and the gradient of every input."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*inputs)
    out.backward(grad)
    return [out.detach(), *(t.grad for t in inputs)]


@pytest.mark.parametrize("scoring", ref.SCORINGS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_route_gradient(scoring, normalize, dtype):
    logits = torch.randn(9, 16, generator=generator(3)).to(dtype)
    grad = torch.randn(9, 4, generator=generator(4))

    def plain(logits):
        s = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
        w = s.gather(1, ref.route(logits, None, 4, scoring=scoring)[0])
        return 1.5 * (w / w.sum(1, keepdim=True) if normalize else w)

    def ours(logits):
        return OPS.moe_route(logits, None, 4, 1, 1, scoring, normalize, 1.5)[1]

    _, expected = gradients(plain, [logits.double()], grad.double())
    _, actual = gradients(ours, [logits], grad)
    torch.testing.assert_close(actual, expected.to(dtype))


@pytest.mark.parametrize("weighted", [False, True])
def test_unpermute_gradient(weighted):
    idx = choices(20, 4, 6)
    pair_row = ref.permute(bf16(20, 8), None, idx, 6, 60)[3]
    y, weights, grad = bf16(64, 16, seed=1), torch.rand(20, 4, generator=generator(2)), bf16(20, 16, seed=3)

    def plain(y, weights):
        valid = (pair_row >= 0)[..., None]
        rows = y[pair_row.clamp_min(0).long()] * valid
        return (rows * weights[..., None] if weighted else rows).sum(1)

    def ours(y, weights):
        return OPS.moe_unpermute(y, pair_row, weights if weighted else None)

    expected = gradients(plain, [y.double(), weights.double()], grad.double())
    actual = gradients(ours, [poison(y, 60), weights], grad)
    assert torch.equal(actual[1].float(), expected[1].bfloat16().float())
    if weighted:
        torch.testing.assert_close(actual[2], expected[2].float())


def test_permute_gradient():
    idx = choices(20, 4, 6)
    grad = bf16(80, 16, seed=3)
    x = bf16(20, 16).requires_grad_()
    rows, _, ends, pair_row = OPS.moe_permute(x, None, idx, 6, 80)
    rows.backward(poison(grad, int(ends[-1])))
    assert x.grad is not None
    assert torch.equal(x.grad, ref.unpermute(grad, pair_row, None))


@pytest.mark.parametrize("epilogue", ["store", "swiglu"])
@pytest.mark.parametrize("masked", [False, True])
def test_gemm_gradient(epilogue, masked):
    """Against float64; rows that no expert owns are NaN in the inputs and in the incoming gradient."""
    b = bf16(4, 128, 24, seed=1)
    if masked:
        a, per_expert, op = bf16(4, 6, 24), COUNTS, OPS.masked_grouped_gemm
        owned = (torch.arange(6) < COUNTS[:, None])[..., None]
    else:
        a, per_expert, op = bf16(20, 24), ENDS, OPS.grouped_gemm
        owned = (torch.arange(20) < ENDS[-1])[:, None]
    grad = bf16(*a.shape[:-1], 128 if epilogue == "store" else 64, seed=2)

    def plain(a, b):
        if masked:
            out = torch.bmm(a, b.transpose(1, 2))
        else:
            out = torch.cat([a[:5] @ b[0].t(), a[5:14] @ b[2].t(), a[14:16] @ b[3].t(), a.new_zeros(4, 128)])
        left, right = out.chunk(2, -1)
        return (out if epilogue == "store" else torch.nn.functional.silu(left) * right) * owned

    expected = gradients(plain, [a.double(), b.double()], grad.double())
    nan = torch.tensor(torch.nan, dtype=torch.bfloat16)
    poisoned = [torch.where(owned, a, nan), b]
    out, grad_a, grad_b = gradients(
        lambda a, b: op(a, b, per_expert, epilogue=epilogue)[0], poisoned, torch.where(owned, grad, nan)
    )
    for actual, e in zip((torch.where(owned, out, 0), grad_a, grad_b), expected):
        assert (actual.double() - e).norm() < 0.01 * e.norm()


def test_gemm_gradient_of_fp8_is_refused():
    a = bf16(18, 256).requires_grad_()
    out, _ = OPS.grouped_gemm(a, bf16(4, 256, 256), ENDS, epilogue="swiglu_fp8")
    with pytest.raises(NotImplementedError, match="train in bfloat16"):
        out.backward(torch.zeros_like(out))


ROUTE = {"logits": ROWS, "bias": ROWS[0], "topk": 4, "num_groups": 6, "topk_groups": 2}
PERMUTE = {"x": A8, "scales": A8_SCALES, "topk_idx": choices(18, 2, 4), "num_experts": 4, "num_rows": 36}
UNPERMUTE = {"y": bf16(21, 8), "pair_row": PAIR_ROW, "weights": torch.rand(7, 3)}
GEMM = {"a": A8, "b": B8, "ends": ENDS, "a_scales": A8_SCALES, "b_scales": B8_SCALES}
MASKED = {"a": M8, "b": B8, "counts": COUNTS, "a_scales": M8_SCALES, "b_scales": B8_SCALES}
PLAIN = {"a": bf16(18, 16), "b": bf16(4, 24, 16), "ends": ENDS}
BAD = [
    ("moe_route", ROUTE, {"logits": ROWS.double()}, TypeError, "logits are torch.float64"),
    ("moe_route", ROUTE, {"logits": ROWS[0]}, ValueError, "logits have shape (24,)"),
    ("moe_route", ROUTE, {"logits": torch.zeros(1, 513)}, ValueError, "E 1..512"),
    ("moe_route", ROUTE, {"bias": ROWS[0, :3]}, ValueError, "bias has shape (3,), needs (24,)"),
    ("moe_route", ROUTE, {"bias": ROWS[0].bfloat16()}, TypeError, "bias is torch.bfloat16"),
    ("moe_route", ROUTE, {"topk": 0}, ValueError, "topk 0, needs 1..8"),
    ("moe_route", ROUTE, {"topk": 9}, ValueError, "topk 9, needs 1..8"),
    ("moe_route", ROUTE, {"num_groups": 5}, ValueError, "num_groups 5"),
    ("moe_route", ROUTE, {"topk_groups": 7}, ValueError, "topk_groups 7"),
    ("moe_route", ROUTE, {"scoring": "relu"}, ValueError, "scoring 'relu'"),
    ("moe_permute", PERMUTE, {"x": A8.float()}, TypeError, "x is torch.float32"),
    ("moe_permute", PERMUTE, {"x": A8[:, :8]}, ValueError, "H a multiple of 16"),
    ("moe_permute", PERMUTE, {"x": bf16(18, 8)}, ValueError, "scales given with x of torch.bfloat16"),
    ("moe_permute", PERMUTE, {"scales": A8_SCALES.double()}, TypeError, "scales are torch.float64"),
    ("moe_permute", PERMUTE, {"scales": A8_SCALES[1:]}, ValueError, "scales have shape (17, 2)"),
    ("moe_permute", PERMUTE, {"topk_idx": choices(17, 2, 4)}, ValueError, "topk_idx has shape (17, 2)"),
    ("moe_permute", PERMUTE, {"topk_idx": choices(18, 33, 4)}, ValueError, "k 1..32"),
    ("moe_permute", PERMUTE, {"topk_idx": choices(18, 2, 4).short()}, TypeError, "topk_idx is torch.int16"),
    ("moe_permute", PERMUTE, {"num_experts": 1025}, ValueError, "num_experts 1025"),
    ("moe_permute", PERMUTE, {"num_rows": -1}, ValueError, "num_rows -1"),
    ("moe_unpermute", UNPERMUTE, {"y": ROWS}, TypeError, "y is torch.float32"),
    ("moe_unpermute", UNPERMUTE, {"y": bf16(21, 12)}, ValueError, "H a multiple of 8"),
    ("moe_unpermute", UNPERMUTE, {"pair_row": PAIR_ROW.long()}, TypeError, "pair_row is torch.int64"),
    ("moe_unpermute", UNPERMUTE, {"pair_row": PAIR_ROW.t().contiguous().t()}, ValueError, "pair_row has strides"),
    ("moe_unpermute", UNPERMUTE, {"weights": ROWS}, ValueError, "weights has shape (16, 24), needs (7, 3)"),
    ("quantize_fp8", {"x": bf16(2, 256)}, {"x": bf16(2, 64)}, ValueError, "H a positive multiple of 128"),
    ("quantize_fp8", {"x": bf16(2, 256)}, {"x": torch.zeros(2, 256)}, TypeError, "x is torch.float32"),
    ("grouped_gemm", GEMM, {"epilogue": "relu"}, ValueError, "epilogue 'relu'"),
    ("grouped_gemm", GEMM, {"a": A8.float()}, TypeError, "a is torch.float32"),
    ("grouped_gemm", GEMM, {"b": bf16(4, 256, 256)}, TypeError, "b is torch.bfloat16, a is torch.float8_e4m3fn"),
    ("grouped_gemm", GEMM, {"b": B8[0]}, ValueError, "needs (E, N, 256)"),
    ("grouped_gemm", GEMM, {"b": B8[:, :, :128]}, ValueError, "needs (E, N, 256)"),
    ("grouped_gemm", GEMM, {"b": B8[:, :64], "b_scales": B8_SCALES[:, :1]}, ValueError, "N 64"),
    ("grouped_gemm", GEMM, {"b": B8[:, :128], "b_scales": B8_SCALES[:, :1], "epilogue": "swiglu"}, ValueError, "N 128"),
    ("grouped_gemm", GEMM, {"ends": ENDS.long()}, TypeError, "ends is torch.int64"),
    ("grouped_gemm", GEMM, {"ends": ENDS[:3]}, ValueError, "ends has shape (3,), needs (4,)"),
    ("grouped_gemm", GEMM, {"a_scales": None}, ValueError, "a_scales missing"),
    ("grouped_gemm", GEMM, {"b_scales": None}, ValueError, "b_scales missing"),
    ("grouped_gemm", GEMM, {"a_scales": A8_SCALES[:, :1]}, ValueError, "a_scales has shape (18, 1), needs (18, 2)"),
    ("grouped_gemm", GEMM, {"b_scales": B8_SCALES.half()}, TypeError, "b_scales is torch.float16"),
    ("grouped_gemm", GEMM, {"expected_rows": -1}, ValueError, "expected_rows -1"),
    ("grouped_gemm", PLAIN, {"a_scales": A8_SCALES}, ValueError, "a_scales given"),
    ("grouped_gemm", PLAIN, {"a": bf16(16, 18).t()}, ValueError, "a has strides (1, 18)"),
    ("grouped_gemm", PLAIN, {"a": bf16(18, 12), "b": bf16(4, 24, 12)}, ValueError, "K 12"),
    ("grouped_gemm", PLAIN, {"b": bf16(4, 20, 16)}, ValueError, "N 20"),
    ("grouped_gemm", PLAIN, {"epilogue": "swiglu"}, ValueError, "N 24 with swiglu"),
    ("masked_grouped_gemm", MASKED, {"a": A8}, ValueError, "needs (E, T, K)"),
    ("masked_grouped_gemm", MASKED, {"b": B8[:3], "b_scales": B8_SCALES[:3]}, ValueError, "needs (4, N, 256)"),
    ("masked_grouped_gemm", MASKED, {"counts": COUNTS[:3]}, ValueError, "counts has shape (3,), needs (4,)"),
]


@pytest.mark.parametrize("entry", BAD, ids=lambda e: f"{e[0]}-{e[4]}")
@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_bad_argument(entry, fake):
    name, correct, changed, error, message = entry
    op = getattr(OPS, name)
    op(**correct)
    with FakeTensorMode() as mode:
        bad = {**correct, **changed}
        if fake:
            bad = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in bad.items()}
            with pytest.raises(error, match=re.escape(message)):
                op(**bad)
            return
    with pytest.raises(error, match=re.escape(message)):
        op(**bad)
