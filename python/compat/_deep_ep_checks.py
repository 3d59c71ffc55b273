"""What DeepEP V1's Buffer refuses, with the kind of error that it raises."""

from __future__ import annotations

from torch import Tensor

from cutehop.comm.config import MAX_RANKS
from cutehop.cute_kernels.errors import check

from ._deep_ep_config import ALIGNMENT

MAX_INT = 2**31 - 1
UNIT = 16  # bytes: V1 counts its buffers in 32-bit numbers of 16 bytes


def check_group_size(ranks: int) -> None:
    check(
        ranks <= MAX_RANKS,
        f"deep_ep.Buffer: {ranks} ranks, supported 1..{MAX_RANKS} on one node; use a group per node",
        NotImplementedError,
    )


def check_buffer_bytes(num_nvl_bytes: int, num_rdma_bytes: int, low_latency_mode: bool) -> None:
    """Of a group within one node."""
    for name, value in (("num_nvl_bytes", num_nvl_bytes), ("num_rdma_bytes", num_rdma_bytes)):
        check(
            value % ALIGNMENT == 0 and 0 <= value // UNIT < MAX_INT,
            f"deep_ep.Buffer: {name} {value}, needs a multiple of {ALIGNMENT} below {UNIT * MAX_INT}; round it",
            RuntimeError,
        )
    check(
        num_nvl_bytes <= MAX_INT or num_rdma_bytes == 0,
        f"deep_ep.Buffer: num_nvl_bytes {num_nvl_bytes} with num_rdma_bytes, limit {MAX_INT}; pass num_rdma_bytes=0",
        RuntimeError,
    )
    check(
        num_rdma_bytes == 0 or low_latency_mode,
        f"deep_ep.Buffer: num_rdma_bytes {num_rdma_bytes} on one node without low_latency_mode, needs 0; pass 0",
        RuntimeError,
    )


def check_layout(**tensors: Tensor | None) -> None:
    """The layout of a dispatch without a handle."""
    missing = [name for name, tensor in tensors.items() if tensor is None]
    check(
        not missing,
        f"deep_ep.dispatch: {', '.join(missing)} None without a handle, needed; pass what get_dispatch_layout returns",
        AssertionError,
    )


def check_choices(topk_idx: Tensor | None, topk_weights: Tensor | None, num_worst_tokens: int) -> None:
    """The choices of a dispatch without a handle."""
    check(
        (topk_idx is None) == (topk_weights is None),
        "deep_ep.dispatch: one of topk_idx and topk_weights is None, needs both or neither; pass both",
        RuntimeError,
    )
    check(
        num_worst_tokens == 0 or topk_idx is not None,
        f"deep_ep.dispatch: num_worst_tokens {num_worst_tokens} without topk_idx, needs it; pass it with topk_weights",
        RuntimeError,
    )


def check_alignment(expert_alignment: int) -> None:
    check(
        expert_alignment >= 1,
        f"deep_ep.dispatch: expert_alignment {expert_alignment}, needs >= 1; pass 1 for none",
    )


def check_no_choices(topk_idx: Tensor | None, topk_weights: Tensor | None) -> None:
    """A dispatch with a handle."""
    check(
        topk_idx is None and topk_weights is None,
        "deep_ep.dispatch: topk_idx or topk_weights beside a handle, which has the routing; leave them out",
        AssertionError,
    )
