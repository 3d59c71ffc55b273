"""Low-latency combine with LogFMT rows: they are encoded where they are sent and decoded where they are added up.

A warp takes a chunk of a row at a time, 8 columns per lane and step. It goes through one of two places in the shared
memory of the warp's ring, by a bulk store; the limits of its groups follow by themselves.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.experimental import primitives as prims

from ...cute_kernels.sm90 import ptx
from ...cute_kernels.sm90.address import bytes_at, ld_i32, ld_vector, st_i32
from ...ref.ep_ll import LOGFMT_CHUNK
from ..config import MAX_LOCAL_EXPERTS, MAX_RANKS
from ..ll_config import GROUP
from .config import RINGS, SEND_RING_BYTES
from .ll_logfmt import CODED_BYTES, applies, decode, encode, ld_pair, ld_u16, limits_of, st_shared_u16
from .ll_remote import put
from .ll_sums import add_row
from .ll_verbs import has_home, outbox_of, slot_of
from .verbs import Group

PLACE_BYTES = 2 * LOGFMT_CHUNK
STEPS = LOGFMT_CHUNK // 256  # of a chunk, at most


class CodedSender:
    """Part of ll_combine_send.CombineSender. sm: has ring, ends, bases and flag. a: LlCombineSendArgs."""

    @cute.jit
    def send_coded(self, g: Group, a, sm, epoch: Int32, warp: Int32, lane: Int32):
        """By one warp."""
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        ends = sm.ends.get_tensor(cute.make_layout(MAX_LOCAL_EXPERTS))
        rows, choices, chunks = g.ranks * a.max_tokens, a.max_tokens * a.max_topk, a.row_bytes // 2 // a.chunk
        total = ends[a.experts_per_rank - 1]
        if const_expr(g.remote):
            most = self.outbox_rows(g, a)
            total = total if total < most else most  # no dispatch counts more
        expert, begin, half = Int32(0), Int32(0), Int32(0)
        for i in cutlass.range(warp * ctas + cta, total * chunks, RINGS * ctas, unroll=1):
            number, chunk = i // chunks, i % chunks
            while number >= ends[expert]:
                begin = ends[expert]
                expert += 1
            row = Int64(expert) * rows + (number - begin)
            place = ld_i32(a.send_slot + row * 4)
            if has_home(g, sm.flag.data_ptr(), place, choices):
                cute.arch.cp_async_bulk_wait_group(1, read=True)  # what was stored from this half before
                cute.arch.sync_warp()
                shared = sm.ring.data_ptr() + (warp * SEND_RING_BYTES + half * PLACE_BYTES)
                size, limits = self.pack_chunk(a, shared, a.y + row * a.row_bytes + chunk * a.chunk * 2, lane)
                cute.arch.fence_view_async_shared()
                cute.arch.sync_warp()
                self.deliver(g, a, sm, epoch, shared, size, limits, place, number, chunk, lane)
                cute.arch.cp_async_bulk_commit_group()
                half ^= 1
        cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def outbox_rows(self, g: Group, a):
        """LlConfig.outbox_rows."""
        each = a.experts_per_rank if a.experts_per_rank < a.max_topk else a.max_topk
        return g.ranks * a.max_tokens * each

    @cute.jit
    def pack_chunk(self, a, shared: cute.Pointer, source: Int64, lane: Int32):
        """A chunk into shared memory, encoded if all its groups can be. Its bytes there; of lane 0 and 16 the limits of
        their groups, one for each step."""
        words, limits, usable = [], [], Boolean(True)
        for step in cutlass.range_constexpr(STEPS):
            column = step * 256 + lane * 8
            loaded, limit = (Int32(0), Int32(0), Int32(0), Int32(0)), Int32(0)
            if column < a.chunk:
                loaded = ld_vector(source + column * 2)
                limit = limits_of(loaded, Int32(-1) if step * 256 + 256 <= a.chunk else Int32(0xFFFF))
                usable = usable & applies(limit)
            words.append(loaded)
            limits.append(limit)
        usable = cute.arch.vote_ballot_sync(usable) == -1
        kept = Int32(usable)
        size = a.chunk * 2
        if usable:
            size = a.chunk // GROUP * CODED_BYTES
        for step in cutlass.range_constexpr(STEPS):
            column = step * 256 + lane * 8
            if column < a.chunk:
                if usable:
                    first, second, rest = encode(words[step], limits[step])
                    at = shared + (column // GROUP * CODED_BYTES + column % GROUP)
                    ptx.st_shared_v2(at, first, second)
                    st_shared_u16(shared + (column // GROUP * CODED_BYTES + GROUP + column % GROUP // 8 * 2), rest)
                else:
                    ptx.st_shared_v4(shared + column * 2, *words[step])
        return size, tuple(limit * kept for limit in limits)

    @cute.jit
    def deliver(
        self, g: Group, a, sm, epoch: Int32, shared: cute.Pointer, size: Int32, limits, place: Int32, number: Int32,
        chunk: Int32, lane: Int32,
    ):  # fmt: skip
        """A chunk and its limits, which this warp has packed, to the home of row `place`; it is my row `number`."""
        choices = a.max_tokens * a.max_topk
        home, row = place // choices, Int64(place % choices)
        slot = a.data_offset + Int64(slot_of(epoch)) * a.slot_bytes
        data, its_limits = chunk * a.chunk * 2, chunk * (a.chunk // GROUP) * 4
        target = slot + row * a.row_bytes + data
        limits_target = slot + Int64(choices) * a.row_bytes + row * a.limits_bytes + its_limits
        base = sm.bases.get_tensor(cute.make_layout(MAX_RANKS))[home]
        mapped = Boolean(True)
        if const_expr(g.remote):
            mapped = base != 0
        if mapped:
            self.store_limits(a, base + limits_target, limits, lane)
            if lane == 0:
                prims.cp_async_bulk_global_shared_cta(bytes_at(base + target), shared, size)
        if const_expr(g.remote):
            if not mapped:
                outbox, first = outbox_of(g, epoch), Int64(self.outbox_rows(g, a)) * a.row_bytes
                copy = outbox + Int64(number) * a.row_bytes + data
                limits_copy = outbox + first + Int64(number) * a.limits_bytes + its_limits
                for at in cutlass.range(lane * 16, size, 512, unroll=1):
                    ptx.st_global(copy + at, *ptx.ld_shared_v4(shared + at))
                self.store_limits(a, limits_copy, limits, lane)
                put(g, target, copy, size, home)
                put(g, limits_target, limits_copy, a.chunk // GROUP * 4, home)

    @cute.jit
    def store_limits(self, a, target: Int64, limits, lane: Int32):
        for step in cutlass.range_constexpr(STEPS):
            if (lane % 16 == 0) & (step * 256 + lane * 8 < a.chunk):
                st_i32(target + (step * 2 + lane // 16) * 4, limits[step])


class CodedReceiver:
    """Part of ll_combine_receive.CombineReceiver. a: LlCombineReceiveArgs."""

    @cute.jit
    def load_coded(self, a, memory: Int64, row: Int32, column: Int32):
        """Limits of a row's group and the bits of 8 columns, as `add_coded` takes them. column: below hidden."""
        limits = ld_i32(memory + a.limits_offset + Int64(row) * a.limits_bytes + column // GROUP * 4)
        begin = column // a.chunk * a.chunk
        words = (Int32(0), Int32(0), Int32(0), Int32(0))
        if limits != 0:
            group = (column - begin) // GROUP * CODED_BYTES
            at = memory + Int64(row) * a.hidden * 2 + begin * 2 + group
            first, second = ld_pair(at + column % GROUP)
            words = (first, second, ld_u16(at + GROUP + column % GROUP // 8 * 2), Int32(0))
        else:
            words = ld_vector(memory + Int64(row) * a.hidden * 2 + column * 2)
        return limits, words

    @cute.jit
    def add_coded(self, acc: cute.Tensor, weight: Float32, limits: Int32, words):
        """acc += weight * values, as ever: product and sum each rounded."""
        if limits != 0:
            values = decode(words[0], words[1], words[2], limits)
            for i in cutlass.range_constexpr(8):
                acc[i] = ptx.add_product(acc[i], weight, values[i])
        else:
            add_row(acc, weight, words)
