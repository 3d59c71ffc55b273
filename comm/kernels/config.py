"""Sizes fixed when the EP kernels are compiled, and the choices that the host makes. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import MAX_RANKS, VECTOR, round_up

LAYOUT_CLUSTER = 8  # CTAs; each counts its share of the tokens, then adds up its share of the experts
LAYOUT_THREADS = 256
MAX_EXPERTS = 8192  # 8 ranks of 1024; int32 counters in shared memory
LAYOUT_COUNTERS = MAX_EXPERTS + MAX_RANKS
LAYOUT_RANKS = 32  # bits of the word in which a thread notes its token's ranks

SEND_THREADS = 1024
COPY_BYTES = 262144  # a sending CTA copies these in 5 us; for more it is worth the 3 us of a launch to have more CTAs

MOVERS = 4  # warps of a receive CTA that copy rows through shared memory
SIDE_WARPS = 4  # warps that copy scales, expert ids and weights
CHUNK = 8  # rows a mover takes at a time
SIDE_CHUNK = 32  # rows a side warp takes at a time, one per lane
RING_BYTES = 49152  # shared memory of one mover's ring
MAX_STAGES = 32  # of a ring
PIECE_BYTES = 8192  # a row is cut in equal pieces of at most this
LEAST_STAGES = 3  # a load, a store and one being read
FLIGHT_BYTES = 3_500_000  # of all rings of a launch: with more in flight between two GPUs, both links slow down

TEAMS = 3  # of a combine CTA; each adds up tokens of its own
TEAM_WARPS = 4  # warps of a team, and one more that loads for it
TEAM_RING_BYTES = 73728  # shared memory of one team's ring
WEIGHT_WARPS = 4  # warps that add top-k weights


@dataclass(frozen=True)
class OneVariant:
    """Of a kernel that is built once: every size is a parameter of the launch."""


def ring(row_bytes: int, ring_bytes: int, rings: int = 1) -> tuple[int, int]:
    """(bytes of a piece, stages) of each of `rings` rings of `ring_bytes` for rows of `row_bytes`, a positive multiple
    of 16."""
    pieces = -(-row_bytes // PIECE_BYTES)
    piece = round_up(-(-row_bytes // pieces), VECTOR)
    return piece, min(ring_bytes // piece, MAX_STAGES, max(LEAST_STAGES, FLIGHT_BYTES // (rings * piece)))


# Low latency, dispatch
TOKEN_WARPS = 16  # of a sending CTA: they quantise tokens, in teams
INDEX_WARPS = 4  # and these find out where each token goes
MAX_TEAMS = 8
IDS = 8192  # choices whose expert ids fit into shared memory; more are read from global memory
COPY_WARPS = 16  # of a receiving CTA
RECORD_PIECE = 512  # bytes of a record of few tokens that a warp takes

# Low latency, combine
RINGS = 8  # warps of a sending CTA
SEND_RING_BYTES = 24576
REDUCE_WARPS = 16  # of a receiving CTA


@dataclass(frozen=True)
class Parts:
    """What one low-latency launch does: send, receive, or both. elastic: ranks may be left out. coded: rows of combine
    travel as LogFMT. Each is a build of its own: kernels without have nothing of it."""

    sends: bool
    receives: bool
    elastic: bool = False
    coded: bool = False


@dataclass(frozen=True)
class RemoteParts(Parts):
    """The same for a group with peers that only NVSHMEM reaches. nvshmem: version whose device code is linked in."""

    nvshmem: str = ""


SEND, RECEIVE, BOTH = PARTS = (Parts(True, False), Parts(False, True), Parts(True, True))
MASK = Parts(False, False, elastic=True)  # neither: it masks ranks, or takes them back
BF16, F32_SCALES, POW2_SCALES, UE8M0_SCALES = range(4)  # how dispatched rows travel


def ll_dispatch_data_bytes(config: Parts) -> int:
    """Shared memory for records that are sent, a team each, and rows that are received, a warp each."""
    if config.sends:
        return 126976 if config.receives else 163840
    return 196608


def ll_teams(tokens: int, num_sms: int, record_bytes: int, data_bytes: int) -> tuple[int, int]:
    """(CTAs, teams per CTA) that send: one round if it fits, and as many warps per token as there are then.

    Teams are a power of two, so that TOKEN_WARPS / teams is their size.
    """
    ctas = max(1, min(num_sms, tokens))
    most = min(MAX_TEAMS, data_bytes // record_bytes)
    teams = 1
    while teams < -(-tokens // ctas) and 2 * teams <= most:
        teams *= 2
    return ctas, teams


def ll_row_bytes(row_bytes: int, scale_words: int) -> int:
    """A received record without its head, in shared memory."""
    return row_bytes + round_up(4 * scale_words, VECTOR)


def ll_word_pieces(row_bytes: int, scale_words: int) -> int:
    """Pieces of a record of few tokens, a warp each."""
    return -(-row_bytes // RECORD_PIECE) - (-4 * scale_words // RECORD_PIECE)


def ll_copy_warps(row_bytes: int, scale_words: int, data_bytes: int) -> int:
    """Warps of a receiving CTA that have a place in shared memory."""
    return min(COPY_WARPS, data_bytes // ll_row_bytes(row_bytes, scale_words))
