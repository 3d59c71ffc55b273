"""Plans that are not of their call: a model of how the decode CTAs meet, and what the host makes of a fault."""

from __future__ import annotations

import ctypes
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutehop.cute_kernels.mla import config as cfg
from cutehop.ops import _scratch as scratch
from cutehop.ref import mla_plan as planner


def blocks_of(length: int) -> int:
    return max(-(-length // cfg.BLOCK), 1)


def meetings(metadata: torch.Tensor, num_splits: torch.Tensor, lengths: list[int], split_blocks: int, slots: int):
    """Who comes to which boundary, who announces a piece to the combine kernel, and the faults: work.get_cut and the
    walk of work.next_position over every partition."""
    plan, starts = metadata.tolist(), num_splits.tolist()
    tickets: Counter[int] = Counter()
    arrivals: Counter[int] = Counter()
    faults: dict[int, int] = {}
    if plan[-1][2:4] != [len(lengths), 0] or plan[-1][cfg.CUT] >> cfg.CUT_SHIFT != split_blocks:
        return tickets, arrivals, dict.fromkeys(range(len(lengths)), cfg.FAULT_PLAN)
    for part, (first_req, block, end_req, end_block, split, _, seqlen, cut) in enumerate(plan):
        req, begins = first_req, first_req if split else -1
        while (req, block) < (end_req, end_block):
            stop = end_block if req == end_req else blocks_of(seqlen)
            stop = min(stop, block + split_blocks) if split_blocks else stop
            pieces = starts[req + 1] - starts[req]
            after = req == end_req
            planned = (plan[part + 1][cfg.CUT] if after else cut) & cfg.CUT_PIECES if after or req == begins else 0
            units = -(-blocks_of(seqlen) // split_blocks) if split_blocks else 0
            expected = (units if units > 1 else 0) if split_blocks else planned
            inside = starts[req] >= 0 and 0 <= pieces <= slots - starts[req]
            fault = cfg.FAULT_LENGTHS if lengths[req] != seqlen else 0
            fault = fault if inside and pieces == expected else cfg.FAULT_PIECES
            if inside and pieces == planned == cfg.MERGE_MAX:
                tickets[part + after] += 1
            elif pieces > cfg.MERGE_MAX and not fault:
                arrivals[req] += 1
            if fault:
                faults[req] = fault
            if stop >= blocks_of(seqlen):
                req, block, split = req + 1, 0, 0
                seqlen = lengths[req] if req < len(lengths) else 0
            else:
                block, split = stop, split + 1
    return tickets, arrivals, faults


LENGTHS = st.lists(st.sampled_from((0, 1, 64, 65, 300, 640, 1000, 5000, 30000)), min_size=1, max_size=12)
SPLITS = st.sampled_from((0, 0, 64, 320, 2560))


@given(LENGTHS, st.integers(1, 40), st.sampled_from((16, 128)), SPLITS)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_every_piece_of_a_correct_plan_meets_the_others(lengths, partitions, rows, split_tokens):
    plan = planner.plan_tensors(lengths, partitions, rows, split_tokens)
    slots = cfg.max_slots(len(lengths), partitions, blocks_of(max(lengths)), split_tokens // 64)
    tickets, arrivals, faults = meetings(*plan, lengths, split_tokens // 64, slots)
    assert faults == {}
    assert set(tickets.values()) <= {2}
    counts = planner.schedule(lengths, partitions, rows, split_tokens)[2]
    assert arrivals == {i: n for i, n in enumerate(counts) if n > planner.MERGE_MAX}


@given(st.data(), st.integers(1, 12), st.integers(1, 40), SPLITS, SPLITS, SPLITS)
@settings(deadline=None, derandomize=True, max_examples=1500)
def test_no_plan_leaves_a_cta_alone(data, batch, partitions, split_a, split_b, split_call):
    """Two tensors of two plans, lengths of a third and another split_tokens: whoever comes to a boundary is one of two.

    A wrong result is a fault, or rests on no value that the plan got wrong: no sequence is left with too few pieces.
    """
    draw = st.lists(st.sampled_from((0, 1, 64, 65, 300, 640, 5000)), min_size=batch, max_size=batch)
    lengths_a, lengths_b, now = data.draw(draw), data.draw(draw), data.draw(draw)
    metadata, _ = planner.plan_tensors(lengths_a, partitions, 16, split_a)
    _, num_splits = planner.plan_tensors(lengths_b, partitions, 16, split_b)
    slots = cfg.max_slots(batch, partitions, 80, split_call // 64)
    tickets, arrivals, faults = meetings(metadata, num_splits, now, split_call // 64, slots)
    assert set(tickets.values()) <= {2}
    for req, count in enumerate(num_splits.diff().tolist()):
        assert arrivals[req] <= max(count, 0)
        if req not in faults and count > planner.MERGE_MAX:
            assert arrivals[req] == count
    if split_a != split_call:
        assert set(faults.values()) == {cfg.FAULT_PLAN}


def test_a_length_that_changed_is_found_where_the_plan_rests_on_it():
    lengths = [640, 5000, 100, 64, 300]
    plan = planner.plan_tensors(lengths, 8, 16)
    cut = [i for i, n in enumerate(planner.schedule(lengths, 8, 16)[2]) if n > 1]
    for i in cut:
        changed = [n + 1 if k == i else n for k, n in enumerate(lengths)]
        _, _, faults = meetings(*plan, changed, 0, 100)
        assert faults == {i: cfg.FAULT_LENGTHS}


# ---- the host ------------------------------------------------------------------------------------------------------


@pytest.fixture
def words(monkeypatch):
    """Scratch memory of device 0 without a GPU: stream 5 has a workspace, captures have one word."""
    zeros = torch.zeros

    def on_the_cpu(*shape, **_):
        return zeros(*shape, dtype=torch.int32)

    monkeypatch.setattr(scratch.torch, "zeros", on_the_cpu)
    monkeypatch.setattr(scratch, "_partials", lambda size, device: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    monkeypatch.setattr(scratch, "_scratch", {})
    monkeypatch.setattr(scratch, "_captures", {})
    monkeypatch.setattr(scratch, "_CAPTURE_COUNTERS", 100)
    scratch.prepare_captures(0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    scratch.scratch_of(0, 5, (1, 2, 3))
    return scratch._scratch[0, 5].word.content, scratch._captures[0].word.content


@pytest.mark.parametrize("fault", [cfg.FAULT_PLAN, cfg.FAULT_PIECES, cfg.FAULT_LENGTHS, cfg.FAULT_MERGE])
@pytest.mark.parametrize("captured", [False, True])
def test_a_fault_raises_once_at_the_next_call(words, fault, captured):
    words[captured].value = fault + 8 * 17
    scratch._scratch[0, 5].counters.fill_(3)
    scratch._captures[0].stock.fill_(3)
    with pytest.raises(RuntimeError, match="CUDA graph" if captured else "earlier call on this stream") as error:
        scratch.scratch_of(0, 5, (1, 2, 3))
    assert ("17" in str(error.value)) == (fault != cfg.FAULT_PLAN)
    assert not scratch._scratch[0, 5].counters.any()
    assert scratch._captures[0].stock.any() != captured, "those of a graph are cleared if it was at fault"
    scratch.scratch_of(0, 5, (1, 2, 3))


def test_other_streams_do_not_see_a_fault(words):
    words[0].value = cfg.FAULT_PIECES
    scratch.scratch_of(0, 6, (1, 2, 3))
    with pytest.raises(RuntimeError, match="num_splits does not fit"):
        scratch.scratch_of(0, 5, (1, 2, 3))


def test_a_workspace_grows_and_keeps_its_word(words):
    small = scratch.scratch_of(0, 5, (1, 2, 3))
    large = scratch.scratch_of(0, 5, (9, 20, 30))
    assert scratch.scratch_of(0, 5, (9, 20, 30)) == large
    assert small[-1] == large[-1] == ctypes.addressof(words[0])
    assert large[2] - large[1] == 20 * 4
    assert scratch._scratch[0, 5].partial.nbytes >= 9
    again = scratch.scratch_of(0, 5, (1, 2, 3))
    assert again[1] == large[1], "counters of all calls of a stream begin at one place"


def test_captured_calls_share_counters_by_capture_and_stream(words, monkeypatch):
    current = [1]

    class Driver:
        @staticmethod
        def cuStreamGetCaptureInfo(stream):
            return 0, 1, current[0]

    monkeypatch.setattr(scratch.driver, "bindings", lambda: Driver)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: True, raising=False)

    def tickets(stream: int, count: int) -> int:
        return scratch.scratch_of(0, stream, (1, count, 0))[1]

    first = tickets(5, 10)
    assert tickets(5, 8) == first
    other_stream = tickets(6, 10)
    current[0] = 2
    other_capture = tickets(6, 10)
    larger = tickets(6, 30)
    taken = {first, other_stream, other_capture, larger}
    assert len(taken) == 4
    assert scratch._captures[0].taken == 60
    exhausted = tickets(6, 50)
    assert exhausted not in taken
