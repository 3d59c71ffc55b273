"""Argument checks of the MoE ops. They read no values: they run on fake tensors and never wait for the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from cutehop.ref.moe import EPILOGUES, SCORINGS
from cutehop.ref.quant import FP8_GROUP

MAX_EXPERTS = 1024  # of permute: shared memory has a counter per warp and expert
MAX_ROUTE_EXPERTS = 512  # of route: a warp holds all scores of a token
MAX_TOPK = 32
FP8 = torch.float8_e4m3fn
_ACTIVATIONS = (torch.bfloat16, FP8)


def check_grouped(
    op: str,
    a: Tensor,
    b: Tensor,
    per_expert: tuple[str, Tensor],
    a_scales: Tensor | None,
    b_scales: Tensor | None,
    epilogue: str,
    expected_rows: int,
) -> None:
    """Arguments of grouped_gemm and masked_grouped_gemm; per_expert: name and value of ends or counts."""
    if epilogue not in EPILOGUES:
        raise ValueError(f"{op}: epilogue {epilogue!r}, supported {'|'.join(EPILOGUES)}; choose one")
    if a.dtype not in _ACTIVATIONS:
        raise TypeError(f"{op}: a is {a.dtype}, supported bfloat16|float8_e4m3fn; cast it or call quantize_fp8")
    if b.dtype != a.dtype:
        raise TypeError(f"{op}: b is {b.dtype}, a is {a.dtype}; use one dtype")
    rank = 2 if per_expert[0] == "ends" else 3
    if a.dim() != rank:
        raise ValueError(f"{op}: a has shape {tuple(a.shape)}, needs {'(M, K)' if rank == 2 else '(E, T, K)'}; reshape")
    columns = a.shape[-1]
    if b.dim() != 3 or b.shape[2] != columns or (rank == 3 and b.shape[0] != a.shape[0]):
        experts = "E" if rank == 2 else a.shape[0]
        raise ValueError(f"{op}: b has shape {tuple(b.shape)}, needs ({experts}, N, {columns}); K lies last, as in a")
    experts, outputs, _ = b.shape
    if experts < 1:
        raise ValueError(f"{op}: b has no experts, at least 1; skip the call")
    _check_sizes(op, columns, outputs, a.dtype == FP8, epilogue)
    for name, tensor in (("a", a), ("b", b)):
        _check_strides(op, name, tensor)
    name, values = per_expert
    _check_tensor(op, name, values, torch.int32, (experts,), a.device)
    if expected_rows < 0:
        raise ValueError(f"{op}: expected_rows {expected_rows}, needs >= 0; pass 0 for no hint")
    if b.device != a.device:
        raise ValueError(f"{op}: b on {b.device}, a on {a.device}; move all arguments to one device")
    blocks = (experts, -(-outputs // FP8_GROUP), columns // FP8_GROUP)
    wanted = {"a_scales": (a_scales, (*a.shape[:-1], blocks[2])), "b_scales": (b_scales, blocks)}
    for name, (scales, shape) in wanted.items():
        if (scales is None) != (a.dtype != FP8):
            state = "missing" if scales is None else "given"
            raise ValueError(
                f"{op}: {name} {state} with a of {a.dtype}; pass scales with float8_e4m3fn, and only there"
            )
        if scales is not None:
            _check_tensor(op, name, scales, torch.float32, shape, a.device, contiguous=name == "b_scales")


def _check_sizes(op: str, columns: int, outputs: int, fp8: bool, epilogue: str) -> None:
    """K and N."""
    step = FP8_GROUP if fp8 else 8
    for name, size in (("K", columns), ("N", outputs)):
        if size < 1 or size % step:
            raise ValueError(
                f"{op}: {name} {size}, needs a positive multiple of {step} for this dtype; pad the weights"
            )
    if epilogue != "store":
        step = FP8_GROUP if fp8 or epilogue == "swiglu_fp8" else 64
        if outputs % (2 * step):
            raise ValueError(
                f"{op}: N {outputs} with {epilogue}, needs gate and up of a multiple of {step} columns each; pad the "
                "weights"
            )


def check_route(
    logits: Tensor, bias: Tensor | None, topk: int, num_groups: int, topk_groups: int, scoring: str
) -> None:
    op = "moe_route"
    if logits.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"{op}: logits are {logits.dtype}, supported float32|bfloat16; cast them")
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MAX_ROUTE_EXPERTS:
        raise ValueError(
            f"{op}: logits have shape {tuple(logits.shape)}, needs (n, E), E 1..{MAX_ROUTE_EXPERTS}; reshape"
        )
    experts = logits.shape[1]
    if bias is not None:
        _check_tensor(op, "bias", bias, torch.float32, (experts,), logits.device)
    if scoring not in SCORINGS:
        raise ValueError(f"{op}: scoring {scoring!r}, supported {'|'.join(SCORINGS)}; choose one")
    if not 1 <= num_groups <= MAX_TOPK or experts % num_groups:
        raise ValueError(
            f"{op}: num_groups {num_groups}, needs a divisor of the {experts} experts in 1..{MAX_TOPK}; 1 is no groups"
        )
    if not 1 <= topk_groups <= num_groups:
        raise ValueError(f"{op}: topk_groups {topk_groups}, needs 1..num_groups ({num_groups}); pass fewer")
    most = min(MAX_TOPK, topk_groups * (experts // num_groups))
    if not 1 <= topk <= most:
        raise ValueError(f"{op}: topk {topk}, needs 1..{most} with these groups; choose fewer experts or more groups")


def check_permute(x: Tensor, scales: Tensor | None, topk_idx: Tensor, num_experts: int, num_rows: int) -> None:
    op = "moe_permute"
    if x.dtype not in _ACTIVATIONS:
        raise TypeError(f"{op}: x is {x.dtype}, supported bfloat16|float8_e4m3fn; cast it")
    _check_rows(op, "x", x)
    n = x.shape[0]
    if scales is not None:
        if x.dtype != FP8:
            raise ValueError(f"{op}: scales given with x of {x.dtype}; pass scales with float8_e4m3fn only")
        if scales.dtype not in (torch.float32, torch.int32):
            raise TypeError(f"{op}: scales are {scales.dtype}, supported float32, or int32 of four UE8M0; cast them")
        if scales.dim() != 2 or scales.shape[0] != n:
            raise ValueError(f"{op}: scales have shape {tuple(scales.shape)}, needs ({n}, S); pass a row per token")
    if topk_idx.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: topk_idx is {topk_idx.dtype}, supported int64|int32; cast it")
    if topk_idx.dim() != 2 or topk_idx.shape[0] != n or not 1 <= topk_idx.shape[1] <= MAX_TOPK:
        raise ValueError(
            f"{op}: topk_idx has shape {tuple(topk_idx.shape)}, needs ({n}, k) k 1..{MAX_TOPK}; pass a row per token"
        )
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"{op}: num_experts {num_experts}, supported 1..{MAX_EXPERTS}; spread them over ranks")
    if num_rows < 0:
        raise ValueError(f"{op}: num_rows {num_rows}, needs >= 0; n * k always suffices")
    _check_devices(op, x, scales=scales, topk_idx=topk_idx)


def check_unpermute(y: Tensor, pair_row: Tensor, weights: Tensor | None) -> None:
    op = "moe_unpermute"
    if y.dtype != torch.bfloat16:
        raise TypeError(f"{op}: y is {y.dtype}, supported bfloat16; cast it")
    _check_rows(op, "y", y)
    if pair_row.dim() != 2 or not 1 <= pair_row.shape[1] <= MAX_TOPK:
        raise ValueError(
            f"{op}: pair_row has shape {tuple(pair_row.shape)}, needs (n, k), k 1..{MAX_TOPK}; pass permute's"
        )
    _check_tensor(op, "pair_row", pair_row, torch.int32, tuple(pair_row.shape), y.device)
    if weights is not None:
        _check_tensor(op, "weights", weights, torch.float32, tuple(pair_row.shape), y.device, contiguous=False)


def check_quantize(x: Tensor) -> None:
    op = "quantize_fp8"
    if x.dtype != torch.bfloat16:
        raise TypeError(f"{op}: x is {x.dtype}, supported bfloat16; cast it")
    if x.dim() < 1 or x.shape[-1] < 1 or x.shape[-1] % FP8_GROUP:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)}, needs (..., H) with H a positive multiple of {FP8_GROUP}; pad it"
        )


def _check_rows(op: str, name: str, tensor: Tensor) -> None:
    """Rows that move as 16-byte vectors."""
    if tensor.dim() != 2 or tensor.shape[1] < 1 or tensor.shape[1] * tensor.itemsize % 16:
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}, needs (rows, H) with H a multiple of "
            f"{16 // tensor.itemsize}; pad the columns"
        )


def _check_strides(op: str, name: str, tensor: Tensor) -> None:
    """What a tensor map can describe: columns side by side, every other step a multiple of 16 bytes."""
    *outer, last = tensor.stride()
    steps = [step for step, size in zip(outer, tensor.shape) if size > 1]
    if (last != 1 and tensor.shape[-1] > 1) or any(step * tensor.itemsize % 16 or step <= 0 for step in steps):
        raise ValueError(
            f"{op}: {name} has strides {tuple(tensor.stride())}, needs 1 in the last dimension and multiples of "
            f"{16 // tensor.itemsize} before it; call {name}.contiguous()"
        )


def _check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
    contiguous: bool = True,
) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name} is {tensor.dtype}, supported {dtype}; call {name}.to({dtype})")
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, needs {tuple(shape)}; fix it")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} has strides {tuple(tensor.stride())}; call {name}.contiguous()")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} on {tensor.device}, not on {device}; move all arguments to one device")


def _check_devices(op: str, x: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: {name} on {tensor.device}, not on {x.device}; move all arguments to one device")
