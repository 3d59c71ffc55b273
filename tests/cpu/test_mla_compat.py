"""`cutehop.compat.flash_mla`: FlashMLA's signatures, both planner forms, and what it refuses."""

from __future__ import annotations

import inspect

import pytest
import torch

from cutehop.compat import flash_mla
from tests.mla_cases import MlaCase, build_inputs, failures

CASE = MlaCase(3, 2, 100, 16, varlen=True, causal=True)


@pytest.fixture
def inputs():
    return build_inputs(CASE)


def test_positional_order_is_flash_mlas():
    assert list(inspect.signature(flash_mla.flash_mla_with_kvcache).parameters) == [
        "q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata", "num_splits",
        "softmax_scale", "causal", "is_fp8_kvcache", "indices", "attn_sink", "extra_k_cache",
        "extra_indices_in_kvcache", "topk_length", "extra_topk_length",
    ]  # fmt: skip
    assert list(inspect.signature(flash_mla.get_mla_metadata).parameters) == [
        "cache_seqlens", "num_q_tokens_per_head_k", "num_heads_k", "num_heads_q", "is_fp8_kvcache", "topk",
    ]  # fmt: skip


def test_two_tensors(inputs):
    metadata, num_splits = flash_mla.get_mla_metadata(inputs.cache_seqlens, 2 * 16, 1)
    assert metadata.dtype == num_splits.dtype == torch.int32
    assert metadata.shape[1] == 8
    assert num_splits.shape == (4,)
    result = flash_mla.flash_mla_with_kvcache(*inputs.arguments()[:4], 512, metadata, num_splits, causal=True)
    assert not failures(inputs, result)


def test_dropped_num_splits_is_planned_again(inputs):
    metadata, _ = flash_mla.get_mla_metadata(inputs.cache_seqlens, 2 * 16, 1, 16)
    result = flash_mla.flash_mla_with_kvcache(*inputs.arguments()[:4], 512, metadata, None, None, True)
    assert not failures(inputs, result)


def test_scheduler_object_is_planned_once(inputs):
    meta, nothing = flash_mla.get_mla_metadata()
    assert nothing is None
    assert not meta.have_initialized
    for _ in range(2):
        result = flash_mla.flash_mla_with_kvcache(*inputs.arguments()[:4], 512, meta, None, None, True)
        assert not failures(inputs, result)
    planned = meta.tile_scheduler_metadata
    assert torch.equal(planned, inputs.plan()[0])
    flash_mla.flash_mla_with_kvcache(*inputs.arguments()[:4], 512, meta, None, 0.1, True)
    assert meta.tile_scheduler_metadata is planned


def test_scheduler_object_of_another_call(inputs):
    meta, _ = flash_mla.get_mla_metadata()
    flash_mla.flash_mla_with_kvcache(*inputs.arguments()[:4], 512, meta, causal=True)
    with pytest.raises(ValueError, match=r"causal=True.*causal=False"):
        flash_mla.flash_mla_with_kvcache(*inputs.arguments()[:4], 512, meta)
    other = build_inputs(MlaCase(2, 1, 100, 16))
    with pytest.raises(ValueError, match=r"b=3.*b=2"):
        flash_mla.flash_mla_with_kvcache(*other.arguments()[:4], 512, meta, causal=True)


def test_scheduler_object_with_num_splits(inputs):
    meta, _ = flash_mla.get_mla_metadata()
    with pytest.raises(ValueError, match="num_splits"):
        flash_mla.flash_mla_with_kvcache(*inputs.arguments()[:4], 512, meta, inputs.plan()[1])


def test_attn_sink(inputs):
    with_sink = build_inputs(MlaCase(3, 2, 100, 16, varlen=True, causal=True, sink=True))
    meta, _ = flash_mla.get_mla_metadata()
    arguments = with_sink.arguments()[:4]
    result = flash_mla.flash_mla_with_kvcache(*arguments, 512, meta, causal=True, attn_sink=with_sink.attn_sink)
    assert not failures(with_sink, result)


@pytest.mark.parametrize(
    "name", ["indices", "extra_k_cache", "extra_indices_in_kvcache", "topk_length", "extra_topk_length"]
)
def test_sparse_arguments(inputs, name):
    meta, _ = flash_mla.get_mla_metadata()
    with pytest.raises(NotImplementedError, match=name):
        flash_mla.flash_mla_with_kvcache(
            *inputs.arguments()[:4], 512, meta, **{name: torch.zeros(1, dtype=torch.int32)}
        )


def test_fp8(inputs):
    with pytest.raises(NotImplementedError, match="is_fp8_kvcache"):
        flash_mla.get_mla_metadata(inputs.cache_seqlens, 32, 1, 16, True)
    with pytest.raises(NotImplementedError, match="topk"):
        flash_mla.get_mla_metadata(inputs.cache_seqlens, 32, 1, 16, topk=64)
    meta, _ = flash_mla.get_mla_metadata()
    with pytest.raises(NotImplementedError, match="is_fp8_kvcache"):
        flash_mla.flash_mla_with_kvcache(*inputs.arguments()[:4], 512, meta, is_fp8_kvcache=True)


def test_missing_tensors(inputs):
    meta, _ = flash_mla.get_mla_metadata()
    with pytest.raises(ValueError, match="block_table"):
        flash_mla.flash_mla_with_kvcache(inputs.q, inputs.k_cache, None, inputs.cache_seqlens, 512, meta)


def test_prefill_is_refused(inputs):
    with pytest.raises(NotImplementedError, match="sparse prefill"):
        flash_mla.flash_mla_sparse_fwd(inputs.q[0], inputs.k_cache[0], inputs.block_table, 0.1)
    with pytest.raises(NotImplementedError, match="prefill"):
        flash_mla.flash_attn_varlen_func(inputs.q)
