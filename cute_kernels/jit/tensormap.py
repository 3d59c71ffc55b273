"""CUtensorMap descriptors: what a TMA copy reads to find its box in global memory."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

from cutehop.cute_kernels.jit import driver

# dtype -> (CUtensorMapDataType, bytes)
_DTYPES = {
    "u8": ("UINT8", 1),
    "f16": ("FLOAT16", 2),
    "bf16": ("BFLOAT16", 2),
    "f32": ("FLOAT32", 4),
}
_SWIZZLES = {0: "NONE", 32: "32B", 64: "64B", 128: "128B"}


class TensorMap(bytes):
    """The 128 bytes of a CUtensorMap, passed to a kernel by value. It points to memory and does not keep it alive."""

    __slots__ = ()


def tensor_map(
    ptr: int,
    dtype: str,
    dims: Sequence[int],
    strides_bytes: Sequence[int],
    box: Sequence[int],
    swizzle: int = 128,
) -> TensorMap:
    """Tiled tensor map; reads outside the tensor give zeros, writes there are dropped. The last 1024 are kept.

    ptr: address, 16-byte aligned. dtype: "u8" | "f16" | "bf16" | "f32". All lists are innermost dimension first.
    dims: 1 to 5 extents in elements; dims[0] is contiguous. strides_bytes: distance in bytes of dims[1:], one fewer
    than dims, each a multiple of 16. box: elements copied per dimension, each 1..256. swizzle: 0 | 32 | 64 | 128 bytes;
    box[0] must not be wider. Raises ValueError, before the driver is called, for what the hardware cannot do.
    """
    return _encode(ptr, dtype, tuple(dims), tuple(strides_bytes), tuple(box), swizzle)


@functools.lru_cache(maxsize=1024)
def _encode(
    ptr: int, dtype: str, dims: tuple[int, ...], strides_bytes: tuple[int, ...], box: tuple[int, ...], swizzle: int
) -> TensorMap:
    _validate(ptr, dtype, dims, strides_bytes, box, swizzle)
    cuda = driver.bindings()
    rank = len(dims)
    encoded = driver.check(
        f"tensor_map: ptr {ptr:#x}, {dtype}, dims {dims}, strides_bytes {strides_bytes}, box {box}, swizzle {swizzle}",
        cuda.cuTensorMapEncodeTiled(
            getattr(cuda.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{_DTYPES[dtype][0]}"),
            rank,
            ptr,
            [cuda.cuuint64_t(extent) for extent in dims],
            [cuda.cuuint64_t(stride) for stride in strides_bytes],
            [cuda.cuuint32_t(extent) for extent in box],
            [cuda.cuuint32_t(1)] * rank,
            cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(cuda.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{_SWIZZLES[swizzle]}"),
            cuda.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
    )
    return TensorMap(ctypes.string_at(int(encoded.getPtr()), 128))


def _validate(
    ptr: int, dtype: str, dims: tuple[int, ...], strides_bytes: tuple[int, ...], box: tuple[int, ...], swizzle: int
) -> None:
    """What cuTensorMapEncodeTiled asks for; the driver itself would only say CUDA_ERROR_INVALID_VALUE."""

    def need(condition: bool, text: str) -> None:
        if not condition:
            raise ValueError(f"tensor_map: {text}")

    need(dtype in _DTYPES, f"dtype {dtype!r}, supported {'|'.join(_DTYPES)}")
    need(swizzle in _SWIZZLES, f"swizzle {swizzle}, supported {'|'.join(map(str, _SWIZZLES))}")
    need(1 <= len(dims) <= 5, f"dims {dims}, supported 1 to 5 dimensions")
    need(len(box) == len(dims), f"box {box} must have one entry for each of dims {dims}")
    need(
        len(strides_bytes) == len(dims) - 1,
        f"strides_bytes {strides_bytes} must have {len(dims) - 1} entries for dims {dims}",
    )
    need(ptr > 0 and ptr % 16 == 0, f"ptr {ptr:#x} must be a multiple of 16 bytes")
    need(all(1 <= extent <= 2**32 for extent in dims), f"dims {dims}, each must be 1..2^32")
    need(
        all(0 < stride < 2**40 and stride % 16 == 0 for stride in strides_bytes),
        f"strides_bytes {strides_bytes}, each must be a positive multiple of 16 below 2^40",
    )
    need(all(1 <= extent <= 256 for extent in box), f"box {box}, each must be 1..256")
    inner_bytes = box[0] * _DTYPES[dtype][1]
    need(inner_bytes % 16 == 0, f"box {box} of {dtype} is {inner_bytes} bytes wide, must be a multiple of 16")
    need(
        not swizzle or inner_bytes <= swizzle,
        f"box {box} of {dtype} is {inner_bytes} bytes wide, more than swizzle {swizzle}",
    )
