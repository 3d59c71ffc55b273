"""Tests marked `gpu` are skipped, with the reason, where the machine cannot run them; fixtures with several ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.ranks import Pools


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-iterations", type=int, default=300, help="length of tests/dist/test_ep_soak.py on GPUs")
    parser.addoption("--most-ranks", type=int, help="leave out tests with more ranks on GPUs, e.g. than there are GPUs")
    parser.addoption("--heap-provider", help="memory of all buffers of ranks on GPUs: vmm, torch or nvshmem")


def pytest_configure(config: pytest.Config) -> None:
    provider = config.getoption("--heap-provider")
    if provider is not None:
        from tests.rank_worker import PROVIDER_VARIABLE

        os.environ[PROVIDER_VARIABLE] = provider  # for tests.rank_worker


def why_no_gpu() -> str | None:
    """The reason that kernels cannot run here, or None. Asks the driver once, creates no CUDA context."""
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    capability = torch.cuda.get_device_capability()
    return None if capability == (9, 0) else f"kernels are built for SM90, this GPU is SM{capability[0]}{capability[1]}"


def _gpu_ranks(item: pytest.Item) -> int:
    """Ranks on GPUs that a test asks for by its parameters, else 0. A module's tests are in the order of these numbers:
    GPUs have one pool at a time, and to start another one takes longer than most tests."""
    callspec = getattr(item, "callspec", None)
    if callspec is None or item.get_closest_marker("gpu") is None:
        return 0
    found = [value[1] for value in callspec.params.values() if isinstance(value, tuple) and value[:1] == ("cuda",)]
    return max([*found, callspec.params.get("ranks", 0)])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    most = config.getoption("--most-ranks")
    if most is not None:
        items[:] = [item for item in items if _gpu_ranks(item) <= most]
    modules = {item.path: place for place, item in reversed([*enumerate(items)])}
    items.sort(key=lambda item: (modules[item.path], _gpu_ranks(item)))
    reason = why_no_gpu()
    if reason is None:
        return
    skip = pytest.mark.skip(reason=reason)
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def _session_pools(gpu: bool) -> Iterator[Pools]:
    from tests.ranks import Pools

    pools = Pools(gpu)
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def _cpu_pools() -> Iterator[Pools]:
    yield from _session_pools(gpu=False)


@pytest.fixture(scope="session")
def _gpu_pools() -> Iterator[Pools]:
    yield from _session_pools(gpu=True)


@pytest.fixture
def cpu_ranks(_cpu_pools: Pools) -> Iterator[Pools]:
    """cpu_ranks(n, fresh=False) -> RankPool of n processes with a gloo group; kept for the session unless fresh."""
    yield _cpu_pools
    _cpu_pools.end_test()


@pytest.fixture
def gpu_ranks(_gpu_pools: Pools) -> Iterator[Pools]:
    """As cpu_ranks, rank i on GPU i % count; ranks that share a GPU run under an MPS daemon of the pool."""
    yield _gpu_pools
    _gpu_pools.end_test()


@pytest.fixture
def ranks_on(request: pytest.FixtureRequest) -> Callable[[str], Pools]:
    """ranks_on(device) -> cpu_ranks of "cpu", gpu_ranks of "cuda"; the other one's processes are not started."""
    return lambda device: request.getfixturevalue("gpu_ranks" if device == "cuda" else "cpu_ranks")
