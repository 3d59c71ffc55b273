"""Low-latency buffers among ranks against the reference: values, operations in flight, statistics, the end of a buffer.

The same functions run over gloo on CPU ranks and, marked gpu, over ranks on GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests import ep_cases
from tests.ep_ll_cases import (
    CASES,
    FORMATS,
    LlCase,
    LlInputs,
    check_case,
    check_received,
    everyone,
    make_buffer,
    receive,
    receive_home,
    receive_options,
    same_bits,
    send,
    send_home,
)
from tests.ranks import Pools, RankPool

pytestmark = pytest.mark.dist
LATE_S = 0.15


class World(NamedTuple):
    device: str
    ranks: int
    pool: RankPool


GPU_WORLDS = [pytest.param(("cuda", ranks), marks=pytest.mark.gpu) for ranks in (2, 8)]


@pytest.fixture(params=[("cpu", 2), ("cpu", 3), ("cpu", 4), *GPU_WORLDS], ids=str)
def world(request: pytest.FixtureRequest, ranks_on: Callable[[str], Pools]) -> World:
    device, ranks = request.param
    return World(device, ranks, ranks_on(device)(ranks))


def run_cases(group, rank, device, cases):
    for case in cases:
        buffer = make_buffer(group, case.config(), device)
        check_case(buffer, LlInputs(case))
        assert buffer.outstanding == 0
        buffer.destroy()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(world, case):
    world.pool.run(run_cases, world.device, [replace(case, ranks=world.ranks)])


def run_on_one_buffer(group, rank, device, cases):
    buffer = make_buffer(group, cases[0].config(), device)
    for number, case in enumerate(cases):
        check_case(buffer, LlInputs(case), dispatches=1 + number % 2)
    buffer.destroy()


def test_one_buffer_for_all_calls(world):
    """Formats, token counts, k and routings change from call to call, and nothing is cleaned; single and repeated
    dispatches move the slots by any number."""
    base = LlCase(ranks=world.ranks, hidden=512, k=8, local_experts=6, rows="bf16")
    cases = [
        replace(base, rows=rows, tokens=tokens, routing=routing, k=k, spare_topk=8 - k, seed=seed)
        for seed, (rows, (tokens, routing, k)) in enumerate(
            (rows, variant)
            for variant in (((16, 0, 3), "random", 8), ((1,), "some", 5), ((0, 9), "one_rank", 3))
            for rows in FORMATS
        )
    ]
    world.pool.run(run_on_one_buffer, world.device, cases)


def three_in_flight(group, rank, device, case):
    """Three dispatches, received in another order on every rank; their combines likewise."""
    buffer = make_buffer(group, case.config(), device)
    inputs = [LlInputs(replace(case, seed=seed)) for seed in range(3)]
    order = [(rank + i) % 3 for i in range(3)] if rank % 2 else [(rank - i) % 3 for i in range(3)]
    for _ in range(3):
        epochs = [send(buffer, each) for each in inputs]
        assert buffer.outstanding == 3
        with pytest.raises(RuntimeError, match=r"dispatch_send: operations sent 3, 2, 1 sends ago are outstanding"):
            send(buffer, inputs[0])
        got = {i: receive(buffer, inputs[i], epochs[i]) for i in order}
        with pytest.raises(RuntimeError, match="the epoch is of no operation outstanding"):
            receive(buffer, inputs[0], epochs[0])
        epochs = [send_home(buffer, each, got[i].handle) for i, each in enumerate(inputs)]
        with pytest.raises(RuntimeError, match="combine_send: operations sent 3, 2, 1 sends ago"):
            send_home(buffer, inputs[0], got[0].handle)
        for i in reversed(order):
            receive_home(buffer, inputs[i], epochs[i])
    buffer.destroy()


def test_three_operations_in_flight(world):
    world.pool.run(three_in_flight, world.device, LlCase(ranks=world.ranks))


def two_batches(group, rank, device, case):
    """A dispatch in flight while another batch's combine runs, as a model with two microbatches has it."""
    buffer = make_buffer(group, case.config(), device)
    first, second = (LlInputs(replace(case, seed=seed)) for seed in (1, 2))
    a = send(buffer, first)
    for _ in range(3):
        b = send(buffer, second)
        a = send_home(buffer, first, receive(buffer, first, a).handle)
        b = send_home(buffer, second, receive(buffer, second, b).handle)
        receive_home(buffer, first, a)
        a = send(buffer, first)
        receive_home(buffer, second, b)
    receive(buffer, first, a)
    held = send(buffer, first)
    receive(buffer, second, send(buffer, second))
    x, topk_idx, weights, y = second.on(rank, buffer.device)
    got = buffer.dispatch(x, topk_idx, **FORMATS[case.rows])
    buffer.combine(y, got.handle, topk_idx, weights)
    with pytest.raises(RuntimeError, match="operations sent 4 sends ago are outstanding"):
        buffer.dispatch(x, topk_idx, **FORMATS[case.rows])
    receive(buffer, first, held)
    check_case(buffer, second)
    buffer.destroy()


