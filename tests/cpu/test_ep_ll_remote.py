"""The low-latency kernels that reach peers through NVSHMEM: compiled without a GPU, and the host's part on fakes."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from cutehop.comm import kernels, ll_buffer, ll_config, memory
from cutehop.comm.kernels import config as sizes
from cutehop.comm.kernels import nvshmem_library
from cutehop.comm.ll_config import SLOTS, LlConfig, LlLayout
from cutehop.comm.ll_outputs import LlHandle

CONFIG = LlConfig(ranks=8, hidden=7168, max_tokens=128, num_experts=256, max_topk=8)
REGISTERS_PER_SM = 65536
PUT, SIGNAL, FENCE = "nvshmemi_transfer_rma_nbi", "nvshmemi_transfer_amo_nonfetch", "nvshmemi_transfer_fence"

needs_nvshmem = pytest.mark.skipif(
    not nvshmem_library.can_compile(), reason="the NVSHMEM wheel, whose device code is linked in, is not installed"
)


def wheels(monkeypatch, **installed: str) -> None:
    def version(wheel: str) -> str:
        key = wheel.removeprefix("nvidia-nvshmem-")
        if key not in installed:
            raise importlib.metadata.PackageNotFoundError(wheel)
        return installed[key]

    monkeypatch.setattr(nvshmem_library.importlib.metadata, "version", version)


def test_the_version_is_the_wheels(monkeypatch):
    wheels(monkeypatch, cu12="3.8.0")
    assert nvshmem_library.version() == "3.8.0"
    assert {config.nvshmem for _, config, _ in kernels.ll_variants(remote=True)} == {"3.8.0"}
    wheels(monkeypatch, cu12="3.10.1", cu13="3.10.1")
    assert nvshmem_library.version() == "3.10.1"


@pytest.mark.parametrize(
    ("installed", "text"),
    [
        ({}, r"not installed; pip install 'nvidia-nvshmem-cu13>=3.5'"),
        ({"cu13": "3.4.5"}, r"nvidia-nvshmem-cu13 is 3\.4\.5, 3\.5 is the oldest"),
        ({"cu12": "3.7.0", "cu13": "3.8.0"}, r"cu13 3\.8\.0 and nvidia-nvshmem-cu12 3\.7\.0 lie in one folder"),
    ],
)
def test_what_will_not_do_is_named(monkeypatch, installed, text):
    wheels(monkeypatch, **installed)
    with pytest.raises(RuntimeError, match=text):
        kernels.make_remote()
    assert not nvshmem_library.can_compile()
    assert not any(isinstance(config, sizes.RemoteParts) for _, config in kernels.variants())


def test_device_code_is_looked_for_in_the_wheels_folder(monkeypatch, tmp_path):
    wheels(monkeypatch, cu13="3.8.0")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(nvshmem_library.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(RuntimeError, match=r"3\.8\.0 is installed without lib/libnvshmem_device_sm_90\.bc"):
        nvshmem_library.bitcode()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / nvshmem_library.BITCODE).touch()
    assert nvshmem_library.bitcode() == tmp_path / "lib" / nvshmem_library.BITCODE


def test_the_outbox_comes_last_and_moves_nothing():
    without, has = LlLayout(CONFIG), LlLayout(CONFIG, remote=True)
    assert has.outbox.offset >= has.data.offset + SLOTS * CONFIG.slot_bytes
    assert [region for region in has.regions if region.name != "outbox"] == list(without.regions)
    assert has.heap_bytes == without.heap_bytes + SLOTS * CONFIG.outbox_bytes
    assert CONFIG.outbox_bytes == 8 * 128 * 8 * (14336 + 224), "a row for each choice of every rank's tokens"
    one = LlConfig(ranks=8, hidden=128, max_tokens=1, num_experts=8192, max_topk=1)
    assert one.outbox_bytes >= 8 * one.counts_bytes + one.record_bytes, "counts may take more than rows"


def compiled(elastic: bool, number: int):
    """(name, what it does, bundle) of a kernel with NVSHMEM's code."""
    pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    function, config, _ = list(kernels.ll_variants(elastic, remote=True))[number]
    return function.name.rpartition(".")[2], config, function.bundle(config)


@pytest.fixture(scope="module", params=range(9), ids=lambda i: f"variant{i}")
def kernel(request):
    return compiled(False, request.param)


@pytest.fixture(scope="module", params=range(10), ids=lambda i: f"variant{i}")
def elastic_kernel(request):
    return compiled(True, request.param)


