"""What the ranks of a pool do in tests/dist/test_deep_ep_compat.py: how a Buffer gets its memory, and CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cutehop.comm.errors import EpTimeoutError
from cutehop.compat._deep_ep_capacity import tokens_that_fit
from cutehop.compat.deep_ep import Buffer
from cutehop.ref import ep as ref
from tests.deep_ep_calls import Problem, few_sms, make, on, same

HIDDEN, TOPK = 64, 2


def route(n: int, ranks: int, device: str) -> tuple[Tensor, int]:
    """Choices that go around all 2 * ranks experts, and their number."""
    choices = torch.arange(n * TOPK, device=device).view(n, TOPK)
    return choices % (2 * ranks), 2 * ranks


def send(buffer: Buffer, x: Any, device: str, **options: Any) -> tuple:
    """dispatch's results for tokens that go around the experts."""
    ids, num_experts = route(len(x[0] if isinstance(x, tuple) else x), buffer.group_size, device)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, num_experts)
    weights = torch.ones(ids.shape, device=device)
    return buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, ids, weights, **options)


def tokens(n: int, device: str, hidden: int = HIDDEN) -> Tensor:
    return torch.arange(n * hidden, device=device).view(n, hidden).remainder(251).bfloat16()


def first_call_decides(group: Any, rank: int, device: str) -> None:
    few_sms(device)
    ranks = group.size()
    buffer = Buffer(group, explicitly_destroy=True, device=device)
    send(buffer, tokens(rank + 1, device), device)
    assert buffer.runtime is not None
    config = buffer.runtime.config
    assert (config.max_tokens, config.hidden, config.num_experts, config.max_topk) == (ranks, HIDDEN, 2 * ranks, TOPK)
    with pytest.raises(ValueError, match=rf"tokens {ranks + 1} .*num_max_tokens_per_rank={ranks + 1}"):
        send(buffer, tokens(ranks + 1, device), device)
    with pytest.raises(ValueError, match="hidden=128"):
        send(buffer, tokens(1, device, 128), device)
    send(buffer, ref.quantize_fp8(tokens(ranks, device)), device)  # a buffer takes bf16 and fp8, whatever came first
    buffer.destroy()
    with pytest.raises(RuntimeError, match="destroyed"):
        send(buffer, tokens(1, device), device)
    buffer.destroy()


def bytes_decide(group: Any, rank: int, device: str) -> None:
    few_sms(device)
    buffer = Buffer(group, 2**20, explicitly_destroy=True, device=device)
    send(buffer, tokens(1, device), device)
    assert buffer.runtime is not None
    config = buffer.runtime.config
    assert config.max_tokens == tokens_that_fit(config, 2**20) > 100
    send(buffer, tokens(config.max_tokens, device), device)
    buffer.destroy()


def keywords_decide(group: Any, rank: int, device: str) -> None:
    few_sms(device)
    ranks = group.size()
    given = {"num_max_tokens_per_rank": 7, "hidden": 128, "num_experts": 2 * ranks, "num_topk": 3}
    buffer = Buffer(group, 2**20, explicitly_destroy=True, device=device, **given)
    assert buffer.runtime is not None  # before any call
    config = buffer.runtime.config
    assert (config.max_tokens, config.hidden, config.num_experts, config.max_topk) == (7, 128, 2 * ranks, 3)
    send(buffer, tokens(7, device), device)
    buffer.destroy()
    short = Buffer(group, explicitly_destroy=True, device=device, num_max_tokens_per_rank=3)
    with pytest.raises(ValueError, match=rf"tokens 4 on rank {ranks - 1}"):  # on all ranks, not on the last one alone
        send(short, tokens(4 if rank == ranks - 1 else 1, device), device)
    short.destroy()


def ranks_differ(group: Any, rank: int, device: str) -> None:
    """All ranks hear of it, and the next first call can be right."""
    few_sms(device)
    last = group.size() - 1
    buffer = Buffer(group, explicitly_destroy=True, device=device)
    with pytest.raises(ValueError, match=rf"differs between ranks: rank 0 .*hidden=64.*rank {last} .*hidden=128"):
        send(buffer, tokens(1, device, 128 if rank == last else 64), device)
    send(buffer, tokens(1, device), device)
    buffer.destroy()


