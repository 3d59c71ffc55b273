"""Ops of dense MLA decode: `cutehop::mla_plan`, `cutehop::mla_decode`, `cutehop::mla_decode_out`.

b sequences, s_q new tokens each, h_q query heads (1..128), h_kv kv heads (dividing h_q), V = first 512 columns of K.

mla_plan(cache_seqlens, s_q, h_q, h_kv=1, num_sms=132, split_tokens=0) -> (tile_scheduler_metadata, num_splits)
    Decides on the device, without a sync, which CTAs read which part of which sequence. Depends on the values of
    cache_seqlens only: one plan serves all layers of a decode step. See cutehop.ref.mla_plan for the tensors.

mla_decode(q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, softmax_scale, causal=False,
           attn_sink=None, cu_seqlens_q=None, max_seqlen_q=0, split_tokens=0, empty_lse_neg_inf=False) -> (out, lse)
    q                        (b, s_q, h_q, 576) bfloat16 | float16, last stride 1; copied first if its address or other
                             strides are no multiples of 16 bytes.
                             With cu_seqlens_q: (total_q, h_q, 576).
    k_cache                  (num_pages, page, h_kv, 576) in q's dtype, page 16|32|64|128, last stride 1, address and
                             other strides multiples of 16 bytes. Rows past a length may hold anything, even NaN.
    block_table              int32 (b, max_pages); entries at or past ceil(length / page) may hold anything.
    cache_seqlens            int32 (b,), 0 <= length <= max_pages * page. Not checked: that would wait for the GPU
                             (flash_mla_with_kvcache has validate=True).
    tile_scheduler_metadata  int32 (P, 8), num_splits int32 (b + 1,): mla_plan's, for these lengths and shapes. On a GPU
                             the kernels compare; where a plan does not fit the result is NaN, and a later call raises
                             RuntimeError.
    softmax_scale            finite, positive.
    causal                   token t of s sees keys < length - (s - 1 - t); False: every token sees all keys.
    attn_sink                float32 (h_q,): out is multiplied by exp(lse) / (exp(lse) + exp(sink)); lse is unchanged.
    cu_seqlens_q             int32 (b + 1,): sequence i owns rows [cu[i], cu[i + 1]) of q, at most max_seqlen_q of them.
                             Results of rows at or past cu[b] are unspecified.
    max_seqlen_q             needed with cu_seqlens_q, 0 otherwise; what mla_plan got as s_q.
    split_tokens             what mla_plan got. Above 0, a result's bits depend on its own sequence alone.
    empty_lse_neg_inf        lse of a token that sees no key is -inf instead of +inf; its out is 0 either way.
    Returns out (b, s_q, h_q, 512) or (total_q, h_q, 512) in q's dtype, lse float32 (b, h_q, s_q) or (h_q, total_q),
    natural logarithm. An empty batch gives empty results.

mla_decode_out(..., out, lse) -> ()
    The same into contiguous tensors of the caller.

Errors: TypeError for dtypes, ValueError for the rest; each names the value, the limit and the cure.
Source of behaviour: FlashMLA's dense decode; page sizes, sinks, ragged queries, fixed cuts and out= are additions.
"""

from __future__ import annotations

from torch import Tensor, float32
from torch._subclasses.fake_tensor import FakeTensor

from cutehop.comm.outputs import allocator
from cutehop.ops._define import define
from cutehop.ops._mla_checks import check_address, check_decode, check_plan, output_shapes
from cutehop.ref import mla as ref
from cutehop.ref import mla_plan as ref_plan


def _allocate_plan(
    cache_seqlens: Tensor, s_q: int, h_q: int, h_kv: int = 1, num_sms: int = 132, split_tokens: int = 0
) -> tuple[Tensor, Tensor]:
    check_plan(cache_seqlens, s_q, h_q, h_kv, num_sms, split_tokens)
    partitions = ref_plan.num_partitions(s_q, h_q, h_kv, num_sms)
    metadata = cache_seqlens.new_empty((partitions, ref_plan.METADATA_COLUMNS))
    return metadata, cache_seqlens.new_empty((cache_seqlens.shape[0] + 1,))


def _allocate_decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    tile_scheduler_metadata: Tensor,
    num_splits: Tensor,
    softmax_scale: float,
    causal: bool = False,
    attn_sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int = 0,
    split_tokens: int = 0,
    empty_lse_neg_inf: bool = False,
) -> tuple[Tensor, Tensor]:
    if isinstance(q, FakeTensor):  # real tensors are checked by the bodies, which mla_decode_out runs too
        check_decode(
            q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, softmax_scale, causal,
            attn_sink, cu_seqlens_q, max_seqlen_q, split_tokens, empty_lse_neg_inf,
        )  # fmt: skip
    out_shape, lse_shape = output_shapes(q, ragged=cu_seqlens_q is not None)
    allocate = allocator(q)
    return allocate(out_shape, _strides(out_shape), q.dtype), allocate(lse_shape, _strides(lse_shape), float32)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor of 2 to 4 dimensions."""
    *_, h, w = shape
    if len(shape) == 2:
        return w, 1
    return (h * w, w, 1) if len(shape) == 3 else (shape[1] * h * w, h * w, w, 1)


def _decode_cpu(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    tile_scheduler_metadata: Tensor,
    num_splits: Tensor,
    softmax_scale: float,
    causal: bool = False,
    attn_sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int = 0,
    split_tokens: int = 0,
    empty_lse_neg_inf: bool = False,
) -> tuple[Tensor, Tensor]:
    """The reference needs no plan; the plan's tensors are checked nevertheless, as on a GPU."""
    check_decode(
        q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, softmax_scale, causal, attn_sink,
        cu_seqlens_q, max_seqlen_q, split_tokens, empty_lse_neg_inf,
    )  # fmt: skip
    check_address("k_cache", k_cache)
    return ref.mla_decode(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        softmax_scale=softmax_scale,
        causal=causal,
        attn_sink=attn_sink,
        cu_seqlens_q=cu_seqlens_q,
        empty_lse_neg_inf=empty_lse_neg_inf,
    )


define(
    "mla_plan",
    "(Tensor cache_seqlens, int s_q, int h_q, int h_kv=1, int num_sms=132, int split_tokens=0)"
    " -> (Tensor tile_scheduler_metadata, Tensor num_splits)",
    allocate=_allocate_plan,
    cpu=ref_plan.mla_plan,
    cuda="cutehop.ops._mla_cuda:plan",
)
define(
    "mla_decode",
    "(Tensor q, Tensor k_cache, Tensor block_table, Tensor cache_seqlens, Tensor tile_scheduler_metadata,"
    " Tensor num_splits, float softmax_scale, bool causal=False, Tensor? attn_sink=None, Tensor? cu_seqlens_q=None,"
    " int max_seqlen_q=0, int split_tokens=0, bool empty_lse_neg_inf=False) -> (Tensor out, Tensor lse)",
    allocate=_allocate_decode,
    cpu=_decode_cpu,
    cuda="cutehop.ops._mla_cuda:decode",
    out_variant=True,
)
