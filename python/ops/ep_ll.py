"""Low-latency ops of expert parallelism: `cutehop::ep_ll_dispatch` and `ep_ll_combine`, and their halves for programs
that do something else between send and receive, `ep_ll_dispatch_send`, `ep_ll_dispatch_recv`, `ep_ll_combine_send`,
`ep_ll_combine_recv`.

A buffer, the name of a cutehop.comm.ll_base.LowLatencyBuffer, is for R ranks, E experts, L = E / R of them on each
rank, and at most T tokens per rank of H columns; n tokens of this rank with k choices each. cutehop.ref.ep_ll defines
the values. All ranks of the buffer make the same sends in the same order. Every send is received once, with at most 3
outstanding, and before the fourth send after it.

ep_ll_dispatch_send(x, topk_idx, buffer, use_fp8=True, round_scale=False, use_ue8m0=False) -> epoch
    x                        bfloat16 (n, H), contiguous, n <= T.
    topk_idx                 int64 | int32 (n, k), contiguous; an id outside [0, E) is no choice.
    use_fp8                  rows travel as e4m3 with a scale per 128 columns; with round_scale powers of two, with
                             use_ue8m0 these, packed.
    Returns int32 (1,), which names the operation for its receive.

ep_ll_dispatch_recv(epoch, buffer, num_topk, use_fp8=True, use_ue8m0=False)
        -> (recv_x, recv_scales, recv_count, src_info, layout_range, send_slot, choice_rows)
    num_topk                 k.  use_fp8, use_ue8m0: of the send.
    Returns bfloat16 or e4m3 (L, R * T, H); float32 (L, R * T, H / 128), int32 (L, R * T, ceil(H / 512)) of packed
    scales, or, with bfloat16, (0,); int32 (L,) received rows of each expert; and with recv_count the handle: int32
    (L, R * T), int64 (L, R), int32 (L, R * T), int32 (R * T, max_topk) (cutehop.comm.ll_outputs.LlHandle). Rows past
    the received ones are undefined.

ep_ll_combine_send(y, src_info, layout_range, recv_count, send_slot, choice_rows, buffer, num_topk, use_logfmt=False)
        -> epoch
    y                        bfloat16 (L, R * T, H), contiguous, in the order of the received rows.
    use_logfmt               rows travel in 10 bits per value, where that is possible.

ep_ll_combine_recv(epoch, topk_idx, topk_weights, buffer, use_logfmt=False) -> combined_x
    topk_idx                 of the dispatch, unchanged, with as many rows.
    topk_weights             float32 (n, k), contiguous.  use_logfmt: of the send.
    Returns bfloat16 (n, H).

ep_ll_dispatch(x, topk_idx, buffer, use_fp8=True, round_scale=False, use_ue8m0=False)
        -> (recv_x, recv_scales, recv_count, src_info, layout_range, send_slot, choice_rows)
ep_ll_combine(y, src_info, layout_range, recv_count, send_slot, choice_rows, topk_idx, topk_weights, buffer,
        use_logfmt=False) -> combined_x
    Both halves, in one launch on a GPU, which takes less time. All ranks call ep_ll_combine, or all its halves.

torch.compile drops no call of them, used or not, and keeps their order (cutehop.ops.ep says what its inductor
backend needs for that). Shapes come from the buffer, which is looked up by its name when a graph is compiled and again
when a call runs. There are no gradients: an input that requires one raises NotImplementedError while autograd records.

Errors: TypeError for dtypes, ValueError for other arguments, RuntimeError for a destroyed buffer and for operations
outstanding, EpTimeoutError (a RuntimeError) where a peer did not do its part in time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from cutehop.comm import ll_checks as checks
from cutehop.comm.ll_base import find
from cutehop.comm.ll_outputs import LlDispatched, LlHandle, empty_combined, empty_dispatched
from cutehop.ops._define import define_ordered

SENT = "Tensor x, Tensor topk_idx, str buffer, bool use_fp8=True, bool round_scale=False, bool use_ue8m0=False"
RECEIVED = (
    "Tensor recv_x, Tensor recv_scales, Tensor recv_count, Tensor src_info, Tensor layout_range, Tensor send_slot,"
    " Tensor choice_rows"
)
HANDLE = "Tensor src_info, Tensor layout_range, Tensor recv_count, Tensor send_slot, Tensor choice_rows"
Outputs = tuple[Tensor, ...]


def _dispatch_send(
    x: Tensor,
    topk_idx: Tensor,
    buffer: str,
    use_fp8: bool = True,
    round_scale: bool = False,
    use_ue8m0: bool = False,
) -> Tensor:
    core = find(buffer)
    return core.dispatch_send(x, topk_idx, use_fp8=use_fp8, round_scale=round_scale, use_ue8m0=use_ue8m0)


def _dispatch_send_fake(
    x: Tensor,
    topk_idx: Tensor,
    buffer: str,
    use_fp8: bool = True,
    round_scale: bool = False,
    use_ue8m0: bool = False,
) -> Tensor:
    core = find(buffer)
    checks.check_dispatch_send(core.config, core.device, x, topk_idx, use_fp8, round_scale, use_ue8m0)
    return x.new_empty((1,), dtype=torch.int32)


def _dispatch_recv(epoch: Tensor, buffer: str, num_topk: int, use_fp8: bool = True, use_ue8m0: bool = False) -> Outputs:
    core = find(buffer)
    return _results(core.dispatch_receive(epoch, num_topk=num_topk, use_fp8=use_fp8, use_ue8m0=use_ue8m0))


def _dispatch_recv_fake(
    epoch: Tensor, buffer: str, num_topk: int, use_fp8: bool = True, use_ue8m0: bool = False
) -> Outputs:
    core = find(buffer)
    checks.check_dispatch_receive(core.config, core.device, epoch, num_topk)
    return _results(empty_dispatched(core.config, epoch, use_fp8, use_ue8m0))


def _results(got: LlDispatched) -> Outputs:
    """In the order of the schema."""
    x, handle = got.recv_x, got.handle
    scales = x.new_empty((0,), dtype=torch.float32) if got.recv_scales is None else got.recv_scales
    return x, scales, got.recv_count, handle.src_info, handle.layout_range, handle.send_slot, handle.choice_rows


def _dispatch(
    x: Tensor,
    topk_idx: Tensor,
    buffer: str,
    use_fp8: bool = True,
    round_scale: bool = False,
    use_ue8m0: bool = False,
) -> Outputs:
    core = find(buffer)
    return _results(core.dispatch(x, topk_idx, use_fp8=use_fp8, round_scale=round_scale, use_ue8m0=use_ue8m0))


def _dispatch_fake(
    x: Tensor,
    topk_idx: Tensor,
    buffer: str,
    use_fp8: bool = True,
    round_scale: bool = False,
    use_ue8m0: bool = False,
) -> Outputs:
    core = find(buffer)
    checks.check_dispatch_send(core.config, core.device, x, topk_idx, use_fp8, round_scale, use_ue8m0)
    return _results(empty_dispatched(core.config, x, use_fp8, use_ue8m0))


def _combine_send(
    y: Tensor,
    src_info: Tensor,
    layout_range: Tensor,
    recv_count: Tensor,
    send_slot: Tensor,
    choice_rows: Tensor,
    buffer: str,
    num_topk: int,
    use_logfmt: bool = False,
) -> Tensor:
    handle = LlHandle(src_info, layout_range, recv_count, send_slot, choice_rows)
    return find(buffer).combine_send(y, handle, num_topk=num_topk, use_logfmt=use_logfmt)


def _combine_send_fake(
    y: Tensor,
    src_info: Tensor,
    layout_range: Tensor,
    recv_count: Tensor,
    send_slot: Tensor,
    choice_rows: Tensor,
    buffer: str,
    num_topk: int,
    use_logfmt: bool = False,
) -> Tensor:
    core = find(buffer)
    handle = LlHandle(src_info, layout_range, recv_count, send_slot, choice_rows)
    checks.check_combine_send(core.config, core.device, y, *handle, num_topk)
    return y.new_empty((1,), dtype=torch.int32)


def _combine_recv(
    epoch: Tensor, topk_idx: Tensor, topk_weights: Tensor, buffer: str, use_logfmt: bool = False
) -> Tensor:
    return find(buffer).combine_receive(epoch, topk_idx, topk_weights, use_logfmt=use_logfmt)


def _combine_recv_fake(
    epoch: Tensor, topk_idx: Tensor, topk_weights: Tensor, buffer: str, use_logfmt: bool = False
) -> Tensor:
    core = find(buffer)
    checks.check_combine_receive(core.config, core.device, epoch, topk_idx, topk_weights)
    return empty_combined(core.config, topk_weights)


def _combine(
    y: Tensor,
    src_info: Tensor,
    layout_range: Tensor,
    recv_count: Tensor,
    send_slot: Tensor,
    choice_rows: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    buffer: str,
    use_logfmt: bool = False,
) -> Tensor:
    handle = LlHandle(src_info, layout_range, recv_count, send_slot, choice_rows)
    return find(buffer).combine(y, handle, topk_idx, topk_weights, use_logfmt=use_logfmt)


def _combine_fake(
    y: Tensor,
    src_info: Tensor,
    layout_range: Tensor,
    recv_count: Tensor,
    send_slot: Tensor,
    choice_rows: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    buffer: str,
    use_logfmt: bool = False,
) -> Tensor:
    core = find(buffer)
    handle = LlHandle(src_info, layout_range, recv_count, send_slot, choice_rows)
    checks.check_combine_send(core.config, core.device, y, *handle, topk_idx.shape[1])
    checks.check_combine_inputs(core.config, core.device, topk_idx, topk_weights, None, None)
    return empty_combined(core.config, topk_weights)


def _refuse_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> NoReturn:
    """torch calls this only where autograd records."""
    raise NotImplementedError(
        "ep_ll: an input requires a gradient, which low-latency ops do not have; call them under torch.no_grad(), or "
        "use ep_dispatch and ep_combine"
    )


def _no_backward(ctx: Any, *gradients: Any) -> NoReturn:
    raise AssertionError("nothing was recorded")


def _define(name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    define_ordered(name, schema, body=body, fake=fake, setup_context=_refuse_gradient, backward=_no_backward)


_define("ep_ll_dispatch", f"({SENT}) -> ({RECEIVED})", _dispatch, _dispatch_fake)
_define(
    "ep_ll_combine",
    f"(Tensor y, {HANDLE}, Tensor topk_idx, Tensor topk_weights, str buffer, bool use_logfmt=False)"
    " -> Tensor combined_x",
    _combine,
    _combine_fake,
)
_define(
    "ep_ll_dispatch_send",
    f"({SENT}) -> Tensor epoch",
    _dispatch_send,
    _dispatch_send_fake,
)
_define(
    "ep_ll_dispatch_recv",
    f"(Tensor epoch, str buffer, int num_topk, bool use_fp8=True, bool use_ue8m0=False) -> ({RECEIVED})",
    _dispatch_recv,
    _dispatch_recv_fake,
)
_define(
    "ep_ll_combine_send",
    f"(Tensor y, {HANDLE}, str buffer, int num_topk, bool use_logfmt=False) -> Tensor epoch",
    _combine_send,
    _combine_send_fake,
)
_define(
    "ep_ll_combine_recv",
    "(Tensor epoch, Tensor topk_idx, Tensor topk_weights, str buffer, bool use_logfmt=False) -> Tensor combined_x",
    _combine_recv,
    _combine_recv_fake,
)
