"""Wrong arguments of `mla_decode`, each with the error it must raise. Shared by the CPU and the GPU tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.mla_cases import MlaCase, MlaInputs, build_inputs

CASE = MlaCase(b=3, s_q=2, s_k=100, h_q=16)
RAGGED_CASE = MlaCase(b=3, s_q=2, s_k=100, h_q=16, tokens_q=(1, 2, 2))

Arguments = dict[str, Any]
Change = Callable[[Arguments], Any]


def arguments(device: str, ragged: bool = False) -> Arguments:
    """A correct call of mla_decode, all arguments by name."""
    inputs: MlaInputs = build_inputs(RAGGED_CASE if ragged else CASE, device)
    names = ("q", "k_cache", "block_table", "cache_seqlens", "tile_scheduler_metadata", "num_splits")
    return dict(zip(names, inputs.arguments()), **inputs.options())


def other_plan(a: Arguments, **changed: int) -> torch.Tensor:
    """Metadata planned for another shape than CASE's."""
    shape = {"s_q": CASE.s_q, "h_q": CASE.h_q, "h_kv": CASE.h_kv, **changed}
    return torch.ops.cutehop.mla_plan(a["cache_seqlens"], **shape)[0]


# (argument, how it is spoiled, error, part of the message): each entry spoils one argument of a correct call.
BAD: list[tuple[str, Change, type[Exception], str]] = [
    ("q", lambda a: a["q"].float(), TypeError, "q dtype torch.float32, supported bfloat16|float16"),
    ("q", lambda a: a["q"].half(), TypeError, "k_cache dtype torch.bfloat16, q has torch.float16"),
    ("q", lambda a: a["q"][0], ValueError, "q shape"),
    ("q", lambda a: a["q"][..., :512], ValueError, "q head_dim 512, supported 576"),
    ("q", lambda a: a["q"].transpose(2, 3).contiguous().transpose(2, 3), ValueError, "q strides"),
    ("q", lambda a: a["q"][:2], ValueError, "block_table shape"),
    ("q", lambda a: a["q"][:, :0], ValueError, "s_q 0"),
    ("q", lambda a: a["q"][:, :, :0], ValueError, "h_q 0, supported 1..128"),
    ("q", lambda a: a["q"].repeat(1, 1, 9, 1), ValueError, "h_q 144, supported 1..128"),
    ("k_cache", lambda a: a["k_cache"][:, :48], ValueError, "page size 48, supported 16|32|64|128"),
    ("k_cache", lambda a: a["k_cache"][..., :512], ValueError, "k_cache head_dim 512"),
    ("k_cache", lambda a: a["k_cache"].squeeze(2), ValueError, "k_cache shape"),
    ("k_cache", lambda a: a["k_cache"][:0], ValueError, "no pages"),
    ("k_cache", lambda a: a["k_cache"].repeat(1, 1, 3, 1), ValueError, "h_kv 3 does not divide h_q 16"),
    ("k_cache", lambda a: torch.nn.functional.pad(a["k_cache"], (0, 1))[..., :576], ValueError, "k_cache strides"),
    ("k_cache", lambda a: misaligned(a["k_cache"]), ValueError, "no multiple of 16 bytes"),
    ("block_table", lambda a: a["block_table"].long(), TypeError, "block_table dtype torch.int64"),
    ("block_table", lambda a: a["block_table"][:2], ValueError, "block_table shape"),
    ("block_table", lambda a: a["block_table"][0], ValueError, "block_table shape"),
    ("block_table", lambda a: a["block_table"].t().contiguous().t(), ValueError, "block_table strides"),
    ("cache_seqlens", lambda a: a["cache_seqlens"].long(), TypeError, "cache_seqlens dtype torch.int64"),
    ("cache_seqlens", lambda a: a["cache_seqlens"][:2], ValueError, "cache_seqlens shape"),
    ("cache_seqlens", lambda a: a["cache_seqlens"][:, None], ValueError, "cache_seqlens shape"),
    ("cache_seqlens", lambda a: a["cache_seqlens"].repeat(2)[::2], ValueError, "cache_seqlens strides"),
    ("tile_scheduler_metadata", lambda a: other_plan(a, num_sms=264), ValueError, "partitions, 1..132"),
    ("tile_scheduler_metadata", lambda a: other_plan(a)[:, :5], ValueError, "tile_scheduler_metadata shape"),
    ("tile_scheduler_metadata", lambda a: other_plan(a).long(), TypeError, "tile_scheduler_metadata dtype"),
    ("tile_scheduler_metadata", lambda a: other_plan(a)[:0], ValueError, "has 0 partitions"),
    ("num_splits", lambda a: a["num_splits"][:3], ValueError, "num_splits shape"),
    ("attn_sink", lambda a: a["q"].new_zeros(16), TypeError, "attn_sink dtype torch.bfloat16"),
    ("attn_sink", lambda a: a["q"].new_zeros(8, dtype=torch.float32), ValueError, "attn_sink shape"),
    ("softmax_scale", lambda a: 0.0, ValueError, "softmax_scale 0.0"),
    ("softmax_scale", lambda a: -1.0, ValueError, "softmax_scale -1.0"),
    ("softmax_scale", lambda a: float("nan"), ValueError, "softmax_scale nan"),
    ("softmax_scale", lambda a: float("inf"), ValueError, "softmax_scale inf"),
    ("split_tokens", lambda a: -64, ValueError, "split_tokens -64"),
    ("split_tokens", lambda a: 100, ValueError, "split_tokens 100"),
    ("max_seqlen_q", lambda a: 2, ValueError, "max_seqlen_q 2 without cu_seqlens_q"),
    ("cu_seqlens_q", lambda a: a["num_splits"], ValueError, "q shape"),
]
BAD_RAGGED: list[tuple[str, Change, type[Exception], str]] = [
    ("max_seqlen_q", lambda a: 0, ValueError, "max_seqlen_q 0 with cu_seqlens_q"),
    ("cu_seqlens_q", lambda a: a["cu_seqlens_q"][:3], ValueError, "cu_seqlens_q shape"),
    ("cu_seqlens_q", lambda a: a["cu_seqlens_q"].long(), TypeError, "cu_seqlens_q dtype"),
    ("cu_seqlens_q", lambda a: None, ValueError, "without cu_seqlens_q"),
]


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values at an address 2 bytes past a multiple of 16."""
    flat = tensor.new_empty(tensor.numel() + 1)[1:]
    return flat.view(tensor.shape).copy_(tensor)


def name_of(entry: tuple[str, Change, type[Exception], str]) -> str:
    """Test id."""
    return f"{entry[0]}: {entry[3]}"
