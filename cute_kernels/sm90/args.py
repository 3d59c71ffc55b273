"""Kernel parameters as a frozen dataclass: the DSL flattens it, one parameter per field, in order."""

from dataclasses import fields

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_ptr

_KINDS = {cute.Pointer: "ptr", Int64: "i64", Int32: "i32", Float32: "f32"}


def param_kinds(args_type) -> tuple[str, ...]:
    """The launcher's parameter kinds of a dataclass whose fields are cute.Pointer, Int64, Int32 or Float32."""
    return tuple(_KINDS[field.type] for field in fields(args_type))


def fake_args(args_type):
    """An instance to compile with; every pointer is global and 16-byte aligned in name only: loads go by element."""

    def fake(kind):
        return make_ptr(Int32, 16, cutlass.AddressSpace.gmem, assumed_align=4) if kind is cute.Pointer else kind(1)

    return args_type(*(fake(field.type) for field in fields(args_type)))
