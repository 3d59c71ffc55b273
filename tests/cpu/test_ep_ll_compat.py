"""What the low-latency methods of `cutehop.compat.deep_ep` refuse before anything moves."""

from __future__ import annotations

import pytest
import torch

from cutehop.compat.deep_ep import Buffer

X, IDX, WEIGHTS = torch.zeros(2, 128).bfloat16(), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
HANDLE = (torch.zeros(1, 16, dtype=torch.int32), torch.zeros(1, 8, dtype=torch.int64), 2, 128, 8, None, None, None)
DISPATCH, COMBINE = (X, IDX, 2, 8), (X, IDX, WEIGHTS, HANDLE)


class Group:
    def size(self) -> int:
        return 8

    def rank(self) -> int:
        return 3


def buffer(**options: object) -> Buffer:
    return Buffer(Group(), **{"device": "cpu", "low_latency_mode": True, "explicitly_destroy": True, **options})


@pytest.mark.parametrize(
    ("method", "arguments", "options", "message"),
    [
        ("low_latency_dispatch", DISPATCH, {"use_ue8m0": True}, "use_ue8m0 without round_scale"),
        ("low_latency_combine", COMBINE, {"zero_copy": True, "use_logfmt": True}, "zero_copy with use_logfmt"),
        ("low_latency_update_mask_buffer", (1, True), {}, "shrink mode is off"),
        ("low_latency_query_mask_buffer", (torch.zeros(8),), {}, "shrink mode is off"),
        ("low_latency_clean_mask_buffer", (), {}, "shrink mode is off"),
    ],
)
def test_what_v1_refuses(method, arguments, options, message):
    with pytest.raises(RuntimeError, match=f"{method}: {message}"):
        getattr(buffer(), method)(*arguments, **options)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("clean_low_latency_buffer", (2, 128, 8)),
        ("low_latency_dispatch", DISPATCH),
        ("low_latency_combine", COMBINE),
        ("get_next_low_latency_combine_buffer", (HANDLE,)),
        ("low_latency_clean_mask_buffer", ()),
    ],
)
def test_the_mode_must_be_on_and_the_buffer_alive(method, arguments):
    with pytest.raises(RuntimeError, match=f"{method}: low_latency_mode is off"):
        getattr(buffer(low_latency_mode=False, enable_shrink=True), method)(*arguments)
    ended = buffer(enable_shrink=True)
    ended.destroy()
    with pytest.raises(RuntimeError, match="was destroyed"):
        getattr(ended, method)(*arguments)


def test_first_call_inside_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before the capture begins call low_latency_dispatch"):
        buffer(device="cuda:0").low_latency_dispatch(*DISPATCH)


def test_a_tensor_for_the_next_combine():
    rows = buffer().get_next_low_latency_combine_buffer(HANDLE)
    assert (rows.shape, rows.dtype, rows.is_contiguous()) == ((1, 16, 128), torch.bfloat16, True)


def test_cleaning_does_nothing():
    made = buffer()
    made.clean_low_latency_buffer(2, 128, 8)
    assert made._ll_runtime is None