def test_two_batches_in_turns(world):
    world.pool.run(two_batches, world.device, LlCase(ranks=world.ranks, rows="ue8m0", hidden=512))


def use_given_outputs(group, rank, device, case):
    inputs, buffer = LlInputs(case), make_buffer(group, case.config(), device)
    options = receive_options(case)
    out = buffer.empty_outputs(use_fp8=True, use_ue8m0=False)
    epoch = send(buffer, inputs)
    with pytest.raises(TypeError, match=r"out is torch\.float8_e4m3fn with scales torch\.float32, needs"):
        buffer.dispatch_receive(epoch, num_topk=case.k, use_fp8=False, out=out)
    got = buffer.dispatch_receive(epoch, **options, out=out)
    assert got is out
    check_received(inputs, rank, out)
    _, topk_idx, weights, _ = inputs.on(rank, buffer.device)
    mine = torch.full((len(topk_idx), case.hidden), 7.0, dtype=torch.bfloat16, device=buffer.device)
    epoch = send_home(buffer, inputs, out.handle)
    with pytest.raises(ValueError, match="out has shape"):
        buffer.combine_receive(epoch, topk_idx, weights, out=mine[:, :128])
    assert buffer.combine_receive(epoch, topk_idx, weights, out=mine) is mine
    assert same_bits(mine, inputs.combined()[rank])
    buffer.destroy()


def test_outputs_of_the_caller(world):
    world.pool.run(use_given_outputs, world.device, LlCase(ranks=world.ranks))


def count_and_wait(group, rank, device, case):
    inputs, buffer = LlInputs(case), make_buffer(group, case.config(), device)
    local = case.local_experts
    received = torch.ones(local, dtype=torch.int32, device=buffer.device)
    waits = [torch.zeros(case.ranks, dtype=torch.int64, device=buffer.device) for _ in range(2)]
    check_case(buffer, inputs)  # whatever the first call takes longer
    _, topk_idx, weights, _ = inputs.on(rank, buffer.device)
    for _ in range(2):
        everyone(group)
        if rank == 1:
            time.sleep(LATE_S)
        got = buffer.dispatch_receive(
            send(buffer, inputs), **receive_options(case), recv_stats=received, wait_stats=waits[0]
        )
        everyone(group)
        if rank == 1:
            time.sleep(LATE_S)
        epoch = send_home(buffer, inputs, got.handle)
        buffer.combine_receive(epoch, topk_idx, weights, wait_stats=waits[1])
    want = 1 + 2 * inputs.received[rank].recv_count
    assert same_bits(received, want)
    buffer.destroy()
    return [wait.tolist() for wait in waits]


def test_statistics(world):
    for rank, waits in enumerate(world.pool.run(count_and_wait, world.device, LlCase(ranks=world.ranks))):
        for wait in waits:
            assert min(wait) >= 0
            if rank != 1:
                assert max(wait) == wait[1] >= LATE_S * 1e9


def in_turns_with_the_normal_mode(group, rank, device, case):
    normal = ep_cases.EpInputs(ep_cases.EpCase(ranks=case.ranks))
    inputs, buffer = LlInputs(case), make_buffer(group, case.config(), device)
    other = ep_cases.make_buffer(group, normal.case.config(), device)
    for _ in range(3):
        epoch = send(buffer, inputs)
        ep_cases.check_case(other, normal)
        epoch = send_home(buffer, inputs, receive(buffer, inputs, epoch).handle)
        ep_cases.check_case(other, normal)
        receive_home(buffer, inputs, epoch)
    buffer.destroy()
    other.destroy()


def test_in_turns_with_calls_of_the_normal_mode(world):
    world.pool.run(in_turns_with_the_normal_mode, world.device, LlCase(ranks=world.ranks))


def no_masks(group, rank, device, case):
    buffer = make_buffer(group, case.config(), device)
    status = torch.zeros(case.ranks, dtype=torch.int32, device=device)
    for call in (lambda: buffer.update_mask(1 - rank, True), lambda: buffer.query_mask(status), buffer.clean_mask):
        with pytest.raises(RuntimeError, match="is not elastic"):
            call()
    buffer.destroy()
    buffer.destroy()
    inputs = LlInputs(case)
    for call in (lambda: send(buffer, inputs), buffer.clean_mask):
        with pytest.raises(RuntimeError, match=f"buffer '{buffer.name}' is destroyed"):
            call()


