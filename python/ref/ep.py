"""Expert-parallel dispatch and combine in plain torch, all ranks at once in one process: the specification.

R ranks share E experts, rank r holds experts [r * L, (r + 1) * L), L = E / R. Every rank s has n_s tokens, and each
token has k choices of an expert. A choice outside [0, E), written as -1, is none: it goes nowhere and counts nowhere.

    dispatch   rank r receives every token with at least one choice on it, once however many of them are there,
               ordered by source rank and within a source by token index. Rows are copied bit for bit.
    combine    token t of rank s gets, in fp32 and in exactly this order, each + rounded on its own,
                   (((bias_0 + bias_1) + y_a) + y_b) + ...          a < b < ... the ranks that received t
               rounded once to y's dtype. A bias that is not given is +0, so no token without a bias gives -0.
               y is not weighted: a rank scales its row by the weights of its own experts beforehand.

The two are adjoint: the gradient of dispatch is combine, that of combine is dispatch_cached.
Argument lists hold one entry per rank, in rank order, and their length is R. All tensors are on one device.
Source of behaviour: DeepEP V1, intranode normal mode; where V1 leaves something undefined, the docstring says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from ..cute_kernels.errors import check

MAX_TOPK = 32
Rows: TypeAlias = "Tensor | tuple[Tensor, Tensor]"
"""Rows to move: (n, H) of any dtype, or e4m3 (n, H) with its scales (n, S), float32 or int32 (four UE8M0 each)."""
Bias: TypeAlias = "Tensor | tuple[Tensor, Tensor] | None"

FP8_GROUP = 128  # columns that share a scale
FP8_MAX = 448.0  # largest e4m3
FP8_MIN_AMAX = 1e-4  # keeps the scale of a group of zeros finite


class Layout(NamedTuple):
    """Where the n tokens of one rank go.

    num_tokens_per_rank: int32 (R,), tokens with at least one choice on the rank.
    num_tokens_per_expert: int32 (E,), choices of the expert; a token that names an expert twice counts twice.
    is_token_in_rank: bool (n, R), True where the token has at least one choice on the rank.
    """

    num_tokens_per_rank: Tensor
    num_tokens_per_expert: Tensor
    is_token_in_rank: Tensor


class Handle(NamedTuple):
    """What one rank keeps of a dispatch, to send rows back (combine) or the same way again (dispatch_cached).

    rank_prefix_matrix: int32 (R, R), the same on every rank. [s, r] = tokens that ranks 0..s send to rank r, so rank
        r's rows from source s are [s - 1, r] (0 for s = 0) to [s, r], end exclusive, and [R - 1, r] counts them all.
        V1 fills only a rank's own column.
    recv_src_idx: int32 (m,), index of each received row's token on its source rank; undefined past the received rows.
    is_token_in_rank: bool (n, R), where this rank's own tokens went.
    """

    rank_prefix_matrix: Tensor
    recv_src_idx: Tensor
    is_token_in_rank: Tensor


class Received(NamedTuple):
    """What one rank receives: m rows, the true count or num_worst_tokens.

    recv_x: as x, (m, H), or the pair (m, H), (m, S), contiguous. Undefined past the received rows (0 here).
    recv_topk_idx: (m, k), dtype of topk_idx: local expert ids 0..L-1, -1 for a choice that is not on this rank and
        for every choice past the received rows.
    recv_topk_weights: float32 (m, k), 0 where recv_topk_idx is -1; undefined past the received rows (0 here).
    num_recv_tokens_per_expert_list: L ints, choices of each local expert, each rounded up to expert_alignment (0 stays
        0); no row is padded for it. Empty with num_worst_tokens.
    handle: for combine and dispatch_cached.
    """

    recv_x: Rows
    recv_topk_idx: Tensor
    recv_topk_weights: Tensor
    num_recv_tokens_per_expert_list: list[int]
    handle: Handle


def layout(topk_idx: Tensor, num_experts: int, num_ranks: int) -> Layout:
    """Count where the tokens of one rank go.

    topk_idx: int64 or int32 (n, k), expert ids; any id outside [0, num_experts) is no choice.

    TypeError for another dtype; ValueError if k is not 1..32 or the ranks do not share the experts evenly.
    """
    _check_experts("ep_layout", num_experts, num_ranks)
    _check_topk("ep_layout", topk_idx)
    valid = (topk_idx >= 0) & (topk_idx < num_experts)
    rank = torch.where(valid, topk_idx // (num_experts // num_ranks), num_ranks).long()
    in_rank = torch.zeros((topk_idx.shape[0], num_ranks + 1), dtype=torch.bool, device=topk_idx.device)
    in_rank = in_rank.scatter_(1, rank, True)[:, :num_ranks].contiguous()
    per_expert = torch.bincount(topk_idx[valid].long(), minlength=num_experts)
    return Layout(in_rank.sum(0, dtype=torch.int32), per_expert.int(), in_rank)


def make_handles(is_token_in_rank: Sequence[Tensor], num_worst_tokens: int = 0) -> list[Handle]:
    """The handle of every rank from every rank's is_token_in_rank, bool (n_s, R).

    num_worst_tokens: 0 or the number of rows m that every rank receives into.

    ValueError if a matrix has other than R columns or a rank receives more than num_worst_tokens > 0 tokens.
    """
    num_ranks = len(is_token_in_rank)
    for rank, mask in enumerate(is_token_in_rank):
        check(
            mask.dim() == 2 and mask.shape[1] == num_ranks,
            f"ep_dispatch: is_token_in_rank[{rank}] has shape {tuple(mask.shape)}, needs (n, {num_ranks}) for "
            f"{num_ranks} ranks; pass what layout() returns",
        )
    prefix = torch.stack([mask.sum(0) for mask in is_token_in_rank]).cumsum(0, dtype=torch.int32)
    handles = []
    for rank, mask in enumerate(is_token_in_rank):
        sources = torch.cat([m[:, rank].nonzero()[:, 0] for m in is_token_in_rank]).int()
        rows = num_worst_tokens or len(sources)
        check(
            len(sources) <= rows,
            f"ep_dispatch: rank {rank} receives {len(sources)} tokens, num_worst_tokens is {num_worst_tokens}; pass at "
            "least ranks * the most tokens of a rank",
        )
        handles.append(Handle(prefix, functional.pad(sources, (0, rows - len(sources)), value=-1), mask))
    return handles


def dispatch(
    xs: Sequence[Rows],
    topk_idxs: Sequence[Tensor],
    topk_weights: Sequence[Tensor],
    num_experts: int,
    expert_alignment: int = 1,
    num_worst_tokens: int = 0,
) -> list[Received]:
    """Send every token to the ranks of its experts; one Received per rank.

    xs: (n_s, H) of one dtype and H on all ranks, or pairs of e4m3 (n_s, H) and scales (n_s, S) of any strides.
    topk_idxs: int64 or int32 (n_s, k).  topk_weights: float32 (n_s, k).
    expert_alignment: rounds the numbers of num_recv_tokens_per_expert_list up, moves no row.
    num_worst_tokens: if not 0, every rank receives into this many rows and returns no list.

    TypeError for a wrong dtype. ValueError if shapes do not match or differ between ranks, k is not 1..32, the ranks
    do not share the experts evenly, expert_alignment < 1, or num_worst_tokens is too few (V1 writes out of bounds).
    """
    num_ranks = len(xs)
    _check_experts("ep_dispatch", num_experts, num_ranks)
    _check_dispatch(xs, topk_idxs, topk_weights)
    check(expert_alignment >= 1, f"ep_dispatch: expert_alignment {expert_alignment}, needs >= 1; pass 1 for none")
    check(num_worst_tokens >= 0, f"ep_dispatch: num_worst_tokens {num_worst_tokens}, needs >= 0; pass 0 for exact rows")
    layouts = [layout(topk_idx, num_experts, num_ranks) for topk_idx in topk_idxs]
    handles = make_handles([each.is_token_in_rank for each in layouts], num_worst_tokens)
    recv_xs = dispatch_cached(xs, handles)
    global_idxs = _gather(topk_idxs, handles, fill=-1)
    weights = _gather(topk_weights, handles, fill=0)
    per_expert = torch.stack([each.num_tokens_per_expert for each in layouts]).sum(0).view(num_ranks, -1)
    aligned = ((per_expert + expert_alignment - 1) // expert_alignment * expert_alignment).tolist()
    received = []
    for rank, handle in enumerate(handles):
        num_local = num_experts // num_ranks
        local_idx = global_idxs[rank] - rank * num_local
        elsewhere = (local_idx < 0) | (local_idx >= num_local)
        received.append(
            Received(
                recv_xs[rank],
                local_idx.masked_fill(elsewhere, -1),
                weights[rank].masked_fill(elsewhere, 0),
                [] if num_worst_tokens else aligned[rank],
                handle,
            )
        )
    return received


def dispatch_cached(xs: Sequence[Rows], handles: Sequence[Handle]) -> list[Rows]:
    """recv_x of every rank for new rows that go the way of an earlier dispatch.

    xs: as for dispatch, with the token counts of the handles but any H and dtype.

    ValueError if a count differs from its handle's, or shapes differ between ranks; TypeError if dtypes do.
    """
    _check_count("ep_dispatch", handles=handles, xs=xs)
    _check_rows("ep_dispatch", xs, [handle.is_token_in_rank.shape[0] for handle in handles])
    parts = [x if isinstance(x, tuple) else (x,) for x in xs]
    gathered = [_gather(part, handles, fill=0) for part in zip(*parts)]
    return [rows[0] if len(rows) == 1 else (rows[0], rows[1]) for rows in zip(*gathered)]


def combine(
    ys: Sequence[Tensor],
    handles: Sequence[Handle],
    topk_weights: Sequence[Tensor] | None = None,
    bias: Sequence[Bias] | None = None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Sum each token's rows over the ranks that received it, in the order that the module's docstring gives.

    ys: bfloat16, float16 or float32 (m_r, H) in the order of the received rows; rows past the received ones are not
        read.
    topk_weights: float32 (m_r, k), usually recv_topk_weights; summed like ys, in fp32 from +0 in rank order.
    bias: per rank (n_s, H) of y's dtype, a pair of them, or None.

    Returns combined_x, per rank (n_s, H) of y's dtype, and combined_topk_weights, per rank float32 (n_s, k), or None.
    A token that no rank received gets its bias, or 0, and weights 0.

    TypeError for a wrong dtype; ValueError if shapes do not match the handles or differ between ranks.
    """
    op = "ep_combine"
    rows = [len(handle.recv_src_idx) for handle in handles]
    _check_count(op, handles=handles, ys=ys)
    _check_alike(op, "ys", ys, rows, (torch.bfloat16, torch.float16, torch.float32))
    dtype, hidden, device = ys[0].dtype, ys[0].shape[1], ys[0].device
    biases = [None] * len(handles) if bias is None else bias
    _check_count(op, handles=handles, bias=biases)
    starts = []
    for rank, (given, handle) in enumerate(zip(biases, handles)):
        n = handle.is_token_in_rank.shape[0]
        zero = torch.zeros((n, hidden), dtype=dtype, device=device)
        pair = given if isinstance(given, tuple) else (zero if given is None else given, zero)
        for each in pair:
            _check_alike(op, f"bias[{rank}]", [each], [n], (dtype,), columns=hidden)
        starts.append(pair[0].float() + pair[1].float())
    combined_x = [total.to(dtype) for total in _reduce(ys, handles, starts)]
    if topk_weights is None:
        return combined_x, None
    _check_count(op, handles=handles, topk_weights=topk_weights)
    _check_alike(op, "topk_weights", topk_weights, rows, (torch.float32,))
    zeros = [topk_weights[0].new_zeros((len(start), topk_weights[0].shape[1])) for start in starts]
    return combined_x, _reduce(topk_weights, handles, zeros)