def entry(ptx: str) -> str:
    """The kernel itself, without NVSHMEM's functions behind it."""
    return re.split(r"\n(?:\.\w+ )*\.func ", ptx[ptx.index(".visible .entry") :])[0]


@needs_nvshmem
def test_calls_of_nvshmem(kernel):
    name, config, bundle = kernel
    body = entry(bundle.ptx)
    called = re.findall(r"call\.uni[^;]*?(nvshmemi_\w+?)I", body)
    puts = 2 if "dispatch" in name or config.coded else 1
    assert called.count(PUT) == config.sends * puts, "records and counts, or rows, with LogFMT and their limits"
    assert called.count(SIGNAL) == config.sends + config.receives, "ready, ack"
    assert called.count(FENCE) == config.sends, "before ready"
    if config.sends:
        assert max(body.rfind(PUT), 0) < body.rfind(FENCE) < body.rfind(SIGNAL)
    assert "nvshmemi_device_state_d" in bundle.ptx
    assert bundle.entry.endswith("_nvshmem_0")


@needs_nvshmem
def test_kernels_that_leave_ranks_out(elastic_kernel):
    """A rank that is left out is told by a signal; one that comes back reads how far the others are."""
    name, config, bundle = elastic_kernel
    body = entry(bundle.ptx)
    assert bundle.registers * bundle.threads <= REGISTERS_PER_SM
    assert bundle.entry.endswith("_elastic_nvshmem_0")
    assert len(re.findall(SIGNAL + "I", body)) >= 2
    assert (name == "ll_mask_kernel") == ("nvshmemi_transfer_rma_g" in body or "nvshmem_int_g" in body)
    assert (PUT in body) == config.sends


@needs_nvshmem
def test_fits_an_sm(kernel):
    name, config, bundle = kernel
    assert bundle.registers * bundle.threads <= REGISTERS_PER_SM
    mapped = sizes.Parts(config.sends, config.receives, coded=config.coded)
    assert bundle.smem_bytes == getattr(kernels, name).bundle(mapped).smem_bytes
    assert bundle.params == (*bundle.params[:6], "i64", "i64", "i64", *bundle.params[9:])


@needs_nvshmem
def test_kernels_for_mapped_peers_have_none_of_it():
    pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    for parts in sizes.PARTS:
        for function in (kernels.ll_dispatch_kernel, kernels.ll_combine_kernel):
            assert "nvshmem" not in function.bundle(parts).ptx


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Fakes:
    """A GPU of CPU memory and an NVSHMEM world: what was admitted to it, and the launches."""

    def __init__(self, monkeypatch) -> None:
        self.events: list = []
        self.one_node: bool | None = None
        zeros, properties = torch.zeros, SimpleNamespace(multi_processor_count=132, uuid="GPU")
        monkeypatch.setattr(memory, "open_heap", self._open_heap)
        monkeypatch.setattr(torch, "zeros", lambda *args, pin_memory=False, **kwargs: zeros(*args, **kwargs))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=7, synchronize=int))
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
        for name in ("ll_dispatch_kernel", "ll_combine_kernel", "ll_combine_whole_kernel"):
            monkeypatch.setattr(kernels, name, self._kernel(name))

    def _open_heap(self, provider, group, nbytes, device, timeout_s, one_node):
        self.events.append(provider)
        self.one_node = one_node
        local = torch.zeros(nbytes, dtype=torch.uint8)
        self.world = SimpleNamespace(admit=lambda library: self.events.append(("admit", library)), queue=lambda: 17)
        return SimpleNamespace(local=local, bases=(local.data_ptr(),), destroy=lambda: None, nvshmem=lambda: self.world)

    def _kernel(self, name):
        def load(config, stream):
            self.events.append("load")
            launch = lambda grid, stream, *values, smem_bytes: self.events.append((name, values))  # noqa: E731
            bundle = SimpleNamespace(smem_bytes=232448)
            return SimpleNamespace(launch=launch, bundle=bundle, library=id(config) % 1000)

        load.bundle = lambda config: self.events.append("bundle")
        return load


SMALL = LlConfig(ranks=1, hidden=256, max_tokens=4, num_experts=4, max_topk=2)


def opened(group, **options) -> ll_buffer.CudaLowLatencyBuffer:
    return ll_buffer.CudaLowLatencyBuffer(group, SMALL, device=torch.device("cpu"), **options)


