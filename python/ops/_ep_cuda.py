"""CUDA body of ep_layout. The ops that move rows call the methods of the buffer that they name."""

from __future__ import annotations

import torch
from torch import Tensor

from cutehop.comm.kernels import layout_kernel
from cutehop.comm.kernels.config import LAYOUT_CLUSTER, LAYOUT_COUNTERS, LAYOUT_RANKS, OneVariant

_CONFIG = OneVariant()


def layout(
    topk_idx: Tensor,
    num_experts: int,
    num_ranks: int,
    *,
    num_tokens_per_rank: Tensor,
    num_tokens_per_expert: Tensor,
    is_token_in_rank: Tensor,
) -> None:
    """Fill the outputs. topk_idx was checked. ValueError for more ranks or experts than the kernel counts."""
    if num_ranks > LAYOUT_RANKS or num_experts + num_ranks > LAYOUT_COUNTERS:
        raise ValueError(
            f"ep_layout: {num_ranks} ranks and {num_experts} experts, supported on CUDA {LAYOUT_RANKS} ranks and "
            f"together {LAYOUT_COUNTERS}; count on the CPU"
        )
    device = topk_idx.get_device()
    if device != torch._C._cuda_getDevice():
        outputs = {
            "num_tokens_per_rank": num_tokens_per_rank, "num_tokens_per_expert": num_tokens_per_expert,
            "is_token_in_rank": is_token_in_rank,
        }  # fmt: skip
        with torch.cuda.device(device):
            return layout(topk_idx, num_experts, num_ranks, **outputs)
    topk_idx = topk_idx.contiguous()
    stream = torch._C._cuda_getCurrentRawStream(device)
    layout_kernel(_CONFIG, stream).launch(
        (LAYOUT_CLUSTER, 1, 1),
        stream,
        topk_idx.data_ptr(),
        topk_idx.itemsize,
        *topk_idx.shape,
        num_experts,
        num_experts // num_ranks,
        num_tokens_per_rank.data_ptr(),
        num_tokens_per_expert.data_ptr(),
        is_token_in_rank.data_ptr(),
        smem_bytes=4 * (num_experts + num_ranks),
    )
