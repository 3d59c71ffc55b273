"""What a build function returns (Program) and what is kept of a compiled kernel (Bundle, one zip file)."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

ARCH = "sm_90a"
MAX_SMEM_BYTES = 232448  # dynamic shared memory one CTA may ask for on SM90 (227 KiB)

# kind -> (struct format, size, alignment) of one kernel parameter.
PARAM_KINDS = {
    "map": ("128s", 128, 64),  # CUtensorMap by value
    "ptr": ("Q", 8, 8),
    "i64": ("q", 8, 8),
    "i32": ("i", 4, 4),
    "f32": ("f", 4, 4),
    "u8": ("B", 1, 1),  # what a cute.TiledMma argument leaves: its accumulate flag
}


@dataclass(frozen=True)
class Program:
    """One kernel for one config, ready to compile; a build function decorated with `compiled` returns it.

    host: `@cute.jit` callable whose body launches exactly one kernel (its grid is never used).
    args: sample arguments for cute.compile; fake tensors and pointers are enough.
    threads: threads of a CTA, as launched in `host`.
    smem_bytes: dynamic shared memory in bytes; must be what the DSL computes, at most MAX_SMEM_BYTES.
    params: kinds of the kernel's parameters in order, keys of PARAM_KINDS. A TMA atom is "map" and its tensor, if its
        layout is fully static, nothing; a cute.Pointer or a static tensor is "ptr"; a cute.TiledMma is "u8".
    cluster: CTAs of a cluster along x. pdl: programmatic dependent launch. cooperative: all CTAs are co-resident.
    """

    host: Callable[..., Any]
    args: tuple[Any, ...]
    threads: int
    smem_bytes: int
    params: tuple[str, ...]
    cluster: int = 1
    pdl: bool = False
    cooperative: bool = False

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.params if kind not in PARAM_KINDS]
        if unknown:
            raise ValueError(f"Program: params {unknown}, supported {'|'.join(PARAM_KINDS)}")
        if not 0 < self.threads <= 1024:
            raise ValueError(f"Program: threads {self.threads}, supported 1..1024")
        if not 0 <= self.smem_bytes <= MAX_SMEM_BYTES:
            raise ValueError(f"Program: smem_bytes {self.smem_bytes}, limit {MAX_SMEM_BYTES}; use fewer stages")
        if not 1 <= self.cluster <= 16:
            raise ValueError(f"Program: cluster {self.cluster}, supported 1..16")


class CorruptBundle(Exception):
    """The bytes are not a whole bundle of this format."""


@dataclass(frozen=True)
class Bundle:
    """A compiled kernel and all that loading and launching it takes; needs no GPU and no DSL.

    name: dotted name of the build function. config: the config in canonical text form (`config_text`).
    entry: symbol of the kernel in the cubin. threads ... cooperative: as in Program.
    cubin: code for sm_90a. ptx: its source. log: what `ptxas -v` said (registers, spills, notes such as C7510).
    """

    name: str
    config: str
    entry: str
    threads: int
    smem_bytes: int
    params: tuple[str, ...]
    cluster: int
    pdl: bool
    cooperative: bool
    cubin: bytes
    ptx: str
    log: str

    @property
    def registers(self) -> int:
        """Registers per thread."""
        return self._from_log(r"Used (\d+) registers")

    @property
    def spill_bytes(self) -> int:
        """Bytes of spill stores and loads per thread."""
        return self._from_log(r"(\d+) bytes spill stores") + self._from_log(r"(\d+) bytes spill loads")

    def _from_log(self, pattern: str) -> int:
        found = re.search(pattern, self.log)
        assert found, f"{self.name}: no {pattern!r} in the ptxas log"
        return int(found[1])

    def to_bytes(self) -> bytes:
        """One zip: meta.json, kernel.cubin, kernel.ptx, ptxas.log. The same bundle always gives the same bytes."""
        meta = asdict(self)
        parts = {"kernel.cubin": meta.pop("cubin"), "kernel.ptx": meta.pop("ptx"), "ptxas.log": meta.pop("log")}
        parts = {"meta.json": json.dumps(meta, indent=1), **parts}
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in parts.items():
                archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)  # ZipInfo: no time of day inside
        return out.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Bundle:
        """The inverse of to_bytes; CorruptBundle if `data` is cut, altered (zip keeps a CRC) or of another format."""
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                meta = json.loads(archive.read("meta.json"))
                meta["params"] = tuple(meta["params"])
                return cls(
                    **meta,
                    cubin=archive.read("kernel.cubin"),
                    ptx=archive.read("kernel.ptx").decode(),
                    log=archive.read("ptxas.log").decode(),
                )
        except Exception as error:  # zipfile raises half a dozen unrelated types, depending on which byte is wrong
            raise CorruptBundle(f"{type(error).__name__}: {error}") from error
