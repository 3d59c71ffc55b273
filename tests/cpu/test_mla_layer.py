"""MlaDecode and PagedMlaCache against transformers' DeepSeek-V3 attention, sequence by sequence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from cutehop.layers import MlaDecode, OutOfPagesError, PagedMlaCache
from cutehop.ref import mla as ref

transformers = pytest.importorskip("transformers")
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek  # noqa: E402

HEADS = 4
HIDDEN = 96
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 64,  # small, so that the tests' positions lie beyond it
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}


class Own:
    """Transformers' attention with random weights; `__call__` gives the outputs of a whole sequence at once."""

    def __init__(self, q_lora_rank: int | None = 48, rope_interleave: bool = True, rope: dict[str, Any] | None = None):
        self.config = transformers.DeepseekV3Config(
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            q_lora_rank=q_lora_rank,
            kv_lora_rank=512,
            qk_nope_head_dim=32,
            qk_rope_head_dim=64,
            v_head_dim=24,
            rope_interleave=rope_interleave,
            rope_parameters=rope,
            max_position_embeddings=2560,
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        self.attention = deepseek.DeepseekV3Attention(self.config, 0).eval()
        for parameter in self.attention.parameters():
            # Gains other than 1 and weights large enough that the softmax is far from uniform.
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3 if parameter.ndim == 1 else 0.1)
        self.rotary = deepseek.DeepseekV3RotaryEmbedding(self.config)

    def rope(self, positions: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rotary(torch.empty(0, dtype=dtype), positions)

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        cos_sin = self.rope(torch.arange(len(hidden))[None], hidden.dtype)
        return self.attention(hidden[None], cos_sin, attention_mask=None)[0][0]


class Paged:
    """MlaDecode on a cache, driven by whole sequences of hidden states."""

    def __init__(self, own: Own, sequences: list[torch.Tensor], num_pages: int = 32, page_size: int = 64):
        self.own = own
        self.sequences = sequences
        self.layer = MlaDecode.from_attention(own.attention)
        self.cache = PagedMlaCache(1, num_pages, len(sequences), 256, page_size=page_size, dtype=sequences[0].dtype)
        self.cache.pages.fill_(torch.nan)  # what was not written must not be read
        self.outputs: list[list[torch.Tensor]] = [[] for _ in sequences]

    @torch.no_grad()
    def advance(self, tokens: dict[int, int], seqs: list[int] | None = None) -> None:
        """One step in which the given sequences gain that many tokens; idle and padded rows hold rubbish."""
        starts = self.cache.lengths
        self.cache.append(tokens)
        s_q = max(tokens.values())
        batch = list(range(len(self.sequences))) if seqs is None else seqs
        hidden = torch.full((len(batch), s_q, HIDDEN), 7.0, dtype=self.sequences[0].dtype)
        for row, seq in enumerate(batch):
            count = tokens.get(seq, 0)
            hidden[row, s_q - count :] = self.sequences[seq][starts[seq] : starts[seq] + count]
        step = self.cache.plan_step(HEADS, s_q, seqs)
        out = self.layer(hidden, *self.own.rope(step.positions, hidden.dtype), self.cache, 0, step)
        for row, seq in enumerate(batch):
            self.outputs[seq].extend(out[row, s_q - tokens.get(seq, 0) :])

    def output(self, seq: int) -> torch.Tensor:
        return torch.stack(self.outputs[seq])


def random_sequences(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, HIDDEN, generator=generator) for length in lengths]


