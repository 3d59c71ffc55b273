"""Errors that callers of cutehop meet. One text form everywhere: "op: argument value, limit; cure"."""

from __future__ import annotations


class CompileInCaptureError(RuntimeError):
    """A kernel is first needed while its stream is being captured into a CUDA graph.

    Compiling and loading are not capturable, so the kernel has to exist before the capture begins.

    kernel: name of the kernel that is missing.
    warm_up: the call to make once before the capture, in words a caller can follow.
    """

    def __init__(self, kernel: str, warm_up: str = "call the op once with these shapes, dtypes and options") -> None:
        super().__init__(
            f"{kernel}: not loaded on this device and its stream is being captured; "
            f"{warm_up} before the capture begins (compiling and loading cannot be captured)"
        )
        self.kernel = kernel
        self.warm_up = warm_up

    def __reduce__(self) -> tuple[type[CompileInCaptureError], tuple[str, str]]:
        # The default rebuilds an exception from its text; ours takes two arguments and must cross process boundaries.
        return type(self), (self.kernel, self.warm_up)


def check(condition: object, message: str, error: type[Exception] = ValueError) -> None:
    """Raise `error(message)` unless `condition` holds.

    message: "op: argument value, limit; cure", e.g. "mla_decode: k_cache page size 48, supported 16|32|64|128;
    allocate the cache with 64-token pages". The text is built on every call, so a hot path tests first
    and raises itself.
    """
    if not condition:
        raise error(message)
