"""Shapes, budgets and host-side choices of the MLA decode kernels: plain Python, importable without the DSL."""

from dataclasses import dataclass

HEAD_DIM = 576  # 512 NoPE + 64 RoPE columns of a cached token
HEAD_DIM_V = 512  # V is the first 512 columns of K
BLOCK = 64  # keys per pipeline block, and the unit of the planner
TILE_M = 64  # packed (token, head) rows per CTA: one wgmma M
NUM_SLABS = HEAD_DIM // 64  # 64-column slabs of one block, 8 KiB each
SLAB_BYTES = BLOCK * 64 * 2
VISIT_COST = 4  # planner: what starting and finishing one piece costs, in blocks
MERGE_MAX = (
    2  # sequences in at most so many pieces are merged by the decode kernel itself, others by the combine kernel
)
COMBINE_REQ = 5  # column of the plan: row i holds the i-th sequence left to combine, or the batch size behind the last
SEQLEN = 6  # column of the plan: length of the partition's first sequence
PAGE_SIZES = (16, 32, 64, 128)
COMBINE_THREADS = 256
PLAN_THREADS = 32
RESCALE_LOG2 = 8.0  # O is rescaled only when a row maximum grew by more than 2**8


@dataclass(frozen=True)
class DecodeConfig:
    """One compiled decode kernel. dtype: "bf16" | "f16"; page_size: 16 | 32 | 64 | 128 tokens."""

    dtype: str
    page_size: int

    @property
    def box_rows(self) -> int:
        """Rows of one TMA box: a block is one box, or several when pages are shorter than a block."""
        return min(self.page_size, BLOCK)


@dataclass(frozen=True)
class CombineConfig:
    """One compiled combine kernel. chunk: pieces loaded before the first use, 8 or 16 (fewer CTAs per SM)."""

    dtype: str
    chunk: int


@dataclass(frozen=True)
class PlanConfig:
    """The planner has one variant."""


def min_piece(rows: int) -> int:
    """Fewest blocks worth a piece of its own: more rows make partial results dearer to merge."""
    return 1 if rows <= TILE_M else 2


def combine_cost(rows: int) -> int:
    """Planner: what a call pays, in blocks, if any sequence needs the combine kernel: little where rows are few."""
    return 0 if rows <= 32 else 3


def max_combines(batch: int, partitions: int) -> int:
    """Most sequences a plan can leave to the combine kernel: each takes at least MERGE_MAX of the P - 1 cuts."""
    return min(batch, (partitions - 1) // MERGE_MAX)


def combine_chunk(batch: int, partitions: int, split_blocks: int) -> int:
    """Few sequences have many pieces each; with fixed splits the order of additions must not depend on the batch."""
    return 16 if partitions >= 12 * batch and split_blocks == 0 else 8


def row_tiles(s_q: int, heads_per_kv: int) -> int:
    """Tiles of 64 packed rows (row = token * heads_per_kv + head) that cover one sequence and kv head."""
    return -(-s_q * heads_per_kv // TILE_M)


def num_partitions(num_sms: int, tiles: int, h_kv: int) -> int:
    """CTAs that share the work of one (row tile, kv head); the grid has one CTA per SM unless tiles alone are more."""
    return max(num_sms // (tiles * h_kv), 1)
