"""The grouped GEMM for few rows, without a GPU: its choices, how work is cut, and what the build came to."""

from __future__ import annotations

import os
import re
from collections import Counter

import pytest

from cutehop import aot
from cutehop.cute_kernels import gemm_decode
from cutehop.cute_kernels.gemm_decode import config as cfg
from cutehop.cute_kernels.jit import Bundle, store
from cutehop.cute_kernels.jit.bundle import MAX_SMEM_BYTES

REGISTERS_PER_SM = 65536
VARIANTS = list(gemm_decode.variants())


# ---- choices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cfg.DTYPES)
@pytest.mark.parametrize("epilogue", cfg.EPILOGUES)
@pytest.mark.parametrize("rows", [0, 0.25, 1, 2, 8, 32, 64])
@pytest.mark.parametrize("limit", [1, 8, 40, 1 << 20])
def test_choice_is_built_and_says_if_it_takes_the_rows_of_random_routing(dtype, epilogue, rows, limit):
    config = cfg.choose(dtype, epilogue, rows, limit)
    assert (config.dtype, config.epilogue) == (dtype, epilogue)
    assert any(built == config for _, built in VARIANTS)
    assert config.fits(rows, limit) is (config.tile_n >= min(limit, rows + 3 * rows**0.5))


def test_choice_is_no_wider_than_the_rows_there_can_be():
    assert cfg.choose("bf16", "store", 64, 8).tile_n == 16
    widths = [cfg.choose("bf16", "store", rows, 1 << 20).tile_n for rows in range(64)]
    assert widths == sorted(widths)
    assert set(widths) == set(cfg.TILES_N)


@pytest.mark.parametrize(("tokens", "tile_n"), [(1, 16), (8, 16), (32, 32), (64, 32), (128, 64)])
def test_choice_for_what_ranks_send_in_a_decode_step(tokens, tile_n):
    """8 ranks with so many tokens each, 8 of 256 experts per token: tokens / 4 rows per expert in the mean."""
    assert cfg.choose("bf16", "store", tokens / 4, 1 << 20).tile_n == tile_n


@pytest.mark.parametrize("config", [config for _, config in VARIANTS], ids=str)
def test_stages_keep_enough_bytes_under_way(config):
    """An SM's share of the memory system's bandwidth, 22 bytes/ns, times a latency of 1.5 us under load, and the block
    that is being multiplied."""
    weights = cfg.TILE_W * cfg.BLOCK_BYTES
    assert (config.stages - 1) * weights >= 2 * 22 * 1500
    assert config.stages * config.stage_bytes <= cfg.RING_BYTES


@pytest.mark.parametrize(("experts", "rows", "columns"), [(32, 256, 4096), (1, 1, 8), (3, 1000, 7168)])
def test_max_units_is_a_bound_whatever_the_split(experts, rows, columns):
    config = cfg.GemmDecodeConfig("bf16", "store", 16)
    bound = cfg.max_units(config, experts, rows, columns, 7)
    for split in ([rows] + [0] * (experts - 1), [rows // experts] * experts, [min(1, rows)] * experts):
        tiles = sum(-(-count // 16) for count in split) * -(-columns // cfg.TILE_W)
        assert tiles * 7 <= bound


# ---- cuts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("units", "ctas"), [(0, 4), (1, 132), (131, 132), (132, 132), (133, 132), (3000, 7)])
def test_shares_are_equal_consecutive_and_found_again(units, ctas):
    """The device functions themselves, run on the CPU."""
    pytest.importorskip("cutlass", reason="needs the CuTe DSL")
    from tests.gemm_decode_cuts import spans_and_owners

    spans, owners = spans_and_owners(units, ctas)
    assert spans[0][0] == 0
    assert [stop for _, stop in spans] == [begin for begin, _ in spans[1:]] + [units]
    sizes = [stop - begin for begin, stop in spans]
    assert max(sizes) - min(sizes) <= 1
    assert owners == [cta for cta, size in enumerate(sizes) for _ in range(size)]


# ---- what the build came to ----------------------------------------------------------------------------------------


def each() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: str(v[1]).replace(" ", ""))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[object, Bundle]:
    """Every variant, from the cache folder or compiled now, in as many processes as there are cores."""
    cache = store.open_store()
    folder = cache.root if cache else tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUTEHOP_CACHE_DIR", str(folder))  # build() changes both; leaving the context puts them back
        patch.setenv("CUTEHOP_CACHE", "1")
        failures = aot.build(folder, jobs=os.cpu_count() or 1, modules=("cutehop.cute_kernels.gemm_decode",))
        assert not failures, "\n".join(failures)
        return {config: function.bundle(config) for function, config in VARIANTS}


@pytest.fixture
def bundle(bundles, variant) -> Bundle:
    return bundles[variant[1]]


@each()
def test_nothing_spills_and_it_fits_an_sm(bundle):
    assert bundle.spill_bytes == 0
    assert "0 bytes stack frame" in bundle.log
    assert not re.findall(r".*\.local\b.*", bundle.ptx)
    assert bundle.registers * bundle.threads <= REGISTERS_PER_SM
    assert bundle.smem_bytes <= MAX_SMEM_BYTES


@each()
def test_multiplies_on_tensor_cores_without_serialisation(bundle, variant):
    """Both halves of a tile, four instructions for a block of K each; rows of activations are the N."""
    config = variant[1]
    found = Counter(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)\.f32\.(\w+)", bundle.ptx))
    k, operand = (16, "bf16") if config.dtype == "bf16" else (32, "e4m3")
    assert found == {(f"m64n{config.tile_n}k{k}", operand): 8}
    assert "C75" not in bundle.log


@each()
def test_loads_by_tma_and_moves_registers_to_the_math(bundle):
    """Two boxes of weights, and a loop over those of activations."""
    assert len(re.findall(r"cp\.async\.bulk\.tensor\.3d\.shared::\w+\.global", bundle.ptx)) == 3
    found = dict(re.findall(r"setmaxnreg\.(\w+)\.sync\.aligned\.u32\s+(\d+)", bundle.ptx))
    assert found == {"dec": "40", "inc": "232"}


@each()
def test_overlaps_with_its_neighbours(bundle):
    """A launch attribute lets it start early, so it must wait for the kernel before it and let the next one start."""
    assert bundle.pdl
    assert bundle.ptx.count("griddepcontrol.wait") >= 1
    assert bundle.ptx.count("griddepcontrol.launch_dependents") >= 1


def test_entries_tell_the_variants_apart(bundles):
    assert len({bundle.entry for bundle in bundles.values()}) == len(bundles)
