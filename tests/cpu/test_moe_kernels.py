"""MoE kernels, compiled for sm_90a without a GPU: what the machine code must contain, and the host's choices."""

from __future__ import annotations

import math
import random
import re
import struct
from fractions import Fraction

import pytest

pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")

from cutehop.cute_kernels import moe
from cutehop.cute_kernels.jit.bundle import MAX_SMEM_BYTES
from cutehop.cute_kernels.moe import config as cfg
from cutehop.ops import _moe_checks as checks

VARIANTS = list(moe.variants())
REGISTERS_PER_SM = 65536


def name_of(variant) -> str:
    function, config = variant
    return f"{function.name.rpartition('.')[2]}-{config}".replace(" ", "")


@pytest.fixture(scope="module", params=VARIANTS, ids=name_of)
def kernel(request):
    function, config = request.param
    return function, config, function.bundle(config)


def test_nothing_spills_or_lives_in_local_memory(kernel):
    _, _, bundle = kernel
    assert bundle.spill_bytes == 0
    assert not re.findall(r".*\.local\b.*", bundle.ptx)
    assert bundle.registers * bundle.threads <= REGISTERS_PER_SM
    assert bundle.smem_bytes <= MAX_SMEM_BYTES


def test_instructions(kernel):
    """Rows move in 16-byte vectors or bulk copies, scores are float64, sums keep the reference's rounding."""
    function, _, bundle = kernel
    ptx = bundle.ptx
    loads, stores = len(re.findall(r"ld\.global\.v4", ptx)), len(re.findall(r"st\.global\.v[24]", ptx))
    if function is moe.permute_kernel:
        assert re.search(r"cp\.async\.bulk\.shared::\w+\.global\.mbarrier", ptx)
        assert re.search(r"cp\.async\.bulk\.global\.shared::cta", ptx)
        assert re.search(r"cp\.async\.bulk\.wait_group\.read\s+1;", ptx), "before a stage is filled again"
        assert re.search(r"cp\.async\.bulk\.wait_group\s+0;", ptx), "before the kernel ends"
    elif function is moe.route_kernel:
        assert "fma.rn.f64" in ptx
        assert "redux.sync" in ptx
    elif function is moe.sort_kernel:
        assert "match.any.sync" in ptx
        assert "atom" not in ptx
    elif function is moe.count_kernel:
        assert "atom.shared" in ptx or "red.shared" in ptx
    else:
        assert loads >= 1
        assert stores >= 1
    if function is moe.unpermute_kernel:
        assert loads == 8, "eight rows in flight"
        assert "fma.rn.f32" not in ptx


@pytest.mark.parametrize("experts", [1, 31, 64, 65, 128, 160, 256, 257, 512])
@pytest.mark.parametrize("scoring", cfg.SCORINGS)
def test_route_config(experts, scoring):
    config = cfg.route_config(experts, scoring)
    assert config.values * cfg.WARP >= experts
    assert config.values == cfg.ROUTE_VALUES[0] or config.values * cfg.WARP // 2 < experts
    assert (moe.route_kernel, config) in VARIANTS


def test_kernels_serve_what_the_checks_allow():
    assert max(cfg.ROUTE_VALUES) * cfg.WARP == checks.MAX_ROUTE_EXPERTS
    assert cfg.MAX_EXPERTS == checks.MAX_EXPERTS <= cfg.SORT_THREADS
    assert cfg.sort_smem_bytes(cfg.MAX_EXPERTS) <= MAX_SMEM_BYTES
    assert checks.MAX_TOPK <= cfg.WARP


def test_no_clusters(kernel):
    """They may find no place beside the CTAs of other ranks that wait on the same GPU."""
    assert kernel[2].cluster == 1


@pytest.mark.parametrize(("pairs", "ctas"), [(0, 1), (1, 1), (4096, 1), (4097, 2), (32768, 8), (1 << 20, 32)])
def test_sort_ctas(pairs, ctas):
    assert cfg.sort_ctas(pairs) == ctas


@pytest.mark.parametrize("row_bytes", [16, 32, 48, 512, 8176, 8192, 8208, 14336, 32768, 60016, 1 << 20])
def test_ring(row_bytes):
    piece, stages = cfg.ring(row_bytes)
    pieces = -(-row_bytes // piece)
    assert piece % cfg.VECTOR_BYTES == 0
    assert piece <= cfg.PIECE_BYTES
    assert (pieces - 1) * piece < row_bytes
    assert 3 <= stages <= cfg.MAX_STAGES
    assert stages * piece <= cfg.RING_BYTES


def test_permute_ctas():
    assert cfg.permute_ctas(1, 14336, 132) == 1
    assert cfg.permute_ctas(128, 14336, 132) == 64
    assert cfg.permute_ctas(4096, 14336, 132) == 132


def test_exact_functions(monkeypatch):
    """The PTX text of exp and 1 / x, run by a few lines of Python in exact arithmetic: within 2^-50."""
    from cutehop.cute_kernels.moe import exact

    texts: list[str] = []
    monkeypatch.setattr(exact, "_ptx", lambda text, result, *arguments: texts.append(text))
    exact.exp(None)
    exact.reciprocal(None)
    exp, reciprocal = texts
    rng = random.Random(0)
    inputs = [rng.uniform(-exact.EXP_LIMIT, exact.EXP_LIMIT) for _ in range(300)] + [
        rng.gauss(0, 2) for _ in range(300)
    ]
    for x in [*inputs, 0.0, 1e-300, exact.EXP_LIMIT, -exact.EXP_LIMIT]:
        e = run_ptx(exp, x)
        assert abs(e / math.exp(x) - 1) < 2**-50
        assert abs(run_ptx(reciprocal, 1 + e) * (1 + e) - 1) < 2**-50


def run_ptx(text: str, argument: float) -> float:
    """The float64 result of straight-line PTX with one float64 operand."""
    registers: dict[str, float | int] = {"{$r0}": argument}

    def value(operand: str) -> float | int:
        if operand.startswith("0d"):
            return struct.unpack(">d", bytes.fromhex(operand[2:]))[0]
        return registers[operand] if operand in registers else int(operand)

    for instruction in filter(None, map(str.strip, text.split(";"))):
        if instruction.startswith(".reg"):
            continue
        name, operands = instruction.split(" ", 1)
        target, *sources = (part.strip() for part in operands.split(","))
        registers[target] = INSTRUCTIONS[name](*map(value, sources))
    result = registers["{$w0}"]
    assert isinstance(result, float)
    return result


def move(x: float | int) -> float | int:
    """The other type with the same bits: in these texts mov.b64 goes between the two."""
    return struct.unpack("=q", struct.pack("=d", x))[0] if isinstance(x, float) else struct.unpack("=d", bits(x))[0]


def bits(x: int) -> bytes:
    return struct.pack("=Q", x & (2**64 - 1))


INSTRUCTIONS = {
    "fma.rn.f64": lambda x, y, z: float(Fraction(x) * Fraction(y) + Fraction(z)),
    "sub.rn.f64": lambda x, y: x - y,
    "mul.rn.f64": lambda x, y: x * y,
    "neg.f64": lambda x: -x,
    "mov.f64": lambda x: x,
    "mov.b64": move,
    "add.s64": lambda x, y: x + y,
    "shl.b64": lambda x, n: (x << n) & (2**64 - 1),
    # as coarse as the hardware's: 20 bits
    "rcp.approx.ftz.f64": lambda x: struct.unpack("=d", bits(move(1 / x) >> 32 << 32))[0],
}
