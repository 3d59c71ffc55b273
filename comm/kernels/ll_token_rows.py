"""What both sides of combine in one launch (ll_combine_whole.py) do: the rows of a token that are here, and the places
of its sums at home.

A warp takes pieces of 256 columns, 8 per lane. What it knows of a token it keeps in its lanes: it is much more often at
another piece than at another token.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from ...cute_kernels.sm90.address import ld_i32, ld_vector_if
from ..ll_config import MAX_TOPK
from .ll_sums import COLUMNS, add_row, lowest_bit
from .verbs import Group

PIECE = 32 * COLUMNS  # columns of a warp
ROWS = 8  # whose loads are in flight together
GROUP = 4  # rows that are looked at or left out together: a branch costs as much as a row's sums
NONE = 31  # a lane that has no choice
assert MAX_TOPK % ROWS == 0
assert MAX_TOPK <= NONE


class TokenRows:
    """a: LlCombineWholeArgs. List of a token: in lane u the row of y of its u-th choice here, -1 for none, and its
    weight, +0.0 for none."""

    @cute.jit
    def share(self, pieces: Int32):
        """First and end of this CTA's pieces."""
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        each = (pieces + ctas - 1) // ctas
        end = (cta + 1) * each
        return cta * each, end if end < pieces else pieces

    def pieces_of(self, a):
        return (a.hidden + (PIECE - 1)) // PIECE

    @cute.jit
    def row_of(self, g: Group, a, source: Int32, token: Int32, choice: Int32):
        """Row of y for a choice, -1 if there is none or the caller's handle has none."""
        row, rows = Int32(-1), a.experts_per_rank * g.ranks * a.max_tokens
        if choice < a.topk:
            row = ld_i32(a.choice_rows + Int64((source * a.max_tokens + token) * a.max_topk + choice) * 4)
        return row if (row >= 0) & (row < rows) else Int32(-1)

    def choices_on(self, a, expert, rank, lane):
        """Bit j: choice j, which lane j has, is on the rank."""
        first = rank * a.experts_per_rank
        here = (lane < a.topk) & (expert >= first) & (expert < first + a.experts_per_rank)
        return cute.arch.vote_ballot_sync(here)

    @cute.jit
    def in_a_list(self, of: Int32, lane: Int32):
        """In lane u the number of the u-th choice of `of`, NONE for none."""
        choice, u = Int32(NONE), Int32(0)
        while of != 0:
            choice = lowest_bit(of) if lane == u else choice
            of &= of - 1
            u += 1
        return choice

    @cute.jit
    def weights_of(self, rows: Int32, weight: Float32, order: Int32):
        """Of a list. weight: of choice j in lane j. order: of in_a_list."""
        weights = cute.arch.shuffle_sync(weight, order)
        return weights if rows >= 0 else Float32(0.0)

    @cute.jit
    def load_rows(self, a, rows: Int32, first: cutlass.Constexpr[int], column: Int32, batch: cute.Tensor):
        """8 columns of rows first to first + 7 of a list, zeros for none; a group that is left out is not looked at."""
        base, inside = a.y + Int64(column) * 2, column < a.hidden
        for group in cutlass.range_constexpr(0, ROWS, GROUP):
            if cutlass.const_expr(group == 0) or self.reaches(rows, first + group):
                for u in cutlass.range_constexpr(group, group + GROUP):
                    row = cute.arch.shuffle_sync(rows, first + u)
                    words = ld_vector_if(base + Int64(row) * (a.hidden * 2), Int32(inside & (row >= 0)))
                    for i in cutlass.range_constexpr(4):
                        batch[4 * u + i] = words[i]

    def reaches(self, rows, first: int):
        """Whether a list has a row at `first` or behind it."""
        return (cute.arch.vote_ballot_sync(rows >= 0) >> first) != 0

    @cute.jit
    def partial(self, a, rows: Int32, weights: Float32, column: Int32, batch: cute.Tensor):
        """Sum of 8 columns over a list, with its weights, zeros for none. batch: the first rows, loaded."""
        acc = cute.make_rmem_tensor(COLUMNS, Float32)
        acc.fill(0.0)
        for first in cutlass.range_constexpr(0, MAX_TOPK, GROUP):
            if self.reaches(rows, first):
                if cutlass.const_expr(first > 0 and first % ROWS == 0):
                    self.load_rows(a, rows, first, column, batch)
                for u in cutlass.range_constexpr(first % ROWS, first % ROWS + GROUP):
                    weight = cute.arch.shuffle_sync(weights, first - first % ROWS + u)
                    add_row(acc, weight, tuple(batch[4 * u + i] for i in range(4)))
        return acc

    def places_of(self, a, token):
        """Offset of a token's sums at its home."""
        return a.sums_offset + Int64(token * a.max_topk) * (a.hidden * 2)

    @cute.jit
    def vector_at(self, a, places: Int64, of: Int32, piece: Int32, lane: Int32, k: cutlass.Constexpr[int]):
        """Address of a lane's vector k of the sum for the choices `of`; of vector 0 of the row if that is one.

        A sum is twice as long as a row and lies piece after piece, in a piece vector 0 of all lanes and then vector 1:
        its first half in the place of the first choice, the second in that of the second.
        """
        row_bytes, rest = a.hidden * 2, of & (of - 1)
        choice, at = lowest_bit(of), piece * (PIECE * 2) + lane * 16
        if rest != 0:
            lanes = (a.hidden - piece * PIECE) // COLUMNS
            lanes = lanes if lanes < 32 else Int32(32)
            at = piece * (PIECE * 4) + (k * lanes + lane) * 16
            if at >= row_bytes:
                choice = lowest_bit(rest)
                at -= row_bytes
        return places + (Int64(choice) * row_bytes + at)
