"""The ops `torch.ops.cutehop.*`. Importing this registers them; kernels are imported by an op's first CUDA call."""

from cutehop.ops import ep, ep_ll, mla, moe  # noqa: F401