def quantize_fp8(x: Tensor, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Cast each token to e4m3 with a scale per 128 columns; the last group may be shorter. x (n, H) must be finite.

    In fp32, per group:  amax = max(1e-4, max |x|)
        float32 scales   scale = amax / 448                      q = e4m3(x * (448 / amax))
        ue8m0            scale = 2 ** ceil(log2(amax / 448))     q = e4m3(x / scale)
    Each operation is rounded once; e4m3() rounds to nearest even. The logarithm is taken from the bits, exactly.
    Source: DeepEP V1's cast, with round_scale for ue8m0.

    Returns q float8_e4m3fn (n, H), and scales: float32 (n, ceil(H / 128)), or with ue8m0 int32 (n, ceil(H / 512)) where
    byte j (from the lowest) of pack p is the biased exponent log2(scale) + 127 of group 4p + j, 0 for no group.
    """
    n, hidden = x.shape
    groups = -(-hidden // FP8_GROUP)
    blocks = functional.pad(x.float(), (0, groups * FP8_GROUP - hidden)).view(n, groups, FP8_GROUP)
    amax = blocks.abs().amax(-1).clamp_min(FP8_MIN_AMAX)
    largest = amax.new_tensor(FP8_MAX)  # with a Python number, torch multiplies by a reciprocal: rounded twice
    scale, inverse = amax / largest, largest / amax
    if ue8m0:
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2 ** exponent, 0.5 <= mantissa < 1
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
        inverse = ((127 - exponent) << 23).view(torch.float32)
        biased = functional.pad((exponent + 127).to(torch.uint8), (0, -groups % 4))
        scale = biased.view(torch.int32)
    q = (blocks * inverse[..., None]).to(torch.float8_e4m3fn).view(n, groups * FP8_GROUP)
    return q[:, :hidden].contiguous(), scale


def dequantize_fp8(q: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The values of quantize_fp8's pair, (n, H): float32(q) * scale, rounded to dtype.

    q: e4m3 (n, H).  scales: float32 (n, >= ceil(H / 128)) or int32 (n, >= ceil(H / 512)), any strides.

    ValueError for fewer scales, TypeError for another dtype of them.
    """
    _check_scales("ep_dequantize", scales)
    if scales.dtype == torch.int32:
        shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=scales.device)
        biased = ((scales[..., None] >> shifts) & 0xFF).flatten(1)
        scales = (biased << 23).view(torch.float32)
    columns = q.shape[1]
    check(
        scales.shape[1] * FP8_GROUP >= columns,
        f"ep_dequantize: scales cover {scales.shape[1] * FP8_GROUP} columns, x has {columns}; pass a scale per "
        f"{FP8_GROUP} columns",
    )
    return (q.float() * scales.repeat_interleave(FP8_GROUP, 1)[:, :columns]).to(dtype)


