"""The methods of DeepEP V1's Buffer that cutehop does not have, with V1's signatures."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor


class Refused:
    """Internode methods. Each raises NotImplementedError with a sentence."""

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


def _internode(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name}: cutehop works within one node; use dispatch and combine of a group of 1..8 ranks"
    )
