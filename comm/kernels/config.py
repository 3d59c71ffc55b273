"""Sizes fixed when the EP kernels are compiled, and the choices that the host makes. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import VECTOR, round_up

LAYOUT_CLUSTER = 8  # CTAs; each counts its share of the tokens, then adds up its share of the experts
LAYOUT_THREADS = 512
MAX_EXPERTS = 8192  # 8 ranks of 1024; int32 counters in shared memory

SEND_THREADS = 1024

MOVERS = 4  # warps of a receive CTA that copy rows through shared memory
SIDE_WARPS = 4  # warps that copy scales, expert ids and weights
CHUNK = 8  # rows a mover takes at a time
SIDE_CHUNK = 32  # rows a side warp takes at a time, one per lane
RING_BYTES = 49152  # shared memory of one mover's ring
MAX_STAGES = 32  # of a ring
PIECE_BYTES = 8192  # a row is cut in equal pieces of at most this

TEAMS = 3  # of a combine CTA; each adds up tokens of its own
TEAM_WARPS = 4  # warps of a team, and one more that loads for it
TEAM_RING_BYTES = 65536  # shared memory of one team's ring
WEIGHT_WARPS = 4  # warps that add top-k weights


@dataclass(frozen=True)
class LayoutConfig:
    pass


@dataclass(frozen=True)
class SendConfig:
    pass


@dataclass(frozen=True)
class ReceiveConfig:
    pass


@dataclass(frozen=True)
class CombineSendConfig:
    pass


@dataclass(frozen=True)
class CombineReceiveConfig:
    pass


@dataclass(frozen=True)
class WaitConfig:
    pass


def ring(row_bytes: int, ring_bytes: int) -> tuple[int, int]:
    """(bytes of a piece, stages) of a ring of `ring_bytes` for rows of `row_bytes`, a positive multiple of 16."""
    pieces = -(-row_bytes // PIECE_BYTES)
    piece = round_up(-(-row_bytes // pieces), VECTOR)
    return piece, min(ring_bytes // piece, MAX_STAGES)


# Low latency
LL_TOKEN_WARPS = 16  # of a dispatch_send CTA: they quantise tokens, in teams
LL_INDEX_WARPS = 4  # and these find out where each token goes
LL_STAGE_BYTES = 163840  # shared memory for the records of a round, one per team
LL_MAX_TEAMS = 8
LL_IDS = 8192  # choices whose expert ids fit into shared memory; more are read from global memory
LL_COPY_BYTES = 196608  # shared memory of a dispatch_receive CTA: a record's data per warp
LL_COPY_WARPS = 16
LL_REDUCE_WARPS = 16  # of a combine_receive CTA


@dataclass(frozen=True)
class LlDispatchSendConfig:
    pass


@dataclass(frozen=True)
class LlDispatchReceiveConfig:
    pass


@dataclass(frozen=True)
class LlCombineSendConfig:
    pass


@dataclass(frozen=True)
class LlCombineReceiveConfig:
    pass


def ll_teams(tokens: int, num_sms: int, record_bytes: int) -> tuple[int, int]:
    """(CTAs, teams per CTA) of a dispatch_send: one round if it fits, and as many warps per token as there are then.

    Teams are a power of two, so that LL_TOKEN_WARPS / teams is their size.
    """
    ctas = max(1, min(num_sms, tokens))
    most = min(LL_MAX_TEAMS, LL_STAGE_BYTES // record_bytes)
    teams = 1
    while teams < -(-tokens // ctas) and 2 * teams <= most:
        teams *= 2
    return ctas, teams


LL_RINGS = 8  # warps of a combine_send CTA
LL_RING_BYTES = 24576


def ll_record_bytes(row_bytes: int, scale_words: int) -> int:
    """A record's data in the shared memory of a dispatch_receive CTA."""
    return row_bytes + round_up(4 * scale_words, VECTOR)


def ll_copy_warps(row_bytes: int, scale_words: int) -> int:
    """Warps of a dispatch_receive CTA that have a record's data in shared memory, each its own."""
    return min(LL_COPY_WARPS, LL_COPY_BYTES // ll_record_bytes(row_bytes, scale_words))
