"""SymmetricHeap's collective behaviour on the CPU, with memory from torch.empty, and the nvshmem provider's one world,
with a stand-in for the library. The real providers: tests/dist/test_heap.py."""

from __future__ import annotations

import pickle
import sys
import types
from unittest import mock

import numpy
import pytest
import torch
import torch.distributed as dist

from cutehop.comm import heap as heap_module
from cutehop.comm import nvshmem
from cutehop.comm.errors import EpTimeoutError
from cutehop.comm.heap import SymmetricHeap, TorchMemory, open_heap, tensor_at
from cutehop.comm.layout import ROW_ALIGN
from cutehop.comm.meeting import Meeting

CPU = torch.device("cpu")


class PlainMemory:
    """Local memory only: every rank's address is my own. Remembers what was called."""

    def __init__(self, fail_at="", skew=0):
        self.calls = []
        self.fail_at = fail_at
        self.skew = skew

    def _step(self, name):
        self.calls.append(name)
        if name == self.fail_at:
            raise MemoryError(f"no room to {name}")

    def greeting(self):
        return "hello"

    def allocate(self, nbytes, greetings):
        self._step("allocate")
        self.greetings = greetings
        self._memory = torch.full((nbytes + 2 * ROW_ALIGN,), 7, dtype=torch.uint8)
        at = -self._memory.data_ptr() % ROW_ALIGN + self.skew
        return self._memory[at : at + nbytes]

    def addresses(self):
        self._step("map")
        at = self._memory.data_ptr()
        return (at + -at % ROW_ALIGN + self.skew,) * len(self.greetings)

    def free(self):
        self._step("free")

    def abandon(self):
        self._step("abandon")

    def close(self):
        self._step("close")


def open_plain(group, nbytes=4096, timeout_s=20.0, **options):
    memory = PlainMemory(**options)
    return SymmetricHeap("plain", group, nbytes, CPU, memory, timeout_s), memory


def live_a_life(group, rank):
    heap, memory = open_plain(group)
    assert (heap.rank, heap.ranks, heap.nbytes) == (rank, 2, 4096)
    assert memory.greetings == ["hello", "hello"]
    assert heap.bases == (heap.local.data_ptr(),) * 2
    assert heap.local.shape == (4096,)
    assert not heap.local.any()
    heap.local.fill_(1)
    heap.acquire()
    assert heap.local.all()  # it was there: nothing happened
    for _ in range(2):
        heap.release()
    assert heap.bases == ()
    with pytest.raises(RuntimeError, match="released"):
        heap.local  # noqa: B018
    heap.acquire()
    assert not heap.local.any()
    other, _ = open_plain(group)
    for _ in range(2):
        heap.destroy()
    other.destroy()
    with pytest.raises(RuntimeError, match="destroyed"):
        heap.acquire()
    return memory.calls


@pytest.mark.dist
def test_memory_comes_zeroed_goes_and_comes_back(cpu_ranks):
    assert cpu_ranks(2).run(live_a_life) == [[*["allocate", "map", "free"] * 2, "close"]] * 2


def fail_on_rank_1(group, rank, step):
    with pytest.raises(MemoryError if rank == 1 else RuntimeError, match=f"no room to {step}") as caught:
        open_plain(group, fail_at=step if rank == 1 else "")
    heap, _ = open_plain(group)  # the ranks are still in step
    heap.destroy()
    return str(caught.value)


@pytest.mark.dist
@pytest.mark.parametrize("step", ["allocate", "map"])
def test_what_fails_on_one_rank_fails_on_all(cpu_ranks, step):
    assert "rank 1: MemoryError" in cpu_ranks(2).run(fail_on_rank_1, step)[0]


def ask_for_different_sizes(group, rank):
    with pytest.raises(ValueError, match=r"rank 0 asked for plain 4096 bytes .* rank 1 for plain 8192"):
        open_plain(group, nbytes=4096 * (rank + 1))


@pytest.mark.dist
def test_ranks_that_ask_for_different_sizes_raise(cpu_ranks):
    cpu_ranks(2).run(ask_for_different_sizes)


def misalign(group, rank):
    with pytest.raises(RuntimeError, match="must be a multiple of 1024"):
        open_plain(group, skew=512)


@pytest.mark.dist
def test_misaligned_memory_is_refused(cpu_ranks):
    cpu_ranks(2).run(misalign)


def come_alone(group, rank):
    heap, memory = open_plain(group, timeout_s=1.0)
    if rank == 1:
        return None
    with pytest.raises(EpTimeoutError) as caught:
        heap.destroy()
    assert heap.bases == ()
    heap.destroy()  # it is destroyed all the same
    return caught.value.peer, caught.value.phase, caught.value.waited_s, memory.calls[-2:]


