"""The compiled MLA kernels, without a GPU: what the build must have come to for the kernels to be fast."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
from collections import Counter

import pytest

from cutehop import aot
from cutehop.cute_kernels import mla
from cutehop.cute_kernels.jit import Bundle, Compiled, store
from cutehop.cute_kernels.jit.bundle import MAX_SMEM_BYTES
from cutehop.cute_kernels.mla import config as cfg

REGISTERS_PER_SM = 65536
VARIANTS = list(mla.variants())
DECODE, OTHERS = ([v for v in VARIANTS if (v[0] is mla.decode_kernel) is decode] for decode in (True, False))
# Places in the code that multiply: the first scores of a piece and the next ones of a pair, in each warpgroup; own and
# other P times V, in each warpgroup for a pair, and once in each for the block that is left over.
QK_PLACES, PV_PLACES = 4, 6
WGMMAS = {"m64n64k16": QK_PLACES * cfg.HEAD_DIM // 16, "m64n256k16": PV_PLACES * cfg.BLOCK // 16}
# With few rows each warpgroup has a block to itself: all its scores, and all columns of V.
FEW_ROWS_WGMMAS = {"m64n16k16": 2 * (cfg.HEAD_DIM // 16 + cfg.HEAD_DIM_V // 64 * cfg.BLOCK // 16)}


def each(variants: list) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("variant", variants, ids=lambda v: f"{v[0].__name__}-{v[1]}".replace(" ", ""))


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Compiled, object], Bundle]:
    """Every variant, from the cache folder or compiled now, in as many processes as there are cores."""
    cache = store.open_store()
    folder = cache.root if cache else tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUTEHOP_CACHE_DIR", str(folder))  # build() changes both; leaving the context puts them back
        patch.setenv("CUTEHOP_CACHE", "1")
        failures = aot.build(folder, jobs=os.cpu_count() or 1, modules=("cutehop.cute_kernels.mla",))
        assert not failures, "\n".join(failures)
        return {(function, config): function.bundle(config) for function, config in VARIANTS}


@pytest.fixture
def bundle(bundles, variant) -> Bundle:
    return bundles[variant]


@pytest.fixture(scope="session")
def nvdisasm() -> str:
    """The program, from the PATH or from its Python package."""
    found = shutil.which("nvdisasm")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
        found = found or next((str(file.locate()) for file in files if file.name == "nvdisasm"), None)
    return found or pytest.skip("nvdisasm is not installed")


def expected_wgmmas(config: mla.DecodeConfig) -> dict[str, int]:
    return FEW_ROWS_WGMMAS if config.few_rows else WGMMAS


def wgmmas(ptx: str) -> Counter[str]:
    return Counter(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)", ptx))


# ---- every kernel --------------------------------------------------------------------------------------------------


@each(VARIANTS)
def test_nothing_spills_or_lives_in_local_memory(bundle):
    assert bundle.spill_bytes == 0
    assert "0 bytes stack frame" in bundle.log
    assert not re.findall(r".*\.local\b.*", bundle.ptx)


@each(VARIANTS)
def test_fits_an_sm(bundle):
    assert bundle.registers * bundle.threads <= REGISTERS_PER_SM
    assert bundle.smem_bytes <= MAX_SMEM_BYTES


@each(VARIANTS)
def test_overlaps_with_its_neighbours(bundle):
    """A launch attribute lets it start early, so it must wait for the kernel before it and let the next one start."""
    assert bundle.pdl
    assert bundle.ptx.count("griddepcontrol.wait") >= 1
    assert bundle.ptx.count("griddepcontrol.launch_dependents") >= 1


def test_entries_tell_the_variants_apart(bundles):
    """A profile shows nothing but the entry."""
    shared = [entry for entry, n in Counter(bundle.entry for bundle in bundles.values()).items() if n > 1]
    assert shared == []


# ---- decode --------------------------------------------------------------------------------------------------------


@each(DECODE)
def test_decode_multiplies_on_tensor_cores_without_serialisation(bundle, variant):
    assert wgmmas(bundle.ptx) == expected_wgmmas(variant[1])
    assert set(re.findall(r"wgmma\.mma_async\S+k16\.(\S+)", bundle.ptx)) == {
        f"f32.{variant[1].dtype}.{variant[1].dtype}"
    }
    assert "C75" not in bundle.log  # ptxas notes about serialised wgmma are C7510 to C7519


@each(DECODE)
def test_decode_loads_by_tma(bundle, variant):
    """Both K blocks slab by slab, a box per page that a block touches; Q by one instruction."""
    loads = Counter(re.findall(r"cp\.async\.bulk\.tensor\.(\dd)\.shared::\w+\.global", bundle.ptx))
    assert loads == {"4d": 2 * cfg.NUM_SLABS * (cfg.BLOCK // variant[1].box_rows), "5d": 1}


@each(DECODE)
def test_decode_moves_registers_from_the_loaders_to_the_math(bundle):
    found = dict(re.findall(r"setmaxnreg\.(\w+)\.sync\.aligned\.u32\s+(\d+)", bundle.ptx))
    assert found == {"dec": "40", "inc": "232"}
    warpgroups = bundle.threads // 128
    assert bundle.registers == REGISTERS_PER_SM // bundle.threads // 8 * 8 == 168  # what a launch gives each thread
    assert (2 * 232 + (warpgroups - 2) * 40) * 128 <= bundle.registers * bundle.threads


# ---- combine -------------------------------------------------------------------------------------------------------


@each([v for v in OTHERS if v[0] is mla.combine_kernel])
def test_combine_has_as_many_loads_in_flight_as_an_sm_takes(bundle, variant):
    loads = len(re.findall(r"ld\.global\.v4\.b32", bundle.ptx))
    assert loads == variant[1].chunk * variant[1].vectors
    assert bundle.registers * bundle.threads * variant[1].ctas_per_sm <= REGISTERS_PER_SM


# ---- machine code --------------------------------------------------------------------------------------------------


@each(VARIANTS)
def test_machine_code(bundle, variant, nvdisasm, tmp_path):
    """ptxas keeps each wgmma and TMA load of the PTX once (it may clone code), and adds no local memory."""
    (tmp_path / "kernel.cubin").write_bytes(bundle.cubin)
    command = [nvdisasm, "--print-code", str(tmp_path / "kernel.cubin")]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)", sass, re.MULTILINE))
    assert found["EXIT"] >= 1, "no instruction was recognised"
    assert found["LDL"] == found["STL"] == 0
    decode = variant[0] is mla.decode_kernel
    assert found["HGMMA"] == (sum(expected_wgmmas(variant[1]).values()) if decode else 0)
    assert found["UTMALDG"] == len(re.findall(r"cp\.async\.bulk\.tensor\.", bundle.ptx))
    assert found["USETMAXREG"] == (2 if decode else 0)
