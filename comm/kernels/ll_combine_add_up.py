"""Combine in one launch (ll_combine_whole.py), home side: my tokens' rows here, and the sums of the other ranks."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from .config import REDUCE_WARPS
from .ll_sums import COLUMNS, add_row, end_rank, load_vector, lowest_bit, store_total, take_vector
from .ll_token_rows import PIECE, ROWS, TokenRows
from .verbs import Group

RANKS = 4  # whose sums are loaded together


class Adder(TokenRows):
    """a: LlCombineWholeArgs."""

    @cute.jit
    def add_up(self, g: Group, a, epoch: Int32, warp: Int32, lane: Int32):
        """By all warps. A sum that does not come ends the buffer."""
        pieces = self.pieces_of(a)
        begin, end = self.share(a.tokens * pieces)
        token, piece, known = (begin + warp) // pieces, (begin + warp) % pieces, Int32(-1)
        choices, ranks, rows, weight, weights = Int32(0), Int32(0), Int32(-1), Float32(0.0), Float32(0.0)
        for _ in cutlass.range(begin + warp, end, REDUCE_WARPS, unroll=1):
            if token != known:
                expert, bits = self.choice(a, token * a.topk + (lane if lane < a.topk else Int32(0)))
                weight, row = bits.bitcast(Float32), self.row_of(g, a, g.rank, token, lane)
                choices, ranks = self.choices_of_ranks(g, a, expert, lane)
                order = self.in_a_list(cute.arch.shuffle_sync(choices, g.rank), lane)
                rows = cute.arch.shuffle_sync(row, order)
                weights = self.weights_of(rows, weight, order)
                known = token
            self.add_piece(g, a, epoch, token, piece, choices, ranks, rows, weight, weights, lane)
            piece += REDUCE_WARPS
            while piece >= pieces:
                piece -= pieces
                token += 1

    @cute.jit
    def choices_of_ranks(self, g: Group, a, expert: Int32, lane: Int32):
        """In lane r the choices on rank r, a bit each; and the ranks that have any, likewise."""
        choices = Int32(0)
        for r in cutlass.range(g.ranks, unroll=1):
            of = self.choices_on(a, expert, r, lane)
            choices = of if lane == r else choices
        return choices, cute.arch.vote_ballot_sync(choices != 0)

    @cute.jit
    def add_piece(
        self, g: Group, a, epoch: Int32, token: Int32, piece: Int32, choices: Int32, ranks: Int32, rows: Int32,
        weight: Float32, weights: Float32, lane: Int32,
    ):  # fmt: skip
        """By one warp: 256 columns of a token. choices, ranks: of choices_of_ranks. weight: of choice j in lane j.
        rows, weights: of the choices here, in a list."""
        column, places = piece * PIECE + lane * COLUMNS, g.own + self.places_of(a, token)
        batch, sums = cute.make_rmem_tensor(4 * ROWS, Int32), cute.make_rmem_tensor(8 * RANKS, Int32)
        others = ranks & ~(Int32(1) << g.rank)
        self.load_rows(a, rows, 0, column, batch)
        self.load_sums(g, a, places, choices, others, piece, lane, sums)
        own, below = self.partial(a, rows, weights, column, batch), (Int32(1) << g.rank) - 1
        total = cute.make_rmem_tensor(COLUMNS, Float32)
        total.fill(0.0)
        if others & below == 0:
            end_rank(total, own)
        while others != 0:
            for u in cutlass.range_constexpr(RANKS):
                if others != 0:
                    source = lowest_bit(others)
                    of = cute.arch.shuffle_sync(choices, source)
                    for k in cutlass.range_constexpr(2):
                        if self.is_awaited(a, of, column, k):
                            at = self.vector_at(a, places, of, piece, lane, k)
                            words = tuple(sums[8 * u + 4 * k + i] for i in range(4))
                            words = take_vector(g, at, words, epoch, source)
                            for i in cutlass.range_constexpr(4):
                                sums[8 * u + 4 * k + i] = words[i]
                    self.add_rank(total, of, weight, tuple(sums[8 * u + i] for i in range(8)))
                    if (others & below != 0) & (others & (others - 1) & below == 0):
                        end_rank(total, own)  # its turn: behind the last rank below mine
                    others &= others - 1
            if others != 0:
                self.load_sums(g, a, places, choices, others, piece, lane, sums)
        if column < a.hidden:
            store_total(a.out + (Int64(token) * a.hidden + column) * 2, total)

    @cute.jit
    def load_sums(
        self, g: Group, a, places: Int64, choices: Int32, others: Int32, piece: Int32, lane: Int32, sums: cute.Tensor
    ):
        """What may have come from the first of `others`: 8 words of a sum, or 4 of a row."""
        sums.fill(0)
        for u in cutlass.range_constexpr(RANKS):
            if others != 0:
                of = cute.arch.shuffle_sync(choices, lowest_bit(others))
                for k in cutlass.range_constexpr(2):
                    if self.is_awaited(a, of, piece * PIECE + lane * COLUMNS, k):
                        words = load_vector(self.vector_at(a, places, of, piece, lane, k))
                        for i in cutlass.range_constexpr(4):
                            sums[8 * u + 4 * k + i] = words[i]
                others &= others - 1

    def is_awaited(self, a, of, column, k: int):
        """Whether a rank that has the choices `of` sends my lane's vector k: of a sum both, of a row the first."""
        return (column < a.hidden) & (((of & (of - 1)) != 0) | (k == 0))

    @cute.jit
    def add_rank(self, total: cute.Tensor, of: Int32, weight: Float32, words):
        """A rank's sum, or its only row, in the first of the words."""
        acc = cute.make_rmem_tensor(COLUMNS, Float32)
        acc.fill(0.0)
        if of & (of - 1) == 0:
            add_row(acc, cute.arch.shuffle_sync(weight, lowest_bit(of)), words[:4])
        else:
            for i in cutlass.range_constexpr(COLUMNS):
                acc[i] = words[i].bitcast(Float32)
        end_rank(total, acc)
