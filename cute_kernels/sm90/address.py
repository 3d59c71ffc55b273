"""Access to global memory by 64-bit addresses, so that 0 can stand for a tensor that a call does not have."""

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8

GMEM = cute.AddressSpace.gmem


def ld_i32(address):
    return cute.arch.load(cute.make_ptr(Int32, address, GMEM, assumed_align=4), Int32)


def st_i32(address, value):
    cute.arch.store(cute.make_ptr(Int32, address, GMEM, assumed_align=4), value)


def ld_i64(address):
    return cute.arch.load(cute.make_ptr(Int64, address, GMEM, assumed_align=8), Int64)


def ld_f32(address):
    return ld_i32(address).bitcast(Float32)


def st_f32(address, value):
    st_i32(address, value.bitcast(Int32))


def st_i64(address, value):
    cute.arch.store(cute.make_ptr(Int64, address, GMEM, assumed_align=8), value)


def ld_u8(address):
    """One byte, as an Int32."""
    return cute.arch.inline_ptx("ld.global.u8 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])


def st_u8(address, value):
    """The low byte of an Int32."""
    cute.arch.inline_ptx("st.global.u8 [{$r0}], {$r1};", read_only_args=[address, value])


def ld_bf16(address):
    """One bfloat16, as a Float32."""
    bits = cute.arch.inline_ptx("ld.global.u16 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])
    return (bits << 16).bitcast(Float32)


@cute.jit
def ld_id(ids, i, id_bytes):
    """Element i of int64 or int32 expert ids; one that needs more than 32 bits becomes -1, which is no expert."""
    expert = ld_i32(ids + Int64(i) * id_bytes)
    if id_bytes == 8:
        if ld_i32(ids + Int64(i) * 8 + 4) != expert >> 31:
            expert = Int32(-1)
    return expert


def ld_vector(address):
    """16 bytes as four Int32."""
    return cute.arch.inline_ptx(
        "ld.global.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Int32, Int32, Int32, Int32],
        read_only_args=[address],
    )


def ld_vector_if(address, wanted):
    """16 bytes as four Int32 where `wanted` (Int32) is not 0, else zeros and no access: a predicate, not a branch."""
    return cute.arch.inline_ptx(
        "{ .reg .pred p; setp.ne.s32 p, {$r1}, 0; mov.b32 {$w0}, 0; mov.b32 {$w1}, 0; mov.b32 {$w2}, 0; "
        "mov.b32 {$w3}, 0; @p ld.global.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}]; }",
        write_only_types=[Int32, Int32, Int32, Int32],
        read_only_args=[address, wanted],
    )


def bytes_at(address):
    """What a bulk copy takes."""
    return cute.make_ptr(Uint8, address, GMEM, assumed_align=16)


def unpack_bf16(words):
    """Four Int32 as eight Float32, in order of the columns."""
    values = []
    for word in words:
        values.append((word << 16).bitcast(Float32))
        values.append((word & -0x10000).bitcast(Float32))
    return values
