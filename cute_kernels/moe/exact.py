"""exp and 1 / x in float64, each to within 2^-50: rounded to float32 they are those of every correct implementation.

In float32 each library has its own last bit, and a choice between two experts may hang on it. The special functions
of PTX for float64 are too coarse, so a polynomial and Newton's method refine them.
"""

import math
import struct

import cutlass.cute as cute
from cutlass import Float32, Float64

EXP_LIMIT = 708.0  # within it, exp has a normal result
_DEGREE = 13  # of exp on [-ln2 / 2, ln2 / 2]: the first term left out is below 2^-57
_ROUND = 1.5 * 2.0**52  # adding it leaves the nearest integer in the low bits
_LN2_HIGH = float.fromhex("0x1.62e42feep-1")  # so few bits that its multiples are exact
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")


def _ptx(text: str, result, *arguments):
    """One instruction or more; constants stand in the text, which operands of inline PTX may not be."""
    return cute.arch.inline_ptx("{ " + text + " }", write_only_types=[result], read_only_args=list(arguments))


def _literal(x: float) -> str:
    return "0d" + struct.pack(">d", x).hex()


def to_f32(x):
    """Rounded to nearest even, subnormals kept."""
    return _ptx("cvt.rn.f32.f64 {$w0}, {$r0};", Float32, x)


def to_f64(x):
    return _ptx("cvt.f64.f32 {$w0}, {$r0};", Float64, x)


def f64_of_bits(bits):
    return _ptx("mov.b64 {$w0}, {$r0};", Float64, bits)


def exp(x):
    """Of a Float64 in [-EXP_LIMIT, EXP_LIMIT]: 2^n * exp(r), n the integer nearest to x / ln2."""
    coefficients = [_literal(1.0 / math.factorial(i)) for i in range(_DEGREE + 1)]
    text = (
        ".reg .f64 n, r, p; .reg .b64 power; "
        f"fma.rn.f64 n, {{$r0}}, {_literal(math.log2(math.e))}, {_literal(_ROUND)}; "
        "mov.b64 power, n; add.s64 power, power, 1023; shl.b64 power, power, 52; "  # drops all of n's bits but n
        f"sub.rn.f64 n, n, {_literal(_ROUND)}; "
        f"fma.rn.f64 r, n, {_literal(-_LN2_HIGH)}, {{$r0}}; fma.rn.f64 r, n, {_literal(-_LN2_LOW)}, r; "
        f"mov.f64 p, {coefficients[-1]}; "
    )
    for coefficient in reversed(coefficients[:-1]):
        text += f"fma.rn.f64 p, p, r, {coefficient}; "
    return _ptx(text + "mov.b64 n, power; mul.rn.f64 {$w0}, p, n;", Float64, x)


def reciprocal(x):
    """Of a positive normal Float64 below 2^1022, or NaN."""
    one = _literal(1.0)
    refine = f"fma.rn.f64 e, m, y, {one}; fma.rn.f64 y, y, e, y; "
    text = ".reg .f64 y, e, m; neg.f64 m, {$r0}; rcp.approx.ftz.f64 y, {$r0}; " + 2 * refine
    return _ptx(text + "mov.f64 {$w0}, y;", Float64, x)


def divide(x, y):
    """x / y, rounded once: where the quotient is exact, as for equal weights, what follows rounds as elsewhere."""
    return _ptx("div.rn.f64 {$w0}, {$r0}, {$r1};", Float64, x, y)


def warp_sum(x):
    """Over the lanes of a warp, in all of them."""
    for i in range(5):
        other = _ptx(
            ".reg .b32 low, high; mov.b64 {low, high}, {$r0}; "
            f"shfl.sync.bfly.b32 low, low, {1 << i}, 31, -1; shfl.sync.bfly.b32 high, high, {1 << i}, 31, -1; "
            "mov.b64 {$w0}, {low, high};",
            Float64,
            x,
        )
        x = x + other
    return x
