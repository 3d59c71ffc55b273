"""What the machine can do, measured in the run that is compared with it: memory copy, peer copy, and NCCL's rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from tools.bench.ep_jobs import Job, Tensors
from tools.bench.ep_setting import Inputs, Moved, Setting, make_inputs
from tools.bench.roofline import CPU_SIZES, GPU_SIZES
from tools.bench.timing import make_lane

PEER_BYTES = 1_000_000_000
PEER_REPEATS = 10


@dataclass(frozen=True)
class EpCeilings:
    """In 10^9 bytes per second. stream_gbs: one GPU's memory, the better of a copy (bytes read and written) and a
    read-only sum. peer_copy_gbs: one way to another GPU, by the copy engine; None if there is one GPU or none."""

    stream_gbs: float
    peer_copy_gbs: float | None


def measure(setting: Setting, device: torch.device) -> EpCeilings:
    """On one rank, while the others wait at a barrier."""
    sizes = GPU_SIZES if device.type == "cuda" else CPU_SIZES
    source = torch.ones(sizes.stream_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy_us, read_us = (_median_us(call, device, sizes.repeats) for call in (lambda: target.copy_(source), source.sum))
    peer = None if setting.shared else _peer_copy_gbs(device)
    return EpCeilings(sizes.stream_bytes / min(copy_us / 2, read_us) / 1e3, peer)


def _median_us(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    lane = make_lane(call, device)
    lane.run(10)  # the clocks are low after ranks have waited for each other
    return statistics.median(lane.run(2) for _ in range(repeats))


def _peer_copy_gbs(device: torch.device) -> float:
    """To the next GPU. torch copies between GPUs with cudaMemcpy, on the source's stream."""
    source = torch.ones(PEER_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source, device=torch.device("cuda", (device.index + 1) % torch.cuda.device_count()))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    target.copy_(source)
    start.record()
    for _ in range(PEER_REPEATS):
        target.copy_(source, non_blocking=True)
    end.record()
    torch.cuda.synchronize()
    return PEER_REPEATS * PEER_BYTES / start.elapsed_time(end) / 1e6


def nccl_jobs(setting: Setting, inputs: Inputs, rank: int, nccl: ProcessGroup) -> list[Job]:
    """Every token to all ranks and the sum of all ranks' rows back: what a layer without dispatch and combine does."""
    x, ranks = inputs.x, setting.ranks
    gathered = x.new_empty((ranks * len(x), x.shape[1]))
    total = torch.empty_like(x)
    everything = torch.cat([make_inputs(setting, source, x.device).x for source in range(ranks)])
    one, own = x.nbytes, slice(rank * len(x), (rank + 1) * len(x))

    def all_gather() -> Tensors:
        dist.all_gather_into_tensor(gathered, x, group=nccl)
        return (gathered,)

    def reduce_scatter() -> Tensors:
        dist.reduce_scatter_tensor(total, everything, group=nccl)
        return (total,)

    def job(name: str, call: Callable[[], Tensors], want: torch.Tensor, memory: int, exact: bool) -> Job:
        moved = Moved(logical=ranks * one, memory=memory, written=0, read=0, remote=(ranks - 1) * one)
        return Job(name, None, "eager", call, {"rows": want}, moved=moved, exact=exact)

    total_of_equals = (everything[own].float() * ranks).bfloat16()
    return [
        job("nccl-all-gather", all_gather, everything, 2 * ranks * one, exact=True),
        job("nccl-reduce-scatter", reduce_scatter, total_of_equals, (ranks + 1) * one, exact=False),
    ]
