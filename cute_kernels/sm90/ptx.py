"""Single PTX instructions the DSL has no typed form for, or whose typed form hides what the kernels rely on."""

import cutlass.cute as cute
from cutlass import Float32, Int32


def st_shared_zero16(smem_addr):
    cute.arch.inline_ptx(
        "st.shared.v4.b32 [{$r0}], {{$r1}, {$r1}, {$r1}, {$r1}};", read_only_args=[smem_addr, Int32(0)]
    )


def st_global(gmem_addr, *values):
    """One store of 1, 2 or 4 adjacent registers of 32 bits, Int32 or Float32."""
    names = ", ".join(f"{{$r{i + 1}}}" for i in range(len(values)))
    vector, names = ("", names) if len(values) == 1 else (f".v{len(values)}", f"{{{names}}}")
    cute.arch.inline_ptx(f"st.global{vector}.b32 [{{$r0}}], {names};", read_only_args=[gmem_addr, *values])


def ld_global_v4_f32(gmem_addr):
    """16-byte load of four floats, coherent (written earlier by another kernel that may still be in the same graph)."""
    return cute.arch.inline_ptx(
        "ld.global.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Float32, Float32, Float32, Float32],
        read_only_args=[gmem_addr],
    )


def ld_global_v2_f32(gmem_addr):
    """8-byte load of two floats, coherent."""
    return cute.arch.inline_ptx(
        "ld.global.v2.f32 {{$w0}, {$w1}}, [{$r0}];", write_only_types=[Float32, Float32], read_only_args=[gmem_addr]
    )


def pack_f16(a, b):
    """Two floats as fp16, to nearest even; a in the lower half."""
    return cute.arch.inline_ptx(
        "cvt.rn.f16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Int32], read_only_args=[a, b]
    )


def unpack_f16(word):
    """The lower and the upper half, as floats."""
    return cute.arch.inline_ptx(
        "{ .reg .b16 low, high; mov.b32 {low, high}, {$r0}; cvt.f32.f16 {$w0}, low; cvt.f32.f16 {$w1}, high; }",
        write_only_types=[Float32, Float32],
        read_only_args=[word],
    )


def stmatrix_x4_trans(smem_addr, a, b, c, d):
    """Four 8 x 8 matrices of 16 bits, transposed; lanes 8 g to 8 g + 7 give the rows' addresses of matrix g."""
    cute.arch.inline_ptx(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
        read_only_args=[smem_addr, a, b, c, d],
    )


def movmatrix(word):
    """An 8 x 8 matrix of 16 bits, transposed."""
    return cute.arch.inline_ptx(
        "movmatrix.sync.aligned.m8n8.trans.b16 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[word]
    )


def halves_of(a, b):
    """The lower 16 bits of two floats, and the upper."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 x, y; mov.b32 x, {$r0}; mov.b32 y, {$r1}; "
        "prmt.b32 {$w0}, x, y, 0x5410; prmt.b32 {$w1}, x, y, 0x7632; }",
        write_only_types=[Int32, Int32],
        read_only_args=[a, b],
    )


def floats_of(low, high):
    """The inverse of halves_of."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 x, y; prmt.b32 x, {$r0}, {$r1}, 0x5410; prmt.b32 y, {$r0}, {$r1}, 0x7632; "
        "mov.b32 {$w0}, x; mov.b32 {$w1}, y; }",
        write_only_types=[Float32, Float32],
        read_only_args=[low, high],
    )


def red_release_gpu_if(gmem_addr, value, wanted):
    """Add to an Int32 where `wanted` (Int32) is not 0, after what this thread has stored or seen is visible.

    A predicate, not a branch: see the log of mla/README.md.
    """
    cute.arch.inline_ptx(
        "{ .reg .pred p; setp.ne.s32 p, {$r2}, 0; @p red.release.gpu.global.add.s32 [{$r0}], {$r1}; }",
        read_only_args=[gmem_addr, value, wanted],
    )


