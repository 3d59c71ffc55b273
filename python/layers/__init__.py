"""torch.nn modules built on the ops: MLA decode over a paged cache."""

from cutehop.layers.mla import MlaDecode
from cutehop.layers.mla_cache import MlaStep, OutOfPagesError, PagedMlaCache

__all__ = ["MlaDecode", "MlaStep", "OutOfPagesError", "PagedMlaCache"]
