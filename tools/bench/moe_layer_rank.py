"""One rank of `python -m tools.bench.moe_layer --ranks N`: FILE REPEATS REGEX. Rank 0 writes the JSON.

Rows of few tokens go through the low-latency buffer, as in decode, the others through the normal one. Every stage is
timed by itself, on what the one before it returned; ranks that share a GPU do it at the same time.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cutehop.comm.config import EpConfig
from cutehop.comm.ll_config import LlConfig
from tools.bench.ep_timing import Team, make_lane, samples
from tools.bench.moe_layer import OURS, Report, chosen, new_report, record, write
from tools.bench.moe_layer_setting import TOLERANCE, Setting, expected

FEW_TOKENS = 128
SHARED_SMS = 8  # of a rank, for rows on the way: eight ranks leave half of an H100 to the GEMMs
SLACK = 1.25  # rows of a normal call above the mean, which random routing does not reach
TIMEOUT_S = 60.0
Tensors = tuple[Tensor | None, ...]
_ops = torch.ops.cutehop


class RankBench:
    """One setting on this rank: the layer, its buffer, its calls."""

    def __init__(self, setting: Setting, team: Team, device: torch.device) -> None:
        self.setting, self.team, self.device = setting, team, device
        self.few = setting.tokens <= FEW_TOKENS
        self.buffer = self._make_low_latency() if self.few else self._make_normal()
        options: dict[str, Any] = {"low_latency_buffer" if self.few else "buffer": self.buffer}
        if not self.few:
            options["max_pairs"] = self._rows(setting.tokens * setting.topk)
        self.x = setting.make_tokens(team.rank, device)
        self.layer = setting.make_layer(device, **options)
        self.want = expected(setting, self.layer, self.x)
        if setting.fp8:
            self.layer.quantize_weights()

    def _rows(self, mean: int) -> int:
        return int(SLACK * mean) if mean > 1024 else mean * self.team.ranks

    def _make_normal(self) -> Any:
        s, ranks = self.setting, self.team.ranks
        # A token chooses topk of the experts, a rank has one in `ranks` of them: the chance that it has none of those.
        none = 1.0
        for i in range(s.topk):
            none *= (s.experts - s.experts // ranks - i) / (s.experts - i)
        rows = min(ranks * s.tokens, self._rows(int(ranks * s.tokens * (1 - none))))
        config = EpConfig(ranks, s.hidden, s.tokens, s.experts, s.topk, scales="f32", max_recv_tokens=rows)
        if self.device.type == "cuda":
            from cutehop.comm.buffer import CudaBuffer
            from cutehop.comm.memory import DEFAULT_NUM_SMS

            sms = SHARED_SMS if ranks > torch.cuda.device_count() else DEFAULT_NUM_SMS
            return CudaBuffer(self.team.group, config, num_sms=sms, timeout_s=TIMEOUT_S)
        from cutehop.comm.gloo import GlooBuffer

        return GlooBuffer(self.team.group, config, timeout_s=TIMEOUT_S)

    def _make_low_latency(self) -> Any:
        s = self.setting
        config = LlConfig(self.team.ranks, s.hidden, s.tokens, s.experts, s.topk)
        if self.device.type == "cuda":
            from cutehop.comm.ll_buffer import CudaLowLatencyBuffer

            return CudaLowLatencyBuffer(self.team.group, config, timeout_s=TIMEOUT_S)
        from cutehop.comm.ll_gloo import GlooLowLatencyBuffer

        return GlooLowLatencyBuffer(self.team.group, config, timeout_s=TIMEOUT_S)

    def calls(self) -> dict[str, Callable[[], Tensors]]:
        """The whole layer, then its stages."""
        layer, x = self.layer, self.x
        idx, weights = layer.gate(x)
        stages = self._low_latency(idx, weights) if self.few else self._normal(idx, weights)
        rows = (x, None) if self.few else layer._as_rows(x)  # the cast of a normal call is part of its dispatch
        return {
            OURS: lambda: (layer(x, low_latency=self.few),),
            "route": lambda: layer.gate(x),
            **stages,
            "shared": lambda: (layer._shared(x, *rows),),
        }

    def _normal(self, idx: Tensor, weights: Tensor) -> dict[str, Callable[[], Tensors]]:
        layer, x, name, fp8 = self.layer, self.x, self.buffer.name, self.setting.fp8
        in_rank = _ops.ep_layout(idx, self.setting.experts, self.team.ranks)[2]

        def dispatch() -> tuple[Tensor, ...]:
            _, per_expert, in_rank = _ops.ep_layout(idx, self.setting.experts, self.team.ranks)
            rows, scales = layer._as_rows(x)
            worst = layer.num_worst_tokens
            return _ops.ep_dispatch(rows, scales, idx, weights, in_rank, per_expert, name, worst)

        got = dispatch()
        recv_x, recv_scales, recv_idx, recv_weights, _, *handle = got
        mean = layer._expected_rows(idx)
        y = layer._local(recv_x, recv_scales if fp8 else None, recv_idx, recv_weights, mean)
        return {
            "dispatch": dispatch,
            "experts": lambda: (layer._local(recv_x, recv_scales if fp8 else None, recv_idx, recv_weights, mean),),
            "combine": lambda: _ops.ep_combine(y, None, x, None, *handle[:2], in_rank, handle[2], name),
        }

    def _low_latency(self, idx: Tensor, weights: Tensor) -> dict[str, Callable[[], Tensors]]:
        layer, x, name, fp8 = self.layer, self.x, self.buffer.name, self.setting.fp8
        mean = layer._expected_rows(idx)

        def dispatch() -> tuple[Tensor, ...]:
            return _ops.ep_ll_dispatch(x, idx, name, fp8)

        rows, scales, counts, src_info, layout_range, *places = dispatch()

        def experts() -> Tensors:
            return (layer.experts(rows, scales if fp8 else None, counts, mean),)

        (y,) = experts()

        def combine() -> Tensors:
            return (_ops.ep_ll_combine(y, src_info, layout_range, counts, *places, idx, weights, name),)

        return {"dispatch": dispatch, "experts": experts, "combine": combine}

    def run(self, repeats: int) -> Report:
        """The row; a layer that is wrong on one rank is timed on none."""
        calls = self.calls()
        lane = make_lane("graph", calls[OURS], 1, self.device)
        (out,) = lane.once()
        assert out is not None
        error = max(self.team.gather(((out.float() - self.want).norm() / self.want.norm()).item()))
        if not error <= TOLERANCE[self.setting.fp8]:
            return record(self.setting, {}, {}, {}, {OURS: f"wrong result: off by {error:.2e} (relative)"})
        times = {}
        for name, call in calls.items():
            lane = make_lane("graph", call, 1, self.device)
            lane.once()
            by_rank = samples(lane, 1, self.team, repeats)
            times[name] = max(statistics.median(own) for own in by_rank)  # of the slowest rank
        return record(self.setting, {OURS: times.pop(OURS)}, times, {OURS: error}, {})


@torch.inference_mode()
def main(argv: Sequence[str]) -> None:
    path, repeats, pattern = Path(argv[0]), int(argv[1]), argv[2] if len(argv) > 2 else ""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    team = Team(group)
    report = new_report(device, repeats, team.ranks)
    for setting in chosen(pattern):
        bench = RankBench(setting, team, device)
        report["rows"].append(bench.run(repeats))
        team.barrier()
        bench.buffer.destroy()
        del bench
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if team.rank == 0:
            print(f"{setting.name}: {report['rows'][-1]['median_us']}", file=sys.stderr, flush=True)
            write(report, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
