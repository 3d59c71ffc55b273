"""torch.nn modules built on the ops: MLA decode over a paged cache, mixture of experts over the ranks of a node."""

from cutehop.layers.mla import MlaDecode
from cutehop.layers.mla_cache import MlaStep, OutOfPagesError, PagedMlaCache
from cutehop.layers.moe import ExpertParallelMoE, MoeRouter, Routing
from cutehop.layers.moe_shared import Fp8SharedExpert, SharedExpert
from cutehop.layers.moe_weights import MoeExperts

__all__ = [
    "ExpertParallelMoE",
    "Fp8SharedExpert",
    "MlaDecode",
    "MlaStep",
    "MoeExperts",
    "MoeRouter",
    "OutOfPagesError",
    "PagedMlaCache",
    "Routing",
    "SharedExpert",
]
