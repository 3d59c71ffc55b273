"""Sizes fixed when the MoE kernels are compiled, and the choices that the host makes. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
VECTOR_BYTES = 16
FP8_GROUP = 128  # columns that share a scale

ROUTE_THREADS = 64  # a warp per token
ROUTE_VALUES = (2, 4, 8, 16)  # experts that a lane holds
SCORINGS = ("sigmoid", "softmax")

SORT_THREADS = 1024
SORT_WARPS = SORT_THREADS // WARP
SORT_PAIRS = 4096  # for which a CTA more pays
MAX_SORT_CTAS = 32
MAX_EXPERTS = 1024

MOVERS = 4  # warps of a permute CTA that copy rows through shared memory
SIDE_WARPS = 4  # warps that copy scales
RING_BYTES = 49152  # shared memory of one mover
PIECE_BYTES = 8192  # a row is cut in equal pieces of at most this
MIN_STAGES = RING_BYTES // PIECE_BYTES
MAX_STAGES = 16

REDUCE_THREADS = 256  # of unpermute and its backward
REDUCE_COLUMNS = 8 * WARP  # of a warp at a time: 16 bytes of bfloat16 per lane

QUANT_THREADS = 256
QUANT_VECTORS = 4  # 16-byte vectors that a thread has in flight


@dataclass(frozen=True)
class RouteConfig:
    values: int
    scoring: str


@dataclass(frozen=True)
class OneVariant:
    """Of a kernel that is built once: every size is a parameter of the launch."""


def route_config(experts: int, scoring: str) -> RouteConfig:
    """The smallest variant that holds all experts, 1..512."""
    return RouteConfig(next(v for v in ROUTE_VALUES if v * WARP >= experts), scoring)


def sort_ctas(pairs: int) -> int:
    """CTAs of a sort. More than one need what each counts from a kernel before."""
    return min(max(-(-pairs // SORT_PAIRS), 1), MAX_SORT_CTAS)


def sort_smem_bytes(experts: int) -> int:
    """Shared memory of a sort launch: counters of each warp, bases of the CTA, sums of warps."""
    return 4 * ((SORT_WARPS + 1) * experts + SORT_WARPS)


def ring(row_bytes: int) -> tuple[int, int]:
    """(bytes of a piece, stages) of a mover's ring for rows of `row_bytes`, a positive multiple of 16."""
    pieces = -(-row_bytes // PIECE_BYTES)
    piece = -(-row_bytes // pieces // VECTOR_BYTES) * VECTOR_BYTES
    return piece, min(RING_BYTES // piece, MAX_STAGES)


def permute_ctas(tokens: int, row_bytes: int, num_sms: int) -> int:
    """CTAs of a permute launch: a piece per mover if SMs suffice, else one CTA per SM."""
    pieces = tokens * -(-row_bytes // ring(row_bytes)[0])
    return max(1, min(num_sms, -(-pieces // MOVERS)))
