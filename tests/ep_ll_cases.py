"""Low-latency inputs of all ranks and what must come out, from cutehop.ref.ep_ll; checks of one rank against it.

Every rank's process builds the inputs of all ranks from the case's seed, on the CPU, and takes its own part.
The checks work for any LowLatencyBuffer on any device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cutehop.comm.ll_base import LowLatencyBuffer
from cutehop.comm.ll_config import LlConfig
from cutehop.comm.ll_gloo import GlooLowLatencyBuffer
from cutehop.comm.ll_outputs import LlDispatched, LlHandle
from cutehop.comm.meeting import Meeting
from cutehop.ref import ep_ll as ref
from tests.ep_cases import same_bits

FORMATS = {
    "bf16": {"use_fp8": False},
    "f32": {},
    "pow2": {"round_scale": True},
    "ue8m0": {"round_scale": True, "use_ue8m0": True},
}


@dataclass(frozen=True)
class LlCase:
    """tokens: per rank, repeated for more ranks. routing: see `_choices`. rows: a key of FORMATS. spare_topk: what the
    buffer could hold beyond k. masked: (rank, peer) whom it has masked."""

    ranks: int = 2
    tokens: tuple[int, ...] = (8, 3, 16, 5)
    max_tokens: int = 16
    hidden: int = 256
    local_experts: int = 4
    k: int = 4
    routing: str = "random"
    rows: str = "f32"
    idx_dtype: torch.dtype = torch.int64
    spare_topk: int = 0
    masked: tuple[tuple[int, int], ...] = ()
    seed: int = 0

    def __str__(self) -> str:
        default = LlCase()
        changed = [f"{n}={v}" for n, v in vars(self).items() if v != getattr(default, n)]
        return ",".join(changed).replace("torch.", "").replace(" ", "") or "default"

    def count(self, rank: int) -> int:
        return self.tokens[rank % len(self.tokens)]

    @property
    def experts(self) -> int:
        return self.ranks * self.local_experts

    @property
    def max_topk(self) -> int:
        return self.k + self.spare_topk

    def config(self, elastic: bool = False) -> LlConfig:
        return LlConfig(self.ranks, self.hidden, self.max_tokens, self.experts, self.max_topk, elastic)


CASES = [
    LlCase(),
    LlCase(rows="bf16", hidden=128, idx_dtype=torch.int32),
    LlCase(rows="pow2", hidden=384, spare_topk=3, routing="some"),
    LlCase(rows="ue8m0", hidden=640, local_experts=3, k=3),  # 5 exponents in 2 packs; experts no multiple of 8
    LlCase(rows="ue8m0", hidden=1024, routing="some", idx_dtype=torch.int32),
    LlCase(rows="bf16", hidden=1152, k=16, local_experts=9, routing="some"),
    LlCase(k=1, local_experts=1),
    LlCase(tokens=(0, 16, 1)),
    LlCase(tokens=(0,), rows="bf16"),
    LlCase(tokens=(16,), routing="one_rank"),
    LlCase(tokens=(16,), routing="one_expert", rows="bf16", k=3),  # an expert's block is full
    LlCase(tokens=(16,), routing="none"),
    LlCase(tokens=(1,), max_tokens=1, local_experts=5, k=2),
    LlCase(tokens=(7, 0, 5, 3), max_tokens=7, local_experts=7, k=6, rows="pow2"),
]


def _choices(case: LlCase, n: int, rng: torch.Generator) -> Tensor:
    """Expert ids (n, k), different within a token; -1 and ids that do not exist for none."""
    shape, experts = (n, case.k), case.experts
    if case.routing == "none":
        return torch.full(shape, -1)
    if case.routing == "one_expert":
        return torch.where(torch.arange(case.k) == case.k - 1, experts - 1, -1).expand(shape)
    first = experts - case.local_experts if case.routing == "one_rank" else 0
    padded = max(experts - first, case.k)  # ids past the experts where there are fewer than choices
    ids = first + torch.rand((n, padded), generator=rng).argsort(1)[:, : case.k]
    if case.routing == "some":
        none = torch.rand(shape, generator=rng) < 1 / 3
        ids = torch.where(none, torch.where(ids % 2 == 0, -1, experts + ids), ids)
    return ids


class LlInputs:
    """Inputs of all ranks, lists by rank; and what the reference makes of them."""

    def __init__(self, case: LlCase) -> None:
        self.case = case
        rng = torch.Generator().manual_seed(2000 + case.seed)
        counts = [case.count(rank) for rank in range(case.ranks)]

        def wide(*shape: int) -> Tensor:
            """Exponents far apart: another order of the additions, or a product not rounded, gives other bits."""
            factor = 2.0 ** torch.randint(-9, 9, shape, generator=rng)
            return (torch.randn(shape, generator=rng) * factor).bfloat16()

        self.xs = [wide(n, case.hidden) for n in counts]
        self.topk_idx = [_choices(case, n, rng).to(case.idx_dtype).contiguous() for n in counts]
        self.topk_weights = [torch.randn((n, case.k), generator=rng) for n in counts]
        block = (case.local_experts, case.ranks * case.max_tokens)
        self.ys = [wide(*block, case.hidden) for _ in counts]
        for y, got in zip(self.ys, self.received):  # whoever reads a row that was not received gets a NaN
            y[torch.arange(block[1]) >= got.recv_count[:, None]] = float("nan")

    @cached_property
    def received(self) -> list[ref.Received]:
        case = self.case
        return ref.dispatch(
            self.xs,
            self.topk_idx,
            case.experts,
            case.max_tokens,
            max_topk=case.max_topk,
            masked=case.masked,
            **FORMATS[case.rows],
        )

    def combined(self, use_logfmt: bool = False, masked: ref.Pairs | None = None) -> list[Tensor]:
        """combined_x of all ranks for ys. masked: what it is after the dispatch, None for the same."""
        case = self.case
        return ref.combine(
            self.ys,
            [got.handle for got in self.received],
            self.topk_idx,
            self.topk_weights,
            case.experts,
            case.max_tokens,
            max_topk=case.max_topk,
            use_logfmt=use_logfmt,
            masked=case.masked if masked is None else masked,
        )

    def on(self, rank: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This rank's x, topk_idx, topk_weights and y."""
        given = (self.xs[rank], self.topk_idx[rank], self.topk_weights[rank], self.ys[rank])
        x, topk_idx, topk_weights, y = (each.to(device) for each in given)
        return x, topk_idx, topk_weights, y