def test_a_buffer_without_masks_and_after_its_end(cpu_ranks):
    cpu_ranks(2).run(no_masks, "cpu", LlCase())


@pytest.mark.gpu
def test_a_gpu_buffer_without_masks_and_after_its_end(gpu_ranks):
    gpu_ranks(2).run(no_masks, "cuda", LlCase())


def scaled(inputs: LlInputs, seed: int) -> LlInputs:
    """With rows of combine that LogFMT encodes, wholly or in some chunks, and others."""
    rng = torch.Generator().manual_seed(seed)
    for y in inputs.ys:
        experts, rows, hidden = y.shape
        y[:, ::2] = (torch.randn((experts, (rows + 1) // 2, hidden), generator=rng) * 0.1).bfloat16()
        y[:, 2::8, : hidden // 2] *= 2.0 ** torch.randint(-130, 0, (hidden // 2,), generator=rng)  # subnormals, zeros
        y[:, 4::8, :128] = 0.25  # no scale
        y[:, 6::8, 5::7] = torch.tensor([-0.0, 1.0])[rows % 2]
    return inputs


def combine_with_logfmt(group, rank, device, case):
    """To the bit as the reference, sent and received in one launch and in two; near the plain result."""
    buffer = make_buffer(group, case.config(), device)
    for seed in range(3):
        inputs = scaled(LlInputs(replace(case, seed=seed)), seed)
        check_case(buffer, inputs, use_logfmt=True)
        check_case(buffer, inputs)
        inputs = LlInputs(replace(case, seed=seed))
        for y in inputs.ys:
            y.copy_(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
        check_case(buffer, inputs, use_logfmt=True)
        coded, plain = inputs.combined(True)[rank], inputs.combined()[rank]
        assert not same_bits(coded, plain)
        a, b = coded.double() + 1, plain.double() + 1
        assert 1 - 2 * (a * b).sum() / (a * a + b * b).sum() < 1e-5
    buffer.destroy()


@pytest.mark.parametrize("hidden", [128, 384, 768, 1024, 1536, 7168])
def test_combine_with_logfmt(world, hidden):
    case = LlCase(ranks=world.ranks, hidden=hidden, rows="bf16", tokens=(8, 3, 13, 5), spare_topk=1)
    world.pool.run(combine_with_logfmt, world.device, case)


def wild_like(part: Tensor, rng: torch.Generator, odd: tuple[int, ...]) -> Tensor:
    """int32 of the same shape: any numbers, the ends of their range, and these."""
    ends = torch.iinfo(torch.int32)
    extremes = torch.tensor([ends.min, *odd, ends.max], dtype=torch.int32)
    return torch.where(
        torch.rand(part.shape, generator=rng) < 0.5,
        torch.randint(ends.min, ends.max, part.shape, generator=rng, dtype=torch.int32),
        extremes[torch.randint(len(extremes), part.shape, generator=rng)],
    )


def combine_with_wild_handles(group, rank, device, case):
    """Counts and places that no dispatch made: rows go nowhere or to a wrong place, and the next call is right."""
    inputs, buffer = LlInputs(case), make_buffer(group, case.config(), device)
    rng = torch.Generator().manual_seed(rank)
    for seed in range(6):
        handle = receive(buffer, inputs, send(buffer, inputs)).handle
        wild = [
            wild_like(part, rng, (-1, 0, buffer.config.max_tokens * case.ranks)).to(buffer.device)
            for part in (handle.recv_count, handle.send_slot)
        ]
        epoch = send_home(buffer, inputs, handle._replace(recv_count=wild[0], send_slot=wild[1]), seed % 2 == 1)
        _, topk_idx, topk_weights, y = inputs.on(rank, buffer.device)
        buffer.combine_receive(epoch, topk_idx, topk_weights, use_logfmt=seed % 2 == 1)
        rows = wild_like(handle.choice_rows, rng, (-1, y.shape[0] * y.shape[1])).to(buffer.device)
        buffer.combine(y, handle._replace(choice_rows=rows), topk_idx, topk_weights)
        check_case(buffer, inputs)
    buffer.destroy()


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 8])
def test_combine_with_wild_handles(gpu_ranks, ranks):
    gpu_ranks(ranks).run(combine_with_wild_handles, "cuda", LlCase(ranks=ranks, rows="bf16"))
