"""Low-latency dispatch and combine in plain torch, all ranks at once in one process: the specification.

R ranks share E experts, rank r holds experts [r * L, (r + 1) * L), L = E / R. Every rank s has n_s <= T tokens of H
columns, H a multiple of 128, and each token has k choices of an expert, all different. A choice outside [0, E),
written as -1, is none.

    dispatch   expert e receives the row of every token that chose it, ordered by source rank and within a source by
               token index, at the begin of a block of R * T rows. Rows are bf16, copied bit for bit, or `quantize`d.
    combine    token t of rank s gets, in fp32 and in exactly this order, each * and + rounded on its own,
                   p_r = ((+0 + w[t, a] * y_a) + w[t, b] * y_b) + ...      a < b < ... the choices on rank r,
                   ((+0 + p_q) + p_r) + ...                                q < r < ... the ranks that have a choice,
               y_j the row that expert topk_idx[t, j] made of t, rounded once to bf16. Choices that are none are left
               out; a token without any gives +0. So the rank that holds a token's experts may add up their rows
               before they travel.

A pair (r, p) in `masked` says that rank r has masked rank p. Nothing travels between two ranks if either masks the
other: a masked rank has no tokens, and choices of its experts are left out.
Argument lists hold one entry per rank, in rank order, and their length is R. All tensors are on one device.
Source of behaviour: DeepEP V1, low-latency mode; V1 leaves the order of the rows open.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..cute_kernels.errors import check
from .ep import FP8_GROUP, quantize_fp8

MAX_TOPK = 16
LOGFMT_BITS = 9  # of a magnitude; the sign is the tenth
LOGFMT_LARGEST = 2**LOGFMT_BITS - 1  # the code of a group's largest magnitude
LOGFMT_SPAN = 32.0  # powers of two that the codes of a group reach down from its largest magnitude
LOGFMT_CHUNK = 1024  # columns, at most, that are encoded together or not at all
LOGFMT_UNIT = 16  # values whose bits lie together
# log2(1 + t) / t for t in [0, 1), and 2^f for f in [0, 1], highest power first: every step of them is rounded to fp32,
# so that all that compute with these numbers get the same bits. Off by less than 3e-7 and 2e-7.
LOG2 = (
    -0.012671715579926968,
    0.06484165787696838,
    -0.15704980492591858,
    0.25716865062713623,
    -0.35380101203918457,
    0.48013150691986084,
    -0.7213143110275269,
    1.4426947832107544,
)
EXP2 = (
    0.0018964617047458887,
    0.008942835032939911,
    0.05586623400449753,
    0.24013972282409668,
    0.6931547522544861,
    0.9999998807907104,
)
LOGFMT_BEND = math.log(2) / 8  # of rounding, below
LOGFMT_STEPS = 1 / (LOGFMT_LARGEST - 1)
Pairs = Collection[tuple[int, int]]


class Handle(NamedTuple):
    """Where the rows of one rank came from.

    src_info: int32 (L, R * T), index of each row's token on its source rank; -1 past the received rows.
    layout_range: int64 (L, R), low 32 bits: rows that the expert received from the rank, high 32 bits: the first one.
    recv_count: int32 (L,).
    send_slot: int32 (L, R * T), source * T * max_topk + token * max_topk + choice; -1 past the received rows.
    choice_rows: int32 (R * T, max_topk), at [source * T + token, choice] local expert * R * T + row, where the choice
        is one of this rank's experts; else -1.
    """

    src_info: Tensor
    layout_range: Tensor
    recv_count: Tensor
    send_slot: Tensor
    choice_rows: Tensor


class Received(NamedTuple):
    """What one rank receives. Rows past recv_count are undefined (0 here).

    recv_x: bfloat16 or e4m3 (L, R * T, H).
    recv_scales: None with bfloat16, else as quantize's, (L, R * T, S).
    recv_count: int32 (L,), the rows of each local expert.
    """

    recv_x: Tensor
    recv_scales: Tensor | None
    recv_count: Tensor
    handle: Handle


def quantize(x: Tensor, round_scale: bool = False, use_ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Rows as they travel with use_fp8: cutehop.ref.ep.quantize_fp8, scales as the options say.

    x: (n, H).  round_scale: scales are powers of two.  use_ue8m0: they are, and four of them are packed in an int32.

    Returns q e4m3 (n, H) and float32 (n, H / 128) or int32 (n, ceil(H / 512)).
    """
    q, scales = quantize_fp8(x, round_scale or use_ue8m0)
    if round_scale and not use_ue8m0:
        exponents = scales.view(torch.uint8)[:, : x.shape[1] // FP8_GROUP]
        scales = (exponents.int() << 23).view(torch.float32)
    return q, scales


def dispatch(
    xs: Sequence[Tensor],
    topk_idxs: Sequence[Tensor],
    num_experts: int,
    max_tokens: int,
    *,
    max_topk: int | None = None,
    use_fp8: bool = True,
    round_scale: bool = False,
    use_ue8m0: bool = False,
    masked: Pairs = (),
) -> list[Received]:
    """Send every token to its experts; one Received per rank.

    xs: bfloat16 (n_s, H).  topk_idxs: int64 or int32 (n_s, k).  max_tokens: T.
    max_topk: what send_slot counts with and the columns of choice_rows, k if None.
    use_fp8: rows travel as quantize(x, round_scale, use_ue8m0).

    TypeError for a wrong dtype; ValueError if shapes do not match or differ between ranks, H is no multiple of 128, k
    is not 1..16, a rank has more than T tokens, a token chooses an expert twice, or experts do not divide evenly.
    """
    _check_dispatch(xs, topk_idxs, num_experts, max_tokens)
    parts = [quantize(x, round_scale, use_ue8m0) if use_fp8 else (x,) for x in xs]
    handles = make_handles(topk_idxs, num_experts, max_tokens, max_topk, masked)
    received = []
    for handle in handles:
        blocks = [_gather([part[i] for part in parts], handle) for i in range(len(parts[0]))]
        received.append(Received(blocks[0], blocks[1] if use_fp8 else None, handle.recv_count, handle))
    return received


def make_handles(
    topk_idxs: Sequence[Tensor], num_experts: int, max_tokens: int, max_topk: int | None = None, masked: Pairs = ()
) -> list[Handle]:
    """The handle of every rank, of arguments as dispatch takes them."""
    ranks, k = len(topk_idxs), topk_idxs[0].shape[1]
    stride = k if max_topk is None else max_topk
    local, rows = num_experts // ranks, ranks * max_tokens
    handles = []
    for rank in range(ranks):
        src_info = topk_idxs[0].new_full((local, rows), -1, dtype=torch.int32)
        send_slot = src_info.clone()
        choice_rows = src_info.new_full((rows, stride), -1)
        layout_range = src_info.new_zeros((local, ranks), dtype=torch.int64)
        count = src_info.new_zeros((local,))
        for expert in range(local):
            begin = 0
            for source, topk_idx in enumerate(topk_idxs):
                token, choice = (topk_idx == rank * local + expert).nonzero().unbind(1)
                if {(rank, source), (source, rank)} & set(masked):
                    token, choice = token[:0], choice[:0]
                end = begin + len(token)
                src_info[expert, begin:end] = token
                send_slot[expert, begin:end] = (source * max_tokens + token) * stride + choice
                of_expert = torch.arange(begin, end, dtype=torch.int32, device=src_info.device)
                choice_rows[source * max_tokens + token, choice] = expert * rows + of_expert
                layout_range[expert, source] = begin << 32 | (end - begin)
                begin = end
            count[expert] = begin
        handles.append(Handle(src_info, layout_range, count, send_slot, choice_rows))
    return handles


def combine(
    ys: Sequence[Tensor],
    handles: Sequence[Handle],
    topk_idxs: Sequence[Tensor],
    topk_weights: Sequence[Tensor],
    num_experts: int,
    max_tokens: int,
    *,
    max_topk: int | None = None,
    use_logfmt: bool = False,
    masked: Pairs = (),
) -> list[Tensor]:
    """Every token's weighted sum, in the order that the module's docstring gives; per rank bfloat16 (n_s, H).

    ys: bfloat16 (L, R * T, H) in the order of the received rows; rows past those are not read.
    handles: of a dispatch with this T and max_topk.  topk_idxs: of that dispatch.  topk_weights: float32 (n_s, k).
    use_logfmt: each row travels encoded by logfmt_encode, where that is possible.

    TypeError for a wrong dtype, ValueError if the lists differ in length or shapes do not match.
    """
    op, ranks, hidden = "ep_ll_combine", len(ys), ys[0].shape[-1]
    for name, given in (("handles", handles), ("topk_idxs", topk_idxs), ("topk_weights", topk_weights)):
        check(len(given) == ranks, f"{op}: {name} has {len(given)} entries, ys has {ranks}; pass one entry per rank")
    local = num_experts // ranks
    for rank, (y, idx, weights) in enumerate(zip(ys, topk_idxs, topk_weights)):
        _check(f"{op}: ys[{rank}]", y, (torch.bfloat16,), (local, ranks * max_tokens, hidden))
        _check(f"{op}: topk_weights[{rank}]", weights, (torch.float32,), tuple(idx.shape))
    slots = max_tokens * (topk_idxs[0].shape[1] if max_topk is None else max_topk)
    combined = []
    for rank, rows in enumerate(_send_home(ys, handles, slots, use_logfmt)):
        home = home_ranks(topk_idxs[rank], num_experts, local)
        for a, b in masked:
            if rank in (a, b):
                home[home == (b if rank == a else a)] = -1
        combined.append(weighted_sum(rows.view(max_tokens, -1, hidden), topk_weights[rank], home))
    return combined


def home_ranks(topk_idx: Tensor, num_experts: int, experts_per_rank: int) -> Tensor:
    """The rank that holds each choice's expert, -1 for no choice; of topk_idx's shape and dtype."""
    return (topk_idx // experts_per_rank).masked_fill(~is_choice(topk_idx, num_experts), -1)


def weighted_sum(rows: Tensor, topk_weights: Tensor, home: Tensor) -> Tensor:
    """The arithmetic of combine, bfloat16 (n, H).

    rows: float32 (>= n, >= k, H), of each token and choice.  topk_weights: float32 (n, k).
    home: int64 or int32 (n, k), the rank that holds the choice's expert, -1 for a choice that is left out.
    """
    n, k = topk_weights.shape
    total = torch.zeros((n, rows.shape[2]), device=rows.device)
    for rank in home[home >= 0].unique().tolist():
        part = torch.zeros_like(total)
        for j in range(k):
            part = torch.where(home[:, j, None] == rank, part + topk_weights[:, j, None] * rows[:n, j], part)
        total = total + part  # +0 for a token without a choice there, which changes no bit: a sum from +0 is never -0
    return total.bfloat16()


def logfmt_encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitudes as 9-bit codes of their logarithms, on a scale that each 128 columns have for themselves.

    x: bfloat16 (n, H). Per group of 128, in fp32, every operation rounded on its own, log2 as LOG2 has it:
        la = log2(amax), li = max(log2(amin), la - 32), step = (la - li) * (1 / 510)      amax, amin of |x|
        code = floor((log2|x| - li) * (1 / step) + rounding), 0..511      rounding = 1.5 - step * ln 2 / 8
    Code 0 is 0, code c is 2^((c - 1) * step + li), so amin is 1 and amax 511, and a value lies nearest to its code's:
    2 - log2((1 + 2^step) / 2) / step, which V1 rounds by, is 1.5 - step * ln 2 / 8 to 5e-7 for all steps.

    Returns limits bfloat16 (n, H / 128, 2), amax and amin of each group, and packed uint8 (n, H / 16, 20): value j of
    16 has its code in bits 9j to 9j + 8 and its sign in bit 144 + j, counted from the lowest of the first byte.
    Groups of equal magnitudes have no scale; their codes are 0.
    """
    n, hidden = x.shape
    groups = x.float().view(n, hidden // FP8_GROUP, FP8_GROUP)
    amin, amax = groups.abs().aminmax(dim=-1)
    limits = torch.stack([amax, amin], -1).bfloat16()
    low, step = (each[..., None] for each in _logfmt_scale(limits))
    rounding = 1.5 - step * LOGFMT_BEND
    codes = ((_log2(groups.abs()) - low) * (1 / step) + rounding).floor().clamp(0, LOGFMT_LARGEST)
    usable = step[..., 0] > 0
    codes = codes.masked_fill(~usable[..., None], 0).int().view(n, hidden // LOGFMT_UNIT, LOGFMT_UNIT)
    bits = (codes[..., None] >> torch.arange(LOGFMT_BITS, device=x.device)) & 1
    negative = (x.view(n, hidden // LOGFMT_UNIT, LOGFMT_UNIT) < 0).int()
    octets = torch.cat([bits.flatten(-2), negative], -1).unflatten(-1, ((LOGFMT_BITS + 1) * LOGFMT_UNIT // 8, 8))
    return limits, (octets << torch.arange(8, device=x.device)).sum(-1).to(torch.uint8)


def logfmt_applies(limits: Tensor) -> Tensor:
    """bool (n, chunks): which chunks of gcd(H, 1024) columns travel encoded: those of which every group has magnitudes
    below 1 that are not all equal. limits: of logfmt_encode."""
    hidden = limits.shape[1] * FP8_GROUP
    _, step = _logfmt_scale(limits)
    usable = (limits[..., 0].float() < 1) & (step > 0)
    chunk = math.gcd(hidden, LOGFMT_CHUNK)
    return usable.view(len(limits), hidden // chunk, chunk // FP8_GROUP).all(-1)


def logfmt_decode(limits: Tensor, packed: Tensor, x: Tensor) -> Tensor:
    """float32 (n, H): the values of logfmt_encode's pair where it applies, those of x, bfloat16 (n, H), elsewhere."""
    n, hidden = x.shape
    bits = ((packed[..., None] >> torch.arange(8, device=x.device)) & 1).flatten(-2).int()
    split = LOGFMT_UNIT * LOGFMT_BITS
    codes = bits[..., :split].unflatten(-1, (LOGFMT_UNIT, LOGFMT_BITS)) << torch.arange(LOGFMT_BITS, device=x.device)
    groups = codes.sum(-1).view(n, hidden // FP8_GROUP, FP8_GROUP)
    low, step = (each[..., None] for each in _logfmt_scale(limits))
    magnitude = torch.where(groups > 0, _exp2((groups - 1) * step + low), 0.0).view(n, hidden)
    values = torch.where(bits[..., split:].reshape(n, hidden) == 1, -magnitude, magnitude)
    applies = logfmt_applies(limits).repeat_interleave(math.gcd(hidden, LOGFMT_CHUNK), 1)
    return torch.where(applies, values, x.float())


def _logfmt_scale(limits: Tensor) -> tuple[Tensor, Tensor]:
    """li and step of every group; step is 0 or NaN where all magnitudes are equal."""
    largest, smallest = _log2(limits.float()).unbind(-1)
    low = torch.maximum(smallest, largest - LOGFMT_SPAN)
    return low, (largest - low) * LOGFMT_STEPS


def _log2(x: Tensor) -> Tensor:
    """Of magnitudes that are bfloat16, in fp32; -inf of 0."""
    mantissa, exponent = x.frexp()
    t = mantissa * 2 - 1
    value = (exponent - 1) + t * _polynomial(LOG2, t)
    return value.masked_fill(x == 0, -math.inf).where(x.isfinite(), x)


def _exp2(x: Tensor) -> Tensor:
    whole = x.floor()
    half = (whole / 2).floor()  # in two factors, since 2^x may be subnormal
    return _polynomial(EXP2, x - whole) * half.exp2() * (whole - half).exp2()


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _gather(per_source: Sequence[Tensor], handle: Handle) -> Tensor:
    """(L, R * T, columns): the sources' rows where the handle says, 0 past them."""
    local, rows = handle.src_info.shape
    block = per_source[0].new_zeros((local, rows, per_source[0].shape[1]))
    for expert, ranges in enumerate(handle.layout_range.tolist()):
        for source, packed in enumerate(ranges):
            begin, count = packed >> 32, packed & 0xFFFFFFFF
            block[expert, begin : begin + count] = per_source[source][handle.src_info[expert, begin : begin + count]]
    return block


def _send_home(ys: Sequence[Tensor], handles: Sequence[Handle], slots: int, use_logfmt: bool) -> list[Tensor]:
    """Per rank float32 (slots, H): each row at its token's and choice's place, 0 where none comes."""
    home = torch.zeros((len(ys) * slots, ys[0].shape[-1]), device=ys[0].device)
    for y, handle in zip(ys, handles):
        for expert, count in enumerate(handle.recv_count.tolist()):
            rows = y[expert, :count]
            values = logfmt_decode(*logfmt_encode(rows), rows) if use_logfmt else rows.float()
            home[handle.send_slot[expert, :count]] = values
    return list(home.split(slots))


def _check_dispatch(xs: Sequence[Tensor], topk_idxs: Sequence[Tensor], num_experts: int, max_tokens: int) -> None:
    op, ranks = "ep_ll_dispatch", len(xs)
    check(ranks == len(topk_idxs) >= 1, f"{op}: {ranks} xs, {len(topk_idxs)} topk_idxs; pass one of each per rank")
    check(
        num_experts >= 1 and num_experts % ranks == 0,
        f"{op}: {num_experts} experts, needs a positive multiple of the {ranks} ranks; pad the experts",
    )
    hidden, k = xs[0].shape[-1], topk_idxs[0].shape[-1]
    check(
        hidden > 0 and hidden % FP8_GROUP == 0,
        f"{op}: hidden {hidden}, needs a positive multiple of {FP8_GROUP}; pad it",
    )
    check(1 <= k <= MAX_TOPK, f"{op}: {k} choices per token, supported 1..{MAX_TOPK}; choose fewer experts")
    for rank, (x, idx) in enumerate(zip(xs, topk_idxs)):
        n = len(x)
        check(n <= max_tokens, f"{op}: {n} tokens on rank {rank}, max_tokens is {max_tokens}; raise it")
        _check(f"{op}: xs[{rank}]", x, (torch.bfloat16,), (n, hidden))
        _check(f"{op}: topk_idxs[{rank}]", idx, (torch.int64, torch.int32), (n, k))
        check(
            not has_repeated_choice(idx, num_experts),
            f"{op}: a token of rank {rank} chooses an expert twice; write -1 for one of the choices",
        )


def is_choice(topk_idx: Tensor, num_experts: int) -> Tensor:
    """bool (n, k): which ids name an expert."""
    return (topk_idx >= 0) & (topk_idx < num_experts)


def has_repeated_choice(topk_idx: Tensor, num_experts: int) -> bool:
    """Whether a token, a row of topk_idx (n, k), chooses an expert twice."""
    chosen = topk_idx.masked_fill(~is_choice(topk_idx, num_experts), -1).sort(1).values
    return bool(((chosen[:, 1:] == chosen[:, :-1]) & (chosen[:, 1:] >= 0)).any())


def _check(what: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    supported = "|".join(map(str, dtypes))
    check(tensor.dtype in dtypes, f"{what} is {tensor.dtype}, supported {supported}; cast it", TypeError)
    check(tuple(tensor.shape) == shape, f"{what} has shape {tuple(tensor.shape)}, needs {shape}; reshape it")
