"""LogFMT: rows of combine in 10 bits per value where a chunk of them allows it, to the bit as cutehop.ref.ep_ll has it.

    chunk    gcd(columns, 1024) columns: encoded, or as they are
    limits   of a row: a word per 128 columns, {amax, amin} of the magnitudes, bf16 each; 0: the chunk is as it is
    group    128 columns encoded: low bytes of the codes, then for each 8 columns the high bits and the signs: 160 bytes

A chunk begins where its columns would in a row that is not encoded: nobody adds up sizes. Every operation is rounded on
its own: plain `+` and `*` could be fused.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from ...cute_kernels.sm90 import ptx
from ...ref.ep_ll import EXP2, LOG2, LOGFMT_BEND, LOGFMT_LARGEST, LOGFMT_SPAN, LOGFMT_STEPS

CODED_BYTES = 160  # of a group
ONE = 0x3F80  # bf16


def floor(x):
    return cute.arch.inline_ptx("cvt.rmi.s32.f32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[x])


def multiply(x, y):
    return cute.arch.inline_ptx("mul.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[x, y])


def subtract(x, y):
    return cute.arch.inline_ptx("sub.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[x, y])


def pow2(exponent):
    """Of an Int32, -126..127."""
    return ((exponent + 127) << 23).bitcast(Float32)


def polynomial(coefficients: tuple[float, ...], x):
    value = Float32(coefficients[0])
    for coefficient in coefficients[1:]:
        value = ptx.add_product(Float32(coefficient), value, x)
    return value


@cute.jit
def log2(bits: Int32):
    """Of the bf16 with these bits, which is finite and not negative; -inf of 0."""
    value = -Float32.inf
    if bits != 0:
        shift = Int32(0)  # that makes a subnormal normal
        exponent = bits >> 7
        if exponent == 0:
            shift = Int32(cute.arch.clz(bits)) - 24
            exponent = Int32(1)
        t = subtract((((bits << shift) & 127) << 16 | (ONE << 16)).bitcast(Float32), Float32(1.0))
        value = ptx.add_product(Float32(exponent - shift - 127), t, polynomial(LOG2, t))
    return value


@cute.jit
def exp2(x: Float32):
    whole = floor(x)
    half = whole >> 1
    value = multiply(polynomial(EXP2, subtract(x, Float32(whole))), pow2(half))
    return multiply(value, pow2(whole - half))


@cute.jit
def limits_of(words, lanes: Int32):
    """{amax, amin} of the 128 columns of 16 lanes, four words of each. lanes: those of the warp that are here."""
    largest, smallest = Int32(0), Int32(0x7FFF)
    for i in cutlass.range_constexpr(8):
        bits = (words[i // 2] >> (16 * (i % 2))) & 0x7FFF
        largest = bits if bits > largest else largest
        smallest = bits if bits < smallest else smallest
    for i in cutlass.range_constexpr(4):
        other = cute.arch.shuffle_sync_bfly(largest, offset=1 << i, mask=lanes)
        largest = other if other > largest else largest
        other = cute.arch.shuffle_sync_bfly(smallest, offset=1 << i, mask=lanes)
        smallest = other if other < smallest else smallest
    return largest | (smallest << 16)


@cute.jit
def scale_of(limits: Int32):
    """li and step of a group."""
    largest = log2(limits & 0xFFFF)
    low = cute.arch.fmax(log2((limits >> 16) & 0xFFFF), subtract(largest, Float32(LOGFMT_SPAN)))
    return low, multiply(subtract(largest, low), Float32(LOGFMT_STEPS))


@cute.jit
def applies(limits: Int32):
    """Whether a group can be encoded: magnitudes below 1 that are not all equal."""
    largest, smallest = limits & 0xFFFF, (limits >> 16) & 0xFFFF
    return (largest < ONE) & (smallest < largest)


@cute.jit
def encode(words, limits: Int32):
    """Low bytes of the codes of 8 columns, two words, and 8 bits of their high bits with 8 of signs above."""
    low, step = scale_of(limits)
    inverse = ptx.div_rn(Float32(1.0), step)
    rounding = subtract(Float32(1.5), multiply(step, Float32(LOGFMT_BEND)))
    codes = cute.make_rmem_tensor(3, Int32)
    codes.fill(0)
    for i in cutlass.range_constexpr(8):
        bits = (words[i // 2] >> (16 * (i % 2))) & 0xFFFF
        value = ptx.add_product(rounding, subtract(log2(bits & 0x7FFF), low), inverse)
        code = floor(cute.arch.fmax(value, Float32(0.0)))
        code = code if code < LOGFMT_LARGEST else Int32(LOGFMT_LARGEST)
        codes[i // 4] = codes[i // 4] | ((code & 255) << (8 * (i % 4)))
        codes[2] = codes[2] | ((code >> 8) << i) | ((bits >> 15) << (8 + i))
    return codes[0], codes[1], codes[2]


@cute.jit
def decode(first: Int32, second: Int32, rest: Int32, limits: Int32):
    """The 8 values of what `encode` returned."""
    low, step = scale_of(limits)
    values = cute.make_rmem_tensor(8, Float32)
    for i in cutlass.range_constexpr(8):
        word = first if i < 4 else second
        code = ((word >> (8 * (i % 4))) & 255) | (((rest >> i) & 1) << 8)
        magnitude = Float32(0.0)
        if code != 0:
            magnitude = exp2(ptx.add_product(low, Float32(code - 1), step))
        values[i] = (magnitude.bitcast(Int32) | (((rest >> (8 + i)) & 1) << 31)).bitcast(Float32)
    return values


def st_shared_u16(pointer, value):
    """The low half of an Int32."""
    cute.arch.inline_ptx(
        "{ .reg .b16 low, high; mov.b32 {low, high}, {$r1}; st.shared.b16 [{$r0}], low; }",
        read_only_args=[pointer, value],
    )


def ld_u16(address):
    """As an Int32."""
    return cute.arch.inline_ptx("ld.global.u16 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])


def ld_pair(address):
    """8 bytes as two Int32."""
    return cute.arch.inline_ptx(
        "ld.global.v2.b32 {{$w0}, {$w1}}, [{$r0}];", write_only_types=[Int32, Int32], read_only_args=[address]
    )
