"""Symmetric heaps on real GPUs: eight ranks, on as many GPUs as there are."""

from __future__ import annotations

import importlib.util
import os
import time

import pytest
import torch
import torch.distributed as dist

from cutehop.comm.errors import EpTimeoutError
from cutehop.comm.heap import open_heap, tensor_at

pytestmark = [pytest.mark.gpu, pytest.mark.dist]

RANKS = 8
MIB = 2**20
BIG = 256 * MIB
SLACK = {
    "vmm": 32 * MIB,
    "torch": 32 * MIB,
    "nvshmem": 128 * MIB,
}  # bytes that may stay with a GPU's ranks after all memory is released
needs_nvshmem = pytest.mark.skipif(importlib.util.find_spec("nvshmem") is None, reason="nvshmem4py is not installed")
PROVIDERS = ["vmm", "torch", pytest.param("nvshmem", marks=needs_nvshmem)]


def my_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def everybody(group) -> None:
    """All kernels of all ranks are done."""
    torch.cuda.synchronize()
    dist.barrier(group)


def views(heap) -> list[torch.Tensor]:
    """Every rank's memory, for kernels of this rank."""
    return [tensor_at(base, heap.nbytes, heap.device) for base in heap.bases]


def read_all(group, heap, salt: int) -> list[int]:
    """Each rank fills its memory with its rank + salt; then each reads all of it, with a kernel: the values found."""
    heap.local.fill_(group.rank() + salt)
    everybody(group)
    found = []
    for view in views(heap):
        low, high = view.min().item(), view.max().item()
        found.append(low if low == high else -1)
    everybody(group)
    return found


