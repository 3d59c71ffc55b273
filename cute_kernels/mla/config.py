"""Shapes, budgets and host-side choices of the MLA decode kernels: plain Python, importable without the DSL."""

from dataclasses import dataclass

HEAD_DIM = 576  # 512 NoPE + 64 RoPE columns of a cached token
HEAD_DIM_V = 512  # V is the first 512 columns of K
BLOCK = 64  # keys per pipeline block, and the unit of the planner
FEW_ROWS = 16  # up to so many rows per sequence and kv head have kernels of their own
TILE_M = 64  # packed (token, head) rows per CTA: one wgmma M
NUM_SLABS = HEAD_DIM // 64  # 64-column slabs of one block, 8 KiB each
SLAB_BYTES = BLOCK * 64 * 2
VISIT_COST = 4  # planner: what starting and finishing one piece costs, in blocks
COST_UNIT = 120  # planner: of a block
MERGE_MAX = 2  # pieces that the decode kernel merges itself; sequences in more are left to the combine kernel
# Columns of the plan: 0 to 4 are work.Record's, then
COMBINE_REQ = 5  # row i holds the i-th sequence left to combine, or the batch size behind the last
SEQLEN = 6  # length of the partition's first sequence
CUT = 7  # split_blocks << CUT_SHIFT, plus the pieces of the sequence in whose middle the partition begins, 0 if in none
CUT_SHIFT = 12
CUT_PIECES = (1 << CUT_SHIFT) - 1  # more pieces are written as so many
PAGE_SIZES = (16, 32, 64, 128)
COMBINE_WARPS = 8
COMBINE_THREADS = 32 * COMBINE_WARPS
# (chunk, teams, vectors) of combine kernels, see CombineConfig
COMBINE_SHAPES = ((4, 8, 1), (4, 4, 1), (4, 2, 1), (8, 1, 1), (4, 1, 2))
READER = 1 << 26  # what a combine CTA adds to a counter of arrivals when it needs it no more
PLAN_WAYS = 4  # to cut that the planner compares, a warp each
PLAN_THREADS = 32 * PLAN_WAYS
RESCALE_LOG2 = 8.0  # O is rescaled only when a row maximum grew by more than 2**8
WARPS_OUT = 8  # math warps: each stores 16 rows x 256 columns of a partial result, and has a counter of arrivals
PARTIAL_OUT_BYTES = TILE_M * HEAD_DIM_V * 2  # of a tile, fp16
PARTIAL_ROWS_BYTES = WARPS_OUT * 16 * 8  # of a tile: for each row in each warp its lse and what its values count
POLL_NS = 1_000_000  # combine: after so long it waits for the whole decode kernel instead
MERGE_NS = 2_000_000_000  # decode: nothing but a broken plan keeps the other piece away so long; it takes about 2 us

# What a kernel writes to its call's report word, with the sequence: fault + 8 * sequence.
FAULT_PLAN = 1  # the plan is of another batch size or other split_tokens
FAULT_PIECES = 2  # num_splits and the plan's records disagree about the pieces of a sequence
FAULT_LENGTHS = 3  # a sequence that is cut, or begins a partition, has another length than the plan says
FAULT_MERGE = 4  # a piece did not arrive


@dataclass(frozen=True)
class DecodeConfig:
    """One compiled decode kernel. dtype: "bf16" | "f16"; page_size: 16 | 32 | 64 | 128 tokens.

    spread: the first partitions do not go to neighbouring SMs, see `few_sequences`. few_rows: at most FEW_ROWS rows per
    sequence and kv head.
    """

    dtype: str
    page_size: int
    spread: bool = False
    few_rows: bool = False

    @property
    def box_rows(self) -> int:
        """Rows of one TMA box: a block is one box, or several when pages are shorter than a block."""
        return min(self.page_size, BLOCK)


@dataclass(frozen=True)
class CombineConfig:
    """One compiled combine kernel.

    chunk: pieces that a warp loads before the first use. teams: of warps in a CTA that share the pieces. vectors: of 16
    columns, per warp.
    """

    dtype: str
    chunk: int
    teams: int
    vectors: int

    @property
    def ctas_per_sm(self) -> int:
        """Latency bound: several CTAs per SM hide each other's loads, as many as their registers allow."""
        return 4 if self.chunk == 4 else 3


@dataclass(frozen=True)
class PlanConfig:
    """The planner has one variant."""


