"""The methods of DeepEP V1's Buffer that cutehop does not have, with V1's signatures."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor


class Refused:
    """Low-latency and internode methods. Each raises NotImplementedError with a sentence."""

    def internode_dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        handle: tuple | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Any = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> NoReturn:
        raise _internode("internode_dispatch")

    def internode_combine(
        self,
        x: Tensor,
        handle: tuple | list,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Any = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> NoReturn:
        raise _internode("internode_combine")

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> NoReturn:
        raise _low_latency("clean_low_latency_buffer")

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> NoReturn:
        raise _low_latency("low_latency_dispatch")

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: tuple,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> NoReturn:
        raise _low_latency("low_latency_combine")

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> NoReturn:
        raise _low_latency("low_latency_update_mask_buffer")

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> NoReturn:
        raise _low_latency("low_latency_query_mask_buffer")

    def low_latency_clean_mask_buffer(self) -> NoReturn:
        raise _low_latency("low_latency_clean_mask_buffer")

    def get_next_low_latency_combine_buffer(self, handle: object) -> NoReturn:
        raise _low_latency("get_next_low_latency_combine_buffer")


def _low_latency(name: str) -> NotImplementedError:
    return NotImplementedError(f"{name}: low-latency mode is not available in cutehop; use dispatch and combine")


def _internode(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name}: cutehop works within one node; use dispatch and combine of a group of 1..8 ranks"
    )
