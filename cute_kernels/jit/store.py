"""The cache folder: one sub-folder per fingerprint, one zip per kernel, safe for processes that race.

Where the DSL is not installed (a machine that only runs kernels built ahead of time), the DSL's version cannot be asked
for, and any folder made from the same sources will do.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cutehop.cute_kernels.jit.bundle import ARCH, Bundle, CorruptBundle

FORMAT = 1  # of the folder and of the bundle; a change makes old folders invisible
SOURCE_PACKAGES = ("cutehop", "cutehop.cute_kernels", "cutehop.comm")


def source_roots() -> dict[str, Path]:
    """Package -> its real folder. In an editable install the three lie apart, in a wheel one inside the other."""
    roots = {}
    for package in SOURCE_PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise RuntimeError(f"package {package} is not installed; install cutehop with pip")
        roots[package] = Path(next(iter(spec.submodule_search_locations)))
    return roots


def source_hash(roots: dict[str, Path]) -> str:
    """16 hex digits over names and contents of all Python files; the same for an editable install and a wheel."""
    files = {}
    for package, root in roots.items():
        for path in root.rglob("*.py"):
            files[f"{package}.{path.relative_to(root).as_posix().replace('/', '.')}"] = path
    digest = hashlib.sha256()
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


@functools.cache
def own_source_hash() -> str:
    """The hash when it was first asked for: before any kernel's code is imported, since `compiled` asks."""
    return source_hash(source_roots())


def sources_changed() -> bool:
    """Whether a source file was edited, added or removed since this process took the hash."""
    return source_hash(source_roots()) != own_source_hash()


@functools.cache
def dsl_version() -> str | None:
    """e.g. "4.8.1" or "4.8.1+cu13" (its compiler libraries come in two builds); None where the DSL is not installed."""
    try:
        version = importlib.metadata.version("nvidia-cutlass-dsl")
    except importlib.metadata.PackageNotFoundError:
        return None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("nvidia-cutlass-dsl-libs-cu13")
        version += "+cu13"
    return version


def open_store() -> Store | None:
    """The store in folder CUTEHOP_CACHE_DIR (default ~/.cache/cutehop); None if CUTEHOP_CACHE is 0."""
    if os.environ.get("CUTEHOP_CACHE") == "0":
        return None
    root = os.environ.get("CUTEHOP_CACHE_DIR") or Path.home() / ".cache" / "cutehop"
    return Store(Path(root), own_source_hash(), dsl_version())


@dataclass(frozen=True)
class Store:
    """root: the cache folder. source: hash of the package's sources. dsl: version of the DSL here, None if none."""

    root: Path
    source: str
    dsl: str | None

    @property
    def folder(self) -> Path | None:
        """Folder of this fingerprint; None if the DSL is not installed and no folder was built from these sources."""
        if self.dsl is not None:
            return self.root / f"v{FORMAT}-{ARCH}-dsl{self.dsl}-src{self.source}"
        return max(self.root.glob(f"v{FORMAT}-{ARCH}-dsl*-src{self.source}"), default=None)

    def get_or_make(self, name: str, config: str, make: Callable[[], Bundle]) -> Bundle:
        """The stored bundle, or what `make` returns, then stored. One process at a time runs `make` for one kernel.

        A stored file that is not whole is moved to quarantine/ and made anew. If the folder cannot be written, the
        bundle is made and not stored. Raises RuntimeError where it is not stored and, for want of the DSL, cannot be
        made.
        """
        bundle = self._read(name, config)
        if bundle:
            return bundle
        if self.dsl is None:
            raise RuntimeError(self._why_missing(name, config))
        with self._locked(name, config) as writable:
            if not writable:
                return make()
            bundle = self._read(name, config, quarantine=True)
            if bundle is None:
                bundle = make()
                self._write(name, config, bundle)
            return bundle

    def path(self, name: str, config: str) -> Path | None:
        """File of a kernel, whether it exists or not; None where `folder` is."""
        return self.folder and self.folder / f"{_file_stem(name, config)}.zip"

    def _read(self, name: str, config: str, quarantine: bool = False) -> Bundle | None:
        path = self.path(name, config)
        if path is None:
            return None
        try:
            bundle = Bundle.from_bytes(path.read_bytes())
            if (bundle.name, bundle.config) != (name, config):
                raise CorruptBundle(f"holds {bundle.name}({bundle.config})")
            return bundle
        except (FileNotFoundError, NotADirectoryError):
            return None
        except CorruptBundle:
            if quarantine:  # only under the lock: without it, a good file just written by another process could go
                (path.parent / "quarantine").mkdir(exist_ok=True)
                os.replace(path, path.parent / "quarantine" / f"{path.name}.{os.getpid()}")
            return None

    def _write(self, name: str, config: str, bundle: Bundle) -> None:
        """Temp file and rename: a reader sees the old file, none, or the whole new one. Runs under the lock."""
        if sources_changed():
            return  # this process may have compiled the old code, and the hash may be that of the new, or the reverse
        path = self.path(name, config)
        assert path is not None
        new = path.with_suffix(f".{os.getpid()}.new")
        try:
            new.write_bytes(bundle.to_bytes())
            os.replace(new, path)
        except OSError as error:
            new.unlink(missing_ok=True)
            _warn_not_stored(name, error)

    @contextlib.contextmanager
    def _locked(self, name: str, config: str) -> Iterator[bool]:
        """Exclusive among processes for one kernel; gives False, and no lock, if the folder cannot be written."""
        path = self.path(name, config)
        assert path is not None
        try:
            (path.parent / "locks").mkdir(parents=True, exist_ok=True)
            file = open(path.parent / "locks" / path.stem, "w")  # noqa: SIM115  closed, and so unlocked, below
        except OSError as error:
            _warn_not_stored(name, error)
            yield False
            return
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield True

    def _why_missing(self, name: str, config: str) -> str:
        cure = "build it with `python -m cutehop.aot build` from these sources, or install nvidia-cutlass-dsl"
        if self.folder is None:
            others = sorted(path.name for path in self.root.glob("v*-src*"))
            return (
                f"{name}: nvidia-cutlass-dsl is not installed here, and {self.root} holds no kernels made from this "
                f"package's sources: wanted v{FORMAT}-{ARCH}-dsl*-src{self.source}, found {others or 'nothing'}; {cure}"
            )
        return f"{name}: nvidia-cutlass-dsl is not installed here, and {self.folder} lacks {config}; {cure}"


def _warn_not_stored(name: str, error: OSError) -> None:
    text = f"{name}: compiled but not stored ({error}); point CUTEHOP_CACHE_DIR at a folder that can be written"
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def _file_stem(name: str, config: str) -> str:
    """Readable and unique, e.g. mla.decode.decode_kernel-dtype=bf16,tile=64-1a2b3c4d5e6f."""
    digest = hashlib.sha256(f"{name}\n{config}".encode()).hexdigest()[:12]
    short = re.sub(r"[^\w.-]+", "", name.removeprefix("cutehop.").removeprefix("cute_kernels."))
    fields = re.sub(r"[^\w.=,-]+", "", config.partition("(")[2])
    return f"{short}-{fields[:80]}-{digest}"
