"""A record of the low-latency dispatch, for both sides: head {token, {expert, row} per choice} | columns | scales."""

import cutlass.cute as cute

from ..ll_config import MAX_TOPK
from .config import BF16, UE8M0_SCALES

HEAD_WORDS = 2 + 2 * MAX_TOPK
FEW_COUNT = 1 << 30  # bit of a count of records that are words


@cute.jit
def record_size(a):
    """Bytes of a record that are sent. a: LlDispatchSendArgs."""
    size = a.head_bytes + a.hidden * 2
    if a.format != BF16:
        words_of_scales = (a.hidden // 128 + 3) // 4 if a.format == UE8M0_SCALES else a.hidden // 128
        size = a.head_bytes + (a.hidden + words_of_scales * 4 + 15) // 16 * 16
    return size
