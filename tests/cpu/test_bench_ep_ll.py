"""Low-latency rows of tools.bench.ep: what they expect is what the buffer delivers, and the bytes that they count."""

from __future__ import annotations

import pytest
import torch

from cutehop.comm.ll_gloo import GlooLowLatencyBuffer
from tools.bench.ep_ll_jobs import TOKENS, LlWork, config, row_name
from tools.bench.ep_setting import Setting, make_inputs

SETTING = Setting(ranks=2, gpus=0, hidden=256, topk=2, experts=8, sms=(0,))


def check_rows(group, rank):
    """Every row's result is right, and a wrong one is seen."""
    buffer = GlooLowLatencyBuffer(group, config(SETTING))
    jobs = LlWork(SETTING, buffer).jobs()
    found = [job.problem(job.call()) for job in jobs]
    spoilt = [tuple(each + 1 if each.dtype != torch.float8_e4m3fn else each for each in job.call()) for job in jobs]
    found += [None if job.problem(got) else f"{job.name}: not seen" for job, got in zip(jobs, spoilt)]
    buffer.destroy()
    return [job.name for job in jobs], found


@pytest.mark.dist
def test_rows_are_checked(cpu_ranks):
    names = [f"ll-{what}-t{tokens}" for tokens in TOKENS for what in ("dispatch", "pair")]
    assert cpu_ranks(2).run(check_rows) == [(names, [None] * 2 * len(names))] * 2


def test_a_row_names_another_transport():
    assert [row_name("pair", 8, transport) for transport in ("p2p", "nvshmem")] == ["ll-pair-t8", "ll-pair-t8-nvshmem"]


def moved_by_hand(setting: Setting, rank: int) -> tuple[int, int]:
    """(bytes through memory, bytes to other ranks), one token and choice after the other."""
    i = make_inputs(setting, rank, torch.device("cpu"))
    record, row = 16 + setting.hidden + setting.hidden // 128 * 4, 2 * setting.hidden
    memory = remote = 0
    for choices in i.topk_idx.tolist():
        ranks = {expert // (setting.experts // setting.ranks) for expert in choices}
        memory += 2 * row + len(ranks) * 2 * record + len(choices) * (record + 3 * row)
        remote += len(ranks - {rank}) * record
        remote += sum(expert // (setting.experts // setting.ranks) != rank for expert in choices) * row
    return memory, remote


def test_bytes(cpu_ranks):
    assert cpu_ranks(2).run(moved_in_jobs) == [
        [moved_by_hand(Setting(2, 0, tokens, 256, 2, 8), rank) for tokens in TOKENS] for rank in range(2)
    ]


def moved_in_jobs(group, rank):
    buffer = GlooLowLatencyBuffer(group, config(SETTING))
    moved = [job.moved for job in LlWork(SETTING, buffer).jobs() if job.moved]
    buffer.destroy()
    return [(each.memory, each.remote) for each in moved]
