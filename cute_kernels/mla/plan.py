"""Split-KV planner on the device: which blocks of which sequences each partition works on.

The cost of a piece is its blocks plus VISIT_COST. A partition is filled in request order up to W; the planner takes the
smallest W with which the partitions suffice, unless halves of the longest sequence save the combine kernel at little
cost. ref/mla_plan.py is the same in plain Python, bit for bit.

One warp: every lane tries one W, lane 0 then writes the plan. Serial over sequences and partitions, once per decode
step: the plan serves all layers.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from ..jit import Program
from ..sm90.args import fake_args, param_kinds
from ..sm90.gmem import load_i32, store_i32
from .config import COMBINE_REQ, CUT, CUT_PIECES, CUT_SHIFT, MERGE_MAX, PLAN_THREADS, SEQLEN, VISIT_COST, PlanConfig
from .work import num_blocks


@dataclass(frozen=True)
class PlanArgs:
    """Kernel parameters in launch order."""

    cache_seqlens: cute.Pointer  # int32 (b,)
    plan: cute.Pointer  # int32 (partitions, 8)
    num_splits: cute.Pointer  # int32 (b + 1,)
    batch: Int32
    partitions: Int32
    min_piece: Int32  # blocks
    row_tiles: Int32
    combine_cost: Int32  # blocks
    split_blocks: Int32


class MlaPlan:
    def __init__(self, config: PlanConfig):
        pass

    @cute.jit
    def __call__(self, args: PlanArgs, stream: cuda.CUstream):
        self.kernel(args).launch(
            grid=(1, 1, 1), block=(PLAN_THREADS, 1, 1), stream=stream, min_blocks_per_mp=1, use_pdl=True
        )

    @cute.kernel
    def kernel(self, a: PlanArgs):
        lane, _, _ = cute.arch.thread_idx()
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
        shortest = a.min_piece
        if a.split_blocks > 0:
            shortest = a.split_blocks if a.split_blocks < longest else longest
        lowest = shortest + VISIT_COST if shortest + VISIT_COST > share else share
        width, pieces = self.search(a, shortest, lowest, Int32(1 << 30), lane)
        if (pieces > MERGE_MAX) & (a.split_blocks == 0):
            floor = VISIT_COST + (total * 9) // (5 * a.partitions * a.row_tiles)
            half = (longest + 1) // 2
            half = half if half > shortest else shortest
            lowest = half + VISIT_COST if half + VISIT_COST > share else share
            highest = (width if width > floor else floor) + a.combine_cost
            coarse, _ = self.search(a, half, lowest, highest, lane)
            if coarse > 0:
                width = coarse
                shortest = half
        used, _ = self.fill(True, a, width, shortest, lane)
        for part in cutlass.range(used + lane, a.partitions, 32, unroll=1):
            for i in cutlass.range_constexpr(8):
                if const_expr(i != COMBINE_REQ):
                    unused = {0: a.batch, 2: a.batch, CUT: a.split_blocks << CUT_SHIFT}
                    store_i32(a.plan, part * 8 + i, unused.get(i, Int32(0)))

    @cute.jit
    def search(self, a: PlanArgs, shortest: Int32, lowest: Int32, highest: Int32, lane: Int32):
        """The first width in [lowest, highest] with which the partitions suffice, or -1; the most pieces it makes."""
        width, pieces = Int32(-1), Int32(0)
        start = lowest
        while (width < 0) & (start <= highest):
            used, most = self.fill(False, a, start + lane, shortest, lane)
            ballot = cute.arch.vote_ballot_sync((used <= a.partitions) & (start + lane <= highest))
            if ballot != 0:
                first = Int32(cute.arch.clz(cute.arch.brev(ballot)))
                width = start + first
                pieces = cute.arch.shuffle_sync(most, first)
            start += 32
        return width, pieces

    @cute.jit
    def fill(self, write: cutlass.Constexpr[bool], a: PlanArgs, width: Int32, shortest: Int32, lane: Int32):
        """Partitions needed when each may cost `width`, and the most pieces of a sequence; writes the plan if asked to.

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
                if const_expr(write):
                    slots += pieces if pieces > 1 else Int32(0)
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
        return part + 1, most

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
        smem_bytes=0,
        params=param_kinds(PlanArgs),
        pdl=True,
    )
