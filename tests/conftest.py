"""Tests marked `gpu` or `dist` are skipped, with the reason, where the machine cannot run them."""

from __future__ import annotations

import pytest
import torch


def why_no_gpu() -> str | None:
    """The reason that kernels cannot run here, or None. Asks the driver once, creates no CUDA context."""
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    capability = torch.cuda.get_device_capability()
    return None if capability == (9, 0) else f"kernels are built for SM90, this GPU is SM{capability[0]}{capability[1]}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_no_gpu()
    if reason is None:
        return
    skip = pytest.mark.skip(reason=reason)
    for item in items:
        if item.get_closest_marker("gpu") or item.get_closest_marker("dist"):
            item.add_marker(skip)
