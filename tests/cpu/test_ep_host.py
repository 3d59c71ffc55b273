"""The host's part of a call on a GPU, here over CPU tensors: what is launched, and what a warm call still refuses.

Buffers remember the signatures that passed their checks. Whatever is no part of a signature has to be looked at in
every call: the tests make a good call first, so that the bad one behind it is warm.
"""

from __future__ import annotations

import ctypes
import threading
import time
from contextlib import nullcontext
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl, for the names of kernel parameters")

from cutehop.comm import checks, kernels, memory
from cutehop.comm.buffer import CudaBuffer
from cutehop.comm.config import EpConfig
from cutehop.comm.gloo import GlooBuffer
from cutehop.comm.kernels import combine_receive, combine_send, receive, send, verbs
from cutehop.comm.kernels import config as sizes
from cutehop.comm.ll_buffer import CudaLowLatencyBuffer
from cutehop.comm.ll_config import LlConfig
from cutehop.ops import _ep_cuda
from cutehop.ref import ep as ref

CONFIG = EpConfig(1, 256, 48, 4, max_topk=8, scales="f32")
LL_CONFIG = LlConfig(1, 256, 48, 4, max_topk=8)
STREAM, WORST = 7, 48
ARGUMENTS = {
    "send_kernel": send.SendArgs,
    "receive_kernel": receive.ReceiveArgs,
    "combine_send_kernel": combine_send.CombineSendArgs,
    "combine_receive_kernel": combine_receive.CombineReceiveArgs,
}


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Launches(list):
    """What kernels were launched with, oldest first: name, grid and parameters, those of the normal mode by name."""

    def kernel(self, name: str) -> SimpleNamespace:
        def launch(grid, stream, *values, smem_bytes=None):
            assert stream == STREAM
            call = SimpleNamespace(kernel=name, grid=grid, values=values)
            if name in ARGUMENTS:
                names = [field.name for field in (*fields(verbs.Group), *fields(ARGUMENTS[name]))]
                call.of = SimpleNamespace(**dict(zip(names, values, strict=True)))
                if name == "send_kernel" and call.of.x:
                    call.x = ctypes.string_at(call.of.x, call.of.tokens * call.of.row_bytes)
            self.append(call)

        return SimpleNamespace(launch=launch, bundle=SimpleNamespace(smem_bytes=232448))


@pytest.fixture
def launches(monkeypatch):
    """Buffers for GPUs work on CPU memory and kernels are only recorded."""
    made = Launches()
    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        monkeypatch.setattr(kernels, name, lambda config, stream, name=name: made.kernel(name))

    def open_heap(provider, group, nbytes, device, timeout_s, one_node):
        local = torch.zeros(nbytes, dtype=torch.uint8)
        return SimpleNamespace(local=local, bases=(local.data_ptr(),), destroy=lambda: None)

    zeros, properties = torch.zeros, SimpleNamespace(multi_processor_count=132, uuid="GPU")
    monkeypatch.setattr(memory, "open_heap", open_heap)
    monkeypatch.setattr(torch, "zeros", lambda *args, pin_memory=False, **kwargs: zeros(*args, **kwargs))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=STREAM, synchronize=int))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    return made


@pytest.fixture
def buffer(group, launches):
    made = CudaBuffer(group, CONFIG, device=torch.device("cpu"))
    yield made
    made.destroy()


@pytest.fixture
def low_latency(group, launches):
    made = CudaLowLatencyBuffer(group, LL_CONFIG, device=torch.device("cpu"))
    yield made
    made.destroy()