def two_heaps(group, rank, provider):
    # The heap itself sees to it that torch accepts a shared device, and to nothing being multicast.
    for name in ("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "TORCH_SYMM_MEM_DISABLE_MULTICAST"):
        os.environ.pop(name, None)
    ranks = group.size()
    first, second = (open_heap(provider, group, nbytes, my_device()) for nbytes in (MIB, 3 * MIB + 1024))
    assert (first.provider, first.rank, first.ranks, first.nbytes) == (provider, rank, ranks, MIB)
    assert [view.any().item() for heap in (first, second) for view in views(heap)] == [False] * (2 * ranks)
    assert not any(base % 1024 for heap in (first, second) for base in heap.bases)
    assert first.local.data_ptr() == first.bases[rank]
    assert len({*first.bases, *second.bases}) == 2 * ranks
    everybody(group)
    first.local.fill_(99)
    assert read_all(group, second, 50) == [50 + r for r in range(ranks)]
    assert first.local.eq(99).all().item()
    assert read_all(group, first, 10) == [10 + r for r in range(ranks)]
    # A store into the next rank's memory arrives there.
    views(first)[(rank + 1) % ranks][512] = 200 + rank
    everybody(group)
    assert first.local[512].item() == 200 + (rank - 1) % ranks
    if provider == "torch":
        assert first._memory._handle.multicast_ptr == 0
    second.destroy()
    assert read_all(group, first, 30) == [30 + r for r in range(ranks)]
    first.destroy()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_ranks_read_and_write_each_other(gpu_ranks, provider):
    gpu_ranks(RANKS, fresh=provider == "nvshmem").run(two_heaps, provider)


@pytest.mark.parametrize("ranks", [2, 3])
def test_fewer_ranks_read_and_write_each_other(gpu_ranks, ranks):
    gpu_ranks(ranks).run(two_heaps, "vmm")


def heaps_of_several_groups(group, rank, provider):
    halves = [dist.new_group([r for r in range(RANKS) if r % 2 == half]) for half in range(2)]
    mine = halves[rank % 2]
    world, half = open_heap(provider, group, MIB, my_device()), open_heap(provider, mine, MIB, my_device())
    assert (half.rank, half.ranks) == (rank // 2, RANKS // 2)
    assert read_all(mine, half, 100 * (rank % 2)) == [100 * (rank % 2) + r for r in range(RANKS // 2)]
    assert read_all(group, world, 1) == [1 + r for r in range(RANKS)]
    half.destroy()
    world.destroy()


@pytest.mark.parametrize("provider", ["vmm", "torch"])
def test_heaps_of_several_groups_are_alive_at_once(gpu_ranks, provider):
    gpu_ranks(RANKS).run(heaps_of_several_groups, provider)


def one_rank_has_made_more(group, rank):
    alone = dist.new_group([0])
    first = open_heap("vmm", alone, MIB, my_device()) if rank == 0 else None
    heap = open_heap("vmm", group, MIB, my_device())
    assert read_all(group, heap, 1) == [1 + r for r in range(RANKS)]
    heap.destroy()
    if first is not None:
        first.destroy()


def test_ranks_may_have_made_unequal_numbers_of_heaps(gpu_ranks):
    gpu_ranks(RANKS).run(one_rank_has_made_more)


def replay_after_release(group, rank):
    """Milliseconds that release and acquire take."""
    heap = open_heap("vmm", group, BIG, my_device())
    bases, peer = heap.bases, views(heap)[(rank + 1) % RANKS]
    found = torch.zeros(1, device="cuda", dtype=torch.uint8)
    heap.local.fill_(rank)
    everybody(group)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found.copy_(peer[512:513])
    begin = time.perf_counter()
    heap.release()
    heap.acquire()
    took = (time.perf_counter() - begin) * 1e3
    assert heap.bases == bases
    heap.local.fill_(100 + rank)
    everybody(group)
    graph.replay()
    assert found.item() == 100 + (rank + 1) % RANKS
    everybody(group)
    heap.destroy()
    return took


def test_graphs_outlive_a_release(gpu_ranks):
    took = gpu_ranks(RANKS).run(replay_after_release)
    print(f"\n{RANKS} ranks, {BIG // MIB} MiB each: release and acquire in {max(took):.1f} ms")


def free_bytes(group) -> int:
    """Of this rank's GPU, while no rank allocates."""
    everybody(group)
    free = torch.cuda.mem_get_info()[0]
    everybody(group)
    return free


def release_and_acquire(group, rank, provider):
    def use(heap, salt):
        assert not heap.local.any().item()
        everybody(group)
        assert read_all(group, heap, salt) == [salt + r for r in range(RANKS)]

    heap = open_heap(provider, group, BIG, my_device())
    use(heap, 1)  # whatever kernels and torch's own pools take, they have taken now
    heap.release()
    without = free_bytes(group)
    sharing = RANKS // torch.cuda.device_count()
    for salt in (20, 40):
        heap.acquire()
        assert without - free_bytes(group) >= sharing * BIG - SLACK[provider]
        use(heap, salt)
        heap.release()
        assert without - free_bytes(group) <= SLACK[provider]
    heap.destroy()
    heap = open_heap(provider, group, BIG, my_device())
    use(heap, 60)
    heap.destroy()
    assert without - free_bytes(group) <= SLACK[provider]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_released_memory_is_back_on_the_gpu(gpu_ranks, provider):
    """Several rounds on the same group: eight ranks on one GPU hold 2 GiB."""
    gpu_ranks(RANKS, fresh=provider == "nvshmem").run(release_and_acquire, provider, timeout=240)


def ask_for_too_much(group, rank, provider):
    with pytest.raises(RuntimeError):
        open_heap(provider, group, 2**42, my_device())
    heap = open_heap(provider, group, MIB, my_device())
    assert read_all(group, heap, 5) == [5 + r for r in range(RANKS)]
    heap.destroy()


@pytest.mark.parametrize("provider", ["vmm", "torch"])
def test_too_much_memory_fails_on_all_and_the_ranks_go_on(gpu_ranks, provider):
    gpu_ranks(RANKS).run(ask_for_too_much, provider)


def open_kept(group, rank, provider):
    global _kept
    _kept = open_heap(provider, group, BIG, my_device(), timeout_s=5.0)


def destroy_kept(group, rank):
    with pytest.raises(EpTimeoutError) as caught:
        _kept.destroy()
    return caught.value.peer, torch.zeros(1, device="cuda").item()


@pytest.mark.parametrize("provider", ["vmm", "torch"])
def test_survivors_of_a_killed_rank_free_their_memory(gpu_ranks, provider):
    pool = gpu_ranks(3, fresh=True)
    pool.run(open_kept, provider)
    pool.kill(1)
    assert pool.run(destroy_kept) == [(1, 0.0), None, (1, 0.0)]


def one_world(group, rank):
    heap = open_heap("nvshmem", group, MIB, my_device())
    pairs = [dist.new_group([r, r + 1]) for r in range(0, RANKS, 2)]
    with pytest.raises(NotImplementedError, match="one world per process"):
        open_heap("nvshmem", pairs[rank // 2], MIB, my_device())
    heap.destroy()


@needs_nvshmem
def test_nvshmem_says_that_it_has_one_world(gpu_ranks):
    gpu_ranks(RANKS, fresh=True).run(one_world)
