"""Tensor maps of the decode kernel, without a GPU: what the boxes that the kernel asks for hold.

The gather of a TMA load is done here by strides. It sees the memory that the map describes, so a map that reaches past
the tensor's storage fails, and fills with zeros outside the map's extents, as the hardware does.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from cutehop.cute_kernels.jit import tensormap
from cutehop.cute_kernels.mla import config as cfg
from cutehop.ops import _mla_cuda, _scratch

HEADS = [(h_q, 1) for h_q in (1, 3, 9, 16, 63, 64, 126, 128)] + [(126, 2), (6, 2), (9, 3), (128, 8), (256, 2), (189, 3)]


@dataclass(frozen=True)
class Map:
    """The arguments of one `tensor_map`, strides in elements."""

    ptr: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    def load(self, memory: Tensor, *start: int) -> Tensor:
        """The box at `start` (innermost first) of the map into the storage of `memory`, outermost dimension first."""
        offset, odd = divmod(self.ptr - memory.untyped_storage().data_ptr(), memory.element_size())
        assert not odd
        whole = memory.as_strided(self.dims[::-1], (1, *self.strides)[::-1], offset)
        there = whole[tuple(slice(first, first + n) for first, n in zip(start[::-1], self.box[::-1]))]
        box = torch.zeros(self.box[::-1], dtype=memory.dtype)
        box[tuple(slice(n) for n in there.shape)] = there
        return box


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """`tensor_map` of _mla_cuda checks its arguments as ever and gives a Map in place of the driver's encoding."""

    def record(ptr, dtype, dims, strides_bytes, box):
        tensormap._validate(ptr, dtype, dims, strides_bytes, box, 128)
        return Map(ptr, dims, tuple(stride // 2 for stride in strides_bytes), box)

    monkeypatch.setattr(_mla_cuda, "tensor_map", record)


def bits(*shape: int) -> Tensor:
    """bfloat16 of random bits."""
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(torch.bfloat16)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


# name -> q of shape (*shape, 576): shape is (batch, tokens, heads), or (tokens, heads)
LAYOUTS = {
    "contiguous": lambda *shape: bits(*shape, 576),
    "wide rows": lambda *shape: bits(*shape, 640)[..., 64:],
    "more heads": lambda *shape: bits(*shape[:-1], shape[-1] + 1, 576)[..., 1:, :],
    "more tokens": lambda *shape: bits(*shape[:-2], shape[-2] + 1, shape[-1], 576)[..., :-1, :, :],
    "heads first": lambda *shape: bits(*shape[:-2], shape[-1], shape[-2], 576).transpose(-3, -2),
    "misaligned rows": lambda *shape: bits(*shape, 580)[..., :576],
    "misaligned start": lambda *shape: bits(*shape, 584)[..., 4:580],
}


def check_tiles(q: Tensor, h_kv: int, starts: list[int], ragged: bool, s_q: int) -> bool:
    few = s_q * q.shape[-2] // h_kv <= cfg.FEW_ROWS
    heights = (cfg.TILE_M, cfg.FEW_ROWS) if few else (cfg.TILE_M,)
    copied = {check_tiles_of(height, q, h_kv, starts, ragged, s_q) for height in heights}
    assert len(copied) == 1
    return copied.pop()


def check_tiles_of(height: int, q: Tensor, h_kv: int, starts: list[int], ragged: bool, s_q: int) -> bool:
    """Every packed row of every tile against q itself, tokens starts[i] .. starts[i + 1] of sequence i.

    Returns whether q was copied. The coordinates are those of Loaders.load_q.
    """
    h_q = q.shape[-2]
    heads_per_kv = h_q // h_kv
    q_map, (q_group, q_kv_step), kept = _mla_cuda._q_map(q, h_kv, s_q, heads_per_kv, height, ragged)
    assert torch.Size(q_map.box).numel() * 2 == cfg.NUM_SLABS * height * 128  # what the kernel's barrier waits for
    tokens = q if ragged else q.flatten(0, 1)
    for req, (token0, end) in enumerate(pairwise(starts)):
        for kv_head in range(h_kv):
            heads = slice(kv_head * heads_per_kv, (kv_head + 1) * heads_per_kv)
            rows = tokens[token0:end, heads].reshape(-1, cfg.HEAD_DIM)
            for tile in range(cfg.row_tiles(end - token0, heads_per_kv)):
                head = kv_head * q_kv_step + tile * cfg.TILE_M % q_group
                token, batch = tile * cfg.TILE_M // q_group, req
                if ragged:
                    batch = 0
                    if q_group > heads_per_kv:
                        head += token0 * heads_per_kv
                    else:
                        token += token0
                box = q_map.load(kept, 0, head, token, 0, batch)
                loaded = box.reshape(cfg.NUM_SLABS, height, 64).transpose(0, 1).reshape(height, cfg.HEAD_DIM)
                wanted = rows[tile * cfg.TILE_M :][:height]
                assert same_bits(loaded[: len(wanted)], wanted), f"sequence {req}, kv head {kv_head}, tile {tile}"
    return kept is not q


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("s_q", [1, 2, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_of_q(layout, s_q, heads):
    h_q, h_kv = heads
    check_tiles(LAYOUTS[layout](3, s_q, h_q), h_kv, [0, s_q, 2 * s_q, 3 * s_q], False, s_q)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_of_ragged_q(layout, heads):
    h_q, h_kv = heads
    tokens = (2, 0, 3, 2 + 2 * cfg.TILE_M * h_kv // h_q, 1)  # the longest has more than two tiles
    for lengths in (tokens, (1, 0, 1, 1)):
        starts = list(accumulate(lengths, initial=0))
        check_tiles(LAYOUTS[layout](starts[-1], h_q), h_kv, starts, True, max(lengths))


@pytest.mark.parametrize(
    ("layout", "s_q", "heads", "copied"),
    [
        ("contiguous", 1, (128, 1), False),
        ("contiguous", 1, (126, 2), False),  # one token: the rows of a kv head are adjacent whatever their number
        ("contiguous", 2, (63, 1), False),  # one kv head: tokens follow each other like heads do
        ("contiguous", 2, (128, 8), False),
        ("contiguous", 2, (126, 2), True),
        ("wide rows", 2, (63, 1), False),
        ("more heads", 2, (128, 1), False),
        ("more heads", 2, (63, 1), True),
        ("heads first", 2, (64, 1), False),
        ("heads first", 2, (9, 1), True),
        ("misaligned rows", 1, (128, 1), True),
        ("misaligned start", 1, (128, 1), True),
    ],
)
def test_q_is_copied_only_where_no_map_describes_it(layout, s_q, heads, copied):
    q = LAYOUTS[layout](2, s_q, heads[0])
    assert check_tiles(q, heads[1], [0, s_q, 2 * s_q], False, s_q) == copied


@pytest.mark.parametrize("shape", [(1, 2, 128), (3, 1, 128), (3, 2, 1)], ids=str)
def test_expanded_q_is_copied(shape):
    """A tensor map takes no stride of 0."""
    q = bits(*shape, 576).expand(3, 2, 128, 576)
    assert check_tiles(q, 1, [0, 2, 4, 6], False, 2)
    assert check_tiles(q[0], 1, [0, 2], True, 2) == (shape[0] == 3)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 16), (1, 3, 1)], ids=str)
def test_strides_of_a_dimension_of_one_do_not_matter(shape):
    """torch lets them be anything; the driver refuses what is no multiple of 16 bytes, also where nothing uses it."""
    q = LAYOUTS["contiguous"](*shape)
    odd = q.as_strided(q.shape, [7 if extent == 1 else stride for extent, stride in zip(q.shape, q.stride())])
    check_tiles(odd, 1, [0, shape[1]], False, shape[1])


def test_stride_of_one_kv_head_does_not_matter():
    k_cache = bits(3, 64, 1, cfg.HEAD_DIM)
    k_map = _mla_cuda._k_map(k_cache.as_strided(k_cache.shape, (64 * cfg.HEAD_DIM, cfg.HEAD_DIM, 0, 1)))
    assert same_bits(k_map.load(k_cache, 64, 0, 0, 2)[0, 0], k_cache[2, :, 0, 64:128])


@pytest.mark.parametrize("h_kv", [1, 3])
@pytest.mark.parametrize("page", cfg.PAGE_SIZES)
@pytest.mark.parametrize("padding", [0, 64])
def test_slabs_of_k(padding, page, h_kv):
    """Coordinates as in Loaders.load_half: column of the slab, row of the page, kv head, page."""
    k_cache = bits(4, page, h_kv, cfg.HEAD_DIM + padding)[1:, ..., padding:]
    k_map = _mla_cuda._k_map(k_cache)
    rows = cfg.DecodeConfig("bf16", page).box_rows
    assert torch.Size(k_map.box).numel() * 2 == rows * 128
    for number in range(k_cache.shape[0]):
        for head in range(h_kv):
            for row in range(0, page, rows):
                boxes = [k_map.load(k_cache, 64 * slab, row, head, number)[0, 0] for slab in range(cfg.NUM_SLABS)]
                assert same_bits(torch.cat(boxes, -1), k_cache[number, row : row + rows, head].contiguous())


@pytest.mark.parametrize(("batch", "s_q", "h_q", "h_kv"), [(1, 1, 16, 1), (3, 2, 128, 1), (40, 1, 128, 2)])
def test_scratch_memory_holds_every_partial_result(monkeypatch, batch, s_q, h_q, h_kv):
    """The shapes are those of work.DecodeArgs; partial_rows begins behind partial_out."""
    for name in ("decode_kernel", "combine_kernel"):
        monkeypatch.setattr(_mla_cuda.mla, name, lambda config, stream: config)
    monkeypatch.setattr(_mla_cuda, "prepare_captures", lambda device: None)
    q, k_cache = bits(batch, s_q, h_q, 576), bits(2, 64, h_kv, 576)
    table, lengths = torch.zeros(batch, 300, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32)
    metadata, _ = torch.ops.cutehop.mla_plan(lengths, s_q, h_q, h_kv)
    call = _mla_cuda._prepare(q, k_cache, table, lengths, metadata, False, s_q, 0, 1.0, 0)
    tiles = cfg.row_tiles(s_q, h_q // h_kv) * h_kv
    slots = cfg.max_slots(batch, len(metadata), 300, 0)
    warps = slots * tiles * cfg.WARPS_OUT
    assert call.sizes == (batch, slots)
    assert call.partial_out_bytes == torch.Size((warps, 16, 32, 8)).numel() * 2
    assert call.scratch[0] - call.partial_out_bytes == torch.Size((warps, 16, 2)).numel() * 4
    assert call.scratch[1:] == (len(metadata) * tiles, -(-slots // (cfg.MERGE_MAX + 1)) * tiles * cfg.WARPS_OUT)


def test_scratch_memory_is_asked_for_in_bytes():
    assert _scratch._partials(12345, torch.device("cpu")).nbytes == 12345
