"""Split-KV planner on the device: which blocks of which sequences each partition works on.

The cost of a piece is its blocks plus VISIT_COST. A partition is filled in request order up to W, the smallest with
which the partitions suffice. Four ways to cut are compared by what W and the merging should take together.
ref/mla_plan.py is the same in plain Python, bit for bit.

A warp for each way to cut: every lane tries one W, lane 0 of the first warp then writes the plan. Serial over sequences
and partitions, once per decode step: the plan serves all layers.
"""

from dataclasses import dataclass
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.memory import SmemAllocator

from ..jit import Program
from ..sm90.args import fake_args, param_kinds
from ..sm90.gmem import load_i32, store_i32
from .config import (
    COMBINE_REQ,
    COST_UNIT,
    CUT,
    CUT_PIECES,
    CUT_SHIFT,
    MERGE_MAX,
    PLAN_THREADS,
    PLAN_WAYS,
    SEQLEN,
    VISIT_COST,
    PlanConfig,
)
from .work import num_blocks


@dataclass(frozen=True)
class PlanArgs:
    """Kernel parameters in launch order."""

    cache_seqlens: cute.Pointer  # int32 (b,)
    plan: cute.Pointer  # int32 (partitions, 8)
    num_splits: cute.Pointer  # int32 (b + 1,)
    batch: Int32
    partitions: Int32
    chunk: Int32  # pieces that a combine CTA takes at a time
    row_tiles: Int32
    tiles: Int32  # of all kv heads
    load: Int32  # config.plan_costs
    merge: Int32
    merge_piece: Int32
    combine: Int32
    combine_piece: Int32
    split_blocks: Int32


