"""The CUDA driver through cuda-python, imported by the first call that needs it."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def bindings() -> Any:
    """cuda.bindings.driver, initialised; RuntimeError where cuda-python or the NVIDIA driver is missing."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise RuntimeError("launching a kernel needs cuda-python: pip install 'cutehop[cu12]' (or cu13)") from error
    try:
        result = driver.cuInit(0)
    except RuntimeError as error:
        raise RuntimeError(f"launching a kernel needs the NVIDIA driver (libcuda), not found here: {error}") from error
    check("cuInit", result)
    return driver


def check(what: str, result: tuple[Any, ...]) -> Any:
    """The value of a driver call that returned `result` = (CUresult, value...); RuntimeError with `what` if it failed.

    Two or more values come back as a tuple.
    """
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"{what}: {getattr(error, 'name', error)}")
    return values[0] if len(values) == 1 else tuple(values)


def current_device() -> int:
    """Ordinal of the device whose context is current on this thread.

    A thread that has none yet gets device 0's primary context, the one torch uses, as the CUDA runtime would give it.
    """
    driver = bindings()
    error, device = driver.cuCtxGetDevice()
    if int(error) == 0:
        return int(device)
    if error != driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
        check("cuCtxGetDevice", (error, device))
    context = check("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(0))
    check("cuCtxSetCurrent", driver.cuCtxSetCurrent(context))
    return 0


def is_capturing(stream: int) -> bool:
    """Whether work put on `stream` now would go into a CUDA graph, or break the capture of one."""
    driver = bindings()
    error, status = driver.cuStreamIsCapturing(stream)
    if error == driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT:
        return True  # the legacy default stream while another stream is being captured
    check("cuStreamIsCapturing", (error, status))
    return int(status) != 0
