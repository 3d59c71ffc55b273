"""cutehop (CuTe on Hopper): MLA decode attention and expert-parallel communication for SM90 GPUs.

`import cutehop` registers the ops under `torch.ops.cutehop`. It imports no cutlass and no NVSHMEM and creates no CUDA
context: kernels are imported by the first call that runs one.
"""

from pathlib import Path

try:
    import torch as _torch  # noqa: F401
except ImportError as error:  # a clash between CUDA packages shows up here first; the doctor runs without torch
    _doctor = Path(__file__).with_name("doctor.py")
    raise ImportError(
        f"cutehop: torch did not import ({error}); `python {_doctor}` names the cause and the cure"
    ) from error

from cutehop import ops as _ops  # noqa: F401
from cutehop.mla import flash_mla_with_kvcache, get_mla_metadata

__version__ = "0.1.0"

__all__ = ["__version__", "flash_mla_with_kvcache", "get_mla_metadata"]
