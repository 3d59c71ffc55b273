"""The split-KV planner: what every plan has to satisfy, on random batches."""

from __future__ import annotations

import random

import pytest
import torch

from cutehop.cute_kernels.mla import config as kernel_config
from cutehop.ref import mla_plan as planner

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


def test_credit_is_the_smallest_that_suffices():
    rng = random.Random(1)
    for _ in range(40):
        lengths, partitions, rows = random_batch(rng), rng.choice((1, 7, 66, 132)), rng.choice((16, 128))
        blocks = [max(-(-n // 64), 1) for n in lengths]
        credit, _, _ = planner.schedule(lengths, partitions, rows)
        shortest = planner.min_piece(rows)
        lowest = max(-(-sum(n + planner.VISIT_COST for n in blocks) // partitions), planner.VISIT_COST + shortest)
        tried = [len(planner._fill(blocks, w, shortest, max(blocks))[0]) for w in range(lowest, credit)]
        assert all(used > partitions for used in tried)


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
    assert not metadata[:, 7].any()
    slots = [n if n > 1 else 0 for n in counts]
    assert num_splits.tolist() == [sum(slots[:i]) for i in range(5)]
    assert max(counts) > planner.MERGE_MAX, "the long request should be cut often"


def test_fixed_cuts_depend_on_the_request_alone():
    _, _, alone = planner.schedule([5000], 66, 128, 512)
    _, _, together = planner.schedule([100, 5000, 0, 70000, 5000], 66, 128, 512)
    assert alone[0] == together[1] == together[4] == 10


def test_empty_batch():
    metadata, num_splits = planner.mla_plan(torch.zeros(0, dtype=torch.int32), 1, 16)
    assert num_splits.tolist() == [0]
    assert metadata.shape == (132, 8)
    assert not metadata.any()


def test_one_sequence_of_n_blocks_is_cut_into_n_pieces():
    # The GPU tests rely on this to reach every piece count with h_q 16.
    for blocks in range(1, 133):
        assert planner.schedule([64 * blocks], 132, 16)[2] == [blocks]


def test_kernels_use_the_same_constants():
    assert kernel_config.VISIT_COST == planner.VISIT_COST
    assert kernel_config.BLOCK == planner.BLOCK
    assert kernel_config.MERGE_MAX == planner.MERGE_MAX
    assert kernel_config.COMBINE_REQ == planner.COMBINE_REQ
    for rows in (1, 64, 65, 512):
        assert kernel_config.min_piece(rows) == planner.min_piece(rows)
    for s_q, h_q, h_kv in SHAPES:
        tiles = kernel_config.row_tiles(s_q, h_q // h_kv)
        assert kernel_config.num_partitions(132, tiles, h_kv) == planner.num_partitions(s_q, h_q, h_kv, 132)
