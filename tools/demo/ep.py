"""Expert parallelism in one file: route tokens to experts on other ranks, apply the experts, bring the results home.

python -m cutehop.launch --ranks 8 --one-gpu tools/demo/ep.py     eight ranks: on one GPU, or on the CPU without one
python -m cutehop.launch tools/demo/ep.py                         one rank per GPU

Expert e multiplies a token by a number of its own, so that what comes back is known: the token times the weighted mean
of its experts' numbers. Exit code 0 if it is that on all ranks.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

import cutehop  # noqa: F401  (registers torch.ops.cutehop)
from cutehop.comm.base import Buffer, Dispatched
from cutehop.comm.config import EpConfig

EXPERTS_PER_RANK = 8
TOLERANCE = 2**-7 * 1.01  # relative: rounded to bf16 on each rank and once more as a sum, each time by up to 2^-8


def make_buffer(config: EpConfig, device: torch.device) -> Buffer:
    """A buffer of all ranks. Collective."""
    group = dist.group.WORLD
    assert group is not None
    if device.type == "cuda":
        from cutehop.comm.buffer import CudaBuffer

        return CudaBuffer(group, config)
    from cutehop.comm.gloo import GlooBuffer

    return GlooBuffer(group, config)


def apply_experts(got: Dispatched, factors: Tensor) -> Tensor:
    """What this rank's experts make of each received token: the weighted sum over those that it chose.

    factors: (experts of this rank,), what each of them multiplies by.
    """
    assert got.recv_topk_idx is not None
    assert got.recv_topk_weights is not None
    chosen = factors[got.recv_topk_idx.clamp(min=0)]  # -1 is an expert elsewhere, and its weight here is 0
    return (got.recv_x.float() * (chosen * got.recv_topk_weights).sum(1, keepdim=True)).bfloat16()


def moe_layer(x: Tensor, topk_idx: Tensor, topk_weights: Tensor, factors: Tensor, buffer: Buffer) -> Tensor:
    """All experts of all ranks applied to this rank's tokens. Collective."""
    num_experts = buffer.config.num_experts
    _, per_expert, in_rank = torch.ops.cutehop.ep_layout(topk_idx, num_experts, buffer.ranks)
    got = buffer.dispatch(x, None, topk_idx, topk_weights, in_rank, per_expert)
    y = apply_experts(got, factors)
    out, _ = buffer.combine(y, got.handle)
    return out


def run(config: EpConfig, device: torch.device) -> tuple[int, float]:
    """Tokens that this rank sent to other ranks, and the largest relative error of what came back."""
    buffer = make_buffer(config, device)
    torch.manual_seed(buffer.rank)
    n, k, experts = config.max_tokens, config.max_topk, config.num_experts
    x = torch.randn(n, config.hidden, dtype=torch.bfloat16, device=device)
    weights, topk_idx = torch.rand(n, experts, device=device).softmax(1).topk(k)
    topk_weights = weights / weights.sum(1, keepdim=True)

    factors = torch.linspace(0.5, 2, experts, device=device)
    own = factors[buffer.rank * config.experts_per_rank :][: config.experts_per_rank]
    out = moe_layer(x, topk_idx, topk_weights, own, buffer)

    want = x.float() * (factors[topk_idx] * topk_weights).sum(1, keepdim=True)
    error = ((out.float() - want).abs() / want.abs().clamp(min=1e-30)).max().item()
    elsewhere = int((topk_idx // config.experts_per_rank != buffer.rank).any(1).sum())
    buffer.destroy()
    return elsewhere, error


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="of every rank (default %(default)s)")
    parser.add_argument("--hidden", type=int, default=2048, help="columns, a multiple of 8 (default %(default)s)")
    parser.add_argument("--topk", type=int, default=4, help="experts per token (default %(default)s)")
    options = parser.parse_args(argv)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group("gloo")  # the buffer meets through its store; rows travel through the buffer's own memory
    ranks = dist.get_world_size()
    config = EpConfig(ranks, options.hidden, options.tokens, ranks * EXPERTS_PER_RANK, options.topk)
    result = run(config, device)
    results: list[tuple[int, float]] = [result] * ranks
    dist.all_gather_object(results, result)
    right = all(error <= TOLERANCE for _, error in results)
    if dist.get_rank() == 0:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU over gloo"
        print(f"{ranks} ranks on {where}, {options.tokens} tokens each, {ranks * EXPERTS_PER_RANK} experts")
        for rank, (elsewhere, error) in enumerate(results):
            print(f"rank {rank}: {elsewhere} tokens have experts on other ranks, relative error {error:.1e}")
        print(f"every token came home {'right' if right else f'WRONG (limit {TOLERANCE:.1e})'}")
    dist.destroy_process_group()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
