"""`cutehop.compat.deep_ep` without peers: V1's signatures, Config, size hints, events, what it refuses, capacities."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

from cutehop.comm.config import EpConfig
from cutehop.comm.layout import EpLayout
from cutehop.compat import _deep_ep_events as events
from cutehop.compat import deep_ep
from cutehop.compat._deep_ep_capacity import Asked, Sizes, _config, check_fits, tokens_that_fit
from cutehop.compat.deep_ep import Buffer, Config, EventHandle, EventOverlap

NOTHING = inspect.Parameter.empty
STREAMS = {"previous_event": None, "async_finish": False, "allocate_on_comm_stream": False}
DISPATCH = {
    "x": NOTHING, "handle": None, "num_tokens_per_rank": None, "num_tokens_per_rdma_rank": None,
    "is_token_in_rank": None, "num_tokens_per_expert": None, "topk_idx": None, "topk_weights": None,
    "expert_alignment": 1, "num_worst_tokens": 0, "config": None, **STREAMS,
}  # fmt: skip
COMBINE = {"x": NOTHING, "handle": NOTHING, "topk_weights": None, "bias": None, "config": None, **STREAMS}
LOW_LATENCY_SIZE = {"num_max_dispatch_tokens_per_rank": NOTHING, "hidden": NOTHING}

# Names, order and defaults of DeepEP V1.
SIGNATURES = {
    "__init__": {
        "group": NOTHING, "num_nvl_bytes": 0, "num_rdma_bytes": 0, "low_latency_mode": False, "num_qps_per_rank": 24,
        "allow_nvlink_for_low_latency_mode": True, "allow_mnnvl": False, "use_fabric": False,
        "explicitly_destroy": False, "enable_shrink": False, "comm": None,
    },
    "destroy": {},
    "is_sm90_compiled": {},
    "set_num_sms": {"new_num_sms": NOTHING},
    "capture": {},
    "get_low_latency_rdma_size_hint": {**LOW_LATENCY_SIZE, "num_ranks": NOTHING, "num_experts": NOTHING},
    "get_comm_stream": {},
    "get_local_buffer_tensor": {"dtype": NOTHING, "size": None, "offset": 0, "use_rdma_buffer": False},
    "get_dispatch_config": {"num_ranks": NOTHING},
    "get_combine_config": {"num_ranks": NOTHING},
    "get_dispatch_layout": {"topk_idx": NOTHING, "num_experts": NOTHING, **STREAMS},
    "dispatch": DISPATCH,
    "combine": COMBINE,
    "internode_dispatch": DISPATCH,
    "internode_combine": COMBINE,
    "clean_low_latency_buffer": {**LOW_LATENCY_SIZE, "num_experts": NOTHING},
    "low_latency_dispatch": {
        "x": NOTHING, "topk_idx": NOTHING, "num_max_dispatch_tokens_per_rank": NOTHING, "num_experts": NOTHING,
        "cumulative_local_expert_recv_stats": None, "dispatch_wait_recv_cost_stats": None, "use_fp8": True,
        "round_scale": False, "use_ue8m0": False, "async_finish": False, "return_recv_hook": False,
    },
    "low_latency_combine": {
        "x": NOTHING, "topk_idx": NOTHING, "topk_weights": NOTHING, "handle": NOTHING, "use_logfmt": False,
        "zero_copy": False, "async_finish": False, "return_recv_hook": False, "out": None,
        "combine_wait_recv_cost_stats": None,
    },
    "low_latency_update_mask_buffer": {"rank_to_mask": NOTHING, "mask": False},
    "low_latency_query_mask_buffer": {"mask_status": NOTHING},
    "low_latency_clean_mask_buffer": {},
    "get_next_low_latency_combine_buffer": {"handle": NOTHING},
}  # fmt: skip
STATIC = {"is_sm90_compiled", "set_num_sms", "capture", "get_low_latency_rdma_size_hint", "get_dispatch_config"} | {
    "get_combine_config"
}
REFUSED = [name for name in SIGNATURES if "internode" in name]


class Group:
    """As much of a ProcessGroup as a Buffer needs before its first call."""

    def __init__(self, size: int = 8, rank: int = 0) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_v1s(name):
    assert isinstance(inspect.getattr_static(Buffer, name), staticmethod) == (name in STATIC)
    parameters = [p for p in inspect.signature(getattr(Buffer, name)).parameters.values() if p.name != "self"]
    of_v1 = [p for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert {p.name: p.default for p in of_v1} == SIGNATURES[name]
    assert [p.name for p in of_v1] == list(SIGNATURES[name])
    assert all(p.default is not NOTHING for p in parameters[len(of_v1) :])  # what V1 does not have, nobody must give


def test_a_module_that_replaces_deep_ep(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "deep_ep", deep_ep)
    monkeypatch.setitem(__import__("sys").modules, "deep_ep.utils", deep_ep)
    scope: dict = {}
    exec("from deep_ep import Buffer, Config, EventOverlap, topk_idx_t", scope)
    exec("from deep_ep.utils import EventHandle, EventOverlap", scope)
    assert scope["Buffer"] is Buffer
    assert scope["topk_idx_t"] is torch.int64


def test_config_checks_and_rounding():
    assert Config() == Config(20, 6, 256, 6, 256 + 2)  # the RDMA queue is a multiple of its chunk
    assert Config(num_sms=24, num_max_rdma_chunked_send_tokens=16, num_max_rdma_chunked_recv_tokens=128) == Config(
        24, 6, 256, 16, 128
    )
    for bad in ((-2,), (20, 0), (20, 256, 256), (20, 6, 256, 0), (20, 6, 256, 64, 127)):
        with pytest.raises(RuntimeError, match=r"^Config: .*; pass"):
            Config(*bad)


@pytest.mark.parametrize(
    ("ranks", "num_sms", "queue"), [(8, 20, 256), (2, 24, 512), (4, 7, 256), (16, 20, 288), (64, 24, 288)]
)
@pytest.mark.parametrize("hidden_bytes", [14336, 48])
def test_nvl_size_hint(ranks, num_sms, queue, hidden_bytes):
    channels, local, nodes = num_sms // 2, min(ranks, 8), max(ranks // 8, 1)
    flags = channels * local * (2 * nodes + 3) * 4
    slots = channels * local * queue
    total = flags + slots * hidden_bytes + slots * 8 + slots * 128 * 8 + slots * 128 * 4 + slots * 128 * 4
    hint = Config(num_sms, 6, queue).get_nvl_buffer_size_hint(hidden_bytes, ranks)
    assert total <= hint < total + 128
    assert hint % 128 == 0


def test_size_hints_of_known_settings():
    assert Config(20, 6, 256).get_nvl_buffer_size_hint(14336, 8) == 335_709_824
    assert Config().get_rdma_buffer_size_hint(14336, 8) == 0
    rows = 10 * 2 * 128 * (14336 + 8 + 128 * 8 + 128 * 4 + 128 * 4 + 16)
    hint = Config(20, 36, 288, 16, 128).get_rdma_buffer_size_hint(14336, 16)
    assert hint == -(-(10 * 2 * 18 * 2 * 4 + 2 * rows) // 128) * 128
    assert Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256) == 1_908_410_496
    assert Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 288) == 2_146_961_792


@pytest.mark.parametrize(("ranks", "num_sms"), [(12, 20), (16, 21)])
def test_size_hints_refuse_what_v1_refuses(ranks, num_sms):
    for hint in (Config(num_sms).get_nvl_buffer_size_hint, Config(num_sms).get_rdma_buffer_size_hint):
        with pytest.raises(RuntimeError, match=f"{ranks} ranks, num_sms {num_sms}"):
            hint(14336, ranks)


def test_recommended_configs(monkeypatch):
    monkeypatch.setattr(Buffer, "num_sms", 20)
    assert Buffer.get_dispatch_config(2) == Config(20, 24, 256, 6, 128)
    assert Buffer.get_dispatch_config(8) == Config(20, 6, 256, 6, 128)
    assert Buffer.get_combine_config(4) == Config(20, 9, 256, 6, 128)
    assert Buffer.get_combine_config(160) == Config(20, 2, 720, 8, 128)
    Buffer.set_num_sms(8)
    for ranks in (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160):
        assert Buffer.get_dispatch_config(ranks).num_sms == Buffer.get_combine_config(ranks).num_sms == 8
    with pytest.raises(AssertionError, match=r"6 ranks.*2\|4\|8"):
        Buffer.get_dispatch_config(6)
    with pytest.raises(AssertionError, match="even"):
        Buffer.set_num_sms(7)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_methods(name):
    arguments = [None] * sum(default is NOTHING for default in SIGNATURES[name].values())
    with pytest.raises(NotImplementedError, match=f"^{name}: "):
        getattr(Buffer(Group(), device="cpu"), name)(*arguments)


def test_constructor_keeps_what_users_read_and_allocates_nothing():
    group = Group(4, 3)
    buffer = Buffer(group, 2**30, low_latency_mode=True, num_rdma_bytes=256, explicitly_destroy=True, device="cpu")
    assert buffer.group is group
    assert (buffer.rank, buffer.group_size, buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (3, 4, 2**30, 256)
    assert (buffer.low_latency_mode, buffer.explicitly_destroy, buffer.enable_shrink) == (True, True, False)
    assert buffer.runtime is None
    assert Buffer.is_sm90_compiled()
    assert isinstance(buffer.get_comm_stream(), torch.cpu.Stream)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "group is None", {"group": None}),
        (NotImplementedError, "comm", {"group": None, "comm": object()}),
        (NotImplementedError, "16 ranks", {"group": Group(16)}),
        (RuntimeError, "num_nvl_bytes 100", {"num_nvl_bytes": 100}),
        (RuntimeError, "num_nvl_bytes -128", {"num_nvl_bytes": -128}),
        (RuntimeError, "num_nvl_bytes", {"num_nvl_bytes": 2**35}),
        (RuntimeError, "limit", {"num_nvl_bytes": 2**31, "num_rdma_bytes": 128, "low_latency_mode": True}),
        (RuntimeError, "num_rdma_bytes 128", {"num_rdma_bytes": 128}),
    ],
)
def test_constructor_errors(error, match, arguments):
    with pytest.raises(error, match=match):
        Buffer(**{"group": Group(), "device": "cpu", **arguments})


def test_destroy_needs_the_promise_and_ends_all_calls():
    with pytest.raises(AssertionError, match="explicitly_destroy"):
        Buffer(Group(), device="cpu").destroy()
    buffer = Buffer(Group(), explicitly_destroy=True, device="cpu")
    buffer.destroy()
    buffer.destroy()
    x, count = torch.zeros(2, 64, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="destroyed"):
        buffer.dispatch(x, None, count, None, torch.zeros(2, 8, dtype=torch.bool), count)


def routed() -> dict:
    count = torch.zeros(8, dtype=torch.int32)
    return {
        "x": torch.zeros(2, 64, dtype=torch.bfloat16),
        "num_tokens_per_rank": count,
        "is_token_in_rank": torch.zeros(2, 8, dtype=torch.bool),
        "num_tokens_per_expert": count,
    }


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (AssertionError, "is_token_in_rank None", {"is_token_in_rank": None}),
        (AssertionError, "num_tokens_per_expert None", {"num_tokens_per_expert": None}),
        (AssertionError, "beside a handle", {"handle": (None,) * 6, "topk_idx": torch.zeros(2, 1, dtype=torch.int64)}),
        (RuntimeError, "both or neither", {"topk_idx": torch.zeros(2, 1, dtype=torch.int64)}),
        (RuntimeError, "num_worst_tokens 16", {"num_worst_tokens": 16}),
        (ValueError, "expert_alignment 0", {"expert_alignment": 0}),
        (ValueError, "handle of 5 parts", {"handle": (None,) * 5}),
    ],
)  # fmt: skip
def test_dispatch_errors_before_anything_moves(error, match, arguments):
    with pytest.raises(error, match=match):
        Buffer(Group(), device="cpu").dispatch(**{**routed(), **arguments})


def test_three_biases():
    bias = (torch.zeros(2, 64),) * 3
    with pytest.raises(AssertionError, match="3 biases"):
        Buffer(Group(), device="cpu").combine(torch.zeros(2, 64), (None,) * 6, bias=bias)


def test_first_call_inside_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before the capture begins call dispatch"):
        Buffer(Group(), device="cuda:0").dispatch(**routed())


def test_no_raw_memory_before_the_first_call():
    buffer = Buffer(Group(), device="cpu")
    with pytest.raises(RuntimeError, match="first call"):
        buffer.get_local_buffer_tensor(torch.int8)
    with pytest.raises(NotImplementedError, match="RDMA"):
        buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True)


def test_event_overlap():
    event = Buffer.capture()
    assert isinstance(event.event, EventHandle)
    event.current_stream_wait()
    with event as same:
        assert same is event
    kept = torch.zeros(1)
    empty = EventOverlap(extra_tensors=(kept,))
    assert empty.extra_tensors[0] is kept
    with empty, pytest.raises(AssertionError, match="async_finish=True"):
        empty.current_stream_wait()


class Recorder:
    """Streams, events and tensors that write down what happens to them, in place of torch.cuda's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.comm = events.CommStream(torch.device("cuda:0"))
        self.comm._module, self.comm._stream = self, self.Stream(self, "comm")
        self.caller = self.current = self.Stream(self, "caller")
        recorder = self

        class Handle:
            def __init__(self) -> None:
                self.stream = recorder.current.name
                recorder.log.append(f"event on {self.stream}")

            def current_stream_wait(self) -> None:
                recorder.log.append(f"{recorder.current.name} waits event of {self.stream}")

        monkeypatch.setattr(events, "EventHandle", Handle)
        self.Handle = Handle

    class Stream:
        def __init__(self, recorder: Recorder, name: str) -> None:
            self.recorder, self.name = recorder, name

        def wait_stream(self, other: Recorder.Stream) -> None:
            self.recorder.log.append(f"{self.name} waits {other.name}")

        def __enter__(self) -> None:
            self.recorder.current = self

        def __exit__(self, *error: object) -> None:
            self.recorder.current = self.recorder.caller

    def current_stream(self, device: torch.device) -> Recorder.Stream:
        return self.current

    def stream(self, stream: Recorder.Stream) -> Recorder.Stream:
        return stream

    def tensor(self, name: str) -> torch.Tensor:
        recorder = self

        class Spy(torch.Tensor):
            def record_stream(self, stream: Recorder.Stream) -> None:
                recorder.log.append(f"{name} on {stream.name}")

        return torch.zeros(1).as_subclass(Spy)

    def run(self, previous: EventOverlap | None, async_finish: bool, allocate: bool = False) -> EventOverlap:
        def work() -> tuple:
            self.log.append(f"work on {self.current.name}")
            return (self.tensor("out"), None, [3])

        return self.comm.run(work, (self.tensor("in"), None), previous, async_finish, allocate)[1]


