"""From a CuTe DSL program to a launched kernel: compile, cache on disk, load, launch. cutlass only to compile."""

from cutehop.cute_kernels.jit.bundle import Bundle, Program
from cutehop.cute_kernels.jit.cache import Compiled, compiled
from cutehop.cute_kernels.jit.module import Kernel
from cutehop.cute_kernels.jit.tensormap import TensorMap, tensor_map

__all__ = ["Bundle", "Compiled", "Kernel", "Program", "TensorMap", "compiled", "tensor_map"]