def arguments(n: int = 16, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor | None]:
    """Of dispatch, new tensors each time."""
    idx = torch.randint(4, (n, 4))
    _, per_expert, in_rank = ref.layout(idx, 4, 1)
    scales = torch.rand(2, n).t() if dtype.itemsize == 1 else None
    return [torch.randn(n, 256).to(dtype), scales, idx, torch.rand(n, 4), in_rank, per_expert]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_parameters_are_those_of_this_call(buffer, launches, dtype):
    buffer.dispatch(*arguments(dtype=dtype), num_worst_tokens=WORST)
    x, scales, idx, weights, in_rank, per_expert = given = arguments(dtype=dtype)
    launches.clear()
    got = buffer.dispatch(*given, num_worst_tokens=WORST, num_sms=5)
    sent, received = launches
    assert (sent.kernel, sent.grid, received.kernel, received.grid) == (
        "send_kernel", (5, 1, 1), "receive_kernel", (5, 1, 1),
    )  # fmt: skip
    matrix, src_idx, _, send_row = got.handle
    assert vars(sent.of).items() >= {
        "own": buffer._memory.local.data_ptr(), "rank": 0, "ranks": 1, "lists": 1, "tokens": 16,
        "is_token_in_rank": in_rank.data_ptr(), "per_expert": per_expert.data_ptr(), "experts_per_rank": 4,
        "x": x.data_ptr(), "row_bytes": 256 * dtype.itemsize, "scales": scales.data_ptr() if scales is not None else 0,
        "scale_words": 0 if scales is None else 2, "scale_row_stride": 0 if scales is None else 1,
        "scale_column_stride": 0 if scales is None else 16, "topk_idx": idx.data_ptr(), "topk_idx_bytes": 8,
        "topk_weights": weights.data_ptr(), "topk": 4, "send_row": send_row.data_ptr(), "matrix": matrix.data_ptr(),
        "recv_per_expert": got.num_recv_tokens_per_expert.data_ptr(), "ticket": 0, "out_rows": WORST,
        "max_recv_rows": 48, "max_topk": 8, "x_offset": buffer.layout.x.offset,
    }.items()  # fmt: skip
    assert vars(received.of).items() >= {
        "lists": 1, "matrix": matrix.data_ptr(), "src_idx": src_idx.data_ptr(), "out_rows": WORST,
        "x": got.recv_x.data_ptr(), "row_bytes": 256 * dtype.itemsize, "piece_bytes": 256 * dtype.itemsize,
        "scales": 0 if scales is None else got.recv_scales.data_ptr(), "scale_words": 0 if scales is None else 2,
        "topk_idx": got.recv_topk_idx.data_ptr(), "topk_idx_bytes": 8,
        "topk_weights": got.recv_topk_weights.data_ptr(), "topk": 4, "x_offset": buffer.layout.x.offset,
    }.items()  # fmt: skip


@pytest.mark.parametrize("late_s", [0, 0.01])
def test_a_dispatch_returns_the_rows_that_the_kernel_counts(buffer, launches, monkeypatch, late_s):
    """Words come one by one, in any order, soon or when the wait sleeps already."""
    choices = [5, 0, 7, 4]

    def count(ticket):
        for i, value in reversed([*enumerate([9, *choices])]):
            time.sleep(late_s)
            buffer._recv_counts[i] = ticket << 32 | value

    send = buffer._send.launch

    def launch(*args):
        send(*args)
        threads.append(threading.Thread(target=count, args=(launches[-1].of.ticket,)))
        threads[-1].start()

    threads: list[threading.Thread] = []
    monkeypatch.setattr(buffer._send, "launch", launch)
    for _ in range(2):
        got = buffer.dispatch(*arguments())
        threads.pop().join()
        assert len(got.recv_x) == launches[-1].of.out_rows == 9
        assert got.num_recv_tokens_per_expert_list == choices
        choices.reverse()


def test_counts_that_never_come_end_the_buffer(buffer, monkeypatch):
    monkeypatch.setattr(buffer._memory, "timeout_s", -4.99)
    with pytest.raises(RuntimeError, match="has not run; something before it blocks the stream"):
        buffer.dispatch(*arguments())
    with pytest.raises(RuntimeError, match="a call ended half way"):
        buffer.dispatch(*arguments(), num_worst_tokens=WORST)


def test_parameters_of_cached_dispatch_and_combine(buffer, launches):
    x, *others = arguments()
    got = buffer.dispatch(x, *others, num_worst_tokens=WORST)
    matrix, src_idx, _, send_row = (each.data_ptr() for each in got.handle)
    launches.clear()
    recv_x, _ = buffer.dispatch_cached(x, None, got.handle)
    y, bias = torch.zeros(WORST, 256).bfloat16(), torch.zeros(16, 256).bfloat16()
    combined_x, combined_weights = buffer.combine(y, got.handle, got.recv_topk_weights, None, bias, num_sms=3)
    sent, received, home, summed = launches
    assert vars(sent.of).items() >= {"lists": 0, "x": x.data_ptr(), "topk_idx": 0, "topk": 0, "send_row": 0}.items()
    assert vars(received.of).items() >= {"lists": 0, "src_idx": src_idx, "x": recv_x.data_ptr(), "topk": 0}.items()
    weights = got.recv_topk_weights.data_ptr()
    assert vars(home.of).items() >= {
        "matrix": matrix, "y": y.data_ptr(), "row_bytes": 512, "weights": weights, "topk": 4,
        "y_offset": buffer.layout.y.offset,
    }.items()  # fmt: skip
    assert vars(summed.of).items() >= {
        "matrix": matrix, "send_row": send_row, "tokens": 16, "out": combined_x.data_ptr(), "row_bytes": 512,
        "piece_bytes": 512, "bias_0": bias.data_ptr(), "bias_1": 0, "weights": combined_weights.data_ptr(), "topk": 4,
        "y_offset": buffer.layout.y.offset,
    }.items()  # fmt: skip
    assert [call.grid[0] for call in launches] == [16, 16, 3, 3]


