"""The split-KV planner: what every plan has to satisfy, on random batches."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutehop.cute_kernels.mla import config as kernel_config
from cutehop.ref import mla_plan as planner
from tests.mla_cases import HEAD_PAIRS, blocks_by_pieces

SHAPES = [(s_q, h_q, h_kv) for s_q in (1, 2, 4) for h_q, h_kv in ((1, 1), (16, 1), (64, 1), (128, 1), (128, 8), (9, 3))]


def random_batch(rng: random.Random) -> list[int]:
    """Lengths of very different kinds: empty, around a block boundary, short, long."""
    longest = rng.choice((1, 65, 600, 5000, 40000))
    kinds = (lambda: 0, lambda: rng.choice((1, 63, 64, 65, 127, 128, 129)), lambda: rng.randint(0, longest))
    return [rng.choice(kinds)() for _ in range(rng.choice((1, 2, 3, 16, 64, 130, 300)))]


def pieces_of(records: list[planner.Record], blocks: list[int], unit: int) -> list[list[tuple[int, int, int, int]]]:
    """Pieces (request, begin, end, split) each partition reads, walking its record as the kernel does."""
    walked = []
    for begin_req, begin_block, end_req, end_block, split in records:
        pieces = []
        req, block = begin_req, begin_block
        while (req, block) < (end_req, end_block):
            end = end_block if req == end_req else blocks[req]
            if unit:
                end = min(end, block + unit)
            pieces.append((req, block, end, split))
            req, block, split = (req + 1, 0, 0) if end == blocks[req] else (req, end, split + 1)
        walked.append(pieces)
    return walked


@pytest.mark.parametrize("split_tokens", [0, 64, 256, 4096])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_plan_tiles_the_work(shape, split_tokens):
    rng = random.Random(repr((shape, split_tokens)))
    s_q, h_q, h_kv = shape
    for num_sms in (132, 132, 132, 16, 1):
        lengths = random_batch(rng)
        blocks = [max((n + 63) // 64, 1) for n in lengths]
        partitions = planner.num_partitions(s_q, h_q, h_kv, num_sms)
        rows, unit = s_q * h_q // h_kv, split_tokens // 64
        credit, records, counts = planner.schedule(lengths, partitions, rows, split_tokens)
        walked = pieces_of(records, blocks, unit)

        assert 1 <= len(records) <= partitions
        assert all(walked), "a used partition without work"
        assert max(sum(end - begin + planner.VISIT_COST for _, begin, end, _ in p) for p in walked) <= credit

        flat = [piece for p in walked for piece in p]
        expected_start, expected_split = (0, 0), 0
        for req, begin, end, split in flat:  # consecutive pieces, in order, without gap or overlap
            assert ((req, begin), split) == (expected_start, expected_split)
            assert begin < end <= blocks[req]
            done = end == blocks[req]
            expected_start, expected_split = ((req + 1, 0), 0) if done else ((req, end), split + 1)
        assert expected_start == (len(lengths), 0)
        assert counts == [sum(piece[0] == req for piece in flat) for req in range(len(lengths))]
        if unit:
            assert all(begin % unit == 0 and end == min(begin + unit, blocks[req]) for req, begin, end, _ in flat)


def smallest_credit(blocks: list[int], partitions: int, shortest: int, lowest: int) -> int:
    """From `lowest` on, found by trying every one."""
    tried = itertools.count(lowest)
    return next(w for w in tried if len(planner._fill(blocks, w, shortest, max(blocks))[0]) <= partitions)


def test_the_cheapest_of_four_ways_to_cut():
    """Pieces as many as there are partitions, half as many, two of a request, uncut: with the smallest credit each."""
    rng = random.Random(1)
    chosen = dict.fromkeys(("many", "two", "uncut"), 0)
    for _ in range(150):
        lengths, partitions, rows = random_batch(rng), rng.choice((1, 7, 66, 132)), rng.choice((16, 128))
        blocks = [max(-(-n // 64), 1) for n in lengths]
        credit, _, counts = planner.schedule(lengths, partitions, rows)
        longest, tiles = max(blocks), -(-rows // 64)
        share = -(-sum(n + planner.VISIT_COST for n in blocks) // partitions)
        few = next(n for n in itertools.count(1) if n * n * planner.combine_chunk(len(blocks), rows, 1) >= longest)
        half = -(-longest // 2)
        candidates = []
        for shortest, least, limited in (
            (1, few, False),
            (1, 2 * few, False),
            (half, half, True),
            (longest,) * 2 + (True,),
        ):
            lowest = max(share, planner.VISIT_COST + least)
            found = smallest_credit(blocks, partitions, shortest, lowest)
            if limited and found >= lowest + 32:
                continue
            pieces = planner._fill(blocks, found, shortest, longest)[1]
            costs, slots, merging = planner.plan_costs(rows), sum(n for n in pieces if n > 1) * tiles, 0
            if max(pieces) == 2:
                merging = costs.merge + costs.merge_piece * slots
            elif max(pieces) > 2:
                merging = costs.combine + costs.combine_piece * slots
            floor = 120 * planner.VISIT_COST + sum(blocks) * costs.load // (partitions * tiles)
            candidates.append((max(120 * found, floor) + merging, found, pieces))
        cheapest = min(cost for cost, _, _ in candidates)
        assert (credit, counts) in [(w, pieces) for cost, w, pieces in candidates if cost == cheapest]
        chosen["uncut" if max(counts) == 1 else "two" if max(counts) == 2 else "many"] += 1
    assert min(chosen.values()) > 5, chosen


@pytest.mark.parametrize(
    ("batch", "blocks", "rows", "pieces"),
    [
        (1, 8, 64, 8),
        (1, 64, 64, 32),  # not 64: the combine kernel loads 16 at a time
        (8, 16, 64, 8),
        (16, 8, 64, 4),  # half of the SMs are left to the combine kernel
        (48, 64, 64, 2),
        (96, 32, 64, 1),
        (20, 4, 128, 1),
    ],
)
def test_plans_that_were_fastest_on_an_h100(batch, blocks, rows, pieces):
    partitions = planner.num_partitions(1, rows, 1, 132)
    assert planner.schedule([64 * blocks] * batch, partitions, rows)[2] == [pieces] * batch


def test_tensors_mirror_the_schedule():
    lengths = torch.tensor([300, 0, 9000, 64], dtype=torch.int32)
    _, records, counts = planner.schedule(lengths.tolist(), 66, 128)
    metadata, num_splits = planner.mla_plan(lengths, 1, 128)
    assert metadata.shape == (66, 8)
    assert metadata.dtype == num_splits.dtype == torch.int32
    assert metadata[: len(records), :5].tolist() == [list(r) for r in records]
    assert metadata[len(records) :, :5].tolist() == [[4, 0, 4, 0, 0]] * (66 - len(records))
    combined = [i for i, n in enumerate(counts) if n > planner.MERGE_MAX]
    assert metadata[:, planner.COMBINE_REQ].tolist() == combined + [4] * (66 - len(combined))
    assert metadata[: len(records), planner.SEQLEN].tolist() == [lengths[r[0]] for r in records]
    assert not metadata[len(records) :, planner.SEQLEN].any()
    cuts = [counts[r[0]] if r[4] else 0 for r in records]
    assert metadata[:, planner.CUT].tolist() == cuts + [0] * (66 - len(cuts))
    slots = [n if n > 1 else 0 for n in counts]
    assert num_splits.tolist() == [sum(slots[:i]) for i in range(5)]
    assert max(counts) > planner.MERGE_MAX, "the long request should be cut often"


def test_tensors_say_how_they_were_cut():
    lengths = torch.tensor([300, 0, 9000, 64], dtype=torch.int32)
    cut = planner.mla_plan(lengths, 1, 128, split_tokens=320)[0][:, planner.CUT]
    assert set((cut >> planner.CUT_SHIFT).tolist()) == {5}
    assert set((cut & planner.CUT_PIECES).tolist()) == {0, -(-9000 // 320)}
    many = planner.plan_tensors([64 * 5000, 64 * 5000], 100, 16, 64)[0][:, planner.CUT]
    assert int((many & planner.CUT_PIECES).max()) == planner.CUT_PIECES


def test_fixed_cuts_depend_on_the_request_alone():
    _, _, alone = planner.schedule([5000], 66, 128, 512)
    _, _, together = planner.schedule([100, 5000, 0, 70000, 5000], 66, 128, 512)
    assert alone[0] == together[1] == together[4] == 10


def test_empty_batch():
    metadata, num_splits = planner.mla_plan(torch.zeros(0, dtype=torch.int32), 1, 16)
    assert num_splits.tolist() == [0]
    assert metadata.shape == (132, 8)
    assert not metadata.any()


def test_one_sequence_is_cut_into_any_number_of_pieces():
    # The GPU tests rely on this to reach every piece count. Two halves are for many sequences.
    for h_q, partitions in ((16, 132), (128, 66)):
        assert set(blocks_by_pieces(h_q)) == set(range(1, partitions + 1)) - {2}
    for blocks in range(1, 133):
        assert planner.schedule([64 * blocks], 132, 16, split_tokens=64)[2] == [blocks]


# ---- what the kernels and their launcher take from the planner ------------------------------------------------------


def test_kernels_use_the_same_constants():
    mirrored = {name for name in vars(planner) if name.isupper()} & set(vars(kernel_config))
    assert mirrored >= {"BLOCK", "VISIT_COST", "MERGE_MAX", "COMBINE_REQ", "SEQLEN", "CUT", "CUT_SHIFT", "CUT_PIECES"}
    assert {n: getattr(kernel_config, n) for n in mirrored} == {n: getattr(planner, n) for n in mirrored}
    assert kernel_config.TILE_M == planner.ROW_TILE


@pytest.mark.parametrize("num_sms", [1, 16, 78, 132])
def test_kernels_use_the_same_partitions(num_sms):
    for s_q in (*range(1, 10), 64, 1000):
        for h_q, h_kv in (*HEAD_PAIRS, (256, 2), (1024, 1)):
            rows = s_q * h_q // h_kv
            assert kernel_config.plan_costs(rows) == planner.plan_costs(rows)
            partitions = kernel_config.num_partitions(num_sms, kernel_config.row_tiles(s_q, h_q // h_kv), h_kv)
            assert partitions == planner.num_partitions(s_q, h_q, h_kv, num_sms)
            for batch in (1, 2, 5, 6, 11, 12, 22, 23, 200):
                chunk = planner.combine_chunk(batch, rows, h_kv)
                assert kernel_config.combine_chunk(batch, rows, h_kv) == chunk


def test_few_sequences_are_those_that_may_leave_half_of_the_partitions_empty():
    for partitions in (132, 66, 33):
        few = [batch for batch in range(1, 200) if kernel_config.few_sequences(batch, partitions)]
        assert few == list(range(1, partitions // 6 + 1))
        used = [len(planner.schedule([64 * 8] * batch, partitions, 64)[1]) for batch in few]
        assert min(used) <= partitions // 2
    assert not kernel_config.few_sequences(1, 1), "every CTA has work"


@given(
    st.integers(1, 500), st.integers(1, 8), st.sampled_from((1, 16, 17, 64, 128, 512)), st.sampled_from((16, 78, 132))
)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_combine_ctas_have_equal_turns(combines, h_kv, rows, num_sms):
    tiles = kernel_config.row_tiles(rows, 1) * h_kv
    for shape in kernel_config.COMBINE_SHAPES:
        config = kernel_config.CombineConfig("bf16", *shape)
        parts, ctas, _ = kernel_config.combine_grid(config, combines, tiles, rows, num_sms)
        resident = max(num_sms * config.ctas_per_sm // parts, 1)
        turns = -(-combines // resident)
        assert ctas <= resident
        assert ctas * turns >= combines > (ctas - 1) * turns, "another turn, or a CTA too many"


def check_bounds(lengths: list[int], partitions: int, rows: int, split_tokens: int) -> None:
    """What the launcher provides from shapes alone, before any plan is known, is enough for this plan."""
    _, _, counts = planner.schedule(lengths, partitions, rows, split_tokens)
    shape = max(-(-max(lengths) // 64), 1), split_tokens // 64
    slots = sum(n for n in counts if n > 1)
    assert slots <= kernel_config.max_slots(len(lengths), partitions, *shape)
    combines = sum(n > planner.MERGE_MAX for n in counts)
    most = kernel_config.max_combines(len(lengths), partitions, *shape)
    assert combines <= most
    assert most in (0, len(lengths)) if split_tokens else most <= partitions
    first_slots = [sum(n for n in counts[:i] if n > 1) for i, n in enumerate(counts) if n > planner.MERGE_MAX]
    counters = {slot // (kernel_config.MERGE_MAX + 1) for slot in first_slots}
    assert len(counters) == len(first_slots), "two sequences count their pieces in one place"
    assert all((i + 1) * kernel_config.WARPS_OUT <= kernel_config.arrivals(slots) for i in counters)


@given(
    lengths=st.lists(st.integers(0, 70).map(lambda n: 64 * n) | st.integers(0, 40000), min_size=1, max_size=40),
    partitions=st.integers(1, 132),
    rows=st.sampled_from((1, 64, 65, 512)),
    split_tokens=st.sampled_from((0, 0, 0, 64, 512, 4096, 20480)),
)
@settings(deadline=None, derandomize=True, max_examples=500)
def test_bounds_of_any_batch(lengths, partitions, rows, split_tokens):
    check_bounds(lengths, partitions, rows, split_tokens)


@pytest.mark.parametrize("rows", [16, 128])
def test_bounds_where_many_sequences_are_cut(rows):
    for partitions in range(1, 133):
        for batch in {max(partitions * k // 12, 1) for k in range(1, 13)}:
            check_bounds([64 * 40] * batch, partitions, rows, 0)


def test_bounds_can_be_reached():
    """Equal sequences, each over two and a half partitions: each of their pieces needs a slot, and all are combined."""
    for partitions in (5, 65, 129):
        batch = (partitions - 1) // 2
        lengths = [64 * 40 * partitions] * batch
        _, _, counts = planner.schedule(lengths, partitions, 128)
        assert sum(n > planner.MERGE_MAX for n in counts) == (partitions - 1) // 2
        assert sum(counts) == kernel_config.max_slots(batch, partitions, max(lengths) // 64, 0)
