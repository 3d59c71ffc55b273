"""Combine in one launch (ll_combine_whole.py), expert side: sums of the rows here, of tokens that others ask for."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64

from ..config import MAX_RANKS
from .config import REDUCE_WARPS
from .ll_sums import COLUMNS, store_vector
from .ll_token_rows import PIECE, ROWS, TokenRows
from .ll_verbs import COUNTS, add_wait, slot_of
from .ll_words import load_words, wait_words
from .verbs import PHASE, Group, aborted, report, wait_count

ASK_BYTES = 16  # {weight, epoch, expert, epoch}


class Answerer(TokenRows):
    """sm: has bases. a: LlCombineWholeArgs."""

    def count_at(self, g: Group, a, epoch, source):
        """Offset of a source's count of tokens."""
        return Int64(slot_of(epoch) * g.ranks + source) * a.counts_bytes + COUNTS

    def ask_at(self, a, epoch, source, token, choice):
        """Offset of what a source asks for a choice."""
        place = Int64((source * a.max_tokens + token) * a.max_topk + choice)
        return a.asks_offset + Int64(slot_of(epoch)) * a.asks_bytes + place * ASK_BYTES

    @cute.jit
    def turn(self, g: Group, i: Int32):
        """Source and token of the others' tokens that come in turn, those of the rank behind mine first."""
        peers = g.ranks - 1 if g.ranks > 1 else Int32(1)
        source = g.rank + 1 + i % peers
        return source if source < g.ranks else source - g.ranks, i // peers

    @cute.jit
    def answer(self, g: Group, a, sm, epoch: Int32, warp: Int32, lane: Int32):
        """By all warps. False: what a rank has to ask has not come in time."""
        pieces, peers = self.pieces_of(a), g.ranks - 1
        # If all ranks have as many tokens it is known what comes first: it is read while the asking is under way.
        held = self.share(a.tokens * pieces * peers)[0] + warp  # the piece whose rows are in `batch`, -1: none
        known = held // pieces  # the turn whose rows are in `row`, `order` and `rows`
        source, token = self.turn(g, known)
        row = self.row_of(g, a, source, token if token < a.max_tokens else Int32(0), lane)
        order, rows = self.list_of(row, lane)
        batch = cute.make_rmem_tensor(4 * ROWS, Int32)
        self.load_rows(a, rows, 0, held % pieces * PIECE + lane * COLUMNS, batch)
        came, tokens, start = Boolean(True), Int32(0), cute.arch.globaltimer()  # of rank r in lane r
        if lane < g.ranks:
            tokens = wait_count(g, g.own + self.count_at(g, a, epoch, lane), epoch, lane, PHASE["ll_asks"])
            if tokens > a.max_tokens:  # no asking: the rank has made another call
                report(g, lane, PHASE["ll_asks"], epoch, tokens, Int64(0))
                tokens = Int32(0)
            if tokens == 0:
                came = not aborted(g)
            if warp == 0:
                add_wait(a.wait_stats, lane, start)
        cute.arch.sync_warp()
        most = cute.arch.warp_redux_sync(tokens if lane != g.rank else Int32(0), "max")
        begin, end = self.share(most * pieces * peers)
        turn, piece = (begin + warp) // pieces, (begin + warp) % pieces
        # asked: the turn whose asking is in `of`, `weights` and `places`.
        asked, of, weights, places = Int32(-1), Int32(0), Float32(0.0), Int64(0)
        for i in cutlass.range(begin + warp, end, REDUCE_WARPS, unroll=1):
            if turn != asked:
                source, token = self.turn(g, turn)
                asked, of = turn, Int32(0)
                if token < cute.arch.shuffle_sync(tokens, source):
                    address = g.own + self.ask_at(a, epoch, source, token, lane if lane < a.topk else Int32(0))
                    found = load_words(address)
                    if turn != known:
                        row = self.row_of(g, a, source, token, lane)
                        order, rows = self.list_of(row, lane)
                        known = turn
                    weight, expert, here = wait_words(g, address, found, epoch, source, PHASE["ll_asks"])
                    came = came & here
                    of = self.choices_on(a, expert, g.rank, lane)
                    of = of if cute.arch.vote_ballot_sync(here) == -1 else Int32(0)
                    if of != cute.arch.vote_ballot_sync(row >= 0):  # not the handle of this dispatch
                        order = self.in_a_list(of, lane)
                        rows, held = cute.arch.shuffle_sync(row, order), Int32(-1)
                    weights = self.weights_of(rows, weight.bitcast(Float32), order)
                    places = sm.bases.get_tensor(cute.make_layout(MAX_RANKS))[source] + self.places_of(a, token)
            if of != 0:
                if i != held:
                    self.load_rows(a, rows, 0, piece * PIECE + lane * COLUMNS, batch)
                    held = Int32(-1)
                self.answer_piece(a, places, of, piece, rows, weights, batch, lane)
            piece += REDUCE_WARPS
            while piece >= pieces:
                piece -= pieces
                turn += 1
        return cute.arch.vote_ballot_sync(came) == -1

    @cute.jit
    def list_of(self, row: Int32, lane: Int32):
        """Choices that have rows, and these, in a list. row: of choice j in lane j."""
        order = self.in_a_list(cute.arch.vote_ballot_sync(row >= 0), lane)
        return order, cute.arch.shuffle_sync(row, order)

    @cute.jit
    def answer_piece(
        self, a, places: Int64, of: Int32, piece: Int32, rows: Int32, weights: Float32, batch: cute.Tensor, lane: Int32
    ):
        """By one warp: 256 columns of a token's sum here to its home. A row that is alone goes as it is."""
        column = piece * PIECE + lane * COLUMNS
        if of & (of - 1) == 0:
            if column < a.hidden:
                store_vector(self.vector_at(a, places, of, piece, lane, 0), tuple(batch[i] for i in range(4)))
        else:
            acc = self.partial(a, rows, weights, column, batch)
            if column < a.hidden:
                for k in cutlass.range_constexpr(2):
                    store_vector(
                        self.vector_at(a, places, of, piece, lane, k),
                        tuple(acc[4 * k + i].bitcast(Int32) for i in range(4)),
                    )