@pytest.fixture
def fp32_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op takes bf16 and fp16 only. Its specification takes fp32, in which wrong algebra cannot hide in rounding."""

    def decode(q, k_cache, block_table, cache_seqlens, metadata, num_splits, **options):
        return ref.mla_decode(q, k_cache, block_table, cache_seqlens, **options)

    monkeypatch.setattr(torch.ops.cutehop, "mla_decode", decode)


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("rope", [None, YARN], ids=["rope", "yarn"])
@pytest.mark.parametrize("rope_interleave", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("q_lora_rank", [48, None])
def test_prefill_and_decode_equal_transformers(fp32_op, q_lora_rank, rope_interleave, rope):
    own = Own(q_lora_rank, rope_interleave, rope)
    paged = Paged(own, random_sequences(140))
    for count in (60, 67, *[1] * 13):  # the second chunk ends on another page than it starts, decode crosses one more
        paged.advance({0: count})
    assert_same(paged.output(0), own(paged.sequences[0]))


@pytest.mark.parametrize("page_size", [16, 64])
def test_sequences_of_different_length_share_a_batch(fp32_op, page_size):
    own = Own()
    paged = Paged(own, random_sequences(75, 12, 135, 40), page_size=page_size)
    paged.advance({0: 70, 1: 5, 2: 130})  # left padding; sequence 3 is idle
    paged.advance({0: 1, 1: 1, 2: 1})
    paged.advance({3: 33}, seqs=[3])  # a prefill alone while the others wait
    paged.advance({2: 1, 3: 1, 1: 1}, seqs=[2, 3, 1])  # another order
    for _ in range(2):
        paged.advance({0: 2, 1: 1, 2: 1, 3: 2})
    for seq, length in enumerate(paged.cache.lengths):
        assert len(paged.outputs[seq]) == length
        assert_same(paged.output(seq), own(paged.sequences[seq][:length]))


def test_released_pages_are_used_again_and_old_rows_do_not_matter(fp32_op):
    own = Own()
    paged = Paged(own, random_sequences(130, 100), num_pages=4)  # three to hand out
    paged.advance({0: 130})
    with pytest.raises(OutOfPagesError, match=r"1 pages needed, 0 free"):
        paged.cache.append({1: 1})
    assert paged.cache.lengths == [130, 0]
    paged.cache.release(0)
    assert paged.cache.lengths == [0, 0]
    assert paged.cache.num_free_pages == 3
    paged.advance({1: 99})
    paged.advance({1: 1})
    assert_same(paged.output(1), own(paged.sequences[1]))


def test_the_real_op_is_as_exact_as_transformers_in_bf16():
    own = Own(rope=YARN)
    sequence = random_sequences(140)[0].bfloat16()
    # The same bf16 weights everywhere; `exact` computes with them in fp32.
    own.attention.bfloat16()
    exact = copy.deepcopy(own)
    exact.attention.float()
    expected = exact(sequence.float())
    paged = Paged(own, [sequence])
    for count in (60, 67, *[1] * 13):
        paged.advance({0: count})
    own_error = (own(sequence).float() - expected).norm()
    our_error = (paged.output(0).float() - expected).norm()
    assert 0 < our_error <= 2 * own_error


def test_a_step_writes_only_the_rows_of_sequences_that_gained_tokens():
    cache = PagedMlaCache(2, 8, 3, 128, dtype=torch.float16)
    cache.append({0: 64, 1: 10})
    cache.pages.zero_()
    cache.append({0: 2})
    step = cache.plan_step(HEADS, 3)
    cache.write(1, step, torch.ones(3, 3, 576, dtype=torch.float16))
    assert step.cache_seqlens.tolist() == [66, 10, 0]
    assert step.positions.tolist() == [[63, 64, 65], [7, 8, 9], [0, 0, 0]]
    assert not cache.pages[0].any()
    written = {(page, row) for page, row, *_ in cache.pages[1].nonzero().tolist() if page != 0}
    page = int(step.block_table[0, 1])
    assert page != 0
    assert written == {(page, 0), (page, 1)}


def test_tables_keep_their_addresses():
    cache = PagedMlaCache(1, 8, 2, 128)

    def addresses() -> list[int]:
        step = cache.plan_step(HEADS)
        return [step.block_table.data_ptr(), step.cache_seqlens.data_ptr()]

    cache.append({0: 1})
    before = addresses()
    cache.append({0: 100, 1: 1})
    cache.release(0)
    assert addresses() == before


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({2: 1}, "sequence 2, valid 0..1"),
        ({-1: 1}, "sequence -1, valid 0..1"),
        ({0: 0}, "0 tokens for sequence 0, must be at least 1"),
        ({0: 101}, "sequence 0 would have 101 tokens, max_seq_tokens is 100"),
        ({1: 1, 0: 101}, "sequence 0 would have 101 tokens"),
    ],
)
def test_append_refuses_and_changes_nothing(tokens, message):
    cache = PagedMlaCache(1, 8, 2, 100)
    with pytest.raises(ValueError, match=message):
        cache.append(tokens)
    assert cache.lengths == [0, 0]
    assert cache.num_free_pages == 7


def test_a_step_that_leaves_tokens_out_is_refused():
    cache = PagedMlaCache(1, 8, 2, 100)
    cache.append({0: 3, 1: 1})
    with pytest.raises(ValueError, match=r"sequence 0 gained 3 tokens, the step has 2 for sequences all"):
        cache.plan_step(HEADS, 2)
    with pytest.raises(ValueError, match=r"sequence 1 gained 1 tokens, the step has 3 for sequences \[0\]"):
        cache.plan_step(HEADS, 3, seqs=[0])
    assert cache.plan_step(HEADS, 3).positions.shape == (2, 3)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 8, 1, 64), "num_layers 0"),
        ((1, 1, 1, 64), "num_pages 1, must be at least 2"),
        ((1, 8, 0, 64), "max_seqs 0"),
        ((1, 8, 1, 0), "max_seq_tokens 0"),
    ],
)
def test_cache_refuses_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        PagedMlaCache(*sizes)


def test_cache_of_another_dtype_is_refused():
    paged = Paged(Own(), random_sequences(4))
    paged.cache = PagedMlaCache(1, 8, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"latents are torch.float32, pages torch.bfloat16; create the cache"):
        paged.advance({0: 4})


def test_layer_refuses_sizes():
    def build(rank: int = 512, cached: int = 576, up: int = 2 * (32 + 24), values: int = 2 * 24) -> MlaDecode:
        linear = torch.nn.Linear
        modules = (linear(8, 192), linear(8, cached), torch.nn.Identity(), linear(rank, up), linear(values, 8))
        return MlaDecode(*modules, num_heads=2, v_head_dim=24, softmax_scale=0.1)

    assert build().qk_nope_head_dim == 32
    with pytest.raises(ValueError, match=r"latent 256 of 320 cached values per token, supported 512 of 576"):
        build(rank=256, cached=320)
    with pytest.raises(ValueError, match=r"kv_b_proj gives 48 values for 2 heads with v_head_dim 24"):
        build(up=48)
    with pytest.raises(ValueError, match=r"o_proj takes 50 values, must be 2 \* 24"):
        build(values=50)
