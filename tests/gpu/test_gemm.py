"""Grouped GEMM kernels against the fp32 reference on the same GPU."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from cutehop.cute_kernels import gemm
from cutehop.cute_kernels.gemm import config as cfg
from cutehop.ops import _gemm_cuda, moe  # noqa: F401
from tests.gemm_cases import SENTINEL, Case, Inputs, build, failures

pytestmark = pytest.mark.gpu

SPLITS = {
    "one expert": (300,),
    "ragged": (1, 64, 65, 127, 128, 129, 193, 500),
    "empty ones": (0, 0, 130, 0, 7, 0, 0),
    "many": tuple((i * 37) % 90 for i in range(70)),
    "more row tiles than a band": (128 * 37 + 5, 3),
    "around units": (255, 256, 257, 319, 320, 321, 384, 511, 513, 577),
}
CONFIGS = [config for _, config in gemm.variants()]
KINDS = [(fp8, epilogue) for fp8 in (False, True) for epilogue in ("store", "swiglu", "swiglu_fp8")]


def run(x: Inputs) -> list[str]:
    """Failures of the CUDA body with every kernel that computes the case, on outputs that are ours to look at."""
    kind = ("fp8" if x.case.fp8 else "bf16", x.case.epilogue)
    return [failure for c in CONFIGS if (c.dtype, c.epilogue) == kind for failure in run_one(x, c)]


def run_one(x: Inputs, config: cfg.GemmConfig) -> list[str]:
    body = _gemm_cuda.masked_grouped_gemm if x.case.masked else _gemm_cuda.grouped_gemm
    out, out_scales = x.outputs()
    with only(config):
        body(*x.args, out=out, out_scales=out_scales)
    return [f"{config}: {failure}" for failure in failures(x, out, out_scales)]


@contextmanager
def only(config: cfg.GemmConfig):
    """Calls take this kernel, whatever the shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cfg, "choose", lambda *_: config)
        yield


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("fp8", "epilogue"), KINDS)
def test_rows_follow_each_other(split, fp8, epilogue):
    assert not run(build(Case(SPLITS[split], 512, 384, fp8, epilogue), "cuda"))


@pytest.mark.parametrize("split", ["ragged", "empty ones", "many", "around units"])
@pytest.mark.parametrize(("fp8", "epilogue"), KINDS)
def test_a_block_of_rows_per_expert(split, fp8, epilogue):
    assert not run(build(Case(SPLITS[split], 512, 384, fp8, epilogue, block_rows=600), "cuda"))


@pytest.mark.parametrize("k", [8, 64, 72, 320, 2048, 7168])
def test_columns_of_k(k):
    assert not run(build(Case((70, 200), 256, k), "cuda"))


@pytest.mark.parametrize("k", [128, 256, 2048, 7168])
def test_columns_of_k_fp8(k):
    assert not run(build(Case((70, 200), 256, k, fp8=True), "cuda"))


@pytest.mark.parametrize(
    ("n", "fp8", "epilogue"),
    [(n, False, "store") for n in (8, 136, 192, 264, 1000)]
    + [(n, True, "store") for n in (128, 384, 640)]
    + [(n, False, "swiglu") for n in (128, 384, 640)]
    + [(n, True, "swiglu") for n in (256, 768)]
    + [(n, fp8, "swiglu_fp8") for n in (256, 768) for fp8 in (False, True)],
)
def test_columns_of_weights(n, fp8, epilogue):
    assert not run(build(Case((70, 200, 0, 129), n, 256, fp8, epilogue), "cuda"))


@pytest.mark.parametrize(
    ("n", "k", "epilogue"), [(4096, 7168, "swiglu"), (4096, 7168, "swiglu_fp8"), (7168, 2048, "store")]
)
@pytest.mark.parametrize("fp8", [False, True])
def test_deepseek_experts(n, k, epilogue, fp8):
    counts = torch.bincount(torch.randint(0, 8, (3000,), generator=torch.Generator().manual_seed(1)), minlength=8)
    assert not run(build(Case(tuple(counts.tolist()), n, k, fp8, epilogue), "cuda"))


@pytest.mark.parametrize("rows", [(-5, 40, 20, 90, 1 << 30), (200, 100, 300, 250, 400), (-1, -2, -3, -4, -5)])
def test_ends_that_make_no_sense(rows):
    x = build(Case((100,) * 5, 264, 128, tail=0), "cuda")
    assert not run(replace(x, rows=torch.tensor(rows, dtype=torch.int32, device="cuda")))


def test_counts_that_make_no_sense():
    x = build(Case((130,) * 4, 264, 128, block_rows=130), "cuda")
    counts = torch.tensor((-(1 << 31), (1 << 31) - 1, 131, -1), dtype=torch.int32, device="cuda")
    assert not run(replace(x, rows=counts))


@pytest.mark.parametrize("masked", [False, True])
def test_strides(masked):
    """Rows further apart than their columns, weights that are part of a larger tensor, scales by column."""
    for fp8 in (False, True):
        x = build(Case((70, 130), 256, 256, fp8, block_rows=200 if masked else None), "cuda")
        wide = torch.zeros((*x.a.shape[:-1], 384), dtype=x.a.dtype, device="cuda")[..., 128:]
        wide.copy_(x.a)
        b = torch.zeros((2, 300, 512), dtype=x.b.dtype, device="cuda")[:, 40:296, :256]
        b.copy_(x.b)
        scales = x.a_scales if x.a_scales is None else x.a_scales.transpose(-1, -2).contiguous().transpose(-1, -2)
        assert not run(replace(x, a=wide, b=b, a_scales=scales))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_same_bits_again(config):
    x = build(Case((300, 5, 700), 512, 1024, config.dtype == "fp8", config.epilogue), "cuda")
    with only(config):
        first, again = x.op(*x.args), x.op(*x.args)
    owned = slice(0, 1005)
    for one, other in zip(first, again):
        assert torch.equal(one[owned].view(torch.uint8), other[owned].view(torch.uint8))


@pytest.mark.parametrize("tile", cfg.TILES["bf16"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_graph_reads_rows_when_it_is_replayed(masked, tile):
    x = build(Case((100, 100, 100), 256, 256, block_rows=160 if masked else None), "cuda")
    whole = replace(x, a=x.a.nan_to_num(0.5))
    body = _gemm_cuda.masked_grouped_gemm if masked else _gemm_cuda.grouped_gemm
    out, out_scales = whole.outputs()
    graph = torch.cuda.CUDAGraph()
    with only(cfg.GemmConfig("bf16", "store", *tile)):
        body(*whole.args, out=out, out_scales=out_scales)
        with torch.cuda.graph(graph):
            body(*whole.args, out=out, out_scales=out_scales)
    for rows in ((3, 150, 160), (0, 0, 140), (160, 160, 160), (0, 0, 0)):
        whole.rows.copy_(torch.tensor(rows, dtype=torch.int32))
        out.fill_(SENTINEL)
        graph.replay()
        assert not failures(whole, out, out_scales)


def test_many_calls_keep_the_pipeline_right():
    """Tiles of all kinds in one launch, over and over: a barrier that is off by one phase hangs or mixes stages."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        counts = tuple(torch.randint(0, 700 if seed % 4 == 0 else 300, (24,), generator=generator).tolist())
        assert not run(build(Case(counts, 1024, 512, fp8=seed % 2 == 1), "cuda", seed))


def test_no_rows():
    x = build(Case((0, 0), 256, 128, tail=0), "cuda")
    out, _ = x.op(*x.args)
    assert out.shape == (0, 256)
