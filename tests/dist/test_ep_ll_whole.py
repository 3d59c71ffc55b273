"""Low-latency dispatch and combine as one call each. On up to 4 GPUs combine is a kernel of its own then, in which the
ranks that hold a token's experts add up their rows (comm/kernels/ll_combine_whole.py)."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from cutehop.comm.errors import EpTimeoutError
from tests.ep_ll_cases import FORMATS, LlCase, LlInputs, check_received, everyone, make_buffer, same_bits
from tests.ep_ll_masking import AWAY, TIMEOUT_S, expect_timeout

pytestmark = pytest.mark.dist
LATE_S = 0.15
on_gpus = pytest.mark.gpu
SEVERAL = [("cpu", 2), ("cpu", 3), *(pytest.param(("cuda", ranks), marks=on_gpus) for ranks in (2, 4, 8))]
WORLDS = [*SEVERAL, pytest.param(("cuda", 1), marks=on_gpus)]


def check_whole(buffer, inputs) -> None:
    x, topk_idx, weights, y = inputs.on(buffer.rank, buffer.device)
    got = buffer.dispatch(x, topk_idx, **FORMATS[inputs.case.rows])
    combined = buffer.combine(y, got.handle, topk_idx, weights)
    check_received(inputs, buffer.rank, got)
    assert same_bits(combined, inputs.combined()[buffer.rank])


def many_calls(group, rank, device, case):
    """Numbers of tokens that differ between calls and ranks: what is asked first is not what was expected."""
    buffer = make_buffer(group, case.config(), device)
    for seed, tokens in enumerate([(40, 64, 3), (64,), (0, 1), (0,), (33, 2, 64), (1, 0, 7)]):
        for routing in ("random", "some", "one_rank"):
            check_whole(buffer, LlInputs(replace(case, tokens=tokens, routing=routing, seed=seed)))
    buffer.destroy()


@pytest.mark.parametrize("hidden", [128, 384, 1920])
@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_many_calls(ranks_on, world, hidden):
    device, ranks = world
    case = LlCase(ranks=ranks, max_tokens=64, hidden=hidden, local_experts=8, k=8, spare_topk=1, rows="bf16")
    ranks_on(device)(ranks).run(many_calls, device, case, timeout=200)


def nearly_as_many(group, rank, device, case):
    """Ranks with one or two tokens less than this one, of more pieces than warps: another share of them falls to a CTA
    than it expects before the others have asked."""
    buffer = make_buffer(group, case.config(), device)
    for n in range(9, 17):
        for less in (1, 2):
            check_whole(buffer, LlInputs(replace(case, tokens=(n, n - less), seed=n)))
            check_whole(buffer, LlInputs(replace(case, tokens=(n - less, n), seed=n)))
    buffer.destroy()


@on_gpus
@pytest.mark.parametrize("ranks", [2, 4])
def test_nearly_as_many_tokens(gpu_ranks, ranks):
    case = LlCase(ranks=ranks, hidden=7168, local_experts=8, k=8, rows="bf16")
    gpu_ranks(ranks).run(nearly_as_many, "cuda", case, timeout=200)


def negative_zeros(group, rank, device, case):
    """Rows, products and sums of -0.0, which on a GPU marks what has not come; on rows that are alone and on others."""
    buffer = make_buffer(group, case.config(), device)
    for k in (1, 2, 4):
        inputs = LlInputs(replace(case, k=k, spare_topk=4 - k))
        pattern = torch.tensor([0.0, -0.0, -0.0, 1e-40, -1e-40], dtype=torch.bfloat16)
        for y in inputs.ys:
            y.copy_(pattern[torch.arange(y.numel()) % 5].view(y.shape))
        for weights in inputs.topk_weights:
            weights.mul_(1e-30)  # products that are rounded to zeros of both signs
        check_whole(buffer, inputs)
    buffer.destroy()


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_negative_zeros(ranks_on, world):
    device, ranks = world
    ranks_on(device)(ranks).run(negative_zeros, device, LlCase(ranks=ranks, rows="bf16"))


def one_is_late(group, rank, device, case):
    """Returns how long each rank was waited for."""
    buffer, inputs = make_buffer(group, case.config(), device), LlInputs(case)
    check_whole(buffer, inputs)  # whatever the first call takes longer
    waits = torch.zeros(case.ranks, dtype=torch.int64, device=buffer.device)
    x, topk_idx, weights, y = inputs.on(rank, buffer.device)
    for _ in range(2):
        got = buffer.dispatch(x, topk_idx, **FORMATS[case.rows])
        everyone(group)
        if rank == AWAY:
            time.sleep(2 * LATE_S)  # the others may leave `everyone` later than this rank
        buffer.combine(y, got.handle, topk_idx, weights, wait_stats=waits)
    buffer.destroy()
    return waits.tolist()


@pytest.mark.parametrize("world", SEVERAL, ids=str)
def test_how_long_ranks_were_waited_for(ranks_on, world):
    device, ranks = world
    for rank, waits in enumerate(ranks_on(device)(ranks).run(one_is_late, device, LlCase(ranks=ranks))):
        assert min(waits) >= 0
        if rank != AWAY:
            assert max(waits) == waits[AWAY] >= 2 * LATE_S * 1e9


def behind_a_dispatch(group, rank, device, case, act) -> None:
    """act(buffer, x, y, handle, topk_idx, weights), twice, in a new buffer and behind a call that is right."""
    inputs = LlInputs(case)
    for _ in range(2):
        buffer = make_buffer(group, case.config(), device, timeout_s=TIMEOUT_S)
        check_whole(buffer, inputs)
        everyone(group)
        x, topk_idx, weights, y = inputs.on(rank, buffer.device)
        act(buffer, x, y, buffer.dispatch(x, topk_idx, **FORMATS[case.rows]).handle, topk_idx, weights)
        everyone(group)
        buffer.destroy()


def one_does_not_combine(group, rank, device, case):
    """The others' wait ends, names the rank and what it did not do, and a new buffer works."""

    def act(buffer, x, y, handle, topk_idx, weights):
        def combine_and_go_on():
            buffer.combine(y, handle, topk_idx, weights)
            for _ in range(2):  # in the stream behind it: they send nothing
                buffer.dispatch(x, topk_idx, **FORMATS[case.rows])

        if rank != AWAY:
            assert expect_timeout(buffer, combine_and_go_on).phase == "ll_asks"
            with pytest.raises(EpTimeoutError) as caught:
                buffer.dispatch(x, topk_idx)
            assert (caught.value.peer, caught.value.phase) == (AWAY, "ll_asks"), caught.value

    behind_a_dispatch(group, rank, device, case, act)