@pytest.mark.dist
def test_a_rank_that_does_not_come_is_named_and_memory_is_free(cpu_ranks):
    peer, phase, waited_s, last = cpu_ranks(2, fresh=True).run(come_alone)[0]
    assert (peer, phase, last) == (1, "heap release", ["abandon", "close"])
    assert 1.0 <= waited_s < 5.0


def meet(group, rank):
    first, second = Meeting(group, 20.0), Meeting(group, 20.0)
    return [first.meet("a", f"I am {rank}"), second.meet("a"), first.meet("b", str(rank)), second.meet("b", "x")]


@pytest.mark.dist
def test_ranks_hear_each_other(cpu_ranks):
    assert cpu_ranks(3).run(meet) == [[["I am 0", "I am 1", "I am 2"], [""] * 3, ["0", "1", "2"], ["x"] * 3]] * 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("mpi", None, 64, CPU), "provider 'mpi', supported vmm|torch|nvshmem"),
        (("torch", None, 0, CPU), "nbytes 0"),
        (("torch", None, 64, CPU), "device cpu, must be a CUDA device"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError, match=r"^heap: ") as caught:
        open_heap(*arguments)
    assert said in str(caught.value)


def test_a_timeout_error_crosses_processes():
    error = pickle.loads(pickle.dumps(EpTimeoutError(1, 2, "combine_ready", 5, 4, 3.25)))
    assert vars(error) == vars(EpTimeoutError(1, 2, "combine_ready", 5, 4, 3.25))
    assert "rank 1 waited 3.25 s for rank 2 in combine_ready: expected 5, got 4" in str(error)


def test_a_view_of_foreign_memory_is_that_memory():
    owner = torch.arange(64, dtype=torch.uint8)
    view = tensor_at(owner.data_ptr() + 16, 8, CPU)
    assert view.tolist() == list(range(16, 24))
    view.zero_()
    assert not owner[16:24].any()
    assert owner[24] == 24


def test_processes_that_torch_cannot_join_are_told_so(cpu_ranks):
    """Before the rendezvous, in which the one that is behind would wait for ever."""
    assert cpu_ranks(2).run(join_unequal_processes) == [True, True]


def join_unequal_processes(group, rank):
    memory = TorchMemory(group, CPU)
    with mock.patch.object(TorchMemory, "rendezvous", rank):
        said = Meeting(group, 10).meet("greet", memory.greeting())
        with pytest.raises(RuntimeError, match="have made 0, 1 symmetric memories so far"):
            memory.allocate(1024, said)
    return True


def test_environment_is_set_for_the_mapping_only(monkeypatch):
    monkeypatch.setenv("TORCH_A", "user's")
    monkeypatch.delenv("TORCH_B", raising=False)
    with heap_module._set_environment(TORCH_A="1", TORCH_B="1"):
        assert [heap_module.os.environ[name] for name in ("TORCH_A", "TORCH_B")] == ["1", "1"]
    assert heap_module.os.environ["TORCH_A"] == "user's"
    assert "TORCH_B" not in heap_module.os.environ


class FakeNvshmem:
    """One PE's nvshmem.core and nvshmem.bindings. Memory is torch's; peers have the same address."""

    def __init__(self):
        self.calls = []
        self.memory = {}
        self.pe = (0, 1)

    class UniqueId:
        def __init__(self):
            self._data = numpy.zeros(1, dtype=[("version", "i4"), ("internal", "i1", 124)])

    def get_unique_id(self, empty=False):
        uid = self.UniqueId()
        if not empty:
            uid._data["internal"] = 5
        return uid

    def init(self, device, uid, rank, nranks, initializer_method):
        assert initializer_method == "uid"
        assert (uid._data["internal"] == 5).all()
        self.calls.append("init")

    def my_pe(self):
        return self.pe[0]

    def n_pes(self):
        return self.pe[1]

    def finalize(self):
        self.calls.append("finalize")

    def malloc(self, nbytes):
        block = torch.empty(nbytes, dtype=torch.uint8)
        self.memory[block.data_ptr()] = block
        return block.data_ptr()

    def free(self, address):
        del self.memory[address]

    def ptr(self, address, pe):
        return address

    def get_version(self):
        return types.SimpleNamespace(libnvshmem_version="3.4.5")

    def culibrary_init(self, library):
        self.calls.append(f"init {library}")
        return library == 13

    def culibrary_finalize(self, library):
        self.calls.append(f"finalize {library}")


