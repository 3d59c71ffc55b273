"""Element access through the plain global pointers that kernels get as parameters."""

import cutlass.cute as cute
from cutlass import Float32, Int32

_UNBOUNDED = 1 << 30  # the extent only has to be static; an Int64 index may pass it


@cute.jit
def load_i32(ptr: cute.Pointer, index):
    return cute.make_tensor(cute.recast_ptr(ptr, dtype=Int32), cute.make_layout(_UNBOUNDED))[index]


@cute.jit
def store_i32(ptr: cute.Pointer, index, value):
    cute.make_tensor(cute.recast_ptr(ptr, dtype=Int32), cute.make_layout(_UNBOUNDED))[index] = value


@cute.jit
def load_f32(ptr: cute.Pointer, index):
    return cute.make_tensor(cute.recast_ptr(ptr, dtype=Float32), cute.make_layout(_UNBOUNDED))[index]


@cute.jit
def store_f32(ptr: cute.Pointer, index, value):
    cute.make_tensor(cute.recast_ptr(ptr, dtype=Float32), cute.make_layout(_UNBOUNDED))[index] = value
