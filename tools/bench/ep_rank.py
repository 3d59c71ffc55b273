"""One rank of `python -m tools.bench.ep`: makes the buffer, checks every row, then times it. Rank 0 writes the JSON."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.distributed as dist

from cutehop.comm.base import Buffer
from cutehop.comm.layout import EpLayout
from cutehop.comm.ll_base import LowLatencyBuffer
from cutehop.comm.ll_config import GROUP
from tools.bench import ep_ceilings
from tools.bench import ep_report as reports
from tools.bench import report as common
from tools.bench.ep import parse
from tools.bench.ep_jobs import Job, Work
from tools.bench.ep_ll_jobs import TOKENS, LlWork, row_name
from tools.bench.ep_ll_jobs import config as ll_config
from tools.bench.ep_setting import Setting, expect, make_inputs
from tools.bench.ep_timing import Team, make_lane, poison, samples

TIMEOUT_S = 60.0  # a rank that waits longer gives up, and with it the run


class Bench:
    """The run of one rank. All ranks make the same calls; each of them has the report.

    path: where rank 0 writes it, after every row, so that an interrupted run keeps its rows.
    rows: a regular expression; only rows whose names match are run.
    """

    def __init__(
        self,
        setting: Setting,
        group: dist.ProcessGroup,
        device: torch.device,
        command: str,
        path: Path,
        rows: str = "",
        transports: Sequence[str] = ("p2p",),
    ) -> None:
        self.setting, self.device, self.team = setting, device, Team(group)
        self._path, self._rows, self._transports = path, rows, transports
        self._say("making the buffer and measuring the ceilings")
        self.buffer, memory = self._make_buffer()
        measured = ep_ceilings.measure(setting, device) if self.team.rank == 0 else None
        self.ceilings = self.team.gather(measured)[0]
        self.work = self._make_work()
        received, remote = zip(*self.team.gather((self.work.received, self.work.expected.remote)))
        traffic = {"received_rows": list(received), "remote_rows": list(remote)}
        header = _header(command, device)
        self.report = reports.new_report(setting, self.ceilings, memory, traffic, header)

    def run(self) -> reports.Report:
        """All rows."""
        self._run(self.work.jobs())
        for transport in self._transports:
            wanted = any(re.search(self._rows, row_name("pair", tokens, transport)) for tokens in TOKENS)
            if self.setting.hidden % GROUP == 0 and wanted:
                buffer = self._make_ll_buffer(transport)
                self._run(LlWork(self.setting, buffer, transport).jobs())
                buffer.destroy()
        if not self.setting.shared:  # last: NCCL's watchdog thread and graph captures do not go well together
            nccl = dist.new_group(backend="nccl")
            self._run(ep_ceilings.nccl_jobs(self.setting, self.work.inputs, self.team.rank, nccl))
        self.buffer.destroy()
        return self.report

    def _run(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if not re.search(self._rows, job.name):
                continue
            row = self._row(job)
            self.report["rows"].append(row)
            self._say(f"{job.name} {row['sms'] or ''}: {row['failed'] or format(row['median_us'], '.1f') + ' us'}")
            if self.team.rank == 0:
                reports.write(self.report, self._path)

    def _row(self, job: Job) -> reports.Report:
        """A row that is wrong on one rank is timed on none."""
        job.prepare()
        lane = make_lane(job.how, job.call, job.calls, self.device)
        poison(lane.once())
        problems = self.team.gather(job.problem(lane.once()))
        if any(problems):
            return reports.failed_row(job, problems)
        times = samples(lane, job.calls, self.team, self.setting.repeats)
        moved = self.team.gather(job.moved)
        return reports.row_record(job, times, moved, self.setting, self.ceilings, self.report["rows"])

    def _make_buffer(self) -> tuple[Buffer, reports.Report]:
        """The buffer, how long the slowest rank took to make it, and the memory that it took."""
        setting, group = self.setting, self.team.group
        free = self._free_bytes()
        start = time.perf_counter()
        buffer: Buffer
        if self.device.type == "cuda":
            from cutehop.comm.buffer import CudaBuffer

            buffer = CudaBuffer(group, setting.config, num_sms=max(setting.sms), timeout_s=TIMEOUT_S)
        else:
            from cutehop.comm.gloo import GlooBuffer

            buffer = GlooBuffer(group, setting.config, timeout_s=TIMEOUT_S)
        creation_s = max(self.team.gather(time.perf_counter() - start))
        taken = free - self._free_bytes()
        return buffer, {
            "creation_s": creation_s,
            "heap_bytes": EpLayout(setting.config).heap_bytes,
            "device_bytes_per_rank": taken // (setting.ranks if setting.shared else 1) if setting.gpus else None,
        }

    def _make_ll_buffer(self, transport: str) -> LowLatencyBuffer:
        config, group = ll_config(self.setting), self.team.group
        if self.device.type == "cuda":
            from cutehop.comm.ll_buffer import CudaLowLatencyBuffer

            return CudaLowLatencyBuffer(group, config, transport=transport, timeout_s=TIMEOUT_S)
        from cutehop.comm.ll_gloo import GlooLowLatencyBuffer

        return GlooLowLatencyBuffer(group, config, timeout_s=TIMEOUT_S)

    def _free_bytes(self) -> int:
        """Of the GPU, while no rank allocates; 0 without one."""
        self.team.barrier()
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0
        self.team.barrier()
        return free

    def _make_work(self) -> Work:
        rank = self.team.rank
        inputs, expected = make_inputs(self.setting, rank, self.device), expect(self.setting, rank, self.device)
        topk = (inputs.topk_idx, inputs.topk_weights)
        handle = self.buffer.dispatch(inputs.x, None, *topk, inputs.in_rank, inputs.per_expert).handle
        return Work(self.setting, self.buffer, inputs, expected, handle)

    def _say(self, line: str) -> None:
        if self.team.rank == 0:
            print(line, file=sys.stderr, flush=True)


def _header(command: str, device: torch.device) -> reports.Report:
    """When, where, what, how."""
    status = common.git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_commit": common.git("rev-parse", "HEAD"),
        "git_modified": None if status is None else bool(status),
        "command": command,
        "machine": common.machine_of(device),
    }


def main(argv: Sequence[str]) -> None:
    """argv: the file for the JSON, then the arguments of tools.bench.ep."""
    path, *arguments = argv
    options = parse(arguments)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # the context is not part of the buffer's creation
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    setting = options.setting(group.size(), min(group.size(), torch.cuda.device_count()))
    if device.type == "cuda":
        setting.check_sms(torch.cuda.get_device_properties(device).multi_processor_count)
    command = f"python -m tools.bench.ep {' '.join(arguments)}".strip()
    Bench(setting, group, device, command, Path(path), options.rows, options.transports).run()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