def st_sys_if(gmem_addr, value, wanted):
    """Store an Int32 where `wanted` (Int32) is not 0, as one that the host may read at any time."""
    cute.arch.inline_ptx(
        "{ .reg .pred p; setp.ne.s32 p, {$r2}, 0; @p st.relaxed.sys.global.b32 [{$r0}], {$r1}; }",
        read_only_args=[gmem_addr, value, wanted],
    )


def pin_registers(frag32):
    """Route 32-bit registers through a volatile mov.

    LLVM sinks the conversions that produce a wgmma A operand past the fence; ptxas then splits the group and
    serialises it (note C7519). A volatile mov right before the fence keeps the producers above it.
    """
    for j in range(cute.size(frag32)):
        frag32[j] = cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[frag32[j]])


def weighted_sum(a, wa, b, wb):
    """a * wa + b * wb with every step rounded, so that swapping (a, wa) with (b, wb) gives the same bits (no fma)."""
    return cute.arch.inline_ptx(
        "{ .reg .f32 x, y; mul.rn.f32 x, {$r0}, {$r1}; mul.rn.f32 y, {$r2}, {$r3}; add.rn.f32 {$w0}, x, y; }",
        write_only_types=[Float32],
        read_only_args=[a, wa, b, wb],
    )


def ld_shared_v4(pointer):
    """16 bytes of shared memory as four Int32."""
    return cute.arch.inline_ptx(
        "ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Int32, Int32, Int32, Int32],
        read_only_args=[pointer],
    )


def ld_shared_cluster(pointer, rank):
    """One Int32 at the place of `pointer`, but in the shared memory of CTA `rank` of the cluster."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 a; mapa.shared::cluster.u32 a, {$r0}, {$r1}; ld.shared::cluster.b32 {$w0}, [a]; }",
        write_only_types=[Int32],
        read_only_args=[pointer, rank],
    )


def st_shared_v4(pointer, a, b, c, d):
    """16-byte store of four 32-bit registers to shared memory."""
    cute.arch.inline_ptx(
        "st.shared.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", read_only_args=[pointer, a, b, c, d]
    )


def st_shared_v2(pointer, a, b):
    """8-byte store of two 32-bit registers to shared memory."""
    cute.arch.inline_ptx("st.shared.v2.b32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[pointer, a, b])


def abs_f32(x):
    return cute.arch.inline_ptx("abs.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


def div_rn(x, y):
    """x / y rounded to nearest even, whatever the compiler's options."""
    return cute.arch.inline_ptx("div.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[x, y])


def cvt_e4m3x4(a, b, c, d):
    """Four floats to e4m3, to nearest even, saturating; a in the lowest byte."""
    return cute.arch.inline_ptx(
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, {$r1}, {$r0}; "
        "cvt.rn.satfinite.e4m3x2.f32 high, {$r3}, {$r2}; mov.b32 {$w0}, {low, high}; }",
        write_only_types=[Int32],
        read_only_args=[a, b, c, d],
    )


def add_product(total, x, y):
    """total + x * y with product and sum each rounded (no fma)."""
    return cute.arch.inline_ptx(
        "{ .reg .f32 p; mul.rn.f32 p, {$r1}, {$r2}; add.rn.f32 {$w0}, {$r0}, p; }",
        write_only_types=[Float32],
        read_only_args=[total, x, y],
    )


def add_bf16x2(a, b):
    """Sums of two pairs of bf16, to nearest even."""
    return cute.arch.inline_ptx("add.rn.bf16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[a, b])


def barrier_or(value, barrier_id: int = 0, threads: int | None = None):
    """A barrier of `threads` (None: all of the CTA) that tells each of them whether the value of any was not 0."""
    place = f"{barrier_id}" if threads is None else f"{barrier_id}, {threads}"
    return cute.arch.inline_ptx(
        "{ .reg .pred p, q; setp.ne.b32 p, {$r0}, 0; "
        f"barrier.cta.red.or.pred q, {place}, p; "
        "selp.b32 {$w0}, 1, 0, q; }",
        write_only_types=[Int32],
        read_only_args=[value],
    )


def ld_global_i32(gmem_addr):
    return cute.arch.inline_ptx("ld.global.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[gmem_addr])