def test_nvshmem_kernels_are_found_before_the_memory_and_admitted_behind_it(group, monkeypatch):
    fakes = Fakes(monkeypatch)
    wheels(monkeypatch, cu13="3.8.0")
    buffer = opened(group, transport="nvshmem", provider="vmm")
    kinds = [event if isinstance(event, str) else event[0] for event in fakes.events]
    assert kinds == [*["bundle"] * 9, "nvshmem", *["load"] * 9, *["admit"] * 9]
    assert fakes.one_node
    buffer.dispatch_send(torch.zeros(1, 256, dtype=torch.bfloat16), torch.zeros(1, 2, dtype=torch.int64))
    name, values = fakes.events[-1]
    assert name == "ll_dispatch_kernel"
    first = buffer.layout.outbox.offset + buffer._memory.local.data_ptr()
    assert values[6:8] == (first, SMALL.outbox_bytes)
    assert buffer._queue.tolist() == [17]
    assert values[8] == buffer._queue.data_ptr()
    names = [field.name for field in fields(pytest.importorskip("cutehop.comm.kernels.ll_remote").RemoteGroup)]
    assert names[6:] == ["outbox", "outbox_bytes", "queue"]
    buffer.destroy()


@pytest.mark.parametrize("transport", ["auto", "p2p"])
def test_one_node_takes_pointers(group, monkeypatch, transport):
    fakes = Fakes(monkeypatch)
    wheels(monkeypatch)
    buffer = opened(group, transport=transport)
    assert (buffer.transport, fakes.one_node) == ("p2p", True)
    assert fakes.events == [*["load"] * 9, "vmm"]
    assert len(buffer._group_args) == 6
    buffer.destroy()


@pytest.mark.parametrize("most_adding", [0, 1])
@pytest.mark.parametrize("use_logfmt", [False, True])
def test_combine_in_one_launch_asks_for_sums_in_small_groups(group, monkeypatch, most_adding, use_logfmt):
    fakes = Fakes(monkeypatch)
    monkeypatch.setattr(ll_config, "MOST_ADDING", most_adding)
    buffer = opened(group, transport="p2p")
    handle = LlHandle(*(torch.zeros(1, dtype=torch.int32) for _ in range(5)))
    y, topk_idx = torch.zeros((4, 4, 256), dtype=torch.bfloat16), torch.zeros((1, 2), dtype=torch.int64)
    out = torch.empty((1, 256), dtype=torch.bfloat16)
    buffer._combine(y, handle, topk_idx, torch.zeros(1, 2), out, use_logfmt=use_logfmt, wait_stats=None)
    sums = most_adding == 1 and not use_logfmt
    assert fakes.events[-1][0] == ("ll_combine_whole_kernel" if sums else "ll_combine_kernel")
    assert ("sums" in {region.name for region in buffer.layout.regions}) == (most_adding == 1)
    buffer.destroy()


def test_several_nodes_take_nvshmem(group, monkeypatch):
    """What the ranks say, as a group of four on two nodes would hear it."""
    fakes = Fakes(monkeypatch)
    wheels(monkeypatch, cu12="3.8.0")
    meet = ll_buffer.Meeting.meet

    def two_nodes(self, phase, words=""):
        said = meet(self, phase, words)
        return [*said, "auto on elsewhere"] if phase == "transport" else said

    monkeypatch.setattr(ll_buffer.Meeting, "meet", two_nodes)
    buffer = opened(group)
    assert (buffer.transport, fakes.one_node) == ("auto", False)
    assert "nvshmem" in fakes.events
    buffer.destroy()


def test_bad_transports_are_refused_before_anything_else(group, monkeypatch):
    fakes = Fakes(monkeypatch)
    wheels(monkeypatch)
    with pytest.raises(ValueError, match=r"transport 'ib', supported auto\|p2p\|nvshmem"):
        opened(group, transport="ib")
    with pytest.raises(RuntimeError, match="NVSHMEM library, which is not installed; pip install"):
        opened(group, transport="nvshmem")
    assert fakes.events == []


def test_forced_nvshmem_hides_peers_that_are_mapped(monkeypatch):
    made = memory.PeerMemory.__new__(memory.PeerMemory)
    made.rank, made.ranks, made.timeout_s, made._error_address = 1, 3, 2.0, 5
    made._heap, made._bases = SimpleNamespace(bases=(1024, 2048, 4096)), torch.zeros(3, dtype=torch.int64)
    for transport, want in (("p2p", [1024, 2048, 4096]), ("nvshmem", [0, 2048, 0]), ("auto", [1024, 2048, 4096])):
        made._transport = transport
        made._map()
        assert made._bases.tolist() == want
        assert made.group_args[1] == 2048