def test_rows_in_place_are_not_copied(buffer, launches):
    x, *others = arguments()
    got = buffer.dispatch(x, *others, num_worst_tokens=WORST)
    launches.clear()
    buffer.dispatch_cached(buffer.dispatch_input(16), None, got.handle)
    buffer.dispatch(buffer.dispatch_input(16), *others, num_worst_tokens=WORST)
    sent = [call for call in launches if call.kernel == "send_kernel"]
    assert [(call.of.x, call.grid[0]) for call in sent] == [(0, 1), (0, 16)]


def test_a_combine_in_place_is_one_launch(buffer, launches):
    """It says itself that the outputs stand, unless there are weights to copy."""
    x, *others = arguments()
    got = buffer.dispatch(x, *others, num_worst_tokens=WORST)
    y = torch.zeros(WORST, 256).bfloat16()
    for rows, weights, names, sends in (
        (None, None, ["combine_receive_kernel"], 1),
        (None, got.recv_topk_weights, ["combine_send_kernel", "combine_receive_kernel"], 0),
        (y, None, ["combine_send_kernel", "combine_receive_kernel"], 0),
    ):
        given = buffer.combine_input(got.handle) if rows is None else rows
        launches.clear()
        buffer.combine(given, got.handle, weights)
        assert [launch.kernel for launch in launches] == names
        assert launches[-1].of.sends == sends
        assert launches[-1].of.max_recv_rows == buffer.config.recv_rows


def test_many_rows_from_elsewhere_are_copied_by_all_sms(buffer, launches, monkeypatch):
    """One CTA waits for their readers before; whatever else waits has the call's number."""
    x, *others = arguments()
    got = buffer.dispatch(x, *others, num_worst_tokens=WORST)
    y = torch.zeros(WORST, 256).bfloat16()
    calls = [
        (lambda x, sms: buffer.dispatch(x, *others, num_worst_tokens=WORST, num_sms=sms), x, buffer.dispatch_input),
        (lambda x, sms: buffer.dispatch_cached(x, None, got.handle, num_sms=sms), x, buffer.dispatch_input),
        (lambda y, sms: buffer.combine(y, got.handle, num_sms=sms), y, lambda n: buffer.combine_input(got.handle)),
    ]
    monkeypatch.setattr(sizes, "COPY_BYTES", 512)
    for call, rows, view in calls:
        ack = buffer.layout.combine_ack if rows is y else buffer.layout.dispatch_ack
        for sms, grids in ((3, [1, 132, 3]), (67, [67, 67]), (48, [48, 48])):
            launches.clear()
            call(rows, sms)
            assert [launch.grid[0] for launch in launches] == grids
            waits = [launch for launch in launches if launch.kernel == "wait_kernel"]
            assert [launch.values[-3] for launch in waits] == [ack.offset] * (sms == 3)
        written = view(len(rows))
        launches.clear()
        call(written, 3)
        assert max(launch.grid[0] for launch in launches) == 3


def test_rows_at_an_odd_address_are_copied_first(buffer, launches):
    x, *others = arguments()
    buffer.dispatch(x, *others, num_worst_tokens=WORST)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    assert shifted.data_ptr() % 16 == 2
    launches.clear()
    buffer.dispatch(shifted, *others, num_worst_tokens=WORST)
    assert launches[0].of.x % 16 == 0
    assert launches[0].x == x.view(torch.uint8).numpy().tobytes()


def test_a_warm_call_looks_at_views(buffer):
    x, *others = arguments()
    buffer.dispatch(x, *others, num_worst_tokens=WORST)
    view = buffer.dispatch_input(17)
    with pytest.raises(ValueError, match="rows begin 512 bytes into the view"):
        buffer.dispatch(view[1:], *others, num_worst_tokens=WORST)
    buffer.dispatch(view[:16], *others, num_worst_tokens=WORST)
    with pytest.raises(ValueError, match="stale view"):
        buffer.dispatch(view[:16], *others, num_worst_tokens=WORST)


