"""The demo's model, tokenizer and prompts, and the adapter that runs the model's attention through cutehop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from cutehop.layers import MlaDecode, MlaStep, PagedMlaCache

TEXT = Path(__file__).with_name(
    "text.txt"
)  # chapters 1 and 2 of Alice's Adventures in Wonderland (1865), public domain
VOCABULARY = 1024


def train_tokenizer(text: str) -> Tokenizer:
    """A byte-level BPE tokenizer of the text itself: takes a fraction of a second and needs no download."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def read_prompts(tokenizer: Tokenizer, text: str, count: int, tokens: int) -> Tensor:
    """`count` passages of `tokens` tokens each, spread evenly over the text: (count, tokens) int64."""
    ids = torch.tensor(tokenizer.encode(text).ids)
    starts = torch.linspace(0, len(ids) - tokens, count).long()
    return torch.stack([ids[start : start + tokens] for start in starts])


def demo_config() -> DeepseekV3Config:
    """DeepSeek-V3 with its per-head sizes, low-rank projections and yarn; fewer layers, heads and hidden units.

    All layers are dense: a router picks experts by comparison, so rounding can change which expert runs, and the two
    generations could differ for a reason that has nothing to do with attention.
    """
    layers = 3
    return DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=layers,
        first_k_dense_replace=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=192,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=163840,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        bos_token_id=None,
        eos_token_id=None,
    )


def build_model(device: torch.device) -> DeepseekV3ForCausalLM:
    """Transformers' own model with random bf16 weights, the same on every machine.

    Embeddings are ten times their usual size. At the usual one a random model soon repeats a single token; with these
    the next token depends on the last one and on what came before it, about half and half.
    """
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(demo_config())
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(10)
    return model.to(torch.bfloat16).to(device).eval()


class PagedModel:
    """Runs a model whose attention goes through cutehop. One cache, one plan per forward pass shared by all layers."""

    def __init__(self, model: DeepseekV3ForCausalLM, cache: PagedMlaCache) -> None:
        self.model = model
        self.cache = cache
        self.step: MlaStep | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        """Append ids (b, s_q) to sequences 0 .. b-1; logits (b, vocabulary) of the last position."""
        batch, tokens = ids.shape
        self.cache.append(dict.fromkeys(range(batch), tokens))
        self.step = self.cache.plan_step(self.model.config.num_attention_heads, tokens)
        # use_cache=False: transformers keeps no cache of its own, the adapters below have one.
        return self.model(ids, position_ids=self.step.positions, use_cache=False, logits_to_keep=1).logits[:, -1]


class _Adapter(nn.Module):
    """Has the signature of transformers' attention and calls MlaDecode, which is causal and needs no mask."""

    def __init__(self, attention: MlaDecode, run: PagedModel, layer: int) -> None:
        super().__init__()
        self.attention = attention
        self.run = run
        self.layer = layer

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: object
    ) -> tuple[Tensor, None]:
        assert self.run.step is not None
        out = self.attention(hidden_states, *position_embeddings, self.run.cache, self.layer, self.run.step)
        return out, None


@contextmanager
def paged_attention(model: DeepseekV3ForCausalLM, cache: PagedMlaCache) -> Iterator[PagedModel]:
    """Within the block every layer's attention is MlaDecode on `cache`, with the model's own weights."""
    run = PagedModel(model, cache)
    own = [layer.self_attn for layer in model.model.layers]
    try:
        for i, layer in enumerate(model.model.layers):
            layer.self_attn = _Adapter(MlaDecode.from_attention(own[i]), run, i)
        yield run
    finally:
        for layer, attention in zip(model.model.layers, own, strict=True):
            layer.self_attn = attention
