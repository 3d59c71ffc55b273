"""One rank of the demo's generation: `python -m cutehop.launch --ranks N --one-gpu -m tools.demo.ranks FOLDER`.

Sequences are split among the ranks, as attention is not; every rank holds its share of the experts.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cutehop import launch
from tools.demo.generate import PREFILL_CHUNK, Generation, generate_paged
from tools.demo.model import build_model, make_buffers

REQUEST = "request.pt"


@dataclass(frozen=True)
class Request:
    """prompts: (b, tokens) on the CPU, b a multiple of the ranks. count: tokens to generate. device: "cpu" | "cuda"."""

    prompts: Tensor
    count: int
    device: str


def generate_on_ranks(request: Request, ranks: int, folder: Path) -> Generation | None:
    """What the ranks generated, in the order of the prompts, times of the slowest rank; None if one failed."""
    torch.save(asdict(request), folder / REQUEST)
    if launch.main(["--ranks", str(ranks), "--one-gpu", "--module", "tools.demo.ranks", str(folder)]):
        return None
    parts = [Generation(**torch.load(folder / f"{rank}.pt", map_location=request.device)) for rank in range(ranks)]
    return Generation(
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.logits for part in parts]),
        torch.cat([part.routes for part in parts], dim=1),
        None,
        max(part.prefill_ms for part in parts),
        max(part.step_ms for part in parts),
    )


def main(folder: Path) -> None:
    """Generate this rank's share and write it down."""
    request = Request(**torch.load(folder / REQUEST))
    device = torch.device("cpu")
    if request.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    prompts = request.prompts.chunk(dist.get_world_size())[rank].to(device)
    model = build_model(device)
    buffers = make_buffers(group, device, len(prompts) * PREFILL_CHUNK, len(prompts))
    generate_paged(model, prompts, 4, buffers)  # loads kernels and meets the peers, which is not what is timed
    got = generate_paged(model, prompts, request.count, buffers)
    torch.save(asdict(got), folder / f"{rank}.pt")
    dist.barrier()
    buffers.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