@pytest.fixture
def library(monkeypatch):
    fake = FakeNvshmem()
    monkeypatch.setattr(nvshmem, "_library", lambda: (fake, fake))
    monkeypatch.setattr(nvshmem, "_world", None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    core = types.ModuleType("cuda.core")
    core.Device = lambda index: types.SimpleNamespace(set_current=lambda: None)
    monkeypatch.setitem(sys.modules, "cuda.core", core)
    monkeypatch.setattr(nvshmem, "_ours", [])
    for name in {**nvshmem.ENVIRONMENT, **nvshmem.SEVERAL_NODES}:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    return fake


@pytest.fixture(scope="module")
def group():
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def open_fake(group, device=CPU):
    return SymmetricHeap("nvshmem", group, 4096, device, nvshmem.NvshmemMemory(group, device), 5.0)


def test_nvshmem_world_lives_from_the_first_heap_to_the_last(library, group):
    first, second = open_fake(group), open_fake(group)
    assert first.bases[0] % ROW_ALIGN == 0
    assert first.local.data_ptr() == first.bases[0]
    first.destroy()
    assert library.calls == ["init"]
    second.release()
    assert library.calls == ["init", "finalize"]
    assert library.memory == {}
    second.acquire()
    second.destroy()
    assert library.calls == ["init", "finalize"] * 2
    assert {name: heap_module.os.environ[name] for name in nvshmem.ENVIRONMENT} == nvshmem.ENVIRONMENT


def test_nvshmem_admits_a_library_once_in_a_world(library, group):
    heap = open_fake(group)
    for handle in (3, 5, 3):
        heap.nvshmem().admit(handle)
    with pytest.raises(RuntimeError, match=r"culibrary_init: status .* of this process is 3\.4\.5; it must be"):
        heap.nvshmem().admit(13)
    heap.release()
    heap.acquire()
    heap.nvshmem().admit(3)
    heap.destroy()
    world = ["init", "init 3", "init 5", "init 13", "finalize 3", "finalize 5", "finalize"]
    assert library.calls == [*world, "init", "init 3", "finalize 3", "finalize"]


def test_nvshmem_of_several_nodes_makes_a_queue_and_looks_for_nics(library, group, monkeypatch):
    open_fake(group).destroy()
    assert heap_module.os.environ["NVSHMEM_REMOTE_TRANSPORT"] == "none"
    monkeypatch.setattr(nvshmem, "_make_queue", lambda: 24)
    mapped, library.ptr = library.ptr, lambda address, pe: 0
    mine = nvshmem.NvshmemMemory(group, CPU, one_node=False)
    heap = SymmetricHeap("nvshmem", group, 4096, CPU, mine, 5.0, one_node=False)
    assert heap.bases == (0,)
    assert heap.nvshmem().queue() == 24
    assert "NVSHMEM_REMOTE_TRANSPORT" not in heap_module.os.environ
    assert heap_module.os.environ["NVSHMEM_IB_ENABLE_IBGDA"] == "1"
    heap.destroy()
    library.ptr = mapped
    heap = open_fake(group)
    assert "NVSHMEM_IB_ENABLE_IBGDA" not in heap_module.os.environ
    assert heap.nvshmem().queue() == nvshmem.DEFAULT_QUEUE
    heap.destroy()


def test_nvshmem_leaves_the_users_variables(library, group, monkeypatch):
    monkeypatch.setenv("NVSHMEM_REMOTE_TRANSPORT", "ibrc")
    open_fake(group).destroy()
    assert heap_module.os.environ["NVSHMEM_REMOTE_TRANSPORT"] == "ibrc"


def test_nvshmem_refuses_a_second_world(library, group):
    heap = open_fake(group)
    other = dist.new_group([0])
    open_fake(other).destroy()  # the same ranks: the same world
    with pytest.raises(NotImplementedError, match="one world per process"):
        open_fake(group, torch.device("meta"))
    heap.destroy()


def test_nvshmem_started_by_somebody_else(library, group):
    library.pe = (3, 8)
    with pytest.raises(NotImplementedError, match="PE 3 of 8, this is rank 0 of 1"):
        open_fake(group)


def test_nvshmem_cannot_go_on_after_a_rank_went_missing(library, group, monkeypatch):
    heap = open_fake(group)

    def nobody_comes(phase, words=""):
        raise EpTimeoutError(0, 1, phase, 2, 1, 1.0)

    monkeypatch.setattr(heap._meeting, "meet", nobody_comes)
    with pytest.raises(EpTimeoutError):
        heap.destroy()
    with pytest.raises(NotImplementedError, match="start the processes again"):
        open_fake(group)


def test_nvshmem_not_installed_names_the_extra(group, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvshmem", None)
    with pytest.raises(ImportError, match=r"pip install 'cutehop\[cu1[23]\]'"):
        nvshmem.NvshmemMemory(group, CPU)
