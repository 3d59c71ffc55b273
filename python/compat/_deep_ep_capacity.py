"""What a Buffer must be able to hold. V1's constructor does not say, so the ranks settle it with their first call."""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cutehop.comm.config import MAX_TOPK, EpConfig
from cutehop.comm.layout import EpLayout
from cutehop.comm.meeting import Meeting
from cutehop.cute_kernels.errors import check

NARROWEST_ROW = 16  # columns that fp8 rows need a multiple of, which is what a buffer for both bf16 and fp8 asks for


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call on one rank; None where a call does not tell (no routing, or a handle instead)."""

    tokens: int
    hidden: int
    num_experts: int | None = None
    num_topk: int | None = None
    itemsize: int = 2
    has_scales: bool = False

    @classmethod
    def of(
        cls, x: Tensor, scales: Tensor | None, num_tokens_per_expert: Tensor | None, topk_idx: Tensor | None
    ) -> Sizes:
        return cls(
            x.shape[0],
            x.shape[-1],
            None if num_tokens_per_expert is None else num_tokens_per_expert.numel(),
            None if topk_idx is None else topk_idx.shape[-1],
            x.element_size(),
            scales is not None,
        )


@dataclass(frozen=True)
class Asked:
    """What the caller told the constructor, None where the first call decides."""

    num_max_tokens_per_rank: int | None
    hidden: int | None
    num_experts: int | None
    num_topk: int | None

    @property
    def is_complete(self) -> bool:
        return None not in (self.num_max_tokens_per_rank, self.hidden, self.num_experts, self.num_topk)


def settle(group: ProcessGroup, asked: Asked, mine: Sizes, num_nvl_bytes: int, timeout_s: float) -> EpConfig:
    """The config that all ranks of the group use from now on. Collective: they tell each other their sizes.

    bf16 rows with room for one f32 scale per 128 columns, so that bf16 and fp8 calls both fit; no scales if hidden is
    no multiple of 16. Tokens per rank: what was asked for, or the most that any rank brings to this call, or what fits
    num_nvl_bytes if that is more.

    ValueError, on all ranks, if their calls differ or exceed what was asked for, or the number of experts is unknown.
    EpTimeoutError if a rank does not come within timeout_s seconds.
    """
    words = Meeting(group, timeout_s).meet("first call of deep_ep.Buffer", json.dumps(astuple(mine)))
    calls = [Sizes(*json.loads(word)) for word in words]
    for rank, call in enumerate(calls):
        check(
            replace(call, tokens=0) == replace(calls[0], tokens=0),
            f"deep_ep.Buffer: the first call differs between ranks: rank 0 {calls[0]}, rank {rank} {call}; "
            "only the number of tokens may",
        )
    config = _config(group.size(), asked, max(call.tokens for call in calls), calls[0], num_nvl_bytes)
    for rank, call in enumerate(calls):
        check_fits(config, call, rank)
    return config


def check_fits(config: EpConfig, call: Sizes, rank: int) -> None:
    """ValueError that names the constructor's keyword if the call does not fit the buffer."""
    num_experts = config.num_experts if call.num_experts is None else call.num_experts
    for what, value, limit, keyword in (
        ("tokens", call.tokens, config.max_tokens, "num_max_tokens_per_rank"),
        ("hidden", call.hidden, config.hidden, "hidden"),
        ("choices per token", call.num_topk or 0, config.max_topk, "num_topk"),
    ):
        if value > limit:
            raise ValueError(
                f"deep_ep.Buffer: {what} {value} on rank {rank}, capacity {limit}; "
                f"make the Buffer with {keyword}={value} or more"
            )
    if num_experts != config.num_experts:
        raise ValueError(
            f"deep_ep.Buffer: {num_experts} experts on rank {rank}, the buffer is for {config.num_experts}; "
            f"make one with num_experts={num_experts}"
        )


def _config(ranks: int, asked: Asked, most_tokens: int, call: Sizes, num_nvl_bytes: int) -> EpConfig:
    num_experts = call.num_experts if asked.num_experts is None else asked.num_experts
    if num_experts is None:
        raise ValueError(
            "deep_ep.Buffer: the first call comes with a handle, which does not tell the number of experts; "
            "make the Buffer with num_experts"
        )
    hidden = call.hidden if asked.hidden is None else asked.hidden
    num_topk = call.num_topk if asked.num_topk is None else asked.num_topk
    config = EpConfig(
        ranks=ranks,
        hidden=hidden,
        max_tokens=max(most_tokens, 1) if asked.num_max_tokens_per_rank is None else asked.num_max_tokens_per_rank,
        num_experts=num_experts,
        max_topk=MAX_TOPK if num_topk is None else num_topk,
        scales="f32" if call.has_scales or hidden % NARROWEST_ROW == 0 else None,
    )
    if asked.num_max_tokens_per_rank is None:
        config = replace(config, max_tokens=max(config.max_tokens, tokens_that_fit(config, num_nvl_bytes)))
    return config


def tokens_that_fit(config: EpConfig, num_bytes: int) -> int:
    """The largest max_tokens with which the memory of one rank takes at most num_bytes; 0 if none does."""

    def heap_bytes(tokens: int) -> int:
        return EpLayout(replace(config, max_tokens=tokens, max_recv_tokens=None)).heap_bytes

    at_most = num_bytes // (config.x_row_bytes + config.ranks * config.y_row_bytes)
    return bisect_right(range(1, at_most + 1), num_bytes, key=heap_bytes)


def check_not_capturing(device: torch.device) -> None:
    """RuntimeError if a CUDA graph is being captured: a buffer cannot get its memory inside of it."""
    check(
        device.type != "cuda" or not torch.cuda.is_current_stream_capturing(),
        "deep_ep.Buffer: has no memory yet and the stream is being captured; before the capture begins call dispatch "
        "once on every rank, with as many tokens as any later call has",
        RuntimeError,
    )
