"""What the grouped GEMM's host side passes to the kernel, without a GPU: sizes, strides and tensor maps.

The kernel's walk over tiles and its loads are done here by the values that the launch would get. A TMA load is a gather
by the map's strides out of the operand's own storage, zeros outside the map's extents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cutehop.cute_kernels import gemm, gemm_decode
from cutehop.cute_kernels.gemm import config as cfg
from cutehop.cute_kernels.jit import tensormap
from cutehop.ops import _gemm_cuda, _gemm_decode_cuda, moe  # noqa: F401
from tests.gemm_cases import Case, Inputs, build, failures

POINTERS = ("rows", "a_scales", "b_scales", "out", "out_scales", "taken")


@dataclass(frozen=True)
class Map:
    """The arguments of one `tensor_map`, strides in elements."""

    ptr: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    def load(self, memory: Tensor, *start: int) -> Tensor:
        """float32 (rows, columns) of the box at `start` (innermost first)."""
        offset = (self.ptr - memory.untyped_storage().data_ptr()) // memory.element_size()
        whole = memory.as_strided(self.dims[::-1], (1, *self.strides)[::-1], offset)
        there = whole[tuple(slice(first, first + n) for first, n in zip(start[::-1], self.box[::-1]))].float()
        box = torch.zeros(self.box[::-1])
        box[tuple(slice(n) for n in there.shape)] = there
        return box[0]


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """Maps in place of the driver's encoding, a config in place of a loaded kernel."""

    def record(ptr, dtype, dims, strides_bytes, box):
        tensormap._validate(ptr, dtype, dims, strides_bytes, box, 128)
        size = {"bf16": 2, "u8": 1}[dtype]
        return Map(ptr, dims, tuple(stride // size for stride in strides_bytes), box)

    monkeypatch.setattr(_gemm_decode_cuda, "tensor_map", record)
    monkeypatch.setattr(_gemm_cuda, "prepare_captures", lambda device: None)
    monkeypatch.setattr(gemm, "gemm_kernel", lambda config, stream: config)


def parameters(call) -> SimpleNamespace:
    """The launch's sizes by the names of the kernel's parameters."""
    from cutehop.cute_kernels.gemm.tiles import GemmArgs

    names = [name for name in GemmArgs.__dataclass_fields__ if name not in POINTERS]
    assert len(names) == len(call.sizes)
    return SimpleNamespace(**dict(zip(names, call.sizes)))


def walk(p: SimpleNamespace, rows: list[int], config: cfg.GemmConfig):
    """(expert, block, row, live, column) of every tile, in the order in which CTAs take them."""
    before = 0
    for expert, value in enumerate(rows):
        stop, first = min(max(value, 0), p.limit), 0
        if p.block_rows == 0:
            first, stop = before, max(stop, before)
            before = stop
        tiles = -(-(stop - first) // config.tile_m)
        units = -(-(stop - first) // cfg.UNIT)
        heights = [(units // tiles + (tile < units % tiles)) * cfg.UNIT for tile in range(tiles)]
        for band in range(0, tiles, config.raster_tiles):
            for column in range(p.column_tiles):
                for tile in range(band, min(band + config.raster_tiles, tiles)):
                    row = first + sum(heights[:tile])
                    yield expert, expert if p.block_rows else 0, row, min(heights[tile], stop - row), column


def configs(case: Case) -> list[cfg.GemmConfig]:
    """Every kernel that computes the case."""
    kind = ("fp8" if case.fp8 else "bf16", case.epilogue)
    return [config for _, config in gemm.variants() if (config.dtype, config.epilogue) == kind]


def execute(x: Inputs, config: cfg.GemmConfig) -> tuple[Tensor, Tensor]:
    """The outputs of a launch."""
    strides = None if x.a_scales is None else x.a_scales.stride()
    call = _gemm_cuda._prepare("grouped_gemm", config, x.a, x.b, strides, 0)
    p = parameters(call)
    out, out_scales = x.outputs()
    flat = out.view(-1, p.columns)
    assert 1 <= call.grid[0] <= 132
    for expert, block, row, live, column in walk(p, x.rows.tolist(), config):
        boxes = [column * config.box_n + i * p.columns for i in range(config.tile_n // config.box_n)]
        acc = torch.zeros(config.tile_m, config.tile_n)
        for kb in range(p.k_blocks):
            units = range(row, row + live, cfg.UNIT)
            a = torch.cat([call.a_map.load(x.a, kb * config.block_k, unit, block) for unit in units])
            b = torch.cat([call.b_map.load(x.b, kb * config.block_k, n, expert) for n in boxes])
            product = a @ b.t()
            if config.dtype == "fp8":
                product = product * scales_of(x, p, config, expert, block, row, live, column, kb)
            acc[: len(a)] += product
        if config.paired:
            acc = torch.nn.functional.silu(acc[:, : config.box_n]) * acc[:, config.box_n :]
        target = flat[block * p.block_rows + row :][:live, column * config.tile_out :][:, : config.tile_out]
        if config.epilogue == "swiglu_fp8":
            from cutehop.ref.quant import quantize_fp8

            acc, scales = quantize_fp8(acc[:live])
            out_scales.view(-1, p.columns // cfg.GROUP)[block * p.block_rows + row :][:live, column] = scales[:, 0]
        target.copy_(acc[:live, : target.shape[1]])
    return out, out_scales


def scales_of(x: Inputs, p, config, expert, block, row, live, column, kb) -> Tensor:
    """Factors of a tile's product, as math.Math.scale_addresses finds them."""
    rows = torch.arange(-(-live // cfg.UNIT) * cfg.UNIT)
    rows = torch.where(rows < live, rows, 0) + row
    flat = x.a_scales.as_strided((x.a_scales.untyped_storage().nbytes() // 4,), (1,), 0)
    mine = flat[block * p.a_scale_block + rows * p.a_scale_row + kb * p.a_scale_k]
    columns = [column * config.tile_out // cfg.GROUP]
    if config.paired:
        columns.append(columns[0] + p.b_scale_rows // 2)
    elif config.tile_n > cfg.GROUP:
        columns.append(min(columns[0] + 1, p.b_scale_rows - 1))
    weights = x.b_scales.view(-1)[[(expert * p.b_scale_rows + side) * p.k_blocks + kb for side in columns]]
    return mine[:, None] * weights.repeat_interleave(config.tile_n // len(columns))[None]


TILES = sorted({tile for tiles in cfg.TILES.values() for tile in tiles})
CASES = [
    Case((70, 0, 130, 300), 264, 72),
    Case((70, 0, 130, 300), 264, 72, block_rows=310),
    Case((70, 129), 384, 192, epilogue="swiglu"),
    Case((70, 129), 256, 128, epilogue="swiglu_fp8", block_rows=129),
    Case((1, 200, 3), 640, 256, fp8=True),
    Case((1, 200, 3), 384, 256, fp8=True, block_rows=250),
    Case((40, 90), 768, 256, fp8=True, epilogue="swiglu"),
    Case((40, 90), 512, 128, fp8=True, epilogue="swiglu_fp8", block_rows=100),
    Case((5,), 8, 8, tail=0),
    Case((cfg.RASTER_ROWS + 257, 128), 520, 8),
    Case((64, 65, 256, 257, 320, 513), 520, 72),
    Case((300, 600), 640, 64, epilogue="swiglu", block_rows=640),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_launch_computes_the_reference(case):
    x = build(case, "cpu")
    for config in configs(case):
        assert not failures(x, *execute(x, config))


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[4], CASES[5]], ids=str)
def test_strides(case):
    """Rows further apart than their columns, weights that are part of a larger tensor, scales by column."""
    x = build(case, "cpu")
    wide = torch.zeros((*x.a.shape[:-1], case.k + 64), dtype=x.a.dtype)[..., 64:]
    wide.copy_(x.a)
    b = torch.zeros((len(case.counts), case.n + 9, case.k + 128), dtype=x.b.dtype)[:, 9:, : case.k]
    b.copy_(x.b)
    scales = None if x.a_scales is None else x.a_scales.transpose(-1, -2).contiguous().transpose(-1, -2)
    y = replace(x, a=wide, b=b, a_scales=scales)
    for config in configs(case):
        assert not failures(y, *execute(y, config))


@pytest.mark.parametrize("rows", [(-5, 40, 20, 90, 1 << 30), (200, 100, 300, 250, 400), (-1, -2, -3, -4, -5)])
def test_ends_that_make_no_sense(rows):
    x = replace(build(Case((100,) * 5, 264, 64, tail=0), "cpu"), rows=torch.tensor(rows, dtype=torch.int32))
    for config in configs(x.case):
        assert not failures(x, *execute(x, config))


@pytest.mark.parametrize("tile", TILES)
def test_a_walk_keeps_what_runs_at_a_time_together(tile):
    """132 consecutive tiles of one large expert need few distinct row and column tiles."""
    config = cfg.GemmConfig("bf16", "store", *tile)
    p = SimpleNamespace(limit=1 << 20, block_rows=0, column_tiles=28)
    tiles = list(walk(p, [config.tile_m * 128], config))
    assert len(tiles) == len(set(tiles)) == 128 * 28
    for start in range(0, len(tiles) - 132, 131):
        window = tiles[start : start + 132]
        assert len({row for _, _, row, _, _ in window}) <= 2 * config.raster_tiles
        assert len({(row, column) for _, _, row, _, column in window}) == 132


@pytest.mark.parametrize("tile", TILES)
def test_an_experts_tiles_share_its_rows(tile):
    """In whole units, none empty, none over the tile, all but the last full, and as equal as that allows."""
    config = cfg.GemmConfig("bf16", "store", *tile)
    for rows in range(1, 12 * cfg.UNIT):
        p = SimpleNamespace(limit=rows, block_rows=0, column_tiles=1)
        heights = [live for _, _, _, live, _ in walk(p, [rows], config)]
        assert sum(heights) == rows
        assert len(heights) == -(-rows // config.tile_m)
        assert 0 < min(heights) <= max(heights) <= config.tile_m
        assert all(height % cfg.UNIT == 0 for height in heights[:-1])
        assert max(heights) - min(heights) < 2 * cfg.UNIT


def test_no_more_ctas_than_tiles_or_sms():
    store = cfg.GemmConfig("bf16", "store")
    assert cfg.num_ctas(32, 32768, 4096, store, 132) == 132
    assert cfg.num_ctas(1, 1, 256, store, 132) == 2
    assert cfg.num_ctas(1, 1, 256, cfg.GemmConfig("bf16", "swiglu"), 132) == 4
    assert cfg.num_ctas(1, 300, 256, cfg.GemmConfig("bf16", "store", *cfg.TALL), 132) == 6


@pytest.mark.parametrize("config", [config for _, config in gemm_decode.variants()], ids=str)
def test_scratch_memory_of_the_other_kernel_holds_two_unfinished_tiles_of_a_cta(config, monkeypatch):
    """The shape is that of gemm_decode.work.GemmDecodeArgs.partials."""
    monkeypatch.setattr(_gemm_decode_cuda, "prepare_captures", lambda device: None)
    monkeypatch.setattr(gemm_decode, "gemm_decode_kernel", lambda config, stream: config)
    x = build(Case((3, 0, 5), 512, 256, fp8=config.dtype == "fp8", epilogue=config.epilogue), "cpu")
    strides = None if x.a_scales is None else x.a_scales.stride()
    call = _gemm_decode_cuda._prepare(x.a, x.b, strides, config, 0)
    size, tickets, _ = call.scratch
    assert size == torch.Size((call.grid[0], 2, 2, config.tile_n // 8, 256, 4)).numel() * 4
    assert tickets == call.grid[0]


def test_addresses_and_sizes_that_do_not_fit_are_refused():
    b = torch.empty((cfg.MAX_EXPERTS + 1, 8, 8), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"1025 experts, supported 1\.\.1024"):
        _gemm_cuda._prepare("grouped_gemm", cfg.GemmConfig("bf16", "store"), b[0], b, None, 0)


V3 = {"store": 7168, "swiglu": 4096, "swiglu_fp8": 4096}  # weight rows of DeepSeek-V3's experts


@pytest.mark.parametrize(
    ("experts", "limit", "masked", "expected_rows", "weight_rows", "k", "few"),
    [
        (1, 1, False, 0, 4096, 2048, True),
        (1, 64, False, 0, 7168, 2048, True),
        (1, 65, False, 0, 7168, 2048, False),  # more than a tile of the other kernel
        (4, 512, False, 0, 4096, 2048, False),
        (4, 512, False, 8, 4096, 2048, True),  # the hint wins: most rows of a static capacity are unused
        (4, 512, True, 8, 4096, 2048, True),
        (4, 512, True, 64, 4096, 2048, False),  # 64 in the mean are more in some
        (4, 512, True, 8, 7168, 2048, False),  # tiles enough for every SM
        (32, 512, True, 1, 4096, 7168, True),  # if a few experts have a row, some SMs have one long tile and some two
        (32, 512, True, 2, 4096, 7168, True),
        (32, 512, True, 3, 4096, 7168, False),
        (32, 512, True, 1, 7168, 2048, False),  # short tiles
        (32, 512, True, 1, 28672, 7168, False),  # many for every expert
        (512, 1024, False, 1, 4096, 7168, True),
        (513, 1024, False, 1, 4096, 7168, False),  # more experts than the other kernel has tables for
        (cfg.MAX_EXPERTS, 1024, False, 0, 256, 7168, False),
    ],
)
def test_few_rows_of_few_experts_take_the_other_kernel(experts, limit, masked, expected_rows, weight_rows, k, few):
    config = cfg.choose("fp8", "swiglu", experts, limit, masked, expected_rows, weight_rows, k, 132)
    assert isinstance(config, cfg.GemmConfig) is not few
    assert (config.dtype, config.epilogue) == ("fp8", "swiglu")


@pytest.mark.parametrize(("dtype", "most"), [("bf16", 1), ("fp8", 2)])
@pytest.mark.parametrize("epilogue", cfg.EPILOGUES)
def test_fewest_rows_of_a_long_k(dtype, most, epilogue):
    for mean in range(1, 5):
        config = cfg.choose(dtype, epilogue, 32, 1 << 20, False, mean, V3[epilogue] // 2, 7168, 132)
        assert isinstance(config, cfg.GemmConfig) is (mean > most)
    short = cfg.choose(dtype, epilogue, 32, 1 << 20, False, 1, V3[epilogue], 2048, 132)
    assert short == cfg.GemmConfig(dtype, epilogue)


@pytest.mark.parametrize("dtype", cfg.TILES)
@pytest.mark.parametrize("epilogue", cfg.EPILOGUES)
def test_the_tile_by_mean_rows(dtype, epilogue):
    low, high = cfg.MIDDLE_ROWS[dtype]
    for mean, middle in ((3, False), (low - 1, False), (low, True), (high, True), (high + 1, False), (1 << 15, False)):
        config = cfg.choose(dtype, epilogue, 32, 1 << 20, False, mean, V3[epilogue], 7168, 132)
        assert config == cfg.GemmConfig(dtype, epilogue, *cfg.TILES[dtype][middle and epilogue != "swiglu_fp8"])
        assert config in [variant for _, variant in gemm.variants()]
