"""A mixture of experts spread over the ranks of a node: route, dispatch, experts, combine, shared expert.

n tokens of this rank with k choices each among E experts, L = E / R of them on each of R ranks, H columns.

    one rank       route -> permute -> GEMM + SwiGLU -> GEMM -> unpermute                    no process group
    normal         route -> dispatch -> the same with the received rows -> combine           training and prefill
    low latency    route -> send, receive by expert -> masked GEMMs -> send, receive         decode, no gradients

All three are calls of ops with shapes that do not depend on the routing, so the code is the same eager, under
torch.compile(fullgraph=True) and captured in a CUDA graph (cutehop.ops.ep says what torch's inductor needs).

With FP8 weights rows are cast once, before they travel, and go to the GEMM as they arrive, with their scales; the
second GEMM takes what the first one's epilogue cast. The shared expert takes the same cast rows.

Each rank's rows are copied once into the memory that peers read, on the way out and on the way back: a view of that
memory cannot be an op's argument under torch.compile, which would hand the op a clone. README.md, "Dispatch and
combine", has what the copies cost ("tensors from elsewhere" against "in place").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from cutehop.cute_kernels.errors import check
from cutehop.layers.moe_shared import Fp8SharedExpert, SharedExpert
from cutehop.layers.moe_weights import MoeExperts, local_slice

_ops = torch.ops.cutehop


class ExpertBuffer(Protocol):
    """What the layer reads of a cutehop.comm.base.Buffer or a cutehop.comm.ll_base.LowLatencyBuffer."""

    name: str
    rank: int
    ranks: int
    config: Any


@dataclass(frozen=True)
class Routing:
    """How experts are chosen, as `moe_route` has it; the defaults are a plain top-k of sigmoids."""

    topk: int
    num_groups: int = 1
    topk_groups: int = 1
    scoring: str = "sigmoid"
    normalize: bool = True
    scale: float = 1.0


def _float_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in float32. Products of two bfloat16 are exact in it, so tensor cores may make them; torch has that
    on a GPU and without a gradient."""
    if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and not torch.is_grad_enabled():
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return functional.linear(x.float(), weight.float())


class MoeRouter(nn.Module):
    """Chooses experts: scores are products of float32, whatever the weights' dtype, as in DeepSeek-V3.

    weight: (E, H). e_score_correction_bias: float32 (E,), added for the choice only, or None; it has no gradient.
    """

    e_score_correction_bias: Tensor | None

    def __init__(self, weight: Tensor, routing: Routing, bias: Tensor | None = None) -> None:
        """The tensors are shared, not copied; a Parameter stays the same object."""
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        self.routing = routing
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """topk_idx int64 (n, k) and topk_weights float32 (n, k) of x (n, H)."""
        logits = _float_linear(x, self.weight)
        bias = None if self.e_score_correction_bias is None else self.e_score_correction_bias.float()
        r = self.routing
        return _ops.moe_route(
            logits, bias, r.topk, r.num_groups, r.topk_groups, r.scoring, r.normalize, r.scale
        )  # fmt: skip


