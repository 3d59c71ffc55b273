"""Bundle -> loaded kernel -> launch. `python -m tools.bench.host_launch` measures the host time of a launch."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from typing import Any

from cutehop.cute_kernels.jit import driver
from cutehop.cute_kernels.jit.bundle import ARCH, PARAM_KINDS, Bundle


class Kernel:
    """A kernel loaded on the device that was current when it was made. Never unloaded: at interpreter exit the driver
    may be gone already, and graphs that were captured with it must stay valid.

    bundle: what was loaded. device: ordinal. library: the CUlibrary, for callers that must initialise its globals.
    """

    def __init__(self, bundle: Bundle) -> None:
        cuda = driver.bindings()
        self.bundle = bundle
        self.device = driver.current_device()
        what = f"{bundle.name}: loading {ARCH} code on device {self.device}"
        self.library = driver.check(what, cuda.cuLibraryLoadData(bundle.cubin, [], [], 0, [], [], 0))
        kernel = driver.check(what, cuda.cuLibraryGetKernel(self.library, bundle.entry.encode()))
        attribute = cuda.CUfunction_attribute
        settings = {attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: bundle.smem_bytes}
        if bundle.cluster > 8:
            settings[attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED] = 1
        for key, value in settings.items():
            driver.check(what, cuda.cuKernelSetAttribute(key, value, kernel, self.device))
        self._function = driver.check(what, cuda.cuKernelGetFunction(kernel))
        # Lazy loading would put the load into the first launch, where it may wait for kernels that wait for this one.
        driver.check(what, cuda.cuFuncLoad(self._function))
        self._config = _launch_config(cuda, bundle)
        self._launch_ex = cuda.cuLaunchKernelEx
        self._block = ParameterBlock(bundle.params)
        self._lock = threading.Lock()

    def launch(self, grid: Sequence[int], stream: int, *values: Any, smem_bytes: int | None = None) -> None:
        """Put one launch on `stream`; returns without waiting.

        grid: CTAs (x, y, z). stream: CUstream handle as int (torch: `stream.cuda_stream`), of this kernel's device.
        values: one per bundle.params: ints (a pointer is its address), floats, TensorMap objects. Memory they point to
        must live until the kernel has run. smem_bytes: dynamic shared memory where a call needs less than the kernel's
        most (bundle.smem_bytes, the default). Raises ValueError for values that don't fit, RuntimeError for CUDA's
        errors.
        """
        config = self._config
        with self._lock:  # cuda-python lets go of the GIL in the call, and config and parameter block are shared
            self._block.pack(values)
            config.gridDimX, config.gridDimY, config.gridDimZ = grid
            config.sharedMemBytes = self.bundle.smem_bytes if smem_bytes is None else smem_bytes
            config.hStream = stream
            (error,) = self._launch_ex(config, self._function, self._block.pointers, 0)
        if error:
            b = self.bundle
            text = f"grid {tuple(grid)}, {b.threads} threads, cluster {b.cluster}, {b.smem_bytes} bytes shared memory"
            driver.check(f"{b.name}: launch with {text}", (error,))


def _launch_config(cuda: Any, bundle: Bundle) -> Any:
    """CUlaunchConfig with all but grid and stream filled in."""
    config = cuda.CUlaunchConfig()
    config.blockDimX, config.blockDimY, config.blockDimZ = bundle.threads, 1, 1
    config.sharedMemBytes = bundle.smem_bytes
    kind, attributes = cuda.CUlaunchAttributeID, []
    if bundle.cluster > 1:
        attributes.append(cuda.CUlaunchAttribute())
        attributes[-1].id = kind.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dim = attributes[-1].value.clusterDim
        dim.x, dim.y, dim.z = bundle.cluster, 1, 1
    if bundle.cooperative:
        attributes.append(cuda.CUlaunchAttribute())
        attributes[-1].id = kind.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        attributes[-1].value.cooperative = 1
    if bundle.pdl:
        attributes.append(cuda.CUlaunchAttribute())
        attributes[-1].id = kind.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attributes[-1].value.programmaticStreamSerializationAllowed = 1
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


class ParameterBlock:
    """Kernel parameters in one reused buffer.

    pointers: address of the array of pointers, one per parameter, that the driver reads them through.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        layout, offsets, end = "=", [], 0
        for kind in kinds:
            code, size, align = PARAM_KINDS[kind]
            start = -(-end // align) * align
            layout += f"{start - end}x{code}"
            offsets.append(start)
            end = start + size
        self.kinds = tuple(kinds)
        self._struct = struct.Struct(layout)
        self._buffer = ctypes.create_string_buffer(end + 64)
        self._base = -ctypes.addressof(self._buffer) % 64
        start = ctypes.addressof(self._buffer) + self._base
        self._array = (ctypes.c_void_p * len(offsets))(*[start + offset for offset in offsets])
        self.pointers = ctypes.addressof(self._array) if offsets else 0

    def pack(self, values: Sequence[Any]) -> None:
        """Write the values; ValueError names the one that does not fit its kind."""
        try:
            self._struct.pack_into(self._buffer, self._base, *values)
        except struct.error:
            raise ValueError(self._misfit(values)) from None

    def _misfit(self, values: Sequence[Any]) -> str:
        if len(values) != len(self.kinds):
            return f"launch: {len(values)} values, the kernel takes {len(self.kinds)}: {', '.join(self.kinds)}"
        for index, (kind, value) in enumerate(zip(self.kinds, values)):
            try:
                struct.pack("=" + PARAM_KINDS[kind][0], value)
            except struct.error as error:
                return f"launch: value {index} is {value!r}, the kernel takes {kind} there ({error})"
        raise AssertionError("each value fits alone, but not all together")
