"""The low-latency ops as torch sees them, and what buffers refuse, on one rank in this process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from cutehop.comm import base, ll_base, ll_outputs
from cutehop.comm.ll_config import LlConfig
from cutehop.comm.ll_gloo import GlooLowLatencyBuffer
from cutehop.ops import ep_ll  # noqa: F401  (registers the ops)
from tests.ep_ll_cases import CASES, LlCase, LlInputs, check_case, check_received, same_bits

ops = torch.ops.cutehop
CPU = torch.device("cpu")
ONE = LlCase(ranks=1, routing="some", rows="bf16", spare_topk=1)


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def buffer(group):
    made = GlooLowLatencyBuffer(group, ONE.config())
    yield made
    made.destroy()


def operands(buffer: GlooLowLatencyBuffer, name: str) -> dict:
    """Correct arguments of an op, by name. A receive gets the epoch of a send made for it."""
    x, topk_idx, weights, y = LlInputs(ONE).on(0, CPU)
    common = {"buffer": buffer.name}
    if name in ("ep_ll_dispatch", "ep_ll_dispatch_send"):
        return {"x": x, "topk_idx": topk_idx, "use_fp8": False, **common}
    epoch = ops.ep_ll_dispatch_send(x, topk_idx, buffer.name, use_fp8=False)
    if name == "ep_ll_dispatch_recv":
        return {"epoch": epoch, "num_topk": 4, "use_fp8": False, **common}
    _, _, *rest = ops.ep_ll_dispatch_recv(epoch, buffer.name, 4, use_fp8=False)
    names = ("recv_count", "src_info", "layout_range", "send_slot", "choice_rows")
    handle = dict(zip(names, rest, strict=True))
    if name == "ep_ll_combine_send":
        return {"y": y, **handle, "num_topk": 4, **common}
    if name == "ep_ll_combine":
        return {"y": y, **handle, "topk_idx": topk_idx, "topk_weights": weights, **common}
    epoch = ops.ep_ll_combine_send(y, **handle, num_topk=4, buffer=buffer.name)
    return {"epoch": epoch, "topk_idx": topk_idx, "topk_weights": weights, **common}


HALVES = ["ep_ll_dispatch_send", "ep_ll_dispatch_recv", "ep_ll_combine_send", "ep_ll_combine_recv"]
OPS = ["ep_ll_dispatch", "ep_ll_combine", *HALVES]


class Still(GlooLowLatencyBuffer):
    """Moves nothing. opcheck calls an op several times, with copies of its arguments, and wants the same each time."""

    def _check_room(self, op):
        """There is always room."""

    def _check_outstanding(self, op, epoch):
        self._outstanding[epoch.data_ptr()] = 0, epoch

    def _send(self, terms, messages):
        return torch.ones(1, dtype=torch.int32)

    def _dispatch_receive(self, epoch, out, **options):
        for each in (out.recv_x.view(torch.uint8), out.recv_scales, *out.handle):
            if each is not None:
                each.zero_()

    def _combine_receive(self, epoch, topk_idx, topk_weights, out, *, use_logfmt, wait_stats):
        out.zero_()


@pytest.mark.parametrize(
    ("op", "options"),
    # opcheck computes with results, which torch cannot in fp8: test_fakes_of_results looks at those.
    [*((op, {}) for op in OPS), (HALVES[0], {"use_fp8": True}), (HALVES[0], {"use_fp8": True, "use_ue8m0": True})],
)
def test_opcheck(group, op, options):
    still = Still(group, ONE.config())
    arguments = operands(still, op)
    torch.library.opcheck(getattr(ops, op).default, (), {**arguments, **options})
    still.destroy()


@pytest.mark.parametrize("options", [{"use_fp8": False}, {}, {"use_ue8m0": True}])
def test_fakes_of_results(buffer, options):
    """Shapes, dtypes and strides while compiling are those of a call."""
    arguments = operands(buffer, "ep_ll_dispatch_send")
    epoch = ops.ep_ll_dispatch_send(**{**arguments, "use_fp8": True, **options})
    real = ops.ep_ll_dispatch_recv(epoch, buffer.name, 4, **options)
    whole = ops.ep_ll_dispatch(**{**arguments, "use_fp8": True, **options})
    with FakeTensorMode() as mode:
        fake = ops.ep_ll_dispatch_recv(mode.from_tensor(epoch), buffer.name, 4, **options)
        given = {n: mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for n, a in arguments.items()}
        fake_whole = ops.ep_ll_dispatch(**{**given, "use_fp8": True, **options})
    assert len(real) == len(fake) == len(whole) == len(fake_whole) == 7
    for r, f in zip((*real, *whole), (*fake, *fake_whole)):
        assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_on_one_rank(group, case):
    case = replace(case, ranks=1)
    made = GlooLowLatencyBuffer(group, case.config())
    check_case(made, LlInputs(case), dispatches=2)
    made.destroy()


@pytest.mark.parametrize("rows", ["bf16", "f32", "ue8m0"])
def test_ops_do_what_the_buffer_does(group, rows):
    case = replace(ONE, rows=rows)
    inputs, made = LlInputs(case), GlooLowLatencyBuffer(group, case.config())
    x, topk_idx, weights, y = inputs.on(0, CPU)
    options = {"use_fp8": rows != "bf16", "use_ue8m0": rows == "ue8m0"}
    epoch = ops.ep_ll_dispatch_send(x, topk_idx, made.name, **options)
    recv_x, scales, count, src_info, layout_range, *places = ops.ep_ll_dispatch_recv(epoch, made.name, 4, **options)
    assert scales.numel() or rows == "bf16"
    handle = ll_outputs.LlHandle(src_info, layout_range, count, *places)
    check_received(inputs, 0, ll_outputs.LlDispatched(recv_x, scales if scales.numel() else None, count, handle))
    epoch = ops.ep_ll_combine_send(y, *handle, made.name, 4)
    assert same_bits(ops.ep_ll_combine_recv(epoch, topk_idx, weights, made.name), inputs.combined()[0])
    got = ops.ep_ll_dispatch(x, topk_idx, made.name, **options)
    recv_x, scales, count, src_info, layout_range, *places = got
    handle = ll_outputs.LlHandle(src_info, layout_range, count, *places)
    check_received(inputs, 0, ll_outputs.LlDispatched(recv_x, scales if scales.numel() else None, count, handle))
    assert same_bits(ops.ep_ll_combine(y, *handle, topk_idx, weights, made.name), inputs.combined()[0])
    small = y * 2.0**-14
    epoch = ops.ep_ll_combine_send(small, *handle, made.name, 4, use_logfmt=True)
    combined = ops.ep_ll_combine_recv(epoch, topk_idx, weights, made.name, use_logfmt=True)
    inputs.ys = [small]
    assert same_bits(combined, inputs.combined(use_logfmt=True)[0])
    assert not same_bits(combined, inputs.combined()[0])
    made.destroy()


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(len(tensor), 2 * tensor.shape[1], dtype=tensor.dtype)[:, ::2].copy_(tensor)


X, IDX, WEIGHTS = torch.zeros(8, 256).bfloat16(), torch.zeros(8, 4, dtype=torch.int64), torch.zeros(8, 4)
Y, SLOT, EPOCH = torch.zeros(4, 16, 256).bfloat16(), torch.zeros(4, 16, dtype=torch.int32), torch.ones(1).int()
WHOLE, WHOLE_HOME, SEND, RECV, HOME, SUM = OPS

# (op, argument, bad value, error, what its message says)
BAD = [
    (SEND, {"x": X.float()}, TypeError, "x is torch.float32, supported torch.bfloat16"),
    (SEND, {"x": X[0]}, ValueError, r"x has shape \(256,\)"),
    (SEND, {"x": X[:, :128].contiguous()}, ValueError, "columns of x 128, needs 256; make the buffer for this"),
    (SEND, {"x": X[:3]}, ValueError, "rows of topk_idx 8, needs 3"),
    (SEND, {"x": strided(X)}, ValueError, r"x has strides \(512, 2\), must be contiguous"),
    (SEND, {"x": X.repeat(3, 1), "topk_idx": IDX.repeat(3, 1)}, ValueError, r"24 tokens, the buffer holds 0\.\.16"),
    (SEND, {"topk_idx": IDX.float()}, TypeError, "topk_idx is torch.float32"),
    (SEND, {"topk_idx": IDX.repeat(1, 2)}, ValueError, r"8 choices per token, the buffer holds 1\.\.5"),
    (SEND, {"topk_idx": strided(IDX)}, ValueError, "topk_idx has strides"),
    (SEND, {"round_scale": True}, ValueError, "round_scale True with use_fp8 False"),
    (SEND, {"use_ue8m0": True}, ValueError, "use_ue8m0 True with use_fp8 False"),
    (RECV, {"epoch": EPOCH.long()}, TypeError, "epoch is torch.int64"),
    (RECV, {"epoch": EPOCH.repeat(2)}, ValueError, r"epoch has shape \(2,\), needs \(1,\)"),
    (RECV, {"num_topk": 6}, ValueError, "6 choices per token"),
    (HOME, {"y": Y.half()}, TypeError, "y is torch.float16"),
    (HOME, {"y": Y[:, :9].contiguous()}, ValueError, r"y has shape \(4, 9, 256\), needs \(4, 16, 256\)"),
    (HOME, {"y": Y.transpose(0, 1).contiguous().transpose(0, 1)}, ValueError, "y has strides"),
    (HOME, {"send_slot": SLOT.long()}, TypeError, "send_slot is torch.int64"),
    (HOME, {"choice_rows": SLOT}, ValueError, r"choice_rows has shape \(4, 16\), needs \(16, 5\)"),
    (HOME, {"src_info": SLOT[:3]}, ValueError, r"src_info has shape \(3, 16\)"),
    (HOME, {"recv_count": EPOCH}, ValueError, r"recv_count has shape \(1,\), needs \(4,\)"),
    (HOME, {"num_topk": 0}, ValueError, "0 choices per token"),
    (WHOLE, {"x": X.float()}, TypeError, "x is torch.float32"),
    (WHOLE_HOME, {"y": Y.half()}, TypeError, "y is torch.float16"),
    (WHOLE_HOME, {"choice_rows": SLOT}, ValueError, r"choice_rows has shape \(4, 16\)"),
    (WHOLE_HOME, {"topk_weights": WEIGHTS[:3]}, ValueError, "rows of topk_weights 3, needs 8"),
    (SUM, {"topk_weights": WEIGHTS.double()}, TypeError, "topk_weights is torch.float64"),
    (SUM, {"topk_weights": WEIGHTS[:3]}, ValueError, "rows of topk_weights 3, needs 8"),
    (SUM, {"topk_weights": WEIGHTS[:, :3].contiguous()}, ValueError, "columns of topk_weights 3, needs 4"),
    *(
        (op, {"buffer": "nobody"}, ValueError, "low-latency buffer 'nobody' does not exist, living ones: ll")
        for op in OPS
    ),
]


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(("op", "changes", "error", "message"), BAD)
def test_bad_arguments_raise(buffer, op, changes, error, message, compiling):
    given = {**operands(buffer, op), **changes}
    before = buffer.outstanding
    if compiling:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = {n: mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for n, a in given.items()}
            with pytest.raises(error, match=message):
                getattr(ops, op)(**fakes)
    else:
        with pytest.raises(error, match=f"{op}|buffer") as caught:
            getattr(ops, op)(**given)
        assert caught.match(message)
    assert buffer.outstanding == before


def test_another_device_raises(buffer):
    with pytest.raises(ValueError, match="x is on meta, the buffer is on cpu"):
        buffer.dispatch_send(X.to("meta"), IDX, use_fp8=False)


def test_statistics_of_other_types_raise(buffer):
    epoch = buffer.dispatch_send(X, IDX.masked_fill(IDX == 0, -1))
    for stats, message in (
        ({"recv_stats": torch.zeros(4)}, "recv_stats is torch.float32"),
        ({"wait_stats": torch.zeros(1, dtype=torch.int32)}, "wait_stats is torch.int32"),
    ):
        with pytest.raises(TypeError, match=message):
            buffer.dispatch_receive(epoch, num_topk=4, **stats)
    with pytest.raises(ValueError, match=r"recv_stats has shape \(3,\), needs \(4,\); pass a value per local expert"):
        buffer.dispatch_receive(epoch, num_topk=4, recv_stats=torch.zeros(3, dtype=torch.int32))
    buffer.dispatch_receive(epoch, num_topk=4)


@pytest.mark.parametrize("op", [WHOLE, WHOLE_HOME, SEND, HOME, SUM])
def test_gradients_are_refused(buffer, op):
    given = operands(buffer, op)
    name = {WHOLE: "x", WHOLE_HOME: "topk_weights", SEND: "x", HOME: "y", SUM: "topk_weights"}[op]
    given[name] = given[name].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="low-latency ops do not have"):
        getattr(ops, op)(**given)


def test_names_and_lifetime(group):
    first = GlooLowLatencyBuffer(group, ONE.config(), name="few")
    assert ll_base.find("few") is first
    with pytest.raises(ValueError, match="buffer 'few' does not exist"):
        base.find("few")  # the normal mode has names of its own
    with pytest.raises(ValueError, match="name 'few' is taken"):
        GlooLowLatencyBuffer(group, ONE.config(), name="few")
    first.destroy()
    first.destroy()
    with pytest.raises(RuntimeError, match="buffer 'few' is destroyed"):
        first.dispatch_send(X, IDX)
    kept = [GlooLowLatencyBuffer(group, ONE.config(), name="few")]
    with pytest.warns(ResourceWarning, match="buffer 'few' was not destroyed"):
        kept.clear()
    with pytest.raises(ValueError, match=r"config\.ranks 2, the group has 1 ranks"):
        GlooLowLatencyBuffer(group, LlConfig(2, 128, 4, 2, 1))
