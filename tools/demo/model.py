"""The demo's model, tokenizer and prompts, and the same model with its attention and experts on cutehop's ops."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from cutehop.comm.base import Buffer
from cutehop.comm.config import EpConfig
from cutehop.comm.ll_base import LowLatencyBuffer
from cutehop.comm.ll_config import LlConfig
from cutehop.layers import ExpertParallelMoE, MlaDecode, PagedMlaCache

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
    """DeepSeek-V3 with its per-head sizes, low-rank projections, yarn and gating: one dense layer, then two of experts;
    fewer layers, heads, experts and hidden units."""
    return DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_group=8,
        topk_group=4,
        n_shared_experts=1,
        moe_intermediate_size=256,
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
    the next token depends on the last one and on what came before it, about half and half. The routers' weights are
    five times as large as usual, which spreads the scores, and their biases, float32 as in published models, random.
    """
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(demo_config())
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(10)
    biases = [torch.randn(model.config.n_routed_experts) * 0.05 for _ in routers(model)]
    model = model.to(torch.bfloat16)
    for gate, bias in zip(routers(model), biases):
        with torch.no_grad():
            gate.weight.mul_(5)
        gate.e_score_correction_bias = bias
    return model.to(device).eval()


def routers(model: DeepseekV3ForCausalLM) -> list[Any]:
    """Of the layers with experts, in order."""
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


@dataclass(frozen=True)
class Buffers:
    """What ranks exchange tokens through: many at once while they read prompts, few while they generate."""

    normal: Buffer
    few: LowLatencyBuffer

    def destroy(self) -> None:
        """Collective."""
        self.normal.destroy()
        self.few.destroy()


def make_buffers(group: torch.distributed.ProcessGroup, device: torch.device, tokens: int, sequences: int) -> Buffers:
    """For up to `tokens` tokens per rank in a normal call, and `sequences` in a decode step. Collective."""
    config = demo_config()
    ranks, hidden = group.size(), config.hidden_size
    experts, k = config.n_routed_experts, config.num_experts_per_tok
    normal, few = EpConfig(ranks, hidden, tokens, experts, k), LlConfig(ranks, hidden, sequences, experts, k)
    if device.type == "cuda":
        from cutehop.comm.buffer import CudaBuffer
        from cutehop.comm.ll_buffer import CudaLowLatencyBuffer

        sms = torch.cuda.get_device_properties(device).multi_processor_count // (2 * ranks)  # ranks may share a GPU
        return Buffers(CudaBuffer(group, normal, num_sms=sms), CudaLowLatencyBuffer(group, few, num_sms=sms))
    from cutehop.comm.gloo import GlooBuffer
    from cutehop.comm.ll_gloo import GlooLowLatencyBuffer

    return Buffers(GlooBuffer(group, normal), GlooLowLatencyBuffer(group, few))


class PagedModel:
    """The model's weights, shared, with MlaDecode for its attention and ExpertParallelMoE for its experts.

    Without buffers this process has all experts. With them it has its rank's, and the methods are collective.
    """

    def __init__(self, model: DeepseekV3ForCausalLM, cache: PagedMlaCache, buffers: Buffers | None = None) -> None:
        self.model, self.cache = model, cache
        self.attentions = [MlaDecode.from_attention(layer.self_attn) for layer in model.model.layers]
        options = {} if buffers is None else {"buffer": buffers.normal, "low_latency_buffer": buffers.few}
        self.few = buffers is not None
        self.blocks = [
            ExpertParallelMoE.from_moe(layer.mlp, **options) if hasattr(layer.mlp, "gate") else layer.mlp
            for layer in model.model.layers
        ]

    @property
    def routers(self) -> list[torch.nn.Module]:
        return [block.gate for block in self.blocks if isinstance(block, ExpertParallelMoE)]

    def append(self, ids: Tensor) -> None:
        """Make room for ids (b, s_q) in sequences 0 .. b-1. On the host; `forward` is on the device."""
        batch, tokens = ids.shape
        self.cache.append(dict.fromkeys(range(batch), tokens))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (b, vocabulary) of the last position of ids, for which `append` made room. Can be captured."""
        own, tokens = self.model.model, ids.shape[1]
        step = self.cache.plan_step(self.model.config.num_attention_heads, tokens)
        x = own.embed_tokens(ids)
        angles = own.rotary_emb(x, step.positions)
        for i, layer in enumerate(own.layers):
            x = x + self.attentions[i](layer.input_layernorm(x), *angles, self.cache, i, step)
            x = x + self._block(i, layer.post_attention_layernorm(x), decode=tokens == 1)
        return self.model.lm_head(own.norm(x[:, -1]))

    def _block(self, i: int, x: Tensor, decode: bool) -> Tensor:
        block = self.blocks[i]
        return block(x, low_latency=decode and self.few) if isinstance(block, ExpertParallelMoE) else block(x)


class Decoder:
    """Calls a PagedModel; on a GPU steps of one token, after the first one, are replays of a CUDA graph."""

    def __init__(self, paged: PagedModel) -> None:
        self.paged = paged
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ids: Tensor | None = None
        self._logits: Tensor | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits (b, vocabulary) of the last position."""
        self.paged.append(ids)
        if ids.device.type == "cpu" or ids.shape[1] > 1:
            return self.paged.forward(ids)
        if self._ids is None:  # loads the kernels, which a capture cannot
            self._ids = ids.clone()
            return self.paged.forward(ids)
        self._ids.copy_(ids)
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self.paged.forward(self._ids)
        self._graph.replay()
        assert self._logits is not None
        return self._logits.clone()
