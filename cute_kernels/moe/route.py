"""Top-k gate: choose k of E experts per token, DeepSeek-V3's groups included. cutehop.ref.moe.route is the rule.

    s = sigmoid or softmax of logits, c = s + bias        w = s of the chosen / (their sum + 1e-20) * scale

Grid (tokens / 2, 1, 1), 64 threads: a warp per token, expert 32 i + l in value i of lane l. Scores are computed in
float64 and rounded once, so that choices do not depend on who computed them; choice scores are compared as integers
that are in the order of the floats. Choosing takes k rounds of {highest key, lowest expert that has it}: two warp
reductions. No shared memory. Bound by latency for few tokens, by float64 arithmetic (25 instructions a score) for many.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Float64, Int32, Int64, const_expr

from ..jit import Program
from ..sm90.address import ld_bf16, ld_f32, st_f32, st_i64
from ..sm90.args import fake_args, param_kinds
from . import exact
from .config import ROUTE_THREADS, WARP, RouteConfig

GONE = -(2**31)  # key of an expert that cannot be chosen (any more); that of -inf is higher
NO_EXPERT = 2**31 - 1
NORMALIZE_EPS = 1e-20


@dataclass(frozen=True)
class RouteArgs:
    """Kernel parameters in launch order."""

    logits: Int64  # f32 or bf16 (tokens, experts)
    logits_bytes: Int32
    bias: Int64  # f32 (experts,) or 0
    tokens: Int32
    experts: Int32
    topk: Int32
    num_groups: Int32
    group_size: Int32
    topk_groups: Int32
    normalize: Int32
    scale: Int64  # bits of a float64
    topk_idx: Int64  # out, int64 (tokens, topk)
    topk_weights: Int64  # out, f32 (tokens, topk)


class Route:
    def __init__(self, config: RouteConfig):
        self.values, self.sigmoid = config.values, config.scoring == "sigmoid"

    @cute.jit
    def __call__(self, args: RouteArgs, stream: cuda.CUstream):
        self.kernel(args).launch(
            grid=(1, 1, 1), block=(ROUTE_THREADS, 1, 1), stream=stream, min_blocks_per_mp=1, use_pdl=True
        )

    @cute.kernel
    def kernel(self, a: RouteArgs):
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        token, lane = cta * (ROUTE_THREADS // WARP) + tid // WARP, tid % WARP
        if token < a.tokens:
            self.route(a, token, lane)

    @cute.jit
    def route(self, a: RouteArgs, token: Int32, lane: Int32):
        """One token, by one warp."""
        s = self.scores(a, token, lane)
        keys = cute.make_rmem_tensor(self.values, Int32)
        for i in cutlass.range_constexpr(self.values):
            keys[i] = Int32(GONE)
            expert = i * WARP + lane
            if expert < a.experts:
                c = s[i]
                if a.bias != 0:
                    c = c + ld_f32(a.bias + Int64(expert) * 4)
                keys[i] = key_of(c)
        if a.num_groups > 1:
            kept = self.keep_groups(a, keys, lane)
            for i in cutlass.range_constexpr(self.values):
                if (kept >> ((i * WARP + lane) // a.group_size)) & 1 == 0:
                    keys[i] = Int32(GONE)
        chosen, weight = Int32(0), Float32(0.0)  # lane j: choice j
        for j in cutlass.range(a.topk, unroll=1):
            best, expert = Int32(GONE), Int32(0)
            for i in cutlass.range_constexpr(self.values - 1, -1, -1):
                if keys[i] >= best:
                    best, expert = keys[i], Int32(i * WARP) + lane
            highest = cute.arch.warp_redux_sync(best, "max")
            winner = cute.arch.warp_redux_sync(expert if best == highest else Int32(NO_EXPERT), "min")
            score = Float32(0.0)
            for i in cutlass.range_constexpr(self.values):
                if winner == i * WARP + lane:
                    score = s[i]
                    keys[i] = Int32(GONE)
            score = cute.arch.shuffle_sync(score, winner % WARP)
            if lane == j:
                chosen, weight = winner, score
        self.store(a, token, lane, chosen, weight)

    @cute.jit
    def store(self, a: RouteArgs, token: Int32, lane: Int32, chosen: Int32, weight: Float32):
        w = exact.to_f64(weight)
        if a.normalize != 0:
            w = exact.divide(w, exact.warp_sum(w) + Float64(NORMALIZE_EPS))
        w = w * exact.f64_of_bits(a.scale)
        if lane < a.topk:
            at = Int64(token) * a.topk + lane
            st_i64(a.topk_idx + at * 8, Int64(chosen))
            st_f32(a.topk_weights + at * 4, exact.to_f32(w))

    @cute.jit
    def scores(self, a: RouteArgs, token: Int32, lane: Int32):
        """s of this lane's experts; anything for experts that are none."""
        s = cute.make_rmem_tensor(self.values, Float32)
        for i in cutlass.range_constexpr(self.values):
            s[i] = -Float32.inf
            if i * WARP + lane < a.experts:
                at = Int64(token) * a.experts + (i * WARP + lane)
                if a.logits_bytes == 2:
                    s[i] = ld_bf16(a.logits + at * 2)
                else:
                    s[i] = ld_f32(a.logits + at * 4)
        if const_expr(self.sigmoid):
            for i in cutlass.range_constexpr(self.values):
                # beyond these limits the result is the same; maximum and minimum drop a NaN
                limited = cute.arch.fmax(cute.arch.fmin(-s[i], Float32(exact.EXP_LIMIT)), Float32(-exact.EXP_LIMIT))
                exponential = exact.exp(exact.to_f64(limited))
                value = exact.to_f32(exact.reciprocal(exponential + Float64(1.0)))
                s[i] = value if s[i] == s[i] else s[i]
        else:
            self.softmax(s)
        return s

    @cute.jit
    def softmax(self, s: cute.Tensor):
        """In place; absent experts are -inf. All is NaN if a value is NaN or +inf, or all are -inf."""
        top, nan = -Float32.inf, Boolean(False)
        for i in cutlass.range_constexpr(self.values):
            nan = nan | (s[i] != s[i])
            top = cute.arch.fmax(top, s[i])
        top = float_of(cute.arch.warp_redux_sync(key_of(top), "max"))
        undefined = (cute.arch.vote_ballot_sync(nan) != 0) | (top - top != 0.0)
        exponentials = []
        total = Float64(0.0)
        for i in cutlass.range_constexpr(self.values):
            below = exact.to_f64(s[i]) - exact.to_f64(top)
            low = Float64(-exact.EXP_LIMIT)
            e = exact.exp(below if below > low else low)
            e = e if s[i] > -Float32.inf else Float64(0.0)
            exponentials.append(e)
            total = total + e
        inverse = exact.reciprocal(exact.warp_sum(total))
        for i in cutlass.range_constexpr(self.values):
            s[i] = Float32.nan if undefined else exact.to_f32(exponentials[i] * inverse)

    @cute.jit
    def keep_groups(self, a: RouteArgs, keys: cute.Tensor, lane: Int32):
        """Bit g: group g is among the topk_groups with the best sums of their two best."""
        own = -Float32.inf  # lane g: the sum of group g
        if a.group_size == WARP:  # value i is group i: as in DeepSeek-V3, a sixth of the instructions
            for i in cutlass.range_constexpr(self.values):
                total = self.best_two(a, keys[i], Int32(GONE), lane)
                own = total if lane == i else own
        else:
            for g in cutlass.range(a.num_groups, unroll=1):
                first, second = Int32(GONE), Int32(GONE)
                for i in cutlass.range_constexpr(self.values):
                    inside = (i * WARP + lane) // a.group_size == g
                    key = keys[i] if inside else Int32(GONE)
                    if key > first:
                        first, second = key, first
                    elif key > second:
                        second = key
                total = self.best_two(a, first, second, lane)
                own = total if lane == g else own
        better = Int32(0)
        for g in cutlass.range(a.num_groups, unroll=1):
            other = cute.arch.shuffle_sync(own, g)
            if (other > own) | ((other == own) & (g < lane)):
                better += 1
        return cute.arch.vote_ballot_sync((better < a.topk_groups) & (lane < a.num_groups))

    @cute.jit
    def best_two(self, a: RouteArgs, first: Int32, second: Int32, lane: Int32):
        """Sum of the two best scores of a group, of each lane's two best keys in it; of one, if it has but one."""
        highest = cute.arch.warp_redux_sync(first, "max")
        leader = cute.arch.vote_ballot_sync(first == highest)
        leads = leader & -leader == Int32(1) << lane
        next_highest = cute.arch.warp_redux_sync(second if leads else first, "max")
        total = float_of(highest)
        if a.group_size > 1:
            total = total + float_of(next_highest)
        return total if total == total else -Float32.inf


@cute.jit
def key_of(x):
    """Integers in the order of floats; NaN as -inf."""
    x = x if x == x else -Float32.inf
    bits = x.bitcast(Int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def float_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).bitcast(Float32)


def program(config: RouteConfig) -> Program:
    """The host function and the fake arguments that compile one variant."""
    kernel = Route(config)
    name = f"cutehop_moe_route_{config.scoring}_{config.values}"
    kernel.kernel.set_name_prefix(name, remove_cutlass_symbol=True, keep_mangled_name=False)
    return Program(
        host=kernel,
        args=(fake_args(RouteArgs), cuda.CUstream(0)),
        threads=ROUTE_THREADS,
        smem_bytes=0,
        params=param_kinds(RouteArgs),
        pdl=True,
    )
