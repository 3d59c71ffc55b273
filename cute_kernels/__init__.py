"""Device code, and how it is compiled, cached and launched. No torch and no NVSHMEM; cutlass only to compile."""

if __name__ != "cutehop.cute_kernels":
    raise ImportError("cute_kernels: import cutehop.cute_kernels, from a project that `pip install -e .` installed")