def test_a_warm_call_looks_at_the_gpu_and_the_buffer(buffer, monkeypatch):
    given = arguments()
    buffer.dispatch(*given, num_worst_tokens=WORST)
    with pytest.raises(ValueError, match=r"num_sms 133, supported 1\.\.132"):
        buffer.dispatch(*given, num_worst_tokens=WORST, num_sms=133)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1)
    with pytest.raises(RuntimeError, match="the current device is cuda:1"):
        buffer.dispatch(*given, num_worst_tokens=WORST)
    buffer._memory._error[0] = 1
    with pytest.raises(RuntimeError):
        buffer.dispatch(*given, num_worst_tokens=WORST)
    buffer._memory._error[0] = 0
    buffer.destroy()
    with pytest.raises(RuntimeError, match="is destroyed"):
        buffer.dispatch(*given, num_worst_tokens=WORST)


def test_a_warm_low_latency_call_looks_at_epochs_and_addresses(low_latency, launches):
    x, topk_idx = torch.randn(16, 256).bfloat16(), torch.randint(4, (16, 4))
    weights = torch.rand(16, 4)
    for _ in range(2):
        epoch = low_latency.dispatch_send(x, topk_idx)
        got = low_latency.dispatch_receive(epoch, num_topk=4)
    assert got.recv_x.data_ptr() in launches[-1].values
    assert epoch.data_ptr() in launches[-1].values
    with pytest.raises(RuntimeError, match="the epoch is of no operation outstanding"):
        low_latency.dispatch_receive(epoch, num_topk=4)
    y = torch.zeros(got.recv_x.shape, dtype=torch.bfloat16)
    out = torch.empty(16 * 256 + 8, dtype=torch.bfloat16)
    assert low_latency.combine(y, got.handle, topk_idx, weights, out=out[8:].view(16, 256)).data_ptr() % 16 == 0
    with pytest.raises(ValueError, match="must be a multiple of 16"):
        low_latency.combine(y, got.handle, topk_idx, weights, out=out[1:-7].view(16, 256))


@pytest.mark.parametrize(
    ("position", "change", "error", "message"),
    [
        (0, lambda t: t.to("meta"), ValueError, "x is on meta, the buffer is on cpu"),
        (0, lambda t: t.float(), TypeError, "x is torch.float32"),
        (0, lambda t: t.repeat(1, 2)[:, ::2], ValueError, "x has strides"),
        (0, lambda t: t.view(-1), ValueError, r"x has shape \(4096,\)"),
        (2, lambda t: t[:15], ValueError, "rows of topk_idx 15, needs 16"),
        (2, lambda t: t.t().contiguous().t(), ValueError, "topk_idx has strides"),
        (3, lambda t: None, ValueError, "topk_idx without topk_weights"),
        (5, lambda t: t.long(), TypeError, "num_tokens_per_expert is torch.int64"),
    ],
)
def test_a_warm_call_sees_another_signature(group, position, change, error, message):
    made = GlooBuffer(group, CONFIG)
    given = arguments()
    for _ in range(2):
        made.dispatch(*given, num_worst_tokens=WORST)
    bad = [change(each) if i == position else each for i, each in enumerate(given)]
    for _ in range(2):  # what failed once is not remembered
        with pytest.raises(error, match=message):
            made.dispatch(*bad, num_worst_tokens=WORST)
    with pytest.raises(ValueError, match="num_worst_tokens -1"):
        made.dispatch(*given, num_worst_tokens=-1)
    made.destroy()


def test_once_calls_its_check_for_new_signatures_only(monkeypatch):
    monkeypatch.setattr(checks, "_MOST_REMEMBERED", 3)
    seen = []
    once = checks.Once(lambda *given: seen.append(given), "fixed")
    first = torch.zeros(2, 3)
    for tensors, option in (((first, None), 1), ((torch.ones(2, 3), None), 1), ((first, None), 2), ((None, first), 1)):
        once(tensors, option)
    assert seen == [("fixed", first, None, 1), ("fixed", first, None, 2), ("fixed", None, first, 1)]
    once((first.double(), None), 1)  # one too many: it begins anew
    once((first, None), 1)
    assert len(seen) == 5


@pytest.mark.parametrize(("experts", "ranks"), [(33, 33), (8200, 8)])
def test_layout_refuses_what_its_kernel_cannot_count(experts, ranks):
    ids, outputs = torch.zeros((1, 1), dtype=torch.int64), torch.zeros(0)
    names = ("num_tokens_per_rank", "num_tokens_per_expert", "is_token_in_rank")
    with pytest.raises(ValueError, match=f"ep_layout: {ranks} ranks and {experts} experts, supported on CUDA 32 ranks"):
        _ep_cuda.layout(ids, experts, ranks, **dict.fromkeys(names, outputs))


def test_a_device_gets_its_index(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert [memory.cuda_device(each) for each in (None, "cuda", torch.device("cuda"))] == [torch.device("cuda", 3)] * 3
    assert memory.cuda_device("cuda:1") == torch.device("cuda", 1)