def receive_options(case: LlCase) -> dict:
    """Keywords of dispatch_receive."""
    options = FORMATS[case.rows]
    return {"num_topk": case.k, **{name: options[name] for name in ("use_fp8", "use_ue8m0") if name in options}}


def _dense(rows: Tensor) -> Tensor:
    """As torch wants it for a view as bytes; contiguous() leaves the strides of an empty tensor."""
    return rows.clone(memory_format=torch.contiguous_format)


def check_received(inputs: LlInputs, rank: int, got: LlDispatched) -> None:
    """Everything that a dispatch returns, bit for bit, where it is defined."""
    want = inputs.received[rank]
    block = (inputs.case.local_experts, inputs.case.ranks * inputs.case.max_tokens)
    assert got.recv_x.shape == want.recv_x.shape
    assert got.recv_x.is_contiguous()
    assert same_bits(got.recv_count, want.recv_count)
    assert same_bits(got.handle.recv_count, want.recv_count)
    assert same_bits(got.handle.layout_range, want.handle.layout_range)
    pairs = [
        (got.recv_x, want.recv_x),
        (got.handle.src_info, want.handle.src_info),
        (got.handle.send_slot, want.handle.send_slot),
    ]
    assert (got.recv_scales is None) == (want.recv_scales is None)
    if got.recv_scales is not None and want.recv_scales is not None:
        assert got.recv_scales.stride() == (block[1] * got.recv_scales.shape[2], 1, block[1])
        pairs.append((got.recv_scales, want.recv_scales))
    for expert, count in enumerate(want.recv_count.tolist()):
        for mine, reference in pairs:
            assert mine.shape[:2] == block
            assert same_bits(_dense(mine[expert, :count]), _dense(reference[expert, :count]))
    has_choice = (want.handle.choice_rows >= 0).any(1)
    assert same_bits(got.handle.choice_rows.cpu()[has_choice], want.handle.choice_rows[has_choice])
    assert got.handle.choice_rows.shape == want.handle.choice_rows.shape


def send(buffer: LowLatencyBuffer, inputs: LlInputs) -> Tensor:
    """Epoch of this rank's dispatch."""
    x, topk_idx, _, _ = inputs.on(buffer.rank, buffer.device)
    return buffer.dispatch_send(x, topk_idx, **FORMATS[inputs.case.rows])


def receive(buffer: LowLatencyBuffer, inputs: LlInputs, epoch: Tensor) -> LlDispatched:
    got = buffer.dispatch_receive(epoch, **receive_options(inputs.case))
    check_received(inputs, buffer.rank, got)
    return got


def send_home(buffer: LowLatencyBuffer, inputs: LlInputs, handle: LlHandle, use_logfmt: bool = False) -> Tensor:
    """Epoch of this rank's combine."""
    *_, y = inputs.on(buffer.rank, buffer.device)
    return buffer.combine_send(y, handle, num_topk=inputs.case.k, use_logfmt=use_logfmt)


def receive_home(buffer: LowLatencyBuffer, inputs: LlInputs, epoch: Tensor, use_logfmt: bool = False) -> None:
    _, topk_idx, topk_weights, _ = inputs.on(buffer.rank, buffer.device)
    got = buffer.combine_receive(epoch, topk_idx, topk_weights, use_logfmt=use_logfmt)
    assert same_bits(got, inputs.combined(use_logfmt)[buffer.rank])


def check_case(buffer: LowLatencyBuffer, inputs: LlInputs, dispatches: int = 1, use_logfmt: bool = False) -> None:
    """Dispatches of the same tokens, the slots move on with each; a combine of the last one; both in one call each."""
    for _ in range(dispatches):
        got = receive(buffer, inputs, send(buffer, inputs))
    receive_home(buffer, inputs, send_home(buffer, inputs, got.handle, use_logfmt), use_logfmt)
    x, topk_idx, topk_weights, y = inputs.on(buffer.rank, buffer.device)
    got = buffer.dispatch(x, topk_idx, **FORMATS[inputs.case.rows])
    check_received(inputs, buffer.rank, got)
    combined = buffer.combine(y, got.handle, topk_idx, topk_weights, use_logfmt=use_logfmt)
    assert same_bits(combined, inputs.combined(use_logfmt)[buffer.rank])


def make_buffer(group: ProcessGroup, config: LlConfig, device: str, timeout_s: float = 30) -> LowLatencyBuffer:
    """The buffer for "cpu" or "cuda", the rank's current one."""
    if device == "cpu":
        return GlooLowLatencyBuffer(group, config, timeout_s=timeout_s)
    from cutehop.comm.ll_buffer import CudaLowLatencyBuffer

    return CudaLowLatencyBuffer(group, config, timeout_s=timeout_s, num_sms=8)


def everyone(group: ProcessGroup) -> None:
    """Returns when all ranks have called and their GPU work is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    Meeting(group, 60).meet("test")