def plan_costs(rows: int) -> tuple[int, int, int, int, int]:
    """Planner, in 1/COST_UNIT blocks: load, merge, merge_piece, combine, combine_piece of cutehop.ref.mla_plan."""
    return (168, 240, 3, 0, 3) if rows <= 32 else (168, 360, 1, 120, 3)


def max_combines(batch: int, partitions: int, max_blocks: int, split_blocks: int) -> int:
    """Most sequences that a plan can leave to the combine kernel, from shapes alone.

    Each takes at least MERGE_MAX of the P - 1 cuts, and has more than MERGE_MAX pieces of which only one may be short.
    """
    if max_blocks <= MERGE_MAX * (split_blocks or 1):
        return 0
    return batch if split_blocks else min(batch, (partitions - 1) // MERGE_MAX)


def max_slots(batch: int, partitions: int, max_blocks: int, split_blocks: int) -> int:
    """Most partial results a plan can ask for: a cut between partitions adds a piece to a sequence that is split."""
    if split_blocks:
        pieces = -(-max_blocks // split_blocks)
        return batch * pieces if pieces > 1 else 0
    cuts = partitions - 1
    return cuts + min(cuts, batch)


def arrivals(slots: int) -> int:
    """Counters of arrived pieces for one tile: sequences left to the combine kernel begin more than MERGE_MAX apart."""
    return -(-slots // (MERGE_MAX + 1)) * WARPS_OUT


def q_rows(rows: int, ragged: bool, split_blocks: int) -> int:
    """Rows of Q that a decode CTA loads.

    The kernels differ in the last bits, and `rows` is that of a ragged batch's longest sequence: where the results must
    not depend on the batch, such a one has the kernel that all of them can have.
    """
    return FEW_ROWS if rows <= FEW_ROWS and not (ragged and split_blocks) else TILE_M


def few_sequences(batch: int, partitions: int) -> bool:
    """Whether a plan may well leave half of the partitions empty. With more sequences that is rare, and neighbours had
    better be row tiles of one partition, which read the same keys."""
    return partitions >= 6 * batch


def combine_chunk(batch: int, rows: int, h_kv: int) -> int:
    """Pieces that a combine CTA takes at a time, unless cuts are fixed: see cutehop.ref.mla_plan."""
    chunk, teams, _ = combine_shape(batch, rows, h_kv, 0)
    return chunk * teams


def combine_shape(batch: int, rows: int, h_kv: int, split_blocks: int) -> tuple[int, int, int]:
    """(chunk, teams, vectors): the fastest of eight in most of 133 calls (README.md). Few sequences have many pieces
    each and leave SMs for many CTAs; with many sequences the CTAs of the combine kernel had better be few.

    With fixed splits the order of additions must not depend on the batch.
    """
    ctas = batch * combine_parts(h_kv * row_tiles(rows, 1), rows, 1, 1)
    eight, four, two, one, wide = COMBINE_SHAPES
    if split_blocks or 128 < ctas < 512:
        return one
    if ctas >= 512:
        return wide
    return eight if ctas <= 32 else four if ctas <= 64 else two


def combine_grid(config: CombineConfig, combines: int, tiles: int, rows: int, num_sms: int) -> tuple[int, int, int]:
    """CTAs of a call: as few as take no longer than all that can be resident, each taking a part of sequence after
    sequence.

    tiles: row tiles of a slot, over all kv heads. rows: of one sequence and kv head.
    """
    parts = combine_parts(tiles, rows, config.teams, config.vectors)
    turns = -(-combines // max(num_sms * config.ctas_per_sm // parts, 1))
    return parts, -(-combines // turns), 1


def combine_parts(tiles: int, rows: int, teams: int, vectors: int) -> int:
    """CTAs that share a sequence: 16 rows and 128 / teams columns each, times `vectors`. tiles: over all kv heads."""
    return tiles * 2 * row_groups(rows) * (2 * teams // vectors)


def row_groups(rows: int) -> int:
    """Groups of 16 rows of a tile that any call of this shape fills."""
    return min(-(-rows // 16), TILE_M // 16)


def row_tiles(s_q: int, heads_per_kv: int) -> int:
    """Tiles of 64 packed rows (row = token * heads_per_kv + head) that cover one sequence and kv head."""
    return -(-s_q * heads_per_kv // TILE_M)


def num_partitions(num_sms: int, tiles: int, h_kv: int) -> int:
    """CTAs that share the work of one (row tile, kv head); the grid has one CTA per SM unless tiles alone are more."""
    return max(num_sms // (tiles * h_kv), 1)
