"""The grouped GEMM for few rows per expert against the fp32 reference on the same GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cutehop.cute_kernels.gemm_decode import config as cfg
from cutehop.ops import _gemm_decode_cuda, moe  # noqa: F401
from tests.gemm_cases import SENTINEL, Case, Inputs, build, failures

pytestmark = pytest.mark.gpu

TILES = sorted({config.tile_n for _, config in _gemm_decode_cuda.gemm_decode.variants()})
KINDS = [(fp8, epilogue) for fp8 in (False, True) for epilogue in cfg.EPILOGUES]
SPLITS = {
    "one row": (1,),
    "one expert has all": (0, 0, 150, 0),
    "around a box": (1, 7, 8, 9, 15, 16, 17),
    "empty ones": (0, 0, 13, 0, 7, 0, 0),
    "around a tile": (31, 32, 33, 63, 64, 65, 127, 128, 129),
    "many": tuple((i * 37) % 11 for i in range(70)),
}


def fill(x: Inputs, tile_n: int, out: torch.Tensor, out_scales: torch.Tensor) -> None:
    config = cfg.GemmDecodeConfig("fp8" if x.case.fp8 else "bf16", x.case.epilogue, tile_n)
    _gemm_decode_cuda.run(*x.args, out, out_scales, x.case.masked, config)


def run(x: Inputs, tile_n: int) -> list[str]:
    """Failures of the kernel with this tile on outputs that are ours to look at."""
    out, out_scales = x.outputs()
    fill(x, tile_n, out, out_scales)
    return failures(x, out, out_scales)


@pytest.mark.parametrize("tile_n", TILES)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("fp8", "epilogue"), KINDS)
def test_rows_follow_each_other(tile_n, split, fp8, epilogue):
    assert not run(build(Case(SPLITS[split], 512, 384, fp8, epilogue), "cuda"), tile_n)


@pytest.mark.parametrize("tile_n", TILES)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("fp8", "epilogue"), KINDS)
def test_a_block_of_rows_per_expert(tile_n, split, fp8, epilogue):
    assert not run(build(Case(SPLITS[split], 512, 384, fp8, epilogue, block_rows=200), "cuda"), tile_n)


@pytest.mark.parametrize("k", [8, 64, 72, 320, 2048, 7168, 16384])
@pytest.mark.parametrize("experts", [1, 2, 9])
def test_a_tile_in_two_or_many_pieces(k, experts):
    """Few tiles over all SMs: pieces of one K block and more, up to as many as there are CTAs."""
    assert not run(build(Case((5,) * experts, 264, k), "cuda"), TILES[0])
    assert not run(build(Case((5,) * experts, 256, -(-k // 128) * 128, fp8=True), "cuda"), TILES[0])


@pytest.mark.parametrize(
    ("n", "fp8", "epilogue"),
    [(n, False, "store") for n in (8, 136, 264, 1000)]
    + [(n, True, "store") for n in (128, 384, 640)]
    + [(n, False, "swiglu") for n in (128, 384, 640)]
    + [(n, True, "swiglu") for n in (256, 768)]
    + [(n, fp8, "swiglu_fp8") for n in (256, 768) for fp8 in (False, True)],
)
def test_columns_of_weights(n, fp8, epilogue):
    assert not run(build(Case((7, 20, 0, 12), n, 256, fp8, epilogue), "cuda"), TILES[1])


@pytest.mark.parametrize("tokens", [1, 8, 128])
@pytest.mark.parametrize(("n", "k", "epilogue"), [(4096, 7168, "swiglu_fp8"), (7168, 2048, "store")])
@pytest.mark.parametrize("fp8", [False, True])
def test_deepseek_experts(tokens, n, k, epilogue, fp8):
    """As 8 ranks with so many tokens send them to one of them, but 8 of its 32 experts."""
    draw = torch.randint(0, 8, (tokens * 2,), generator=torch.Generator().manual_seed(tokens))
    counts = tuple(torch.bincount(draw, minlength=8).tolist())
    x = build(Case(counts, n, k, fp8, epilogue, block_rows=256), "cuda")
    config = cfg.choose("fp8" if fp8 else "bf16", epilogue, tokens / 4, 256)
    assert not run(x, config.tile_n)


@pytest.mark.parametrize("rows", [(-5, 40, 20, 90, 1 << 30), (50, 20, 70, 60, 100), (-1, -2, -3, -4, -5)])
def test_ends_that_make_no_sense(rows):
    x = build(Case((20,) * 5, 264, 128, tail=0), "cuda")
    assert not run(replace(x, rows=torch.tensor(rows, dtype=torch.int32, device="cuda")), TILES[0])


def test_counts_that_make_no_sense():
    x = build(Case((30,) * 4, 264, 128, block_rows=30), "cuda")
    counts = torch.tensor((-(1 << 31), (1 << 31) - 1, 31, -1), dtype=torch.int32, device="cuda")
    assert not run(replace(x, rows=counts), TILES[0])


def test_no_rows_write_nothing():
    x = build(Case((0, 0, 0), 512, 256, block_rows=16), "cuda")
    assert not run(x, TILES[0])


@pytest.mark.parametrize("masked", [False, True])
def test_strides(masked):
    """Rows further apart than their columns, weights that are part of a larger tensor, scales by column."""
    for fp8 in (False, True):
        x = build(Case((7, 13), 256, 256, fp8, block_rows=20 if masked else None), "cuda")
        wide = torch.zeros((*x.a.shape[:-1], 384), dtype=x.a.dtype, device="cuda")[..., 128:]
        wide.copy_(x.a)
        b = torch.zeros((2, 300, 512), dtype=x.b.dtype, device="cuda")[:, 40:296, :256]
        b.copy_(x.b)
        scales = x.a_scales if x.a_scales is None else x.a_scales.transpose(-1, -2).contiguous().transpose(-1, -2)
        assert not run(replace(x, a=wide, b=b, a_scales=scales), TILES[1])


@pytest.mark.parametrize(("fp8", "epilogue"), KINDS)
def test_the_same_bits_again(fp8, epilogue):
    """Pieces arrive in another order each time; other work on the GPU sees to that."""
    x = build(Case((3, 0, 5, 9, 1), 1024, 4096, fp8, epilogue, block_rows=16), "cuda")
    first = x.outputs()
    fill(x, TILES[1], *first)
    side, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for i in range(30):
        with torch.cuda.stream(side):
            for _ in range(i % 4):
                noise @ noise
        again = x.outputs()
        fill(x, TILES[1], *again)
        for one, other in zip(first, again):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("masked", [False, True])
def test_a_graph_reads_rows_when_it_is_replayed(masked):
    x = build(Case((10, 10, 10), 256, 2048, block_rows=16 if masked else None), "cuda")
    whole = replace(x, a=x.a.nan_to_num(0.5))
    out, out_scales = whole.outputs()
    fill(whole, TILES[1], out, out_scales)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fill(whole, TILES[1], out, out_scales)
        fill(whole, TILES[1], out, out_scales)
    for rows in ((3, 15, 16), (0, 0, 14), (16, 16, 16), (0, 0, 0), (1, 1, 1)):
        whole.rows.copy_(torch.tensor(rows, dtype=torch.int32))
        out.fill_(SENTINEL)
        graph.replay()
        assert not failures(whole, out, out_scales)


def test_many_calls_leave_tickets_and_pipeline_right():
    """Pieces of all kinds, over and over: a counter that does not return to 0 loses a piece in a later call."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        experts = 1 + seed % 12
        counts = tuple(torch.randint(0, 20, (experts,), generator=generator).tolist())
        case = Case(counts, 512, 1024, fp8=seed % 2 == 1, epilogue=cfg.EPILOGUES[seed % 3])
        assert not run(build(case, "cuda", seed), TILES[seed % len(TILES)])


def test_the_ops_take_it_for_few_rows():
    """The hint decides; results are those of the op."""
    x = build(Case((3, 0, 5), 512, 256, fp8=True, epilogue="swiglu_fp8", block_rows=512), "cuda")
    out, out_scales = x.op(*x.args, 4)
    mine, mine_scales = x.outputs()
    fill(x, cfg.choose("fp8", "swiglu_fp8", 4, 512).tile_n, mine, mine_scales)
    for e, count in enumerate(x.case.counts):
        assert torch.equal(out[e, :count].float(), mine[e, :count].float())
        assert torch.equal(out_scales[e, :count], mine_scales[e, :count])
