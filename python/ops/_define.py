"""Registers an op of `torch.ops.cutehop`: `define` for one that computes, `define_ordered` for one that communicates.

`define` takes one schema, one allocator, one reference, one CUDA body.

The allocator decides shape, dtype and strides of every output for the fake (torch.compile), the CPU implementation and
the CUDA implementation alike, so that they cannot disagree. torch drops trailing arguments that equal the schema's
defaults before it calls Python, so the functions need the same defaults: a signature that differs is refused.

Library.define/impl is used rather than torch.library.custom_op because it adds less time to a call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

Outputs = Tensor | tuple[Tensor, ...]

# Collecting the library would unregister its ops, so it lives with the module.
_LIBRARY = torch.library.Library("cutehop", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)


def define(
    name: str,
    schema: str,
    *,
    allocate: Callable[..., Outputs],
    cpu: Callable[..., Outputs],
    cuda: str | None = None,
    out_variant: bool = False,
) -> None:
    """Register `cutehop::<name>` and, with `out_variant`, `cutehop::<name>_out`.

    schema: "(Tensor x, int n, *, float scale=1.0) -> (Tensor out, Tensor lse)"; returns are named Tensors.
    allocate: called with the op's arguments, returns the uninitialised outputs: a Tensor for one return, else a tuple.
        It may take `**_` in place of arguments it does not read. It runs on fake tensors too, so it reads no values.
    cpu: the reference. Called with the op's arguments, returns new tensors of the allocated shapes and dtypes.
    cuda: "package.module:function", imported on the first CUDA call. Called with the op's arguments and, as keywords
        named after the returns, the allocated outputs, which it fills. The dispatcher sets no device: it does.
    out_variant: `<name>_out` takes the outputs as further keyword-only arguments, fills them and returns nothing.
    """
    _LIBRARY.define(name + schema, tags=_TAGS)
    parsed = getattr(torch.ops.cutehop, name).default._schema
    returns = tuple(r.name for r in parsed.returns)
    defaults = _defaults(parsed)
    _require_signature(f"{name}: allocate", allocate, defaults)
    _require_signature(f"{name}: cpu", cpu, defaults)

    fills = {"CPU": _reference_fill(name, cpu, returns)}
    if cuda is not None:
        fills["CUDA"] = _lazy_fill(name, cuda, defaults | dict.fromkeys(returns, inspect.Parameter.empty))
    for key, fill in fills.items():
        _LIBRARY.impl(name, _allocating(allocate, fill, returns), key)
    torch.library.register_fake(f"cutehop::{name}", allocate, lib=_LIBRARY)
    if not out_variant:
        return

    star = "" if any(a.kwarg_only for a in parsed.arguments) else "*, "
    writes = ", ".join(f"Tensor({chr(ord('a') + i)}!) {r}" for i, r in enumerate(returns))
    arguments = schema.rpartition(") -> ")[0]
    _LIBRARY.define(f"{name}_out{arguments}, {star}{writes}) -> ()", tags=_TAGS)
    for key, fill in fills.items():
        _LIBRARY.impl(f"{name}_out", fill, key)
    torch.library.register_fake(f"cutehop::{name}_out", lambda *args, **kwargs: None, lib=_LIBRARY)


def define_ordered(
    name: str,
    schema: str,
    *,
    body: Callable[..., Outputs],
    fake: Callable[..., Outputs],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Register `cutehop::<name>`, whose calls torch.compile neither drops nor reorders among those of all such ops.

    schema: as for `define`; no argument is written to.
    body: called with the op's arguments on every device, returns new tensors.
    fake: called in its place with fake tensors, returns what body would: same shapes, dtypes and strides.
    setup_context, backward: as for torch.library.register_autograd.
    """
    _LIBRARY.define(name + schema, tags=_TAGS)
    op = getattr(torch.ops.cutehop, name).default
    defaults = _defaults(op._schema)
    _require_signature(f"{name}: body", body, defaults)
    _require_signature(f"{name}: fake", fake, defaults)
    _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cutehop::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"cutehop::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    # A call without users counts as dead code, and two equal calls as one: on this rank only, while its peers wait.
    _register_effectful_op(op, _EffectType.ORDERED)


def _defaults(schema: torch.FunctionSchema) -> dict[str, Any]:
    """Default of every argument."""
    return {a.name: a.default_value if a.has_default_value() else inspect.Parameter.empty for a in schema.arguments}


def _allocating(
    allocate: Callable[..., Outputs], fill: Callable[..., None], returns: tuple[str, ...]
) -> Callable[..., Outputs]:
    """The functional op: allocate, fill, return."""
    if len(returns) == 1:
        (only,) = returns

        def run_one(*args: Any, **kwargs: Any) -> Outputs:
            kwargs_with_output = {**kwargs, only: (output := allocate(*args, **kwargs))}
            fill(*args, **kwargs_with_output)
            return output

        return run_one

    def run(*args: Any, **kwargs: Any) -> Outputs:
        outputs = allocate(*args, **kwargs)
        kwargs.update(zip(returns, outputs))
        fill(*args, **kwargs)
        return outputs

    return run


def _reference_fill(name: str, cpu: Callable[..., Outputs], returns: tuple[str, ...]) -> Callable[..., None]:
    """A reference that returns new tensors, as a body that fills given ones."""

    def fill(*args: Any, **kwargs: Any) -> None:
        outputs = [kwargs.pop(r) for r in returns]
        results = cpu(*args, **kwargs)
        for r, output, result in zip(returns, outputs, (results,) if isinstance(results, Tensor) else results):
            if output.shape != result.shape or output.dtype != result.dtype:
                raise ValueError(
                    f"{name}: {r} has shape {tuple(output.shape)} and dtype {output.dtype}, the result has "
                    f"{tuple(result.shape)} and {result.dtype}; pass an output of that shape and dtype"
                )
            output.copy_(result)

    return fill


def _lazy_fill(name: str, target: str, parameters: dict[str, Any]) -> Callable[..., None]:
    """A body that is imported when it is first called."""
    module, _, function = target.partition(":")

    @cache
    def load() -> Callable[..., None]:
        body: Callable[..., None] = getattr(import_module(module), function)
        _require_signature(f"{name}: {target}", body, parameters)
        return body

    def fill(*args: Any, **kwargs: Any) -> None:
        load()(*args, **kwargs)

    return fill


def _require_signature(what: str, function: Callable[..., Any], defaults: dict[str, Any]) -> None:
    """Refuse a function whose parameters or defaults differ from the schema's."""
    named = {}
    open_ended = False
    for p in inspect.signature(function).parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            open_ended = True
        else:
            named[p.name] = p.default
    for parameter, default in named.items():
        assert parameter in defaults, f"{what} takes {parameter}, the schema does not"
        assert default == defaults[parameter], f"{what} has {parameter}={default}, schema {defaults[parameter]}"
    missing = [parameter for parameter in defaults if parameter not in named]
    assert open_ended or not missing, f"{what} lacks {', '.join(missing)}"
