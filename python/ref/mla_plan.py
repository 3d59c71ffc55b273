"""Split-KV planner of MLA decode: which CTAs read which blocks of which request. The device's planner is bit-equal.

A block is 64 cached tokens. The work of a batch is dealt to P partitions; a partition is executed by one CTA per row
tile and kv head, so P * row tiles * kv heads fills the GPU once. A partition walks the requests in order and pays, for
every piece it reads, the piece's blocks plus VISIT_COST (starting a piece and writing its result). All partitions get
the same credit W, the smallest with which P partitions suffice: the slowest partition decides how long a call takes.
Several ways to cut are compared (`schedule`), as merging pieces takes time too.

    split_tokens == 0     a request is cut wherever a partition's credit ends
    split_tokens == 64*S  a request is cut every S blocks whatever else is in the batch, so that the order in which its
                          partial results are added depends on the request alone

Source of behaviour: the greedy of FlashMLA's planner, with a searched credit instead of an upper bound for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64  # tokens
VISIT_COST = 4  # blocks; mirrored in cute_kernels/mla/config.py, which imports no torch
COST_UNIT = 120  # of a block
ROW_TILE = 64  # rows (query token, query head) of one CTA
METADATA_COLUMNS = 8  # a Record, then the three columns below
COMBINE_REQ = 5  # row i: the i-th request in more than MERGE_MAX pieces (as many as there are rows), b behind the last
MERGE_MAX = 2  # pieces that the decode kernel merges itself
SEQLEN = 6  # length of the record's first request
CUT = 7  # split_blocks << CUT_SHIFT, plus the pieces of the request in whose middle the record begins, 0 if in none
CUT_SHIFT = 12
CUT_PIECES = (1 << CUT_SHIFT) - 1  # more pieces are written as so many

# A partition reads from its begin position up to the end position, which is exclusive; begin_split is the index of its
# first piece within that piece's request.
Record = tuple[int, int, int, int, int]  # begin_req, begin_block, end_req, end_block, begin_split
Plan = tuple[int, list[Record], list[int]]  # W, a record per used partition, pieces per request


def num_partitions(s_q: int, h_q: int, h_kv: int, num_sms: int) -> int:
    """Partitions P of a call: as many as keep one CTA per SM, at least 1."""
    row_tiles = -(-s_q * (h_q // h_kv) // ROW_TILE)
    return max(num_sms // (h_kv * row_tiles), 1)


def combine_chunk(batch: int, rows: int, h_kv: int) -> int:
    """Pieces that a CTA of the combine kernel takes at a time: the fewer sequences and rows, the more warps for each.

    rows: query rows of one request and kv head. CTAs of one team of warps would take 16 rows and 128 columns each.
    """
    ctas = batch * h_kv * -(-rows // ROW_TILE) * min(-(-rows // 16), ROW_TILE // 16) * 4
    if ctas <= 32:
        return 32
    if ctas <= 64:
        return 16
    return 8 if ctas < 512 else 4


class PlanCosts(NamedTuple):
    """What the planner reckons with, in 1/COST_UNIT of the time that a partition computes on a block.

    load: for a block to come through memory while every CTA waits for one. merge, merge_piece: once for a call in which
    some request is in two pieces, and for each piece and tile. combine, combine_piece: the same where some are in more.
    """

    load: int
    merge: int
    merge_piece: int
    combine: int
    combine_piece: int


def plan_costs(rows: int) -> PlanCosts:
    """rows: query rows of one request and kv head. Fitted to 387 shapes on an H100 (cute_kernels/mla/README.md)."""
    return PlanCosts(168, 240, 3, 0, 3) if rows <= 32 else PlanCosts(168, 360, 1, 120, 3)


def _fill(blocks: list[int], credit_per_partition: int, shortest: int, longest: int) -> tuple[list[Record], list[int]]:
    """Deal `blocks` to partitions of equal credit in pieces of shortest..longest blocks; only a rest may be shorter.

    Positions are (request, block, index of the piece); a finished request is (request + 1, 0, 0).
    """
    records: list[Record] = []
    pieces = []
    begin, credit = (0, 0, 0), credit_per_partition
    for request, total in enumerate(blocks):
        done = split = 0
        while done < total:
            wanted = min(longest, total - done)
            taken = min(wanted, credit - VISIT_COST)
            if taken == wanted or taken >= shortest:
                done, split, credit = done + taken, split + 1, credit - VISIT_COST - taken
            if taken < wanted:
                records.append((begin[0], begin[1], request, done, begin[2]))
                begin, credit = (request, done, split), credit_per_partition
        pieces.append(split)
    if blocks:
        records.append((begin[0], begin[1], len(blocks), 0, begin[2]))
    return records, pieces


def _ways(blocks: list[int], chunk: int) -> dict[str, tuple[int, int, int]]:
    """(shortest piece, blocks that a partition takes at least, how many credits to try) of each way to cut.

    "many": as many pieces as there are partitions, but not so many that combining them, `chunk` at a time, takes longer
    than it saves. "fewer": half as many. "two": no request in more than two. "whole": none cut.
    """
    longest, least = max(blocks, default=1), 1
    while chunk * least * least < longest:
        least += 1
    half = -(-longest // 2)
    return {
        "many": (1, least, 1 << 30),
        "fewer": (1, 2 * least, 1 << 30),
        "two": (half, half, 32),
        "whole": (longest, longest, 32),
    }


def candidates(
    lengths: list[int], partitions: int, rows: int, split_tokens: int = 0, h_kv: int = 1
) -> dict[str, tuple[int, Plan]]:
    """By way to cut (`_ways`, or "fixed"), what a call should take in 1/COST_UNIT blocks, and the plan.

    That is the credit, or what the blocks take to come through memory if it is more, and the cost of merging.
    """
    blocks = [max(-(-length // BLOCK), 1) for length in lengths]  # an empty request is visited too: it writes its zeros
    longest, row_tiles = max(blocks, default=1), -(-rows // ROW_TILE)
    if split_tokens:
        unit = min(split_tokens // BLOCK, longest)
        ways, visits = {"fixed": (unit, unit, 1 << 30)}, sum(-(-n // unit) for n in blocks)
    else:
        ways, visits = _ways(blocks, combine_chunk(len(blocks), rows, h_kv)), len(blocks)
    share = -(-(sum(blocks) + VISIT_COST * visits) // partitions)
    costs = plan_costs(rows)
    # No partition is faster than its share of the memory's bandwidth; row tiles wait for a block together.
    floor = COST_UNIT * VISIT_COST + sum(blocks) * costs.load // (partitions * row_tiles)
    found = {}
    for way, (shortest, least, tries) in ways.items():
        lowest = max(share, VISIT_COST + least)
        # Linear, because the number of partitions need not fall monotonically with the credit. It takes few steps: a
        # closed partition leaves less than VISIT_COST + shortest of its credit unused.
        for credit in range(lowest, lowest + tries):
            records, pieces = _fill(blocks, credit, shortest, shortest if split_tokens else longest)
            if len(records) <= partitions:
                cost = max(COST_UNIT * credit, floor)
                if slots := sum(n for n in pieces if n > 1):
                    combined = max(pieces) > MERGE_MAX
                    cost += costs.combine if combined else costs.merge
                    cost += (costs.combine_piece if combined else costs.merge_piece) * slots * row_tiles * h_kv
                found[way] = cost, (credit, records, pieces)
                break
    return found


def schedule(lengths: list[int], partitions: int, rows: int, split_tokens: int = 0, h_kv: int = 1) -> Plan:
    """The cheapest plan, as Python values. Of two that cost the same the one whose way comes first.

    lengths: cached tokens per request.  rows: query rows of one request and kv head, s_q * h_q / h_kv.
    """
    return min(candidates(lengths, partitions, rows, split_tokens, h_kv).values(), key=lambda c: c[0])[1]


def as_tensors(plan: Plan, lengths: list[int], partitions: int, split_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """A plan as the two tensors of `mla_plan`, on the CPU."""
    _, records, pieces = plan
    metadata = torch.zeros((partitions, METADATA_COLUMNS), dtype=torch.int32)
    metadata[:, 0] = metadata[:, 2] = len(lengths)
    metadata[:, COMBINE_REQ] = len(lengths)
    if lengths:
        cuts = [min(pieces[request], CUT_PIECES) if split else 0 for request, _, _, _, split in records]
        metadata[:, CUT] = split_tokens // BLOCK << CUT_SHIFT
        metadata[: len(records), CUT] += torch.tensor(cuts, dtype=torch.int32)
        metadata[: len(records), :5] = torch.tensor(records, dtype=torch.int32)
        metadata[: len(records), SEQLEN] = torch.tensor([lengths[record[0]] for record in records], dtype=torch.int32)
    combines = [request for request, n in enumerate(pieces) if n > MERGE_MAX][:partitions]
    metadata[: len(combines), COMBINE_REQ] = torch.tensor(combines, dtype=torch.int32)
    slots = torch.tensor([0] + [n if n > 1 else 0 for n in pieces], dtype=torch.int32)
    return metadata, slots.cumsum(0, dtype=torch.int32)


def plan_tensors(
    lengths: list[int], partitions: int, rows: int, split_tokens: int = 0, h_kv: int = 1
) -> tuple[Tensor, Tensor]:
    """The tensors of the plan that `schedule` chooses."""
    return as_tensors(schedule(lengths, partitions, rows, split_tokens, h_kv), lengths, partitions, split_tokens)


def mla_plan(
    cache_seqlens: Tensor, s_q: int, h_q: int, h_kv: int = 1, num_sms: int = 132, split_tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """Plan of one decode call as the tensors that `mla_decode` takes, on the device of cache_seqlens.

    cache_seqlens: int32 (b,), cached tokens per sequence.
    s_q: query tokens per sequence (the bound max_seqlen_q when ragged).  h_q, h_kv: query and kv heads.
    num_sms: SMs the call may fill.  split_tokens: 0 or the fixed piece length in tokens, a multiple of 64.

    Returns tile_scheduler_metadata int32 (P, 8): a record per partition, of which unused ones begin and end at (b, 0),
    then the requests that are cut (column 5, independent of the record beside it), the length of the record's first
    request, and what a decode call must match (column CUT).
    num_splits int32 (b + 1,): exclusive prefix sum of partial-result slots, where a request in one piece needs none and
    one in n >= 2 pieces needs n.
    """
    partitions = num_partitions(s_q, h_q, h_kv, num_sms)
    metadata, num_splits = plan_tensors(cache_seqlens.tolist(), partitions, s_q * (h_q // h_kv), split_tokens, h_kv)
    return metadata.to(cache_seqlens.device), num_splits.to(cache_seqlens.device)