def test_a_call_waits_and_is_waited_for(monkeypatch):
    recorder = Recorder(monkeypatch)
    assert recorder.run(None, False).event is None
    assert recorder.run(EventOverlap(None), False).event is None
    assert recorder.log == ["comm waits caller", "work on comm", "caller waits comm", "out on caller"] * 2


def test_an_asynchronous_call_is_waited_for_by_its_event(monkeypatch):
    recorder = Recorder(monkeypatch)
    before = EventOverlap(recorder.Handle())
    recorder.log.clear()
    done = recorder.run(before, True, allocate=True)
    expected = ["comm waits event of caller", "work on comm", "event on comm", "out on caller", "in on comm"]
    assert recorder.log == expected
    done.current_stream_wait()
    assert recorder.log[-1] == "caller waits event of comm"


@pytest.mark.parametrize("async_finish", [False, True])
@pytest.mark.parametrize("with_event", [False, True])
def test_allocate_on_comm_stream_needs_both(monkeypatch, with_event, async_finish):
    recorder = Recorder(monkeypatch)
    previous = EventOverlap(recorder.Handle()) if with_event else EventOverlap(None)
    if with_event and async_finish:
        assert recorder.run(previous, True, allocate=True).event is not None
    else:
        with pytest.raises(RuntimeError, match="allocate_on_comm_stream"):
            recorder.run(previous, async_finish, allocate=True)