def _segments(handle: Handle, rank: int) -> list[tuple[int, int]]:
    """First and last (exclusive) row of every source among the rows that `rank` received."""
    return list(pairwise((0, *handle.rank_prefix_matrix[:, rank].tolist())))


def _gather(per_source: Sequence[Tensor], handles: Sequence[Handle], fill: int) -> list[Tensor]:
    """Rows of every rank, `fill` past the received ones."""
    gathered = []
    for rank, handle in enumerate(handles):
        rows = per_source[0].new_full((len(handle.recv_src_idx), per_source[0].shape[1]), fill)
        for source, (begin, end) in enumerate(_segments(handle, rank)):
            rows[begin:end] = per_source[source][handle.recv_src_idx[begin:end].long()]
        gathered.append(rows)
    return gathered


def _reduce(per_rank: Sequence[Tensor], handles: Sequence[Handle], totals: list[Tensor]) -> list[Tensor]:
    """Add the rows of every rank, ascending, to the totals of the tokens that they came from."""
    for rank, (rows, handle) in enumerate(zip(per_rank, handles)):
        for total, (begin, end) in zip(totals, _segments(handle, rank)):
            tokens = handle.recv_src_idx[begin:end].long()  # a token is at most once on a rank
            total[tokens] += rows[begin:end].float()
    return totals


