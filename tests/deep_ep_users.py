"""An MoE layer as three public code bases call DeepEP's Buffer, in the ranks of a pool, compared with one process.

vllm      one Buffer per process, made with explicitly_destroy over a CPU group; layout, dispatch and combine with
          every argument by keyword, configs from the table (None where it has no entry); block-scaled fp8 or bf16;
          either asynchronous calls whose event is waited for where it holds something, or two microbatches in flight
          with an event captured before their calls; expert ids made global again; output copied into the caller's.
megatron  autograd functions around dispatch and combine: the backward of one is the other with the saved handle,
          weights included; one Buffer per process, made anew when the group or a size hint changes, never destroyed;
          previous_event and allocate_on_comm_stream throughout, all events waited for.
sglang    a dispatcher in two halves (capture an event, then move), counts aligned to 128, the layout's event passed
          on to dispatch, Configs that may come from a file, fp8 with column-major scales, one handle at a time.

Expert e multiplies its input by (e + 1) / E.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cutehop.compat.deep_ep import Buffer, Config, EventHandle, EventOverlap
from cutehop.ref import ep as ref
from tests.deep_ep_calls import Inputs, Problem, few_sms, make, on

CLOSE = {"rtol": 2e-2, "atol": 2e-2}  # bf16 rows, rounded once per rank and once more at home


def experts(x: Tensor, ids: Tensor, weights: Tensor, num_experts: int, first: int = 0) -> Tensor:
    """Sum over the choices of weight * expert(x); ids count from `first`, -1 is none."""
    scale = torch.where(ids < 0, 0, (ids + first + 1) / num_experts)
    return x.float() * (scale * weights).sum(-1, keepdim=True)


def dense(problem: Problem, inputs: Inputs, rank: int) -> Tensor:
    """The layer's output for a rank's tokens without any communication."""
    return experts(inputs.values[rank], inputs.topk_idx[rank], inputs.topk_weights[rank], problem.experts)


def vllm(group: Any, rank: int, device: str, problem: Problem, fp8: bool, microbatches: bool) -> None:
    few_sms(device)
    buffer = Buffer(
        group=group,
        num_nvl_bytes=2**24,
        num_rdma_bytes=0,
        low_latency_mode=False,
        num_qps_per_rank=1,
        explicitly_destroy=True,
        device=device,
    )
    Buffer.set_num_sms(min(20, Buffer.num_sms))
    inputs = make(problem, "fp8" if fp8 else "random")
    local = problem.experts // problem.ranks
    tuned = problem.ranks in (2, 4, 8)

    def prepare(x: Any, ids: Tensor, weights: Tensor) -> tuple:
        before = buffer.capture() if microbatches else None
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(
            topk_idx=ids,
            num_experts=problem.experts,
            previous_event=before,
            async_finish=False,
            allocate_on_comm_stream=False,
        )
        return buffer.dispatch(
            x=x,
            handle=None,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=ids,
            topk_weights=weights,
            expert_alignment=1,
            config=Buffer.get_dispatch_config(problem.ranks) if tuned else None,
            previous_event=before,
            async_finish=not microbatches,
            allocate_on_comm_stream=False,
        )

    def compute(x: Any, ids: Tensor, weights: Tensor, counts: list[int], _: tuple, event: EventOverlap) -> Tensor:
        if event.event is not None:
            event.current_stream_wait()
        x = ref.dequantize_fp8(*x) if isinstance(x, tuple) else x
        assert counts == torch.bincount(ids[ids >= 0], minlength=local).tolist()
        elsewhere = problem.experts - 1 if rank == 0 else 0  # an expert that is not on this rank
        ids = torch.where(ids == -1, elsewhere, ids + rank * local)
        here = (ids // local == rank) & (weights != 0)
        return experts(x, ids.masked_fill(~here, -1), weights, problem.experts).bfloat16()

    def finalize(output: Tensor, y: Tensor, handle: tuple) -> None:
        combined, nothing, event = buffer.combine(
            x=y,
            handle=handle,
            topk_weights=None,
            config=Buffer.get_combine_config(problem.ranks) if tuned else None,
            previous_event=buffer.capture() if microbatches else None,
            async_finish=not microbatches,
            allocate_on_comm_stream=False,
        )
        if event.event is not None:
            event.current_stream_wait()
        assert nothing is None
        output.copy_(combined, non_blocking=True)

    arguments = on(device, (inputs.rows[rank], inputs.topk_idx[rank], inputs.topk_weights[rank]))
    for _ in range(2):
        received = [prepare(*arguments) for _ in range(2 if microbatches else 1)]
        for each in received:
            output = torch.empty(problem.tokens[rank], problem.hidden, dtype=torch.bfloat16, device=device)
            finalize(output, compute(*each), each[4])
            torch.testing.assert_close(output.float().cpu(), dense(problem, inputs, rank), **CLOSE)
    buffer.destroy()


class MegatronBuffers:
    """The process's one Buffer, replaced when it does not fit."""

    def __init__(self, group: Any, device: str) -> None:
        self.group, self.device = group, device
        self.buffer: Buffer | None = None
        self.made = 0

    def get(self, x: Tensor) -> Buffer:
        size, row = self.group.size(), x.size(1) * max(x.element_size(), 2)
        configs = Buffer.get_dispatch_config(size), Buffer.get_combine_config(size)
        nvl = max(config.get_nvl_buffer_size_hint(row, size) for config in configs)
        rdma = max(config.get_rdma_buffer_size_hint(row, size) for config in configs)
        buffer = self.buffer
        if buffer is None or buffer.group != self.group or buffer.num_nvl_bytes < nvl or buffer.num_rdma_bytes < rdma:
            self.close()
            buffer = self.buffer = Buffer(self.group, nvl, rdma, device=self.device)
            self.made += 1
        return buffer

    def close(self) -> None:
        """What Megatron leaves to the destructor, which does nothing collective here."""
        if self.buffer is not None and self.buffer.runtime is not None:
            self.buffer.runtime.destroy()


