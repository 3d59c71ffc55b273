"""EP kernels, compiled for sm_90a without a GPU: what the machine code must contain, and the host's choices."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")

from cutehop.comm import kernels
from cutehop.comm.kernels import config as sizes
from cutehop.cute_kernels.jit.bundle import MAX_SMEM_BYTES

# Those with NVSHMEM's code in them: test_ep_ll_remote.py.
VARIANTS = [each for each in kernels.variants() if not isinstance(each[1], sizes.RemoteParts)]
REGISTERS_PER_SM = 65536
# What each kernel does with rows by bulk copies: load, store.
LOADING = ("receive", "combine_receive", "ll_dispatch+receive", "ll_combine+send")
STORING = ("receive", "ll_dispatch+send", "ll_dispatch+receive", "ll_combine+send", "ll_combine_coded+send")
RINGS = ("receive", "ll_combine+send")  # a stage is loaded again once its last store has read it
PULLING = ("receive", "combine_receive")  # reads peers' memory
# What peers read once they see its flag.
WRITING = ("send", "combine_send", "combine_receive", "ll_dispatch+send", "ll_combine+send", "ll_combine_coded+send")


def name_of(variant) -> str:
    """ "receive", or of a kernel in parts "ll_dispatch+send+receive", "ll_combine_coded+send"."""
    function, config = variant
    parts = [part for part in ("send", "receive") if getattr(config, f"{part}s", False)]
    name = function.name.rpartition(".")[2].removesuffix("_kernel") + "_coded" * getattr(config, "coded", False)
    return "+".join((name, *parts))


def does(name: str, what: tuple[str, ...]) -> bool:
    """Whether any part of the kernel is named in `what`."""
    kernel, *parts = name.split("+")
    return any(f"{kernel}+{part}" in what for part in parts) if parts else kernel in what


@pytest.fixture(scope="module", params=VARIANTS, ids=name_of)
def kernel(request):
    """(name, bundle) of every kernel."""
    function, config = request.param
    return name_of(request.param), function.bundle(config)


def test_nothing_spills_or_lives_in_local_memory(kernel):
    _, bundle = kernel
    assert bundle.spill_bytes == 0
    assert not re.findall(r".*\.local\b.*", bundle.ptx)


def test_fits_an_sm(kernel):
    _, bundle = kernel
    assert bundle.registers * bundle.threads <= REGISTERS_PER_SM
    assert bundle.smem_bytes <= MAX_SMEM_BYTES


def test_rows_move_by_bulk_copies(kernel):
    name, bundle = kernel
    loads = len(re.findall(r"cp\.async\.bulk\.shared::\w+\.global\.mbarrier", bundle.ptx))
    stores = len(re.findall(r"cp\.async\.bulk\.global\.shared::cta", bundle.ptx))
    assert (loads > 0) == does(name, LOADING)
    assert (stores > 0) == does(name, STORING)
    if does(name, PULLING):
        assert "fence.proxy.async.global" in bundle.ptx, "peers write in the generic proxy"
    if does(name, RINGS):
        assert re.search(r"cp\.async\.bulk\.wait_group\.read\s+1;", bundle.ptx), "before a stage is filled again"
    if stores and does(name, WRITING):
        assert re.search(r"cp\.async\.bulk\.wait_group\s+0;", bundle.ptx), "before the CTA says it is done"


def test_what_crosses_gpus_is_of_system_scope(kernel):
    """Flags and counts; arrivals of this GPU's CTAs alone are of gpu scope."""
    name, bundle = kernel
    if name == "layout":
        return
    assert "ld.relaxed.sys" in bundle.ptx
    if name == "ll_mask":  # it writes flags that no data comes with, and waits for no peer
        assert "st.relaxed.sys" in bundle.ptx
        return
    assert "ld.acquire.sys" in bundle.ptx
    assert "ld.acquire.gpu" not in bundle.ptx
    assert ("st.release.sys.global.b32" in bundle.ptx) == does(name, WRITING), "a flag that says: my data is there"
    if name not in ("wait", "combine_send", "ll_combine+send", "ll_combine_coded+send"):
        assert "st.relaxed.sys" in bundle.ptx, "counts, acknowledgements"


@pytest.mark.parametrize("variant", [each for each in VARIANTS if "ll_dispatch" in name_of(each)], ids=name_of)
def test_few_tokens_are_dispatched_as_words(variant):
    """64 bits with their epoch, written and read as a whole; not where ranks may be left out."""
    function, config = variant
    ptx = function.bundle(config).ptx
    assert ("st.relaxed.sys.global.v2.b64" in ptx) == (config.sends and not config.elastic)
    assert ("ld.relaxed.sys.global.v2.b64" in ptx) == (config.receives and not config.elastic)


def test_sums_of_a_whole_combine_need_no_flag():
    """Words that show by themselves that they have come; whoever waits for a flag has nothing of them."""
    whole = [each for each in VARIANTS if "ll_combine_whole" in name_of(each)]
    assert len(whole) == 1
    for function, config in VARIANTS:
        ptx = function.bundle(config).ptx
        is_whole = (function, config) in whole
        assert ("ld.relaxed.sys.global.v4.b32" in ptx) == ("st.relaxed.sys.global.v4.b32" in ptx) == is_whole
        if is_whole:
            assert "cp.async.bulk" not in ptx
            assert "st.release.sys.global.b32" not in ptx


def test_every_wait_has_a_deadline(kernel):
    """A poll of a flag is a loop that reads the clock. mbarriers wait for copies, which end by themselves."""
    name, bundle = kernel
    assert ("%globaltimer" in bundle.ptx) == (name != "layout")


@given(
    st.integers(1, 4096).map(lambda vectors: 16 * vectors),
    st.sampled_from([sizes.RING_BYTES, sizes.TEAM_RING_BYTES]),
    st.integers(1, 132 * sizes.MOVERS),
)
def test_a_ring_holds_its_stages_and_a_row_is_cut_evenly(row_bytes, ring_bytes, rings):
    piece, stages = sizes.ring(row_bytes, ring_bytes, rings)
    assert 0 < piece <= min(row_bytes, sizes.PIECE_BYTES)
    assert piece % 16 == 0
    assert stages * piece <= ring_bytes
    assert 3 <= stages <= sizes.MAX_STAGES  # a load, a store and one being read
    assert stages == 3 or rings * stages * piece <= sizes.FLIGHT_BYTES
    pieces = -(-row_bytes // piece)
    assert pieces == -(-row_bytes // sizes.PIECE_BYTES)


def test_rows_of_deepseek_are_cut_without_rest():
    assert sizes.ring(14336, sizes.RING_BYTES) == (7168, 6)
    assert sizes.ring(7168, sizes.RING_BYTES) == (7168, 6)
    assert sizes.ring(14336, sizes.TEAM_RING_BYTES) == (7168, 10)


@pytest.mark.parametrize(("sms", "dispatch", "combine"), [(16, 6, 10), (24, 5, 6), (48, 3, 3), (132, 3, 3)])
def test_many_sms_hold_less_in_flight_each(sms, dispatch, combine):
    assert sizes.ring(14336, sizes.RING_BYTES, sms * sizes.MOVERS) == (7168, dispatch)
    assert sizes.ring(14336, sizes.TEAM_RING_BYTES, sms * sizes.TEAMS) == (7168, combine)