def _check_experts(op: str, num_experts: int, num_ranks: int) -> None:
    check(num_ranks >= 1, f"{op}: {num_ranks} ranks, needs at least 1; pass one entry per rank")
    check(
        num_experts >= 1 and num_experts % num_ranks == 0,
        f"{op}: {num_experts} experts, needs a positive multiple of the {num_ranks} ranks; add experts that no token "
        "chooses",
    )


def _check_topk(op: str, topk_idx: Tensor) -> None:
    check(
        topk_idx.dtype in (torch.int64, torch.int32),
        f"{op}: topk_idx is {topk_idx.dtype}, supported torch.int64|torch.int32; cast it",
        TypeError,
    )
    check(
        topk_idx.dim() == 2 and 1 <= topk_idx.shape[1] <= MAX_TOPK,
        f"{op}: topk_idx has shape {tuple(topk_idx.shape)}, needs (n, k) with k 1..{MAX_TOPK}; pass one row per token",
    )


def _check_scales(op: str, scales: Tensor) -> None:
    check(
        scales.dtype in (torch.float32, torch.int32),
        f"{op}: scales are {scales.dtype}, supported torch.float32, or torch.int32 of four UE8M0; cast them",
        TypeError,
    )


def _check_count(op: str, **arguments: Sequence) -> None:
    """All arguments have as many entries as the first."""
    (first, entries), *others = arguments.items()
    check(len(entries) >= 1, f"{op}: {first} has 0 entries, needs at least 1; pass one entry per rank")
    for name, other in others:
        check(
            len(other) == len(entries),
            f"{op}: {name} has {len(other)} entries, {first} has {len(entries)}; pass one entry per rank",
        )