def _options(overlap: bool) -> dict[str, Any]:
    before = EventOverlap(EventHandle()) if overlap else None
    return {"previous_event": before, "async_finish": overlap, "allocate_on_comm_stream": overlap}


class Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Tensor, probs: Tensor, num_experts: int, buffers: Any, overlap: bool
    ) -> tuple:
        buffer, options = buffers.get(x), _options(overlap)
        per_rank, per_node, per_expert, in_rank, ready = buffer.get_dispatch_layout(ids, num_experts, **options)
        recv_x, recv_ids, recv_probs, counts, handle, done = buffer.dispatch(
            x,
            topk_idx=ids,
            topk_weights=probs,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            **{**options, "previous_event": ready},
        )
        if overlap:
            done.current_stream_wait()
        ctx.buffers, ctx.handle, ctx.overlap = buffers, handle, overlap
        return recv_x, recv_ids, recv_probs, torch.tensor(counts), handle

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, _ids: Any, grad_probs: Tensor, _counts: Any, _handle: Any) -> tuple:
        buffer = ctx.buffers.get(grad_x)
        x, probs, done = buffer.combine(
            grad_x.contiguous(), ctx.handle, topk_weights=grad_probs.float(), **_options(ctx.overlap)
        )
        if ctx.overlap:
            done.current_stream_wait()
        return x, None, probs, None, None, None


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, handle: tuple, buffers: MegatronBuffers, overlap: bool) -> Tensor:
        ctx.buffers, ctx.handle, ctx.overlap = buffers, handle, overlap
        combined, _, done = buffers.get(y).combine(y, handle=handle, **_options(overlap))
        if overlap:
            done.current_stream_wait()
        return combined

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        y, _, _, _, _, done = ctx.buffers.get(grad).dispatch(
            grad.contiguous(), handle=ctx.handle, **_options(ctx.overlap)
        )
        if ctx.overlap:
            done.current_stream_wait()
        return y, None, None, None


