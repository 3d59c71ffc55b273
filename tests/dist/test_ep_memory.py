"""The memory of CudaBuffer: rows that are copied into it by all SMs, and graphs that outlive its release."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest

from cutehop.comm.config import EpConfig
from cutehop.comm.kernels.config import COPY_BYTES
from tests.dist.test_ep_graphs import Layer, ragged
from tests.ep_gpu_work import open_buffer, settle
from tests.ep_traffic import Sizes, Traffic, round_trip
from tests.rank_worker import PROVIDER_VARIABLE

pytestmark = [pytest.mark.dist, pytest.mark.gpu]

MOST = 640  # tokens of a rank
ROUNDS = 24


@pytest.fixture(scope="module", params=[8, 2])
def ranks(request):
    """Of the module, so that pytest runs all tests of one pool before it makes the next."""
    return request.param


def copy_by_all_sms(group, rank, device):
    """Calls of one SM with rows from elsewhere, on some ranks more than it copies by itself."""
    ranks = group.size()
    buffer = open_buffer(group, EpConfig(ranks, 1024, MOST, 4 * ranks, max_topk=8, scales="f32"), device, num_sms=1)
    assert buffer.max_num_sms > 1
    tokens = tuple((MOST, 100, 513, 0, MOST, 257, 1, 33)[:ranks])
    rows = (Sizes(tokens, hidden=1024), Sizes(tokens[::-1], hidden=1024, rows="f32"))
    assert MOST * 1024 > COPY_BYTES > 100 * 1024 * 2
    given = [Traffic(sizes, seed, device) for seed, sizes in enumerate(rows)]
    settle(group)
    wrong = []
    for number in range(ROUNDS):
        worst = 0 if number % 3 == 0 else ranks * MOST
        wrong.append(round_trip(buffer, given[number % 2], worst, cached=True))
    settle(group)
    buffer.destroy()
    return [bool(each) for each in wrong]


def test_rows_that_all_sms_copy(gpu_ranks, ranks):
    assert gpu_ranks(ranks).run(copy_by_all_sms, "cuda") == [[False] * ROUNDS] * ranks


def replay_over_releases(group, rank, device):
    """What is wrong, and the milliseconds of a release and an acquire."""
    ranks = group.size()
    buffer = open_buffer(group, EpConfig(ranks, 1024, 64, 4 * ranks, max_topk=8, scales="f32"), device)
    sizes = Sizes(ragged(ranks), hidden=1024, rows="f32", k=8)
    layers = [Layer(buffer, sizes, device, views) for views in (False, True)]
    wrong, took = [], []
    for number in range(4):
        for layer in layers:
            traffic = Traffic(replace(sizes, routing=("random", "hostile")[number % 2]), number, device)
            wrong.append(layer.replay(traffic))
        wrong.append(round_trip(buffer, traffic, cached=True))
        settle(group)
        begin = time.perf_counter()
        buffer.release_memory()
        buffer.acquire_memory()
        took.append((time.perf_counter() - begin) * 1e3)
    wrong.append(layers[0].replay(traffic))
    settle(group)
    buffer.destroy()
    return [bool(each) for each in wrong], min(took)


def test_graphs_outlive_a_release(gpu_ranks, ranks):
    if os.environ.get(PROVIDER_VARIABLE, "vmm") != "vmm":
        pytest.skip("memory of the other providers may come back at another address")
    results = gpu_ranks(ranks).run(replay_over_releases, "cuda")
    print(f"\n{ranks} ranks: release_memory and acquire_memory in {max(took for _, took in results):.1f} ms")
    assert [wrong for wrong, _ in results] == [[False] * 13] * ranks
