"""CudaBuffer and its ops with one rank, in this process: every case, opcheck, compile, streams, wrong arguments."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from cutehop.comm.base import find
from cutehop.comm.config import EpConfig
from tests.ep_cases import CASES, MAX_TOKENS, EpCase, EpInputs, check_case, same_bits
from tests.ep_gpu_work import guarded_outputs, open_buffer, poison_rows
from tests.ep_traffic import Sizes, Traffic, differ, round_trip

pytestmark = pytest.mark.gpu

ops = torch.ops.cutehop
CASE = EpCase(ranks=1, rows="f32", hidden=256, routing="some")


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def buffer(group):
    made = open_buffer(group, EpConfig(1, 1024, MAX_TOKENS, 4, max_topk=8, scales="f32"), "cuda")
    yield made
    made.destroy()


@pytest.mark.parametrize("case", [case for case in CASES if case.local_experts == 4], ids=str)
def test_case(buffer, case):
    poison_rows(buffer)
    with guarded_outputs():
        check_case(buffer, EpInputs(replace(case, ranks=1)))


@pytest.mark.parametrize("num_sms", [1, 2, 132])
def test_numbers_of_sms(buffer, num_sms):
    """The first CTA of several makes the lists and does not copy; a single one does both."""
    inputs = EpInputs(replace(CASE, tokens=(MAX_TOKENS,)))
    arguments = inputs.arguments(0, buffer.device)
    got = buffer.dispatch(*arguments, num_sms=num_sms)
    assert same_bits(got.recv_x, inputs.received[0].recv_x[0])
    again, _ = buffer.dispatch_cached(*arguments[:2], got.handle, num_sms=num_sms)
    assert same_bits(again, inputs.received[0].recv_x[0])
    combined, _ = buffer.combine(inputs.ys[0].cuda(), got.handle, num_sms=num_sms)
    assert same_bits(combined, inputs.combined(0, False)[0][0])


def test_calls_on_the_current_stream(buffer):
    """Behind what the stream does already, and from one stream to the next where the caller orders them."""
    streams, event = [torch.cuda.Stream(), torch.cuda.Stream()], torch.cuda.Event()
    event.record()
    wrong = []
    for seed in range(6):
        with torch.cuda.stream(streams[seed % 2]):
            event.wait()
            traffic = Traffic(Sizes((MAX_TOKENS,), hidden=512), seed, "cuda")
            torch.cuda._sleep(2_000_000)
            wrong.append(round_trip(buffer, traffic, MAX_TOKENS, cached=True))
            event.record()
    torch.cuda.synchronize()
    assert not any(wrong)


class Arguments:
    """Correct arguments of the ops, by name; with gradients wanted for all that can have one."""

    def __init__(self, buffer, worst: int = 0) -> None:
        inputs = EpInputs(replace(CASE, rows="bf16"))
        x, _, idx, weights, in_rank, per_expert = inputs.arguments(0, buffer.device)
        out = ops.ep_dispatch(x, None, idx, weights, in_rank, per_expert, buffer.name, worst)
        handle = {
            "rank_prefix_matrix": out[5], "recv_src_idx": out[6], "is_token_in_rank": in_rank, "send_row": out[7],
        }  # fmt: skip
        x, y, weights, recv_weights, bias = (
            each.detach().clone().requires_grad_() for each in (x, out[0], weights, out[3], x)
        )
        self.ep_dispatch = {
            "x": x, "scales": None, "topk_idx": idx, "topk_weights": weights, "is_token_in_rank": in_rank,
            "num_tokens_per_expert": per_expert, "buffer": buffer.name, "num_worst_tokens": len(out[0]),
        }  # fmt: skip
        self.ep_dispatch_cached = {"x": x, "scales": None, **handle, "buffer": buffer.name}
        self.ep_combine = {
            "y": y, "topk_weights": recv_weights, "bias_0": bias, "bias_1": bias, **handle, "buffer": buffer.name,
        }  # fmt: skip


@pytest.mark.parametrize("op", ["ep_dispatch", "ep_dispatch_cached", "ep_combine"])
def test_opcheck(buffer, op):
    torch.library.opcheck(getattr(ops, op).default, (), getattr(Arguments(buffer), op))


def test_opcheck_one_byte_rows(buffer):
    x, scales, *rest = EpInputs(CASE).arguments(0, buffer.device)
    x = x.view(torch.uint8)  # opcheck computes with its inputs, which torch cannot in fp8
    torch.library.opcheck(ops.ep_dispatch.default, (x, scales, *rest, buffer.name))


def test_compiled_layer(buffer):
    """fullgraph, over the static form; sizes of the inputs may change between calls."""

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def layer(x, idx, weights, factor):
        _, per_expert, in_rank = ops.ep_layout(idx, 4, 1)
        recv_x, _, _, recv_weights, _, *handle = ops.ep_dispatch(
            x, None, idx, weights, in_rank, per_expert, buffer.name, MAX_TOKENS
        )
        prefix, src, row = handle
        outgoing = (recv_weights + 1) * factor.float()
        return ops.ep_combine(recv_x * factor, outgoing, None, None, prefix, src, in_rank, row, buffer.name)

    for n in (MAX_TOKENS, 17, 2):
        traffic = Traffic(Sizes((n,), hidden=512), n, "cuda")
        x, _, idx, weights, *_ = traffic.arguments(0)
        for got, want in zip(layer(x, idx, weights, traffic.factor[0]), traffic.combined(0, 0)):
            assert not differ(got, want)


def test_wrong_arguments_take_nothing_away(buffer):
    inputs = EpInputs(CASE)
    x, *others = inputs.arguments(0, buffer.device)
    for change, error, message in (
        ({"x": x.cpu()}, ValueError, "x is on cpu, the buffer is on cuda:0"),
        ({"x": x[:, ::2]}, ValueError, "must be contiguous"),
        ({"x": x.float()}, TypeError, "x is torch.float32"),
        ({"num_sms": 1000}, ValueError, "num_sms 1000, supported 1..132"),
        ({"num_worst_tokens": -1}, ValueError, "num_worst_tokens -1"),
    ):
        with pytest.raises(error, match=message):
            buffer.dispatch(*[change.pop("x", x), *others], **change)
    check_case(buffer, inputs)


def test_too_few_rows_raise(group):
    """num_worst_tokens below the number that arrives: told by the next call, or by check() after the kernels."""
    made = open_buffer(group, CASE.config(), "cuda", timeout_s=5)
    inputs = EpInputs(replace(CASE, routing="random"))
    made.dispatch(*inputs.arguments(0, made.device), num_worst_tokens=15)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="rank 0 receives 16 rows, the limit is 15; the call is lost"):
        made.check()
    with pytest.raises(RuntimeError, match="the call is lost"):
        made.dispatch_input(1)
    made.destroy()


def test_names_and_warnings(group):
    kept = [open_buffer(group, CASE.config(), "cuda")]
    name = kept[0].name
    assert find(name) is kept[0]
    with pytest.warns(ResourceWarning, match=f"buffer '{name}' was not destroyed"):
        kept.clear()
    with pytest.raises(ValueError, match="does not exist"):
        find(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_sms": 0}, "num_sms 0, supported 1"), ({"timeout_s": 0}, "timeout_s 0, must be positive")],
)
def test_bad_options(group, change, message):
    with pytest.raises(ValueError, match=message):
        open_buffer(group, CASE.config(), "cuda", **change)
