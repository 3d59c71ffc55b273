"""Low-latency dispatch, sender's side: quantise each token and push it once to every rank that has one of its experts.

    record = head {token, {expert, row among my choices of that expert} per choice} | columns | scales
    place  = slot of the epoch, my part, index of the token among those I send to that rank

In rounds, a token per team:

    16 token warps  in teams of 2 to 16: bf16 columns to e4m3 with a scale per 128 columns (or the columns as they are)
    4 index warps   expert ids into shared memory; the heads of the round's tokens; in one CTA, counts to all peers

then one warp of each team stores its record to the peers, a lane per rank. Up to FEW_TOKENS records all token warps
store, as words that need no flag (ll_words.py). Rows of an expert are numbered by source rank and token, so the
receiver puts them in an order that does not depend on timing. Bound by latency, for many tokens by pushing. The last
CTA to be done sends `ready`, where a peer may wait for it.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint8, const_expr
from cutlass.experimental import primitives as prims

from ...cute_kernels.sm90 import ptx
from ...cute_kernels.sm90.address import ld_id, ld_vector, st_i32, unpack_bf16
from ..config import MAX_RANKS
from ..ll_config import FEW_TOKENS, MAX_TOPK
from .config import BF16, F32_SCALES, IDS, INDEX_WARPS, TOKEN_WARPS, UE8M0_SCALES
from .ll_records import FEW_COUNT, HEAD_WORDS, record_size
from .ll_remote import RemoteGroup, put
from .ll_verbs import (
    COUNTS,
    READY,
    SEND_LIVE,
    base_of,
    finish,
    is_live,
    next_epoch,
    outbox_of,
    slot_of,
)
from .ll_waits import note_receivers, peek_acks, wait_ack
from .ll_words import store_words, uses_words
from .verbs import GMEM, Group, may_proceed, peer_base, send_count, start_next_kernel

TOKEN_THREADS = 32 * TOKEN_WARPS
INDEX_THREADS = 32 * INDEX_WARPS
THREADS = TOKEN_THREADS + INDEX_THREADS
INDEX_BARRIER = 1
FP8_MAX, FP8_MIN_AMAX = 448.0, 1e-4


@dataclass(frozen=True)
class LlDispatchSendArgs:
    """Kernel parameters in launch order."""

    x: Int64  # bf16 (tokens, hidden)
    topk_idx: Int64  # int64 or int32 (tokens, topk); ids outside [0, experts) are no choice
    topk_idx_bytes: Int32
    tokens: Int32
    topk: Int32
    hidden: Int32
    format: Int32  # BF16 ... UE8M0_SCALES
    teams: Int32  # per CTA, a power of two
    epoch: Int64  # out, int32 (1,)
    experts: Int32
    experts_per_rank: Int32
    max_tokens: Int32
    counts_bytes: Int32  # of one source in the counts region
    head_bytes: Int32
    record_bytes: Int32
    slot_bytes: Int64
    data_offset: Int64
    words_bytes: Int64  # of a slot
    words_offset: Int64


class DispatchSender:
    """Part of ll_dispatch.LlDispatch. sm: has ids, counters, heads, index, bases, flag and data, the records."""

    receives: bool

    @cute.jit
    def send(self, g: Group, a: LlDispatchSendArgs, sm):
        """By all threads; returns the epoch, and whether the receiving half has to count it."""
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        warp, lane = cute.arch.make_warp_uniform(tid // 32), tid % 32
        acks = peek_acks(g, tid - TOKEN_THREADS)
        epoch, base = next_epoch(g), base_of(g, tid)
        if (cta == 0) & (tid == 0):
            st_i32(a.epoch, epoch)
        go = Boolean(True)
        if (warp >= TOKEN_WARPS) & (warp < TOKEN_WARPS + INDEX_WARPS):
            go = self.index_begin(g, a, sm, epoch, tid - TOKEN_THREADS, acks)
        # Packing touches no peer, so it does not wait for them; the barrier before the first push does.
        rounds = (a.tokens + ctas * a.teams - 1) // (ctas * a.teams)
        for r in cutlass.range(rounds if rounds > 0 else 1, unroll=1):
            first = r * a.teams * ctas + cta  # token of team 0; the next team's is `ctas` further
            if warp >= TOKEN_WARPS:
                for team in cutlass.range(warp - TOKEN_WARPS, a.teams, INDEX_WARPS, unroll=1):
                    if first + team * ctas < a.tokens:
                        self.make_head(g, a, sm, first + team * ctas, team, lane)
            else:
                self.pack(a, sm, warp, lane, first, ctas)
            cute.arch.fence_view_async_shared()
            go = may_proceed(g, go)
            few = Boolean(a.tokens <= FEW_TOKENS) if const_expr(uses_words(g)) else Boolean(False)
            if go & few & (warp < TOKEN_WARPS):
                self.push_words(g, a, sm, epoch, tid, first, ctas)
            elif go & (warp < a.teams):
                if first + warp * ctas < a.tokens:
                    self.push(g, a, sm, epoch, warp, lane)
            elif go & (r == 0) & (cta == ctas - 1) & (warp >= TOKEN_WARPS):  # that CTA has the fewest tokens
                self.send_counts(g, a, sm, epoch, tid - TOKEN_THREADS)
            cute.arch.sync_threads()
        if const_expr(not self.receives):
            start_next_kernel()
        cute.arch.cp_async_bulk_wait_group(0)
        late = Boolean(False)
        if const_expr(uses_words(g) and self.receives):
            late = Boolean(a.tokens <= FEW_TOKENS)  # nobody waits for a flag, so the end of the kernel is early enough
        if not late:
            finish(g, READY, "dispatch_send", epoch, True, go, base, sm.flag.data_ptr())
        return epoch, late

    @cute.jit
    def index_begin(self, g: Group, a: LlDispatchSendArgs, sm, epoch: Int32, thread: Int32, acks):
        """What the index warps do before the first round. False if a peer's acknowledgement did not come."""
        self.load_ids(a, sm, thread)
        reached = Boolean(True)
        if thread < g.ranks:
            sm.bases.get_tensor(cute.make_layout(MAX_RANKS))[thread] = peer_base(g, thread)
            reached = wait_ack(g, epoch, thread, acks)
        if const_expr(g.elastic):
            if thread < 32:
                note_receivers(g, sm.flag.data_ptr(), reached)
        return may_proceed(g, reached, INDEX_BARRIER, INDEX_THREADS)

    @cute.jit
    def id_of(self, a: LlDispatchSendArgs, i: Int32):
        """Expert of choice i of all, -1 for none."""
        expert = ld_id(a.topk_idx, i, a.topk_idx_bytes)
        return expert if (expert >= 0) & (expert < a.experts) else Int32(-1)

    @cute.jit
    def load_ids(self, a: LlDispatchSendArgs, sm, thread: Int32):
        ids = sm.ids.get_tensor(cute.make_layout(IDS))
        choices = a.tokens * a.topk
        choices = choices if choices < IDS else Int32(IDS)
        for i in cutlass.range(thread, choices, INDEX_THREADS, unroll=4):
            ids[i] = self.id_of(a, i)

    @cute.jit
    def get_id(self, a: LlDispatchSendArgs, sm, i: Int32):
        ids = sm.ids.get_tensor(cute.make_layout(IDS))
        return ids[i] if i < IDS else self.id_of(a, i)

    @cute.jit
    def send_counts(self, g: Group, a: LlDispatchSendArgs, sm, epoch: Int32, thread: Int32):
        """{epoch, tokens} and {epoch, choices} of each expert, to their ranks."""
        counters = sm.counters.data_ptr()
        for i in cutlass.range(thread, a.experts + g.ranks, INDEX_THREADS, unroll=1):
            cute.arch.store(counters + i, Int32(0))
        cute.arch.barrier(barrier_id=INDEX_BARRIER, number_of_threads=INDEX_THREADS)
        for token in cutlass.range(thread, a.tokens, INDEX_THREADS, unroll=1):
            ranks = Int32(0)
            for choice in cutlass.range(a.topk, unroll=1):
                expert = self.get_id(a, sm, token * a.topk + choice)
                if expert >= 0:
                    cute.arch.atomic_add(counters + expert, Int32(1), sem="relaxed", scope="cta")
                    ranks |= Int32(1) << (expert // a.experts_per_rank)
            for r in cutlass.range(g.ranks, unroll=1):
                if (ranks >> r) & 1 != 0:
                    cute.arch.atomic_add(counters + a.experts + r, Int32(1), sem="relaxed", scope="cta")
        cute.arch.barrier(barrier_id=INDEX_BARRIER, number_of_threads=INDEX_THREADS)
        mine = Int64(slot_of(epoch) * g.ranks + g.rank) * a.counts_bytes + COUNTS
        for i in cutlass.range(thread, a.experts + g.ranks, INDEX_THREADS, unroll=1):
            rank, word = i - a.experts, Int32(0)
            if i < a.experts:
                rank, word = i // a.experts_per_rank, 1 + i % a.experts_per_rank
            if is_live(g, sm.flag.data_ptr(), SEND_LIVE, rank):
                base = sm.bases.get_tensor(cute.make_layout(MAX_RANKS))[rank]
                place = base + mine + word * 8
                if const_expr(g.remote):
                    if base == 0:
                        place = outbox_of(g, epoch) + Int64(rank) * a.counts_bytes + word * 8
                count = cute.arch.load(counters + i, Int32)
                if const_expr(uses_words(g)):
                    if (word == 0) & (a.tokens <= FEW_TOKENS):
                        count |= FEW_COUNT
                send_count(place, epoch, count)
        if const_expr(g.remote):
            cute.arch.barrier(barrier_id=INDEX_BARRIER, number_of_threads=INDEX_THREADS)
            self.put_counts(g, a, sm, epoch, mine, thread // 32)

    @cute.jit
    def put_counts(self, g: RemoteGroup, a: LlDispatchSendArgs, sm, epoch: Int32, mine: Int64, warp: Int32):
        """By one warp: counts from the outbox to every fourth rank that only NVSHMEM reaches."""
        bases = sm.bases.get_tensor(cute.make_layout(MAX_RANKS))
        for rank in cutlass.range(cute.arch.make_warp_uniform(warp), g.ranks, INDEX_WARPS, unroll=1):
            if (bases[rank] == 0) & is_live(g, sm.flag.data_ptr(), SEND_LIVE, rank):
                put(g, mine, outbox_of(g, epoch) + Int64(rank) * a.counts_bytes, 8 + 8 * a.experts_per_rank, rank)

    @cute.jit
    def make_head(self, g: Group, a: LlDispatchSendArgs, sm, token: Int32, team: Int32, lane: Int32):
        """By one warp: head of a token's record, and its index among the tokens that go to each rank."""
        head = cute.make_tensor(sm.heads.data_ptr() + team * HEAD_WORDS, cute.make_layout(HEAD_WORDS))
        index = cute.make_tensor(sm.index.data_ptr() + team * MAX_RANKS, cute.make_layout(MAX_RANKS))
        own = Int32(-1)  # lane j: my choice j
        if lane < a.topk:
            own = self.get_id(a, sm, token * a.topk + lane)
        goes, before, first = self.ranks_of(a, sm, token), Int32(0), Int32(0)
        if token > 0:
            before, first = self.count_earlier(a, sm, token, own, lane)
        for j in cutlass.range(a.topk, unroll=1):  # an expert twice in one token
            other = cute.arch.shuffle_sync(own, j)
            if (lane > j) & (own == other):
                before += 1
        if lane < MAX_RANKS:
            index[lane] = first if (goes >> lane) & 1 != 0 else Int32(-1)
        if lane < a.topk:
            head[2 + 2 * lane], head[3 + 2 * lane] = own, before
        if lane == 0:
            head[0], head[1] = token, Int32(0)

    @cute.jit
    def count_earlier(self, a: LlDispatchSendArgs, sm, token: Int32, own: Int32, lane: Int32):
        """By one warp, of the tokens before this one: choices of the expert that lane j chooses, and tokens that go to
        the rank r of lane r."""
        mine = [cute.arch.shuffle_sync(own, j) for j in range(MAX_TOPK)]
        equal = cute.make_rmem_tensor(MAX_TOPK, Int32)
        equal.fill(0)
        for i in cutlass.range(lane, token * a.topk, 32, unroll=2):
            other = self.get_id(a, sm, i)
            for j in cutlass.range_constexpr(MAX_TOPK):
                equal[j] = equal[j] + Int32(other == mine[j])
        earlier = cute.make_rmem_tensor(MAX_RANKS, Int32)
        earlier.fill(0)
        for t in cutlass.range(lane, token, 32, unroll=1):
            ranks = self.ranks_of(a, sm, t)
            for r in cutlass.range_constexpr(MAX_RANKS):
                earlier[r] = earlier[r] + ((ranks >> r) & 1)
        choices, tokens = Int32(0), Int32(0)
        for j in cutlass.range_constexpr(MAX_TOPK):
            total = cute.arch.warp_redux_sync(equal[j], "add")
            if lane == j:
                choices = total
        for r in cutlass.range_constexpr(MAX_RANKS):
            total = cute.arch.warp_redux_sync(earlier[r], "add")
            if lane == r:
                tokens = total
        return choices, tokens

    @cute.jit
    def ranks_of(self, a: LlDispatchSendArgs, sm, token: Int32):
        """Bit r: a choice of the token is on rank r."""
        ranks = Int32(0)
        for choice in cutlass.range(a.topk, unroll=1):
            expert = self.get_id(a, sm, token * a.topk + choice)
            if expert >= 0:
                ranks |= Int32(1) << (expert // a.experts_per_rank)
        return ranks

    @cute.jit
    def pack(self, a: LlDispatchSendArgs, sm, warp: Int32, lane: Int32, first: Int32, ctas: Int32):
        """Columns and scales of the record of this warp's team; a step is 256 columns, 8 per lane."""
        size = TOKEN_WARPS // a.teams
        team = warp // size
        token = first + team * ctas
        if token < a.tokens:
            record = sm.data.data_ptr() + team * a.record_bytes + a.head_bytes
            row = a.x + Int64(token) * a.hidden * 2
            for column in cutlass.range((warp % size) * 256 + lane * 8, a.hidden, size * 256, unroll=1):
                words = ld_vector(row + Int64(column) * 2)
                if a.format == BF16:
                    ptx.st_shared_v4(record + column * 2, *words)
                else:
                    self.quantise(a, record, column, words, lane)

    @cute.jit
    def quantise(self, a: LlDispatchSendArgs, record: cute.Pointer, column: Int32, words, lane: Int32):
        """16 lanes share a scale. Lanes past the last column are not here: they are whole groups of 16."""
        values = unpack_bf16(words)
        amax = Float32(FP8_MIN_AMAX)
        for i in cutlass.range_constexpr(8):
            amax = cute.arch.fmax(amax, ptx.abs_f32(values[i]))
        lanes = Int32(-1) if column - lane * 8 + 256 <= a.hidden else Int32(0xFFFF)
        for i in cutlass.range_constexpr(4):
            amax = cute.arch.fmax(amax, cute.arch.shuffle_sync_bfly(amax, offset=1 << i, mask=lanes))
        scale, inverse = ptx.div_rn(amax, Float32(FP8_MAX)), ptx.div_rn(Float32(FP8_MAX), amax)
        exponent = Int32(0)
        if a.format != F32_SCALES:
            bits = scale.bitcast(Int32)
            exponent = (bits >> 23) & 255
            if bits & 0x7FFFFF != 0:
                exponent += 1
            scale, inverse = (exponent << 23).bitcast(Float32), ((254 - exponent) << 23).bitcast(Float32)
        low = ptx.cvt_e4m3x4(*(values[i] * inverse for i in range(4)))
        high = ptx.cvt_e4m3x4(*(values[i] * inverse for i in range(4, 8)))
        ptx.st_shared_v2(record + column, low, high)
        if lane % 16 == 0:
            place = record + a.hidden
            if a.format == UE8M0_SCALES:
                cute.arch.store(place + column // 128, Uint8(exponent))
                if column + 128 == a.hidden:  # the rest of the last word
                    for group in cutlass.range(column // 128 + 1, (a.hidden + 511) // 512 * 4, unroll=1):
                        cute.arch.store(place + group, Uint8(0))
            else:
                cute.arch.store(cute.recast_ptr(place + column // 128 * 4, dtype=Int32), scale.bitcast(Int32))

    @cute.jit
    def push(self, g: Group, a: LlDispatchSendArgs, sm, epoch: Int32, team: Int32, lane: Int32):
        """By one warp: the head into the record, then the record to every rank, a lane each."""
        head = cute.make_tensor(sm.heads.data_ptr() + team * HEAD_WORDS, cute.make_layout(HEAD_WORDS))
        record = sm.data.data_ptr() + team * a.record_bytes
        words = cute.make_tensor(cute.recast_ptr(record, dtype=Int32), cute.make_layout(HEAD_WORDS))
        for i in cutlass.range(lane, 2 + 2 * a.topk, 32, unroll=1):
            words[i] = head[i]
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()
        if lane < g.ranks:
            index = cute.make_tensor(sm.index.data_ptr() + team * MAX_RANKS, cute.make_layout(MAX_RANKS))[lane]
            mapped = index >= 0
            if const_expr(g.remote):
                mapped = mapped & (sm.bases.get_tensor(cute.make_layout(MAX_RANKS))[lane] != 0)
            if mapped:
                if is_live(g, sm.flag.data_ptr(), SEND_LIVE, lane):
                    size = record_size(a)
                    at = Int64(slot_of(epoch)) * a.slot_bytes + Int64(g.rank * a.max_tokens + index) * a.record_bytes
                    prims.cp_async_bulk_global_shared_cta(
                        cute.make_ptr(
                            Uint8,
                            sm.bases.get_tensor(cute.make_layout(MAX_RANKS))[lane] + a.data_offset + at,
                            GMEM,
                            assumed_align=16,
                        ),
                        record,
                        size,
                    )
        cute.arch.cp_async_bulk_commit_group()
        if const_expr(g.remote):
            self.put_record(g, a, sm, epoch, team, lane)
        cute.arch.cp_async_bulk_wait_group(0, read=True)  # before the next round overwrites the record

    @cute.jit
    def push_words(self, g: Group, a: LlDispatchSendArgs, sm, epoch: Int32, thread: Int32, first: Int32, ctas: Int32):
        """By the token warps: their team's record to every rank, as words."""
        size = TOKEN_THREADS // a.teams
        team = thread // size
        if first + team * ctas < a.tokens:
            head = cute.make_tensor(sm.heads.data_ptr() + team * HEAD_WORDS, cute.make_layout(HEAD_WORDS))
            index = cute.make_tensor(sm.index.data_ptr() + team * MAX_RANKS, cute.make_layout(MAX_RANKS))
            bases = sm.bases.get_tensor(cute.make_layout(MAX_RANKS))
            record = sm.data.data_ptr() + team * a.record_bytes
            words = cute.make_tensor(cute.recast_ptr(record, dtype=Int32), cute.make_layout(1 << 16))
            few = a.max_tokens if a.max_tokens < FEW_TOKENS else Int32(FEW_TOKENS)
            slot = a.words_offset + Int64(slot_of(epoch)) * a.words_bytes
            for i in cutlass.range(thread % size, record_size(a) // 8, size, unroll=1):
                one, other = words[2 * i], words[2 * i + 1]
                if 8 * i < a.head_bytes:
                    one, other = head[2 * i], head[2 * i + 1]
                for rank in cutlass.range(g.ranks, unroll=1):
                    if index[rank] >= 0:
                        at = Int64(g.rank * few + index[rank]) * a.record_bytes * 2
                        store_words(bases[rank] + slot + at + i * 16, one, other, epoch)

    @cute.jit
    def put_record(self, g: RemoteGroup, a: LlDispatchSendArgs, sm, epoch: Int32, team: Int32, lane: Int32):
        """By one warp: the record to the ranks that only NVSHMEM reaches, by way of the outbox."""
        token = cute.make_tensor(sm.heads.data_ptr() + team * HEAD_WORDS, cute.make_layout(HEAD_WORDS))[0]
        index = cute.make_tensor(sm.index.data_ptr() + team * MAX_RANKS, cute.make_layout(MAX_RANKS))
        words = cute.make_tensor(
            cute.recast_ptr(sm.data.data_ptr() + team * a.record_bytes, dtype=Int32), cute.make_layout(1 << 16)
        )
        wanted = Boolean(False)
        if lane < g.ranks:
            if index[lane] >= 0:
                if sm.bases.get_tensor(cute.make_layout(MAX_RANKS))[lane] == 0:
                    wanted = is_live(g, sm.flag.data_ptr(), SEND_LIVE, lane)
        ranks = cute.arch.vote_ballot_sync(wanted)
        if ranks != 0:
            copy = outbox_of(g, epoch) + Int64(g.ranks) * a.counts_bytes + Int64(token) * a.record_bytes
            size = record_size(a)
            for at in cutlass.range(lane * 4, size // 4, 128, unroll=2):
                ptx.st_global(copy + at * 4, *(words[at + i] for i in range(4)))
            for rank in cutlass.range(g.ranks, unroll=1):
                if (ranks >> rank) & 1 != 0:
                    place = Int64(g.rank * a.max_tokens + index[rank]) * a.record_bytes
                    target = a.data_offset + Int64(slot_of(epoch)) * a.slot_bytes + place
                    put(g, target, copy, size, rank)