class MlaPlan:
    def __init__(self, config: PlanConfig):
        @cute.struct
        class Smem:
            costs: cute.struct.MemRange[Int64, PLAN_WAYS]
            widths: cute.struct.MemRange[Int32, PLAN_WAYS]
            shortest: cute.struct.MemRange[Int32, PLAN_WAYS]

        self.Smem: Any = Smem

    @cute.jit
    def __call__(self, args: PlanArgs, stream: cuda.CUstream):
        self.kernel(args).launch(
            grid=(1, 1, 1), block=(PLAN_THREADS, 1, 1), stream=stream, min_blocks_per_mp=1, use_pdl=True
        )

    @cute.kernel
    def kernel(self, a: PlanArgs):
        tid, _, _ = cute.arch.thread_idx()
        lane, way = tid % 32, cute.arch.make_warp_uniform(tid // 32)
        sm = SmemAllocator().allocate(self.Smem)
        costs = sm.costs.get_tensor(cute.make_layout(PLAN_WAYS))
        widths = sm.widths.get_tensor(cute.make_layout(PLAN_WAYS))
        shortests = sm.shortest.get_tensor(cute.make_layout(PLAN_WAYS))
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        cost, total, longest = Int32(0), Int32(0), Int32(1)
        for i in cutlass.range(lane, a.batch, 32, unroll=1):
            blocks = num_blocks(load_i32(a.cache_seqlens, i))
            units = Int32(1)
            if a.split_blocks > 0:
                units = (blocks + a.split_blocks - 1) // a.split_blocks
            cost += blocks + units * VISIT_COST
            total += blocks
            longest = blocks if blocks > longest else longest
        cost = cute.arch.warp_redux_sync(cost, "add")
        total = cute.arch.warp_redux_sync(total, "add")
        longest = cute.arch.warp_redux_sync(longest, "max")
        share = (cost + a.partitions - 1) // a.partitions
        few = Int32(1)
        while a.chunk * few * few < longest:
            few += 1
        least, shortest = few, Int32(1)
        if way == 1:
            least = 2 * few
        if way >= 2:
            least = (longest + 1) // 2 if way == 2 else longest
            shortest = least
        if a.split_blocks > 0:
            least = a.split_blocks if a.split_blocks < longest else longest
            shortest = least
        lowest = least + VISIT_COST if least + VISIT_COST > share else share
        highest = lowest + 31 if way >= 2 else Int32(1 << 30)
        if (way > 0) & (a.split_blocks > 0):  # fixed cuts: one way
            highest = Int32(0)
        width, pieces, slots = self.search(a, shortest, lowest, highest, lane)
        if lane == 0:
            costs[way] = self.cost(a, width, pieces, slots, total)
            widths[way] = width
            shortests[way] = shortest
        cute.arch.sync_threads()
        if way == 0:
            best = costs[0]
            for i in cutlass.range_constexpr(1, PLAN_WAYS):
                if costs[i] < best:
                    best = costs[i]
                    width = widths[i]
                    shortest = shortests[i]
            self.write(a, width, shortest, lane)

    @cute.jit
    def cost(self, a: PlanArgs, width: Int32, pieces: Int32, slots: Int32, total: Int32):
        """What a call with such a plan should take, in 1/COST_UNIT blocks."""
        floor = COST_UNIT * VISIT_COST + Int64(total) * a.load // (a.partitions * a.row_tiles)
        cost = Int64(width) * COST_UNIT
        cost = cost if cost > floor else floor
        combined = pieces > MERGE_MAX
        once = a.combine if combined else a.merge
        each = a.combine_piece if combined else a.merge_piece
        cost += Int64(once) + Int64(each * a.tiles) * slots if slots > 0 else Int64(0)
        return cost if width >= 0 else Int64(1 << 62)

    @cute.jit
    def write(self, a: PlanArgs, width: Int32, shortest: Int32, lane: Int32):
        """The plan, by one warp."""
        used, _, _ = self.fill(True, a, width, shortest, lane)
        for part in cutlass.range(used + lane, a.partitions, 32, unroll=1):
            for i in cutlass.range_constexpr(8):
                if const_expr(i != COMBINE_REQ):
                    unused = {0: a.batch, 2: a.batch, CUT: a.split_blocks << CUT_SHIFT}
                    store_i32(a.plan, part * 8 + i, unused.get(i, Int32(0)))

    @cute.jit
    def search(self, a: PlanArgs, shortest: Int32, lowest: Int32, highest: Int32, lane: Int32):
        """The first width in [lowest, highest] with which the partitions suffice, or -1; the most pieces it makes of a
        sequence, and the slots for pieces."""
        width, pieces, slots = Int32(-1), Int32(0), Int32(0)
        start = lowest
        while (width < 0) & (start <= highest):
            used, most, needed = self.fill(False, a, start + lane, shortest, lane)
            ballot = cute.arch.vote_ballot_sync((used <= a.partitions) & (start + lane <= highest))
            if ballot != 0:
                first = Int32(cute.arch.clz(cute.arch.brev(ballot)))
                width = start + first
                pieces = cute.arch.shuffle_sync(most, first)
                slots = cute.arch.shuffle_sync(needed, first)
            start += 32
        return width, pieces, slots

    @cute.jit
    def fill(self, write: cutlass.Constexpr[bool], a: PlanArgs, width: Int32, shortest: Int32, lane: Int32):
        """Partitions needed when each may cost `width`, the most pieces of a sequence, and slots; writes the plan if
        asked to.

        A piece is cut off only if it has at least `shortest` blocks. All lanes walk the sequences together and keep 32
        lengths at a time in their registers; to write, all walk with the same width and lane 0 stores.
        """
        part, credit, slots, most, combines = Int32(0), width, Int32(0), Int32(0), Int32(0)
        stores = lane == 0
        lengths = self.length(a, lane)
        if const_expr(write):
            if stores:
                self.begin(a, part, Int32(0), Int32(0), Int32(0), lengths)
                store_i32(a.plan, CUT, a.split_blocks << CUT_SHIFT)
                store_i32(a.num_splits, 0, slots)
        for first in cutlass.range(0, a.batch, 32, unroll=1):
            these = lengths
            lengths = self.length(a, first + 32 + lane)
            last = first + 32 if first + 32 < a.batch else a.batch
            for req in cutlass.range(first, last, unroll=1):
                seqlen = cute.arch.shuffle_sync(these, req - first)
                blocks = num_blocks(seqlen)
                done, pieces = Int32(0), Int32(0)
                opened, whole = part + 1, part + 1  # partitions that begin here; those before `whole` with the sequence
                while done < blocks:
                    done, pieces, credit = self.take(a, blocks, done, pieces, credit, shortest)
                    if done < blocks:  # the partition is full
                        if const_expr(write):
                            if stores:
                                self.end(a, part, req, done)
                                self.begin(a, part + 1, req, done, pieces, seqlen)
                        part += 1
                        credit = width
                        whole = part + 1 if done == 0 else whole
                most = pieces if pieces > most else most
                slots += pieces if pieces > 1 else Int32(0)
                if const_expr(write):
                    if stores:
                        store_i32(a.num_splits, req + 1, slots)
                    known = pieces if pieces < CUT_PIECES else Int32(CUT_PIECES)
                    for i in cutlass.range(opened + lane, part + 1, 32, unroll=1):
                        cut = known if i >= whole else Int32(0)
                        store_i32(a.plan, i * 8 + CUT, (a.split_blocks << CUT_SHIFT) + cut)
                    if (pieces > MERGE_MAX) & (combines < a.partitions):
                        if stores:
                            store_i32(a.plan, combines * 8 + COMBINE_REQ, req)
                        combines += 1
        if const_expr(write):
            if stores:
                self.end(a, part, a.batch, Int32(0))
            for i in cutlass.range(combines + lane, a.partitions, 32, unroll=1):
                store_i32(a.plan, i * 8 + COMBINE_REQ, a.batch)
        return part + 1, most, slots

    @cute.jit
    def take(self, a: PlanArgs, blocks: Int32, done: Int32, pieces: Int32, credit: Int32, shortest: Int32):
        """What a partition with so much credit takes of a sequence of which `done` blocks are taken already."""
        rest = blocks - done
        if a.split_blocks == 0:
            if rest + VISIT_COST <= credit:
                credit -= rest + VISIT_COST
                done = blocks
                pieces += 1
            else:
                if credit - VISIT_COST >= shortest:
                    done += credit - VISIT_COST
                    pieces += 1
        else:
            unit = a.split_blocks + VISIT_COST
            full = (rest - 1) // a.split_blocks  # whole units before the last one
            units = credit // unit
            units = units if units < full else full
            done += units * a.split_blocks
            pieces += units
            credit -= units * unit
            if (units == full) & (blocks - done + VISIT_COST <= credit):
                credit -= blocks - done + VISIT_COST
                done = blocks
                pieces += 1
        return done, pieces, credit

    @cute.jit
    def length(self, a: PlanArgs, req: Int32):
        seqlen = Int32(0)
        if req < a.batch:
            seqlen = load_i32(a.cache_seqlens, req)
        return seqlen

    def begin(self, a, part, req, block, split, seqlen):
        for field, value in ((0, req), (1, block), (4, split), (SEQLEN, seqlen)):
            store_i32(a.plan, part * 8 + field, value)

    def end(self, a, part, req, block):
        store_i32(a.plan, part * 8 + 2, req)
        store_i32(a.plan, part * 8 + 3, block)


def program(config: PlanConfig) -> Program:
    """The host function and the fake arguments that compile the planner."""
    kernel = MlaPlan(config)
    kernel.kernel.set_name_prefix("cutehop_mla_plan", remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(PlanArgs), cuda.CUstream(0)),
        threads=PLAN_THREADS,
        smem_bytes=kernel.Smem.size_in_bytes(),
        params=param_kinds(PlanArgs),
        pdl=True,
    )