def test_capacity_comes_from_the_bytes_or_from_the_first_call():
    call = Sizes(4096, 7168, 256, 8)
    nothing = Asked(None, None, None, None)
    small = _config(8, nothing, 4096, call, 335_709_824)
    assert (small.max_tokens, small.hidden, small.num_experts, small.max_topk) == (4096, 7168, 256, 8)
    assert (small.dtype, small.scales) == ("bf16", "f32")
    large = _config(8, nothing, 4096, call, 2**30)
    assert EpLayout(large).heap_bytes <= 2**30 < EpLayout(replace(large, max_tokens=large.max_tokens + 1)).heap_bytes
    assert large.max_tokens > 8000
    asked = _config(8, Asked(100, 8192, 512, 6), 4096, call, 2**30)
    assert (asked.max_tokens, asked.hidden, asked.num_experts, asked.max_topk) == (100, 8192, 512, 6)
    assert _config(8, nothing, 0, Sizes(0, 64, 8), 0).max_tokens == 1
    assert _config(8, nothing, 1, Sizes(1, 64, 8), 0).max_topk == 32  # unknown, so any
    assert _config(8, nothing, 1, Sizes(1, 24, 8), 0).scales is None  # rows of 24 bytes cannot be fp8
    with pytest.raises(ValueError, match="num_experts"):
        _config(8, nothing, 1, Sizes(1, 64), 0)


