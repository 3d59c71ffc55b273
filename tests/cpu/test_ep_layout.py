"""EpConfig and EpLayout: what holds for every config, the memory of the issue's setting, and refusals."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cutehop.comm.config import LINE, MAX_RANKS, EpConfig, round_up
from cutehop.comm.layout import ERROR_WORDS, ROW_ALIGN, EpLayout
from cutehop.comm.ll_config import FEW_TOKENS, SLOTS, LlConfig, LlLayout

KiB, MiB = 2**10, 2**20
V3 = EpConfig(ranks=8, hidden=7168, max_tokens=4096, num_experts=256, max_topk=8)
DTYPES = [("bf16", None), ("bf16", "f32"), ("bf16", "ue8m0"), ("fp8", "f32"), ("fp8", "ue8m0")]
FLAGS = ["dispatch_ready", "dispatch_ack", "combine_ready", "combine_ack", "counts"]
CONTROL = [*FLAGS, "epochs", "arrivals", "abort", "expert_counts"]
ROWS = ["topk", "x_scales", "x", "y_weights", "y"]


@st.composite
def configs(draw) -> EpConfig:
    ranks = draw(st.integers(1, 8))
    max_tokens = draw(st.integers(1, 10_000))
    dtype, scales = draw(st.sampled_from(DTYPES))
    bound = draw(st.none() | st.integers(1, ranks * max_tokens))
    return EpConfig(
        ranks=ranks,
        hidden=16 * draw(st.integers(1, 1024)),
        max_tokens=max_tokens,
        num_experts=ranks * draw(st.integers(1, 1024)),
        max_topk=draw(st.integers(1, 32)),
        dtype=dtype,
        scales=scales,
        max_recv_tokens=bound,
    )


def pieces(region) -> list[tuple[int, int]]:
    """(begin, end) of every item that a kernel can address; of many, the first and last two."""
    items = sorted({i for i in (0, 1, region.items - 2, region.items - 1) if 0 <= i < region.items})
    begins = [region.at(item) for item in items]
    return [(begin, begin + region.item_bytes) for begin in begins]


@given(configs())
def test_regions_are_disjoint_aligned_and_inside_the_memory(config):
    layout = EpLayout(config)
    for memory, total in (("heap", layout.heap_bytes), ("host", layout.host_bytes)):
        regions = [r for r in layout.regions if r.memory == memory]
        assert regions[0].offset == 0
        assert all(before.end <= after.offset for before, after in itertools.pairwise(regions))
        assert regions[-1].end <= total < regions[-1].end + ROW_ALIGN
    for region in layout.regions:
        assert getattr(layout, region.name) is region
        assert region.align == (ROW_ALIGN if region.name in ROWS else LINE)
        assert region.at(0) % region.align == 0
    assert layout.heap_bytes % ROW_ALIGN == 0


@given(configs())
def test_items_are_disjoint_and_inside_their_region(config):
    for region in EpLayout(config).regions:
        spans = pieces(region)
        assert all(a_end <= b_begin for (_, a_end), (b_begin, _) in itertools.pairwise(spans))
        assert region.offset <= spans[0][0]
        assert spans[-1][1] <= region.end


@given(configs())
def test_every_item_holds_what_is_written_there(config):
    """From the definitions of the protocol, not from the properties that EpConfig derives."""
    layout = EpLayout(config)
    needed = {
        "counts": 8 * config.ranks,
        "expert_counts": 8 * config.num_experts // config.ranks,
        "send_lists": 4 * config.max_tokens,
        "topk": (4 + 4) * config.max_topk,
        "x": config.hidden * {"bf16": 2, "fp8": 1}[config.dtype],
        "y": 2 * config.hidden,
        "y_weights": 4 * config.max_topk,
        "x_scales": {None: 0, "f32": 4 * math.ceil(config.hidden / 128), "ue8m0": math.ceil(config.hidden / 128)}[
            config.scales
        ],
        "error": 8 * len(ERROR_WORDS),
    }
    for name, item_bytes in needed.items():
        region = getattr(layout, name)
        assert item_bytes <= region.item_bytes < item_bytes + LINE
        assert region.item_bytes % 16 == 0, "bulk copies"
    rows = config.max_recv_tokens or config.ranks * config.max_tokens
    assert layout.y.items == layout.y_weights.items == rows
    assert layout.x.items == layout.x_scales.items == layout.topk.items == config.max_tokens
    assert layout.recv_counts.items == 1 + config.num_experts // config.ranks


@given(configs())
def test_no_two_flags_share_a_line_and_control_comes_first(config):
    layout = EpLayout(config)
    polled = [getattr(layout, name) for name in (*FLAGS, "epochs", "arrivals", "abort")]
    words = [r.at(item) for r in polled for item in range(r.items)]
    assert len({word // LINE for word in words}) == len(words)
    assert all(getattr(layout, name).items == MAX_RANKS for name in FLAGS)
    assert layout.expert_counts.items == config.ranks
    for region in layout.regions:
        if region.memory == "heap":
            assert (region.end <= layout.control_bytes) == (region.name in CONTROL)


def enlarged(config: EpConfig, field: str, factor: int) -> EpConfig:
    """The same config with one capacity made larger; an example that has no larger one is skipped."""
    widest = {"dtype": "bf16", "scales": "f32", "max_recv_tokens": None}
    if field in widest:
        return dataclasses.replace(config, **{field: widest[field]})
    assume(field != "num_experts" or config.experts_per_rank * factor <= 1024)
    assume(field != "max_topk" or config.max_topk * factor <= 32)
    return dataclasses.replace(config, **{field: getattr(config, field) * factor})


@pytest.mark.parametrize(
    "field", ["hidden", "max_tokens", "num_experts", "max_topk", "max_recv_tokens", "dtype", "scales"]
)
@given(config=configs(), factor=st.integers(2, 5))
def test_a_larger_capacity_shrinks_no_region(field, config, factor):
    small, large = EpLayout(config), EpLayout(enlarged(config, field, factor))
    assert all(a.bytes <= b.bytes for a, b in zip(small.regions, large.regions))
    assert small.heap_bytes <= large.heap_bytes
    assert small.host_bytes <= large.host_bytes


@given(config=configs(), ranks=st.tuples(st.integers(1, 8), st.integers(1, 8)), experts=st.integers(1, 18))
def test_more_ranks_need_no_less_memory(config, ranks, experts):
    """Region by region this does not hold: a rank then owns fewer of the same experts."""
    few, many = (
        EpLayout(dataclasses.replace(config, ranks=r, num_experts=math.lcm(*ranks) * experts, max_recv_tokens=None))
        for r in sorted(ranks)
    )
    assert few.heap_bytes <= many.heap_bytes


def test_memory_of_the_issues_setting_bf16():
    """4096 tokens of 7168 columns, top-8 of 256, 8 ranks: 32768 rows in the worst case."""
    layout = EpLayout(V3)
    line = 128
    control = 4 * 8 * line + 8 * line  # four kinds of flags and the counts, from eight peers
    control += 2 * line + 4 * line + line  # epochs, arrivals, abort
    control += 8 * (32 * 8)  # 32 experts' counts from eight peers
    assert layout.control_bytes == control == 8_064
    lists = 8 * 4096 * 4
    topk = 4096 * 8 * (4 + 4)
    x = 4096 * 7168 * 2
    y_weights = 8 * 4096 * 8 * 4
    y = 8 * 4096 * 7168 * 2
    assert [getattr(layout, n).bytes for n in ("send_lists", "topk", "x_scales", "x", "y_weights", "y")] == [
        lists,
        topk,
        0,
        x,
        y_weights,
        y,
    ]
    gap = -(control + lists) % 1024  # rows start at a multiple of 1024 bytes; all their sizes are multiples of it
    assert layout.heap_bytes == control + lists + gap + topk + x + y_weights + y == 529_932_288
    assert layout.host_bytes == 128 + round_up((1 + 32) * 8, 128) == 512


def test_memory_of_the_issues_setting_fp8_and_bounded():
    fp8 = EpLayout(dataclasses.replace(V3, dtype="fp8", scales="f32"))
    assert fp8.x.bytes == 4096 * 7168 == 28 * MiB
    assert fp8.x_scales.bytes == 4096 * 56 * 4 == 896 * KiB
    assert fp8.heap_bytes - EpLayout(V3).heap_bytes == 896 * KiB - 28 * MiB
    packed = EpLayout(dataclasses.replace(V3, dtype="fp8", scales="ue8m0"))
    assert packed.x_scales.bytes == 4096 * round_up(14 * 4, 16) == 256 * KiB
    # Uniform routing fills 8 * (1 - C(224, 8) / C(256, 8)) / 8 of the worst case, 21,687 rows; bound at 24576.
    bounded = EpLayout(dataclasses.replace(V3, max_recv_tokens=24576))
    rows_saved = 32768 - 24576
    assert EpLayout(V3).heap_bytes - bounded.heap_bytes == rows_saved * (7168 * 2 + 8 * 4)


def test_offsets_beyond_4_gib_are_exact():
    layout = EpLayout(dataclasses.replace(V3, max_tokens=65536))
    last = layout.y.at(8 * 65536 - 1)
    assert last == layout.y.end - 14336
    assert last > 8 * 65536 * 14336 - 14336 > 2**32


def test_control_offsets_do_not_depend_on_the_config():
    """Kernels have them as constants; only expert_counts, the last of them, has a size that varies."""
    small = EpLayout(EpConfig(ranks=1, hidden=8, max_tokens=1, num_experts=1, max_topk=1))
    large = EpLayout(V3)
    for name in CONTROL:
        assert getattr(small, name).offset == getattr(large, name).offset


def test_the_table_names_every_region_and_the_totals():
    layout = EpLayout(V3)
    lines = str(layout).splitlines()
    assert lines[0] == str(V3)
    body = [line.split() for line in lines[2:-1]]
    assert [(row[0], row[1], row[2], row[3]) for row in body] == [
        (r.name, r.memory, f"{r.offset:,}", f"{r.bytes:,}") for r in layout.regions
    ]
    assert all(line.endswith(r.users) for line, r in zip(lines[2:-1], layout.regions))
    assert lines[-1] == "heap 529,932,288 bytes (505.4 MiB), of which control 8,064; host 512 bytes"


def test_the_readme_tells_every_region_and_the_right_size():
    text = (Path(__file__).resolve().parents[2] / "comm" / "README.md").read_text(encoding="utf-8")
    told = {name for row in re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert {r.name for r in EpLayout(V3).regions if r.memory == "heap"} <= told
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    namespace: dict[str, EpLayout] = {}
    exec(compile(block, "comm/README.md", "exec"), namespace)
    (size,) = re.findall(r"heap_bytes  # ([\d_]+):", block)
    assert namespace["layout"].heap_bytes == int(size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 0}, "ranks 0, supported 1..8; use one buffer per NVLink node"),
        ({"ranks": 9}, "ranks 9, supported 1..8; use one buffer per NVLink node"),
        ({"hidden": 0}, "hidden 0, must be a positive multiple of 8"),
        ({"hidden": 7164}, "hidden 7164, must be a positive multiple of 8 (16 bytes of 2-byte elements); pad"),
        ({"hidden": 7176, "dtype": "fp8", "scales": "f32"}, "hidden 7176, must be a positive multiple of 16 (16 bytes"),
        ({"hidden": 7176, "scales": "f32"}, "hidden 7176, must be a positive multiple of 16 (16 bytes of 1-byte"),
        ({"max_tokens": 0}, "max_tokens 0, supported 1..268435455; dispatch in smaller batches"),
        ({"max_tokens": 2**28}, "max_tokens 268435456, supported 1..268435455; dispatch in smaller batches"),
        ({"num_experts": 0}, "num_experts 0, must be a positive multiple of ranks 8; pad the experts"),
        ({"num_experts": 250}, "num_experts 250, must be a positive multiple of ranks 8; pad the experts"),
        ({"num_experts": 8200}, "num_experts 8200 on 8 ranks is 1025 per rank, limit 1024; use more ranks"),
        ({"max_topk": 0}, "max_topk 0, supported 1..32; route each token to fewer experts"),
        ({"max_topk": 33}, "max_topk 33, supported 1..32; route each token to fewer experts"),
        ({"dtype": "f16"}, "dtype 'f16', supported bf16|fp8; name the widest row"),
        ({"scales": "e8m0"}, "scales 'e8m0', supported None|f32|ue8m0; quantise with one scale per 128 columns"),
        ({"dtype": "fp8"}, "scales None with dtype 'fp8', supported f32|ue8m0; name the scales of the fp8 rows"),
        ({"max_recv_tokens": 0}, "max_recv_tokens 0, supported 1..32768; leave it None for the worst case"),
        ({"max_recv_tokens": 32769}, "max_recv_tokens 32769, supported 1..32768; leave it None for the worst case"),
    ],
)
def test_a_value_outside_its_limits_is_refused(change, message):
    with pytest.raises(ValueError, match="EpConfig: ") as error:
        dataclasses.replace(V3, **change)
    assert str(error.value).startswith(f"EpConfig: {message}")


@pytest.mark.parametrize("field", ["ranks", "hidden", "max_tokens", "num_experts", "max_topk"])
@pytest.mark.parametrize("value", [1.0, True, "8", None])
def test_a_value_that_is_no_int_is_refused(field, value):
    with pytest.raises(TypeError, match=f"EpConfig: {field} {value!r} is {type(value).__name__}, must be an int"):
        dataclasses.replace(V3, **{field: value})


def test_a_bound_that_is_no_int_is_refused():
    with pytest.raises(TypeError, match=r"EpConfig: max_recv_tokens 24576\.0 is float, must be an int"):
        dataclasses.replace(V3, max_recv_tokens=24576.0)


def test_low_latency_memory_of_deepseek():
    """128 tokens per rank on 8 ranks in 64 MiB, and the words of few tokens apart from all else."""
    layout = LlLayout(LlConfig(8, 7168, 128, 256, 8))
    assert layout.heap_bytes <= 64 * MiB
    assert layout.words.item_bytes >= 2 * 8 * FEW_TOKENS * layout.config.record_bytes
    assert layout.words.offset >= layout.data.offset + SLOTS * layout.config.slot_bytes


def test_low_latency_memory_of_sums():
    """Of groups of up to 4 ranks whose combine in one launch asks for sums, apart from all else."""
    config = LlConfig(4, 7168, 128, 256, 8)
    layout = LlLayout(config)
    assert layout.heap_bytes <= 80 * MiB
    assert layout.sums.item_bytes == 128 * 8 * 7168 * 2
    assert layout.asks.offset >= layout.words.offset + SLOTS * config.words_bytes
    assert layout.sums.offset >= layout.asks.offset + SLOTS * config.asks_bytes
    others = [LlLayout(dataclasses.replace(config, **change)) for change in ({"ranks": 8}, {"elastic": True})]
    for without in (*others, LlLayout(config, remote=True)):
        assert not {"asks", "sums"} & {region.name for region in without.regions}
