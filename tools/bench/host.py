"""Host cost of `mla_decode`: per warm call, per part of it, and of the first call of a new process.

python -m tools.bench.host            the table
python -m tools.bench.host --json F   the same as JSON too
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tools.bench.rows import HEAD_DIM_V, ROWS, SOFTMAX_SCALE, Inputs, make_inputs

CALLS = 100  # per sample at most: few enough that the GPU's launch queue never fills and blocks the host
SAMPLE_S = 5e-3  # per sample at most, for a CPU, where the call is the whole work
SAMPLES = 30

# Imports and inputs stay outside the time: a server has both before its first call.
FIRST_CALL = """
import json, sys, time
import torch, cutehop
from tools.bench.rows import ROWS, SOFTMAX_SCALE, make_inputs
device = torch.device(sys.argv[1])
x = make_inputs(ROWS[0], device)
sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
sync()
start = time.perf_counter()
meta, num_splits = torch.ops.cutehop.mla_plan(x.cache_seqlens, x.q.shape[1], x.q.shape[2], 1)
planned = time.perf_counter()
torch.ops.cutehop.mla_decode(
    x.q, x.k_cache, x.block_table, x.cache_seqlens, meta, num_splits, softmax_scale=SOFTMAX_SCALE, causal=False
)
launched = time.perf_counter()
sync()
done = time.perf_counter()
print(json.dumps({
    "plan_s": planned - start, "decode_s": launched - planned, "first_result_s": done - start,
    "compiler_imported": "cutlass" in sys.modules,
}))
"""


def per_call_us(call: Callable[[], Any], device: torch.device) -> float:
    """Median host time of one call, us; the device works in the background and is waited for between samples."""

    def sample(calls: int) -> float:
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    sample(1)
    calls = min(CALLS, max(1, round(SAMPLE_S / sample(3))))
    median = statistics.median(sample(calls) for _ in range(SAMPLES))
    _synchronize(device)
    return median * 1e6


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def parts(inputs: Inputs) -> dict[str, float]:
    """Host time (us) of whole ops and of what they are made of, on the inputs' device."""
    import cutehop

    x, ops, device = inputs, torch.ops.cutehop, inputs.q.device
    shape = (x.q.shape[1], x.q.shape[2], 1)
    meta, num_splits = ops.mla_plan(x.cache_seqlens, *shape)
    args = (x.q, x.k_cache, x.block_table, x.cache_seqlens, meta, num_splits)
    options: dict[str, Any] = {"softmax_scale": SOFTMAX_SCALE, "causal": x.causal}
    out, lse = ops.mla_decode(*args, **options)

    def outputs() -> None:
        x.q.new_empty((*x.q.shape[:-1], HEAD_DIM_V))
        torch.empty(lse.shape, dtype=torch.float32, device=device)

    def friendly() -> None:
        cutehop.flash_mla_with_kvcache(*args[:4], HEAD_DIM_V, *args[4:], SOFTMAX_SCALE, x.causal)

    calls: dict[str, Callable[[], Any]] = {
        "mla_plan": lambda: ops.mla_plan(x.cache_seqlens, *shape),
        "flash_mla_with_kvcache": friendly,
        "mla_decode": lambda: ops.mla_decode(*args, **options),
        "mla_decode_out (allocates nothing)": lambda: ops.mla_decode_out(*args, **options, out=out, lse=lse),
        "torch.empty of out and lse": outputs,
    }
    times = {name: per_call_us(call, device) for name, call in calls.items()}
    return times | (_launches(calls["mla_decode"]) if device.type == "cuda" else {})


def _launches(call: Callable[[], Any]) -> dict[str, float]:
    """What the kernel launches of one call cost, and how many there are, from a clock around Kernel.launch."""
    from cutehop.cute_kernels.jit import Kernel

    spent: list[float] = []
    original = Kernel.launch

    def timed(self: Any, *args: Any) -> None:
        start = time.perf_counter()
        original(self, *args)
        spent.append(time.perf_counter() - start)

    with mock.patch.object(Kernel, "launch", timed):
        for _ in range(CALLS):
            call()
    torch.cuda.synchronize()
    count = len(spent) // CALLS
    each = statistics.median(spent) * 1e6
    return {f"of which {count} kernel launches": count * each}


def first_call(device: torch.device, repeats: int = 3) -> dict[str, Any]:
    """The median of `repeats` new processes' first calls, seconds. RuntimeError with its output if a process fails."""
    runs = []
    for _ in range(repeats):
        command = [sys.executable, "-c", FIRST_CALL, str(device)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        if done.returncode:
            raise RuntimeError(f"the new process failed with status {done.returncode}:\n{done.stderr}")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return sorted(runs, key=lambda run: run["first_result_s"])[repeats // 2]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.host", description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there too")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    row = ROWS[0]
    report: dict[str, Any] = {
        "device": str(device),
        "row": row.name,
        "us": parts(make_inputs(row, device)),
        "first": first_call(device),
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    for name, value in report["us"].items():
        print(f"{name:<36}{value:9.1f} us")
    for name, value in report["first"].items():
        print(f"{'first call: ' + name:<36}{value if isinstance(value, bool) else round(value, 4)!s:>9}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
