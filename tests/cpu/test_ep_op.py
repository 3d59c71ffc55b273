"""The expert-parallel ops as torch sees them, and what buffers refuse, on one rank in this process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from cutehop.comm.base import find
from cutehop.comm.gloo import GlooBuffer
from cutehop.ref import ep as ref
from tests.ep_cases import CASES, MAX_TOKENS, EpCase, EpInputs, check_case, same_bits

ops = torch.ops.cutehop
CPU = torch.device("cpu")
ONE = EpCase(ranks=1, rows="f32", routing="some")


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def buffer(group):
    made = GlooBuffer(group, ONE.config())
    yield made
    made.destroy()


class Arguments:
    """Correct arguments of the ops for bf16 rows, by name; `call` changes some of them."""

    def __init__(self, buffer: GlooBuffer) -> None:
        inputs = EpInputs(replace(ONE, rows="bf16"))
        x, _, idx, weights, in_rank, per_expert = inputs.arguments(0, CPU)
        layout = {"is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
        self.of = {
            "ep_layout": {"topk_idx": idx, "num_experts": 4, "num_ranks": 1},
            "ep_dispatch": {"x": x, "scales": None, "topk_idx": idx, "topk_weights": weights, **layout},
        }
        out = ops.ep_dispatch(**self.of["ep_dispatch"], buffer=buffer.name)
        handle = {
            "rank_prefix_matrix": out[5], "recv_src_idx": out[6], "is_token_in_rank": in_rank, "send_row": out[7],
        }  # fmt: skip
        bias = torch.ones_like(x)
        self.of["ep_dispatch_cached"] = {"x": x, "scales": None, **handle}
        self.of["ep_combine"] = {"y": out[0], "topk_weights": out[3], "bias_0": bias, "bias_1": bias, **handle}
        for name in ("ep_dispatch", "ep_dispatch_cached", "ep_combine"):
            self.of[name]["buffer"] = buffer.name

    def call(self, op: str, **changes: object) -> object:
        return getattr(ops, op)(**{**self.of[op], **changes})


@pytest.fixture
def arguments(buffer):
    return Arguments(buffer)


def differentiable(arguments: dict) -> dict:
    """Gradients wanted for all that can have one."""
    float_names = ("x", "y", "topk_weights", "bias_0", "bias_1")
    return {
        n: a.detach().clone().requires_grad_() if n in float_names and a is not None else a
        for n, a in arguments.items()
    }


@pytest.mark.parametrize(
    ("op", "changes"),
    [
        ("ep_layout", {}),
        ("ep_dispatch", {}),
        ("ep_dispatch", {"topk_idx": None, "topk_weights": None}),
        ("ep_dispatch_cached", {}),
        ("ep_combine", {}),
        ("ep_combine", {"topk_weights": None, "bias_0": None, "bias_1": None}),
    ],
)
def test_opcheck(arguments, op, changes):
    torch.library.opcheck(getattr(ops, op).default, (), differentiable({**arguments.of[op], **changes}))


def test_opcheck_static_form(arguments):
    received = len(arguments.of["ep_combine"]["recv_src_idx"])  # no more, since opcheck compares undefined rows too
    given = {**differentiable(arguments.of["ep_dispatch"]), "num_worst_tokens": received}
    torch.library.opcheck(ops.ep_dispatch.default, (), given)


def test_opcheck_one_byte_rows(buffer):
    x, scales, *rest = EpInputs(ONE).arguments(0, CPU)
    x = x.view(torch.uint8)  # opcheck computes with its inputs, which torch cannot in fp8
    torch.library.opcheck(ops.ep_dispatch.default, (x, scales, *rest, buffer.name))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_on_one_rank(group, case):
    case = replace(case, ranks=1)
    made = GlooBuffer(group, case.config())
    check_case(made, EpInputs(case))
    made.destroy()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout(case):
    case = replace(case, ranks=4)
    for idx in EpInputs(case).topk_idx:
        got, want = ops.ep_layout(idx, case.experts, 4), ref.layout(idx, case.experts, 4)
        assert all(same_bits(g, w) for g, w in zip(got, want))


def test_absent_results_have_one_dimension(arguments):
    out = arguments.call("ep_dispatch", topk_idx=None, topk_weights=None)
    assert [tuple(each.shape) for each in out[1:4]] == [(0,), (0,), (0,)]
    assert arguments.call("ep_combine", topk_weights=None)[1].shape == (0,)
    assert arguments.call("ep_dispatch_cached")[1].shape == (0,)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(len(tensor), 2 * tensor.shape[1], dtype=tensor.dtype)[:, ::2].copy_(tensor)


X, IDX, WEIGHTS = torch.zeros(16, 256).bfloat16(), torch.zeros(16, 4, dtype=torch.int64), torch.zeros(16, 4)
FP8, SCALES = X.to(torch.float8_e4m3fn), torch.zeros(16, 2)

# (op, argument, bad value, error, what its message says)
BAD_TYPES = [
    ("ep_layout", {"topk_idx": IDX.float()}, TypeError, "topk_idx is torch.float32"),
    ("ep_dispatch", {"x": X.float()}, TypeError, "x is torch.float32, supported torch.bfloat16 and 1-byte"),
    ("ep_dispatch", {"x": X > 0}, TypeError, "x is torch.bool"),
    ("ep_dispatch", {"x": FP8, "scales": SCALES.double()}, TypeError, "scales is torch.float64"),
    ("ep_dispatch", {"scales": SCALES}, ValueError, "scales with bfloat16 x"),
    ("ep_dispatch", {"x": FP8, "scales": SCALES[0]}, ValueError, r"scales has shape \(2,\)"),
    ("ep_dispatch", {"x": X[0]}, ValueError, r"x has shape \(256,\)"),
    ("ep_dispatch", {"x": X[:9]}, ValueError, "rows of topk_idx 16, needs 9"),
    ("ep_dispatch", {"topk_weights": None}, ValueError, "topk_idx without topk_weights"),
    ("ep_dispatch", {"topk_idx": None}, ValueError, "topk_weights without topk_idx"),
    ("ep_dispatch", {"topk_weights": WEIGHTS[:, :3]}, ValueError, "columns of topk_weights 3, needs 4"),
    ("ep_dispatch", {"topk_weights": WEIGHTS.double()}, TypeError, "topk_weights is torch.float64"),
    ("ep_dispatch", {"is_token_in_rank": torch.ones(16, 1)}, TypeError, "is_token_in_rank is torch.float32"),
    ("ep_dispatch", {"is_token_in_rank": torch.ones(3, 1).bool()}, ValueError, "is_token_in_rank 3, needs 16"),
    ("ep_dispatch", {"num_tokens_per_expert": IDX}, TypeError, "num_tokens_per_expert is torch.int64"),
    ("ep_dispatch", {"num_worst_tokens": -1}, ValueError, "num_worst_tokens -1, at least 0"),
    ("ep_dispatch_cached", {"x": X[:9]}, ValueError, "rows of x 9, needs 16"),
    ("ep_dispatch_cached", {"send_row": IDX}, TypeError, "send_row is torch.int64"),
    ("ep_dispatch_cached", {"recv_src_idx": IDX.int()}, ValueError, r"recv_src_idx has shape \(16, 4\), needs \(m,\)"),
    ("ep_combine", {"y": FP8}, TypeError, "y is torch.float8_e4m3fn"),
    ("ep_combine", {"y": X[:3]}, ValueError, "rows of y 3, needs"),
    ("ep_combine", {"topk_weights": WEIGHTS[:3]}, ValueError, "rows of topk_weights 3"),
    ("ep_combine", {"bias_0": X[:3]}, ValueError, "rows of bias_0 3, needs 16"),
    ("ep_combine", {"bias_1": X[:, :8]}, ValueError, "columns of bias_1 8, needs 256"),
    ("ep_combine", {"bias_1": X.half()}, TypeError, "bias_1 is torch.float16"),
]
BAD_FITS = [
    ("ep_layout", {"topk_idx": IDX.expand(16, 4).repeat(1, 9)}, ValueError, r"36 choices per token, supported 1\.\.32"),
    ("ep_layout", {"num_ranks": 3}, ValueError, "4 experts on 3 ranks"),
    ("ep_dispatch", {"x": strided(X)}, ValueError, r"x has strides \(512, 2\), must be contiguous"),
    ("ep_dispatch", {"x": X[:, :4].contiguous()}, ValueError, "a row of x has 8 bytes, needs a multiple of 16"),
    ("ep_dispatch", {"x": X.repeat(1, 2)}, ValueError, r"1024 bytes, needs a multiple of 16 in 16\.\.512"),
    ("ep_dispatch", {"x": FP8, "scales": SCALES.repeat(1, 9)}, ValueError, "scales have 18 columns"),
    ("ep_dispatch", {"topk_idx": strided(IDX)}, ValueError, "topk_idx has strides"),
    ("ep_dispatch", {"topk_idx": None, "topk_weights": None, "num_worst_tokens": 99}, ValueError, "without topk_idx"),
    ("ep_dispatch", {"topk_idx": IDX.repeat(1, 3), "topk_weights": WEIGHTS.repeat(1, 3)}, ValueError, "12 choices"),
    ("ep_dispatch", {"is_token_in_rank": torch.ones(16, 2).bool()}, ValueError, "has 2 ranks, the buffer has 1"),
    ("ep_dispatch", {"num_tokens_per_expert": IDX[:, 0].int()}, ValueError, "16 experts, the buffer is for 4"),
    ("ep_dispatch_cached", {"rank_prefix_matrix": torch.ones(2, 2).int()}, ValueError, r"needs \(1, 1\) and \(n, 1\)"),
    ("ep_combine", {"buffer": "nobody"}, ValueError, "buffer 'nobody' does not exist, living ones: ep"),
]


@pytest.mark.parametrize(("op", "changes", "error", "message"), BAD_TYPES + BAD_FITS)
def test_bad_arguments_raise(arguments, op, changes, error, message):
    with pytest.raises(error, match=f"{op}|buffer") as caught:
        arguments.call(op, **changes)
    assert caught.match(message)


@pytest.mark.parametrize(("op", "changes", "error", "message"), BAD_TYPES)
def test_bad_arguments_raise_while_compiling(arguments, op, changes, error, message):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = {**arguments.of[op], **changes}
        fakes = {n: mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for n, a in given.items()}
        with pytest.raises(error, match=message):
            getattr(ops, op)(**fakes)


def test_too_many_tokens_raise(arguments):
    n = MAX_TOKENS + 1
    x, idx, weights = torch.zeros(n, 256).bfloat16(), torch.zeros(n, 4, dtype=torch.int64), torch.zeros(n, 4)
    with pytest.raises(ValueError, match=r"49 tokens, the buffer holds 0\.\.48"):
        arguments.call("ep_dispatch", x=x, topk_idx=idx, topk_weights=weights, is_token_in_rank=torch.ones(n, 1).bool())


def test_another_device_raises(buffer):
    x, *others = EpInputs(replace(ONE, rows="bf16")).arguments(0, CPU)
    with pytest.raises(ValueError, match="x is on meta, the buffer is on cpu"):
        buffer.dispatch(x.to("meta"), *others)


def test_names(group):
    first = GlooBuffer(group, ONE.config(), name="tokens")
    assert find("tokens") is first
    with pytest.raises(ValueError, match="name 'tokens' is taken"):
        GlooBuffer(group, ONE.config(), name="tokens")
    others = [GlooBuffer(group, ONE.config()) for _ in range(2)]
    assert len({first.name, *(each.name for each in others)}) == 3
    for each in (first, *others):
        each.destroy()
    with pytest.raises(ValueError, match="buffer 'tokens' does not exist"):
        find("tokens")
    GlooBuffer(group, ONE.config(), name="tokens").destroy()


def test_a_buffer_that_was_not_destroyed_warns(group):
    kept = [GlooBuffer(group, ONE.config(), name="forgotten")]
    with pytest.warns(ResourceWarning, match="buffer 'forgotten' was not destroyed"):
        kept.clear()
    with pytest.raises(ValueError, match="does not exist"):
        find("forgotten")


def test_config_of_another_group_raises(group):
    with pytest.raises(ValueError, match=r"config.ranks 2, the group has 1 ranks"):
        GlooBuffer(group, EpCase(ranks=2).config())
