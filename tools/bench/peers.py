"""What is timed: cutehop's op and the peers it is compared with, behind one interface.

A peer is a module with
    NAME, VERSION                                                  strings for the report
    plan(cache_seqlens, s_q, h_q, max_len, causal) -> state        the planner, run once outside the timed call
    decode(q, k_cache, block_table, cache_seqlens, state, softmax_scale, causal) -> (out, lse)
named flash_mla_peer.py or fa3_peer.py in the folder that --peers names, or the installed package `flash_mla`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tools.bench.rows import HEAD_DIM_V, SOFTMAX_SCALE, Inputs

OURS = "cutehop"
PEER_FILES = ("flash_mla_peer.py", "fa3_peer.py")


@dataclass(frozen=True)
class Implementation:
    """prepare(inputs) runs the planner and returns the call to be timed: no arguments, (out, lse) back."""

    name: str
    version: str
    prepare: Callable[[Inputs], Callable[[], tuple[Tensor, Tensor]]]


def ours() -> Implementation:
    """The op this project is about."""
    import cutehop

    def prepare(x: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
        ops = torch.ops.cutehop
        meta, num_splits = ops.mla_plan(x.cache_seqlens, x.q.shape[1], x.q.shape[2], x.k_cache.shape[2])
        args = (x.q, x.k_cache, x.block_table, x.cache_seqlens, meta, num_splits)
        return lambda: ops.mla_decode(*args, softmax_scale=SOFTMAX_SCALE, causal=x.causal)

    return Implementation(OURS, cutehop.__version__, prepare)


def find_peers(folder: Path | None) -> list[Implementation]:
    """The peers in `folder`; without one the installed `flash_mla` or none. FileNotFoundError if it holds none."""
    if folder is None:
        return [_installed_flash_mla()] if importlib.util.find_spec("flash_mla") else []
    files = [folder / name for name in PEER_FILES if (folder / name).is_file()]
    if not files:
        raise FileNotFoundError(f"--peers {folder}: none of {', '.join(PEER_FILES)} is there")
    return [_from_module(_load(file)) for file in files]


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def _from_module(module: ModuleType) -> Implementation:
    def prepare(x: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
        state = module.plan(x.cache_seqlens, x.q.shape[1], x.q.shape[2], x.max_len, x.causal)
        args = (x.q, x.k_cache, x.block_table, x.cache_seqlens, state, SOFTMAX_SCALE, x.causal)
        return lambda: module.decode(*args)

    return Implementation(module.NAME, module.VERSION, prepare)


def _installed_flash_mla() -> Implementation:
    """The real package. Its planner object fills itself in the first call, so that call is made here, untimed."""
    flash_mla: Any = importlib.import_module("flash_mla")

    def prepare(x: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
        meta, num_splits = flash_mla.get_mla_metadata(x.cache_seqlens, x.q.shape[1] * x.q.shape[2], 1)
        args = (x.q, x.k_cache, x.block_table, x.cache_seqlens, HEAD_DIM_V, meta, num_splits)

        def call() -> tuple[Tensor, Tensor]:
            return flash_mla.flash_mla_with_kvcache(*args, softmax_scale=SOFTMAX_SCALE, causal=x.causal)

        call()
        return call

    return Implementation("FlashMLA", getattr(flash_mla, "__version__", "installed"), prepare)