def _check_alike(
    op: str,
    name: str,
    tensors: Sequence[Tensor],
    rows: Sequence[int],
    dtypes: tuple[torch.dtype, ...],
    columns: int | None = None,
) -> None:
    """One dtype out of `dtypes` and one width (that of rank 0 unless given) on all ranks, and the expected rows."""
    supported = "|".join(map(str, dtypes))
    for rank, (tensor, n) in enumerate(zip(tensors, rows)):
        where = f"{op}: {name}[{rank}]" if len(tensors) > 1 else f"{op}: {name}"
        check(tensor.dtype in dtypes, f"{where} is {tensor.dtype}, supported {supported}; cast it", TypeError)
        check(
            tensor.dtype == tensors[0].dtype,
            f"{where} is {tensor.dtype}, rank 0 has {tensors[0].dtype}; use one dtype on all ranks",
            TypeError,
        )
        width = tensors[0].shape[-1] if columns is None else columns
        check(
            tensor.shape == (n, width),
            f"{where} has shape {tuple(tensor.shape)}, needs {(n, width)}; pass a row per token, as wide on all ranks",
        )


def _check_rows(op: str, xs: Sequence[Rows], counts: Sequence[int]) -> None:
    pairs = [x for x in xs if isinstance(x, tuple)]
    if not pairs:
        data = [x for x in xs if isinstance(x, Tensor)]
        _check_alike(op, "x", data, counts, (data[0].dtype,))
        return
    check(
        len(pairs) == len(xs),
        f"{op}: x is an (e4m3, scales) pair on {len(pairs)} of {len(xs)} ranks; pass a pair on all ranks or on none",
        TypeError,
    )
    _check_alike(op, "x", [data for data, _ in pairs], counts, (torch.float8_e4m3fn,))
    _check_scales(op, pairs[0][1])
    _check_alike(op, "scales", [scales for _, scales in pairs], counts, (pairs[0][1].dtype,))


def _check_dispatch(xs: Sequence[Rows], topk_idxs: Sequence[Tensor], topk_weights: Sequence[Tensor]) -> None:
    op = "ep_dispatch"
    _check_count(op, xs=xs, topk_idxs=topk_idxs, topk_weights=topk_weights)
    counts = [len(x[0] if isinstance(x, tuple) else x) for x in xs]
    _check_rows(op, xs, counts)
    for topk_idx in topk_idxs:
        _check_topk(op, topk_idx)
    _check_alike(op, "topk_idx", topk_idxs, counts, (torch.int64, torch.int32))
    _check_alike(op, "topk_weights", topk_weights, counts, (torch.float32,), columns=topk_idxs[0].shape[1])