@pytest.mark.parametrize("num_bytes", [0, 1000, 10**5, 10**7])
def test_tokens_that_fit(num_bytes):
    config = EpConfig(ranks=4, hidden=64, max_tokens=1, num_experts=8, max_topk=2, scales="f32")
    tokens = tokens_that_fit(config, num_bytes)
    assert tokens == 0 or EpLayout(replace(config, max_tokens=tokens)).heap_bytes <= num_bytes
    assert EpLayout(replace(config, max_tokens=tokens + 1)).heap_bytes > num_bytes


@pytest.mark.parametrize(
    ("call", "keyword"),
    [
        (Sizes(5, 64, 8, 2), "num_max_tokens_per_rank=5"),
        (Sizes(4, 128, 8, 2), "hidden=128"),
        (Sizes(4, 64, 8, 3), "num_topk=3"),
        (Sizes(4, 64, 16, 2), "num_experts=16"),
    ],
)
def test_a_call_that_does_not_fit_names_the_keyword(call, keyword):
    config = EpConfig(ranks=4, hidden=64, max_tokens=4, num_experts=8, max_topk=2)
    check_fits(config, Sizes(4, 64, 8, 2), 0)
    check_fits(config, Sizes(0, 32), 0)
    with pytest.raises(ValueError, match=keyword):
        check_fits(config, call, 3)