@on_gpus
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_that_does_not_combine(gpu_ranks, ranks):
    gpu_ranks(ranks).run(one_does_not_combine, "cuda", LlCase(ranks=ranks))


def one_answers_too_little(group, rank, device, case):
    """It takes it that tokens have one choice each: sums of the other choices do not come, and that is said of it."""

    def act(buffer, x, y, handle, topk_idx, weights):
        if rank == AWAY:
            buffer.combine(y, handle, topk_idx[:, :1].contiguous(), weights[:, :1].contiguous())
        else:
            error = expect_timeout(buffer, lambda: buffer.combine(y, handle, topk_idx, weights))
            assert error.phase == "ll_ready"

    behind_a_dispatch(group, rank, device, case, act)


@on_gpus
def test_sums_that_do_not_come(gpu_ranks):
    gpu_ranks(2).run(one_answers_too_little, "cuda", LlCase(tokens=(8, 0), routing="one_rank"))


def experts_named_twice(group, rank, device, case):
    """As many rows as choices while a block has room; rows past it are dropped, and the next call is right."""
    buffer, inputs = make_buffer(group, case.config(), device), LlInputs(case)
    x, topk_idx, weights, y = inputs.on(rank, buffer.device)
    ones, some, all_same = torch.ones_like(y), topk_idx.clone(), torch.zeros_like(topk_idx)
    some[:, 1] = some[:, 0]
    for ids in (some, all_same):
        got = buffer.dispatch(x, ids, **FORMATS[case.rows])
        combined = buffer.combine(ones, got.handle, ids, weights)
        assert got.recv_count.max() <= ones.shape[1]
        if ids is some:
            want = weights.sum(1, keepdim=True).expand(combined.shape)
            torch.testing.assert_close(combined.float(), want, rtol=2**-7, atol=1e-5)
        check_whole(buffer, inputs)
    buffer.destroy()


@on_gpus
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_experts_named_twice(gpu_ranks, ranks):
    case = LlCase(ranks=ranks, tokens=(16,), local_experts=8, rows="bf16")
    gpu_ranks(ranks).run(experts_named_twice, "cuda", case)
