"""The compiled grouped GEMM kernels, without a GPU: what the build must have come to for them to be fast."""

from __future__ import annotations

import os
import re
from collections import Counter

import pytest

from cutehop import aot
from cutehop.cute_kernels import gemm
from cutehop.cute_kernels.gemm import config as cfg
from cutehop.cute_kernels.jit import Bundle, store
from cutehop.cute_kernels.jit.bundle import MAX_SMEM_BYTES

CONFIGS = [config for _, config in gemm.variants()]
REGISTERS_PER_SM = 65536


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[cfg.GemmConfig, Bundle]:
    """Every variant, from the cache folder or compiled now, in as many processes as there are cores."""
    cache = store.open_store()
    folder = cache.root if cache else tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUTEHOP_CACHE_DIR", str(folder))  # build() changes both; leaving the context puts them back
        patch.setenv("CUTEHOP_CACHE", "1")
        failures = aot.build(folder, jobs=os.cpu_count() or 1, modules=("cutehop.cute_kernels.gemm",))
        assert not failures, "\n".join(failures)
        return {config: gemm.gemm_kernel.bundle(config) for config in CONFIGS}


@pytest.fixture(params=CONFIGS, ids=lambda c: f"{c.dtype}-{c.epilogue}-{c.tile_m}x{c.tile_n}")
def config(request) -> cfg.GemmConfig:
    return request.param


@pytest.fixture
def bundle(bundles, config) -> Bundle:
    return bundles[config]


def test_every_dtype_has_every_epilogue():
    wide = {(c.dtype, c.epilogue) for c in CONFIGS if (c.tile_m, c.tile_n) == cfg.WIDE}
    tall, middle = (
        {(c.dtype, c.epilogue) for c in CONFIGS if (c.tile_m, c.tile_n) == tile} for tile in (cfg.TALL, cfg.MIDDLE)
    )
    assert wide == {(dtype, epilogue) for dtype in cfg.TILES for epilogue in cfg.EPILOGUES}
    assert tall == {("bf16", "store"), ("bf16", "swiglu")}
    assert middle == {("fp8", "store"), ("fp8", "swiglu")}
    assert len(CONFIGS) == len(set(CONFIGS))


def test_nothing_spills_or_lives_in_local_memory(bundle):
    assert bundle.spill_bytes == 0
    assert "0 bytes stack frame" in bundle.log
    assert not re.findall(r".*\.local\b.*", bundle.ptx)


def test_fits_an_sm(bundle):
    assert bundle.registers * bundle.threads <= REGISTERS_PER_SM
    assert bundle.smem_bytes <= MAX_SMEM_BYTES


def test_multiplies_on_tensor_cores_without_serialisation(bundle, config):
    """One block of 128 bytes of K: four steps of all columns, or with FP8 of each 128 of them. A tall tile has one
    loop for two units of rows and one for a single unit."""
    shape, kind = ("m64n128k32", "e4m3") if config.dtype == "fp8" else (f"m64n{config.tile_n}k16", "bf16")
    units = range(1, config.wg_rows // cfg.UNIT + 1)
    steps = config.tile_n // 32 if config.dtype == "fp8" else sum(4 * n for n in units)
    found = Counter(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(\w+)\.f32\.(\w+)\.(\w+)", bundle.ptx))
    assert found == {(shape, kind, kind): steps}
    assert "C75" not in bundle.log  # ptxas notes about serialised wgmma are C7510 to C7520


def test_loads_by_tma(bundle, config):
    """A's boxes, one for each 64 rows, and B's, which is two boxes where a tile is gate and up."""
    loads = re.findall(r"cp\.async\.bulk\.tensor\.3d\.shared::\w+\.global", bundle.ptx)
    assert len(loads) == config.tile_m // cfg.UNIT + (2 if config.paired else 1)


def test_moves_registers_from_the_loader_to_the_math(bundle, config):
    found = dict(re.findall(r"setmaxnreg\.(\w+)\.sync\.aligned\.u32\s+(\d+)", bundle.ptx))
    math, loader = (160, 32) if config.tile_m == 192 else (232, 40)
    assert found == {"dec": str(loader), "inc": str(math)}
    assert bundle.registers * bundle.threads >= (config.math_wgs * math + loader) * 128


def test_stores_16_bytes_at_a_time(bundle, config):
    """The rows of a thread; nothing but the scales and the counter of tiles is stored otherwise."""
    width = 1 if config.epilogue == "swiglu_fp8" else 2
    stores = Counter(re.findall(r"st\.global\.(\w+\.?\w*)", bundle.ptx))
    assert stores.pop("v4.b32") == config.wg_rows // 32 * config.tile_out * width // 64
    assert sum(stores.values()) == (3 if config.epilogue == "swiglu_fp8" else 1)


def test_overlaps_with_its_neighbours(bundle):
    """A launch attribute lets it start early, so it must wait for the kernel before it and let the next one start."""
    assert bundle.pdl
    assert bundle.ptx.count("griddepcontrol.wait") == bundle.ptx.count("griddepcontrol.launch_dependents") == 1
