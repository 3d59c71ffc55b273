"""cutehop.ops._define: one allocator, defaults that match the schema, out= variants, and the time it adds to a call."""

from __future__ import annotations

import sys
import time
import types

import pytest
import torch
from torch import Tensor

from cutehop.ops import _define
from cutehop.ops._define import define

SCHEMA = "(Tensor x, int n=2, *, float scale=1.0, Tensor? bias=None) -> (Tensor out, Tensor total)"


def allocate(x: Tensor, n: int = 2, **_: object) -> tuple[Tensor, Tensor]:
    """Outputs that no reference makes by itself: `out` is laid out column-major."""
    return x.new_empty(x.shape[1], x.shape[0] * n).t(), x.new_empty((), dtype=torch.float64)


def reference(x: Tensor, n: int = 2, *, scale: float = 1.0, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    out = x.repeat(n, 1) * scale + (0 if bias is None else bias)
    return out, out.sum().double()


def sum_all(x: Tensor) -> Tensor:
    return x.sum()


define("toy_repeat", SCHEMA, allocate=allocate, cpu=reference, cuda="cutehop_toy:fill", out_variant=True)
define("toy_sum", "(Tensor x) -> (Tensor total)", allocate=lambda x: x.new_empty(()), cpu=sum_all, out_variant=True)
toy = torch.ops.cutehop


@pytest.mark.parametrize("kwargs", [{}, {"scale": 2.0}, {"scale": 0.5, "bias": torch.ones(3)}])
@pytest.mark.parametrize("args", [(), (2,), (3,)])
def test_result_has_the_reference_values_and_the_allocator_layout(args, kwargs):
    x = torch.randn(4, 3)
    out, total = toy.toy_repeat(x, *args, **kwargs)
    want, want_total = reference(x, *args, **kwargs)
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    assert total == want_total
    assert out.stride() == allocate(x, *args)[0].stride() != want.stride()


@pytest.mark.parametrize(
    ("op", "args", "kwargs"),
    [
        (toy.toy_repeat.default, (torch.randn(4, 3),), {}),
        (toy.toy_repeat.default, (torch.randn(4, 3), 3), {"scale": 2.0, "bias": torch.randn(3)}),
        (
            toy.toy_repeat_out.default,
            (torch.randn(4, 3), 3),
            {"scale": 2.0, "out": torch.zeros(12, 3), "total": torch.zeros((), dtype=torch.float64)},
        ),
        (toy.toy_sum.default, (torch.randn(5),), {}),
        (toy.toy_sum_out.default, (torch.randn(5),), {"total": torch.zeros(())}),
    ],
)
def test_opcheck(op, args, kwargs):
    torch.library.opcheck(op, args, kwargs)


def test_compiles_without_a_graph_break():
    def model(x: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, total = torch.ops.cutehop.toy_repeat(x * 2, 3, scale=0.5)
        torch.ops.cutehop.toy_sum_out(out, total=buffer)
        return out + 1, total, buffer * 2

    x = torch.randn(4, 3)
    eager = model(x, buffer := torch.zeros(()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x, other := torch.zeros(()))
    for got, want in zip((*compiled, other), (*eager, buffer)):
        torch.testing.assert_close(got, want)
    assert buffer != 0


def test_out_variant_writes_the_given_tensors_and_refuses_other_shapes():
    x = torch.randn(4, 3)
    out, total = torch.full((8, 3), float("nan")), torch.zeros((), dtype=torch.float64)
    assert toy.toy_repeat_out(x, out=out, total=total) is None
    torch.testing.assert_close(out, reference(x)[0])
    for bad in (torch.zeros(1, 3), torch.zeros(8, 3, dtype=torch.float64)):
        with pytest.raises(ValueError, match="toy_repeat: out has shape"):
            toy.toy_repeat_out(x, out=bad, total=total)


def test_cuda_body_is_imported_by_the_first_call_and_gets_the_allocated_outputs(monkeypatch):
    """Without a GPU the CUDA key is reached through the dispatcher's own redispatch, on CPU tensors."""
    x = torch.randn(4, 3)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(ModuleNotFoundError, match="cutehop_toy"):
        toy.toy_repeat.default.redispatch(keys, x)

    def fill(x, n=2, *, scale=1.0, bias=None, out, total):
        out.fill_(scale * n)
        total.fill_(7)

    module = types.ModuleType("cutehop_toy")
    module.fill = fill  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cutehop_toy", module)
    out, total = toy.toy_repeat.default.redispatch(keys, x, 3, scale=2.0)
    assert out.shape == (12, 3)
    assert bool((out == 6).all())
    assert total == 7


def wrong_default(x: Tensor, n: int = 3, *, scale: float = 1.0, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return reference(x, n, scale=scale, bias=bias)


def missing(x: Tensor, n: int = 2, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return reference(x, n, scale=scale)


def unknown(x: Tensor, n: int = 2, *, factor: float = 1.0, **_: object) -> tuple[Tensor, Tensor]:
    return reference(x, n, scale=factor)


@pytest.mark.parametrize(
    ("function", "message"), [(wrong_default, "n=3, schema 2"), (missing, "lacks bias"), (unknown, "takes factor")]
)
@pytest.mark.parametrize("role", ["allocate", "cpu"])
def test_a_function_that_disagrees_with_the_schema_is_refused(role, function, message):
    functions = {"allocate": allocate, "cpu": reference, role: function}
    with pytest.raises(AssertionError, match=message):
        define(f"toy_bad_{role}_{function.__name__}", SCHEMA, **functions)


def test_define_adds_less_than_2_us_to_a_call():
    """Against a body that allocates and fills by hand; the dispatcher's own time is torch's and the same for both."""
    outputs = torch.zeros(2), torch.zeros(3)

    def take(x, n, *, scale=1.0):
        return outputs

    def fill(x, n, *, scale=1.0, out, total):
        pass

    def by_hand(x, n, *, scale=1.0):
        out, total = take(x, n, scale=scale)
        fill(x, n, scale=scale, out=out, total=total)
        return out, total

    def us_per_call(function, repeats=2000):
        best = float("inf")
        for _ in range(9):
            start = time.perf_counter()
            for _ in range(repeats):
                function(outputs, 3, scale=0.5)
            best = min(best, (time.perf_counter() - start) / repeats)
        return best * 1e6

    assert us_per_call(_define._allocating(take, fill, ("out", "total"))) - us_per_call(by_hand) < 2