def handle_comes_first(group: Any, rank: int, device: str) -> None:
    """A Buffer that was made anew since the dispatch, as when a bigger one is needed between forward and backward."""
    few_sms(device)
    old = Buffer(group, explicitly_destroy=True, device=device)
    x = tokens(5 + rank, device)
    recv_x, _, _, _, handle, _ = send(old, x, device)
    old.destroy()
    unknown = Buffer(group, explicitly_destroy=True, device=device)
    with pytest.raises(ValueError, match="num_experts"):
        unknown.dispatch(x, handle)
    new = Buffer(group, explicitly_destroy=True, device=device, num_experts=2 * group.size())
    same(new.dispatch(x, handle)[0], recv_x.cpu())
    new.combine(recv_x, handle)
    new.destroy()


def raw_memory(group: Any, rank: int, device: str) -> None:
    few_sms(device)
    buffer = Buffer(group, explicitly_destroy=True, device=device)
    x = tokens(6, device)
    expected = send(buffer, x, device)[0].cpu()
    whole = buffer.get_local_buffer_tensor(torch.int8)
    assert whole.numel() == 2 * x.numel()
    assert buffer.get_local_buffer_tensor(torch.float32, offset=16).numel() == (whole.numel() - 16) // 4
    with pytest.raises(ValueError, match="ask for fewer"):
        buffer.get_local_buffer_tensor(torch.int8, torch.Size((7, 2 * HIDDEN)))
    view = buffer.get_local_buffer_tensor(torch.bfloat16, torch.Size((6, HIDDEN)))
    assert view.data_ptr() == whole.data_ptr()
    view.copy_(x)
    same(send(buffer, view, device)[0], expected)
    with pytest.raises(ValueError, match="stale"):
        send(buffer, view, device)
    buffer.destroy()


def first_rank_stays_away(group: Any, rank: int, device: str) -> str:
    """What the others are told."""
    if rank == 0:
        return ""
    buffer = Buffer(group, device=device, timeout_s=1)
    with pytest.raises(EpTimeoutError) as caught:
        send(buffer, tokens(1, device), device)
    assert caught.value.peer == 0
    return caught.value.phase


def captured(group: Any, rank: int, device: str, problems: list[Problem]) -> None:
    """Layout, dispatch and combine in one CUDA graph, replayed with other tokens and choices. Equal shapes needed."""
    few_sms(device)
    buffer = Buffer(group, explicitly_destroy=True, device=device)
    first = problems[0]
    cases = [make(problem) for problem in problems]
    x, ids, weights = (
        on(device, part[rank]).clone() for part in (cases[0].values, cases[0].topk_idx, cases[0].topk_weights)
    )

    def layer() -> tuple:
        per_rank, _, per_expert, in_rank, ready = buffer.get_dispatch_layout(ids, first.experts, async_finish=True)
        recv_x, recv_ids, recv_weights, _, handle, done = buffer.dispatch(
            x, None, per_rank, None, in_rank, per_expert, ids, weights,
            num_worst_tokens=first.worst, previous_event=ready, async_finish=True,
        )  # fmt: skip
        with done:
            pass
        return recv_x, recv_ids, *buffer.combine(recv_x, handle, recv_weights)[:2]

    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, first.experts)
    with pytest.raises(RuntimeError, match="before the capture begins"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, ids, weights, num_worst_tokens=first.worst)
    layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recv_x, recv_ids, combined_x, combined_weights = layer()
    for problem, inputs in zip(problems * 2, cases * 2):
        for static, part in zip((x, ids, weights), (inputs.values, inputs.topk_idx, inputs.topk_weights)):
            static.copy_(part[rank])
        graph.replay()
        received = ref.dispatch(inputs.values, inputs.topk_idx, inputs.topk_weights, problem.experts)
        handles = [each.handle for each in received]
        home_x, home_weights = ref.combine(
            [each.recv_x for each in received], handles, [each.recv_topk_weights for each in received]
        )
        m = len(received[rank].recv_x)
        same((recv_x[:m], recv_ids[:m]), (received[rank].recv_x, received[rank].recv_topk_idx))
        assert (recv_ids[m:] == -1).all()
        assert home_weights is not None
        same((combined_x, combined_weights), (home_x[rank], home_weights[rank]))
    buffer.destroy()