class ExpertParallelMoE(nn.Module):
    """The MoE block of a DeepSeek-V3-shaped model; parameters have transformers' names, `gate.weight`,
    `gate.e_score_correction_bias`, `experts.gate_up_proj`, `experts.down_proj`, `shared_experts.*`.
    An Fp8SharedExpert has names of its own and loads the published ones.

    A layer names its buffers, it does not keep them alive. Calls with a buffer are collective: all ranks make them, and
    backward, in the same order, a rank without tokens too. Router and shared expert are on every rank: where a loss is
    a sum over ranks, add up their gradients; those of the experts hold all ranks' tokens already.
    """

    def __init__(
        self,
        gate: MoeRouter,
        experts: MoeExperts,
        shared_experts: nn.Module | None = None,
        *,
        buffer: ExpertBuffer | None = None,
        low_latency_buffer: ExpertBuffer | None = None,
        num_worst_tokens: int | None = None,
        max_pairs: int | None = None,
    ) -> None:
        """gate: for all E experts. experts: this rank's, which begin at rank * L. shared_experts: added to the result.

        buffer: cutehop.comm.base.Buffer of normal calls; with FP8 experts made with scales="f32". Without one the layer
            has all experts.
        low_latency_buffer: cutehop.comm.ll_base.LowLatencyBuffer of low-latency calls.
        num_worst_tokens: rows that a normal call may receive; None for what the buffer holds, 0 to wait on the CPU for
            the number that there are (no CUDA graph, no inductor).
        max_pairs: rows of the matrix sorted by expert, choices of local experts among the received rows. None always
            suffices: received rows * min(k, L), several times what balanced routing needs. With fewer, a token whose
            choice finds no row becomes NaN.
        ValueError for experts, buffers and sizes that do not belong together.
        """
        super().__init__()
        self.gate, self.experts, self.shared_experts = gate, experts, shared_experts
        check(max_pairs is None or max_pairs > 0, f"ExpertParallelMoE: max_pairs {max_pairs}, needs >= 1; or pass None")
        self.max_pairs = max_pairs
        num_experts, hidden = gate.weight.shape
        check(
            (experts.num_experts, experts.hidden) == (num_experts, hidden),
            f"ExpertParallelMoE: the router chooses among {num_experts} experts of {hidden} columns, the experts are "
            f"of {experts.num_experts} with {experts.hidden}; pass num_experts to MoeExperts, and weights of one model",
        )
        rank, self.ranks = 0, 1
        for each, may_be_wider in ((buffer, True), (low_latency_buffer, False)):
            if each is not None:
                self._check_buffer(each, may_be_wider)
                rank, self.ranks = each.rank, each.ranks
        check(
            (experts.num_local * self.ranks, experts.first) == (num_experts, rank * experts.num_local),
            f"ExpertParallelMoE: rank {rank} of {self.ranks} holds experts {experts.first} to "
            f"{experts.first + experts.num_local - 1} of {num_experts}, needs {num_experts // self.ranks} from "
            f"{rank * (num_experts // self.ranks)}; pass the rank's experts, and a buffer if it is not alone",
        )
        self.buffer = None if buffer is None else buffer.name
        self.low_latency_buffer = None if low_latency_buffer is None else low_latency_buffer.name
        self.num_worst_tokens = 0
        if buffer is not None:
            self.num_worst_tokens = buffer.config.recv_rows if num_worst_tokens is None else num_worst_tokens

    @classmethod
    def from_moe(cls, moe: nn.Module, **options: Any) -> ExpertParallelMoE:
        """Share the weights of a transformers `DeepseekV3MoE` (or one with its attributes), the local experts' only.

        Reads gate.weight, e_score_correction_bias, top_k, num_group, topk_group, norm_topk_prob, routed_scaling_factor;
        experts.gate_up_proj, down_proj; shared_experts; config.hidden_act. A rank that holds all experts trains the
        same Parameters, another one views of them. options: of the constructor.
        """
        m: Any = moe
        act = m.config.hidden_act
        check(act == "silu", f"ExpertParallelMoE: hidden_act {act!r}, supported 'silu'; the GEMM's epilogue is SwiGLU")
        gate = m.gate
        routing = Routing(
            gate.top_k, gate.num_group, gate.topk_group, normalize=gate.norm_topk_prob, scale=gate.routed_scaling_factor
        )
        router = MoeRouter(gate.weight, routing, gate.e_score_correction_bias)
        first, count = _local_experts(len(gate.weight), options)
        up, down = (local_slice(w, first, count) for w in (m.experts.gate_up_proj, m.experts.down_proj))
        experts = MoeExperts(up, down, first=first, num_experts=len(gate.weight))
        return cls(router, experts, m.shared_experts, **options)

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> ExpertParallelMoE:
        """A layer with memory for the local experts only, normally distributed, for load_state_dict or for training.

        config: attributes of a transformers `DeepseekV3Config`.
        dtype: of all weights; float8_e4m3fn is for the experts, the shared one too; the router is bfloat16 then.
        options: of the constructor. A state dict of the whole block, or of a published checkpoint, is cut to what is
        here: layer.load_state_dict(state).
        """
        c = config
        num_experts, hidden, inner = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        first, count = _local_experts(num_experts, options)
        std = getattr(c, "initializer_range", 0.02)
        is_fp8 = dtype == torch.float8_e4m3fn
        others: dict[str, Any] = {"dtype": torch.bfloat16 if is_fp8 else dtype, "device": device}

        def weights(*shape: int) -> Tensor:
            return torch.empty(shape, **others).normal_(std=std)

        routing = Routing(
            c.num_experts_per_tok,
            c.n_group,
            c.topk_group,
            normalize=c.norm_topk_prob,
            scale=c.routed_scaling_factor,
        )
        bias = torch.zeros(num_experts, dtype=torch.float32, device=device)
        gate = MoeRouter(weights(num_experts, hidden), routing, bias)
        shared = SharedExpert(hidden, inner * c.n_shared_experts, **others) if c.n_shared_experts else None
        up, down = weights(count, 2 * inner, hidden), weights(count, hidden, inner)
        experts = MoeExperts(up, down, first=first, num_experts=num_experts)
        if is_fp8:
            return cls(gate, experts.quantized(), shared and shared.quantized(), **options)
        return cls(gate, experts, shared, **options)

    def quantize_weights(self) -> ExpertParallelMoE:
        """This layer, its experts and its SharedExpert cast to FP8 with a scale per 128 x 128 block. The router stays,
        and so does a shared expert of any other class, transformers' too: what it computes is not known here. No
        gradients reach the layer's input or its experts from then on."""
        self.experts = self.experts.quantized()
        if type(self.shared_experts) is SharedExpert:  # a subclass may compute something else
            self.shared_experts = self.shared_experts.quantized()
        return self

    def forward(self, hidden_states: Tensor, low_latency: bool = False) -> Tensor:
        """What the experts make of hidden_states, bfloat16 (..., H), of the same shape.

        low_latency: through the low-latency buffer. ValueError without one, NotImplementedError where a gradient is
        wanted that there is none of: of low-latency calls, of FP8.
        """
        x = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
        if self.experts.is_fp8 and torch.is_grad_enabled() and x.requires_grad:
            raise NotImplementedError(
                "ExpertParallelMoE: the input requires a gradient, which FP8 weights do not pass on; call it under "
                "torch.no_grad(), or train in bfloat16"
            )
        topk_idx, topk_weights = self.gate(x)
        fp8_shared = isinstance(self.shared_experts, Fp8SharedExpert)
        rows, scales = self._as_rows(x) if fp8_shared or not low_latency else (x, None)
        shared = self._shared(x, rows, scales)
        if low_latency:
            out = self._low_latency(x, topk_idx, topk_weights)
        elif self.buffer is None:
            check(
                self.ranks == 1,
                "ExpertParallelMoE: a normal call of a layer on several ranks with a low-latency buffer only; pass "
                "buffer=, or call it with low_latency=True",
            )
            out = self._local(rows, scales, topk_idx, topk_weights, self._expected_rows(topk_idx))
        else:  # the sums begin with the shared expert's results, so they are not rounded once more
            return self._normal(rows, scales, topk_idx, topk_weights, shared).view(hidden_states.shape)
        return (out if shared is None else out + shared).view(hidden_states.shape)

    def _shared(self, x: Tensor, rows: Tensor, scales: Tensor | None) -> Tensor | None:
        """What the shared expert makes of x, or of x as `_as_rows` has cast it."""
        if self.shared_experts is None:
            return None
        if isinstance(self.shared_experts, Fp8SharedExpert) and scales is not None:
            return self.shared_experts.of_rows(rows, scales)
        return self.shared_experts(x)

    def _normal(
        self, rows: Tensor, scales: Tensor | None, topk_idx: Tensor, topk_weights: Tensor, shared: Tensor | None
    ) -> Tensor:
        _, per_expert, in_rank = _ops.ep_layout(topk_idx, self.experts.num_experts, self.ranks)
        recv_x, recv_scales, recv_idx, recv_weights, _, prefix, src_idx, send_row = _ops.ep_dispatch(
            rows, scales, topk_idx, topk_weights, in_rank, per_expert, self.buffer, self.num_worst_tokens
        )
        scales = recv_scales if self.experts.is_fp8 else None
        y = self._local(recv_x, scales, recv_idx, recv_weights, self._expected_rows(topk_idx))
        return _ops.ep_combine(y, None, shared, None, prefix, src_idx, in_rank, send_row, self.buffer)[0]

    def _low_latency(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        buffer, fp8 = self.low_latency_buffer, self.experts.is_fp8
        if buffer is None:
            raise ValueError(
                "ExpertParallelMoE: low_latency=True without a low-latency buffer; pass low_latency_buffer="
            )
        rows, scales, counts, src_info, layout_range, *places = _ops.ep_ll_dispatch(x, topk_idx, buffer, fp8)
        y = self.experts(rows, scales if fp8 else None, counts, self._expected_rows(topk_idx))
        return _ops.ep_ll_combine(y, src_info, layout_range, counts, *places, topk_idx, topk_weights, buffer)

    def _local(
        self, x: Tensor, scales: Tensor | None, topk_idx: Tensor, topk_weights: Tensor, expected_rows: int
    ) -> Tensor:
        """Each row's weighted sum over its experts on this rank, bfloat16 (m, H). topk_idx: local ids, -1 for none."""
        local, k = self.experts.num_local, topk_idx.shape[1]
        most = x.shape[0] * min(k, local)
        num_rows = most if self.max_pairs is None else min(self.max_pairs, most)
        rows, row_scales, ends, pair_row = _ops.moe_permute(x, scales, topk_idx, local, num_rows)
        y = self.experts(rows, None if scales is None else row_scales, ends, expected_rows)
        out = _ops.moe_unpermute(y, pair_row, topk_weights)
        if num_rows < most:
            lost = (topk_idx >= 0) & (pair_row < 0)
            out = out.masked_fill(lost.any(1, keepdim=True), torch.nan)
        return out

    def _as_rows(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows as the GEMM takes them, and scales."""
        return _ops.quantize_fp8(x) if self.experts.is_fp8 else (x, None)

    def _expected_rows(self, topk_idx: Tensor) -> int:
        """Mean rows of an expert if all ranks have as many tokens as this one."""
        return max(1, topk_idx.numel() * self.ranks // self.experts.num_experts)

    def _check_buffer(self, buffer: ExpertBuffer, may_be_wider: bool) -> None:
        config, (num_experts, hidden), topk = buffer.config, self.gate.weight.shape, self.gate.routing.topk
        fits = config.hidden == hidden or (may_be_wider and config.hidden > hidden)
        check(
            config.num_experts == num_experts and config.max_topk >= topk and fits,
            f"ExpertParallelMoE: buffer {buffer.name!r} is for {config.num_experts} experts, {config.max_topk} choices "
            f"and {config.hidden} columns, the layer has {num_experts}, {topk} and {hidden}; make the buffer for it",
        )


def _local_experts(num_experts: int, options: dict[str, Any]) -> tuple[int, int]:
    """The first expert of this rank and how many there are, by the buffers among a constructor's options."""
    buffer = options.get("buffer") or options.get("low_latency_buffer")
    count = num_experts // (buffer.ranks if buffer else 1)
    return (buffer.rank if buffer else 0) * count, count
