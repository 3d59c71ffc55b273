"""`compiled`: a build function whose kernels are compiled once, kept on disk, and loaded once per device."""

from __future__ import annotations

import dataclasses
import enum
import functools
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from cutehop.cute_kernels.errors import CompileInCaptureError
from cutehop.cute_kernels.jit import compiler, driver
from cutehop.cute_kernels.jit.bundle import Bundle, Program
from cutehop.cute_kernels.jit.module import Kernel
from cutehop.cute_kernels.jit.store import open_store, own_source_hash

Config = TypeVar("Config")

# One for the process: cute.compile in two threads at once aborts the interpreter. Re-entrant, and always taken before
# a file lock, so that a build function may ask for another kernel's bundle.
_LOCK = threading.RLock()


def config_text(config: Any) -> str:
    """The config in canonical text form, the key on disk: equal text, equal types and equal values.

    Takes frozen dataclasses of None, bool, int, float, str, enums, tuples and such dataclasses; TypeError for others.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type) and config.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        fields = (f"{field.name}={config_text(getattr(config, field.name))}" for field in dataclasses.fields(config))
        return f"{type(config).__qualname__}({', '.join(fields)})"
    if isinstance(config, enum.Enum):
        return f"{type(config).__qualname__}.{config.name}"
    if type(config) is tuple:
        return f"({''.join(config_text(item) + ', ' for item in config)})"
    if type(config) in (type(None), bool, int, float, str):
        return repr(config)  # 1, 1.0, True and '1' all differ
    raise TypeError(
        f"config value {config!r} of type {type(config).__name__} cannot be part of a cache key; "
        "supported: frozen dataclass, None, bool, int, float, str, enum, tuple"
    )


class Compiled(Generic[Config]):
    """What `compiled` makes of a build function.

    name: its dotted name. The build function itself is `__wrapped__`.
    """

    def __init__(self, build: Callable[[Config], Program]) -> None:
        functools.update_wrapper(self, build)
        self.name = f"{build.__module__}.{build.__qualname__}"
        self._build = build
        self._bundles: dict[str, Bundle] = {}
        self._kernels: dict[tuple[int, Config], Kernel] = {}

    def bundle(self, config: Config) -> Bundle:
        """The compiled kernel, from memory, from the cache folder, or compiled now. Needs no GPU."""
        text = config_text(config)
        if text not in self._bundles:
            with _LOCK:
                if text not in self._bundles:
                    make = functools.partial(self._compile, config, text)
                    store = open_store()
                    self._bundles[text] = store.get_or_make(self.name, text, make) if store else make()
        return self._bundles[text]

    def __call__(self, config: Config, stream: int = 0) -> Kernel:
        """The kernel, loaded on the current CUDA device.

        stream: handle of the stream it will run on. While that is being captured into a graph, a kernel that is not
        loaded yet raises CompileInCaptureError. Configs that compare equal must mean the same kernel.
        """
        device = driver.current_device()
        kernel = self._kernels.get((device, config))
        return kernel if kernel is not None else self._load(device, config, stream)

    def _load(self, device: int, config: Config, stream: int) -> Kernel:
        if driver.is_capturing(stream):
            raise CompileInCaptureError(self.name)
        with _LOCK:
            if (device, config) not in self._kernels:
                self._kernels[device, config] = Kernel(self.bundle(config))
            return self._kernels[device, config]

    def _compile(self, config: Config, text: str) -> Bundle:
        compiler.import_cutlass()
        return compiler.compile_program(self._build(config), self.name, text)


def compiled(build: Callable[[Config], Program]) -> Compiled[Config]:
    """Decorator for a function config -> Program, where config is a frozen dataclass.

    The function lives in one of the package's three source roots (they are hashed for the disk cache), depends on
    nothing but its config, and imports cutlass in its body, which runs only when the kernel has to be compiled.
    """
    own_source_hash()  # now, before device code is imported: what is edited from here on is noticed, and not stored
    return Compiled(build)