def megatron(group: Any, rank: int, device: str, problems: list[Problem], overlap: bool) -> int:
    """Gradients of tokens and probabilities too. The number of Buffers made."""
    few_sms(device)
    buffers = MegatronBuffers(group, device)
    for problem in problems:
        inputs = make(problem)
        first = rank * (problem.experts // problem.ranks)
        leaves = [on(device, part[rank]).clone().requires_grad_() for part in (inputs.values, inputs.topk_weights)]
        x, probs = leaves
        recv_x, ids, recv_probs, counts, handle = Dispatch.apply(
            x, on(device, inputs.topk_idx[rank]), probs, problem.experts, buffers, overlap
        )
        assert counts.sum() == (ids >= 0).sum().cpu()
        y = experts(recv_x, ids, recv_probs, problem.experts, first).bfloat16()
        out = Combine.apply(y, handle, buffers, overlap)
        wanted = [part[rank].clone().requires_grad_() for part in (inputs.values, inputs.topk_weights)]
        expected = experts(wanted[0], inputs.topk_idx[rank], wanted[1], problem.experts)
        torch.testing.assert_close(out.float().cpu(), expected, **CLOSE)
        grad = torch.ones_like(expected) / 16
        out.backward(on(device, grad).bfloat16())
        expected.backward(grad)
        for leaf, want in zip(leaves, wanted):
            torch.testing.assert_close(leaf.grad.float().cpu(), want.grad.float(), rtol=2e-2, atol=5e-2)
    buffers.close()
    return buffers.made


class SglangDispatcher:
    """Two halves per operation, so that other work can be put between them."""

    def __init__(
        self, buffer: Buffer, num_experts: int, overlap: bool, configs: tuple[Config | None, Config | None]
    ) -> None:
        self.buffer, self.num_experts, self.overlap = buffer, num_experts, overlap
        self.dispatch_config, self.combine_config = configs
        self.handle: tuple | None = None

    def capture(self) -> EventOverlap | None:
        return Buffer.capture() if self.overlap else None

    def dispatch(self, x: Any, ids: Tensor, weights: Tensor, before: EventOverlap | None) -> tuple:
        per_rank, per_node, per_expert, in_rank, before = self.buffer.get_dispatch_layout(
            ids,
            self.num_experts,
            previous_event=before,
            async_finish=self.overlap,
            allocate_on_comm_stream=before is not None,
        )
        x, ids, weights, counts, self.handle, event = self.buffer.dispatch(
            x,
            topk_idx=ids,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=before,
            async_finish=self.overlap,
            allocate_on_comm_stream=(before is not None) and self.overlap,
            expert_alignment=128,
            config=self.dispatch_config,
        )
        if self.overlap:
            event.current_stream_wait()
        return x, ids, weights, counts

    def combine(self, y: Tensor, before: EventOverlap | None) -> Tensor:
        combined, _, event = self.buffer.combine(
            y,
            self.handle,
            async_finish=self.overlap,
            previous_event=before,
            allocate_on_comm_stream=before is not None,
            config=self.combine_config,
        )
        if self.overlap:
            event.current_stream_wait()
        self.handle = None
        return combined


def sglang(group: Any, rank: int, device: str, problem: Problem, kind: str, overlap: bool, tuning: dict | None) -> None:
    """tuning: arguments of Config from a file, or None for the table."""
    few_sms(device)
    size = group.size()
    configs = (None, None) if tuning is None else (Config(**tuning), Config(**tuning))
    sizing = [c or table(size) for c, table in zip(configs, (Buffer.get_dispatch_config, Buffer.get_combine_config))]
    row = problem.hidden * (1 if kind != "random" else 2)
    nvl = max(config.get_nvl_buffer_size_hint(row, size) for config in sizing)
    rdma = max(config.get_rdma_buffer_size_hint(row, size) for config in sizing)
    buffer = Buffer(
        group, nvl, rdma, low_latency_mode=False, num_qps_per_rank=Buffer.num_sms, allow_mnnvl=True, device=device
    )
    dispatcher = SglangDispatcher(buffer, problem.experts, overlap, configs)
    inputs = make(problem, kind)
    local = problem.experts // problem.ranks
    for _ in range(2):
        before = dispatcher.capture()
        arguments = on(device, (inputs.rows[rank], inputs.topk_idx[rank], inputs.topk_weights[rank]))
        x, ids, weights, counts = dispatcher.dispatch(*arguments, before)
        true_counts = torch.bincount(ids[ids >= 0], minlength=local)
        assert counts == ((true_counts + 127) // 128 * 128).tolist()
        x = ref.dequantize_fp8(*x) if isinstance(x, tuple) else x
        y = experts(x, ids, weights, problem.experts, rank * local).bfloat16()
        out = dispatcher.combine(y, dispatcher.capture())
        torch.testing.assert_close(out.float().cpu(), dense(problem, inputs, rank), **CLOSE)
    assert buffer.runtime is not None
    buffer.runtime.destroy()
