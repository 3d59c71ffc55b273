"""The demo on a CPU: it passes as it is, it fails when attention is wrong, and its judgement is right."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from cutehop.layers import MlaDecode, mla_cache
from tools.bench.roofline import Ceilings
from tools.demo import __main__ as demo
from tools.demo import generate, kernels, model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PROMPTS", 2)
    monkeypatch.setattr(demo, "PROMPT_TOKENS", 60)
    monkeypatch.setattr(demo, "NEW_TOKENS", 8)  # decode crosses into the second page


def test_demo_passes_and_plans_once_per_step(monkeypatch, capsys):
    plans = []

    def counted(*args):
        plans.append(args)
        return plan(*args)

    plan = mla_cache.get_mla_metadata
    monkeypatch.setattr(mla_cache, "get_mla_metadata", counted)
    assert demo.main(["--device", "cpu"]) == 0
    # One chunk of prompt and seven decode steps, once freely and once following; three layers share each plan.
    assert len(plans) == 2 * 8
    output = capsys.readouterr().out
    assert "CPU reference" in output
    assert "limit twice own: ok" in output


def test_demo_fails_if_attention_is_wrong(monkeypatch, capsys):
    right = MlaDecode.from_attention

    def wrong(attention):
        layer = right(attention)
        layer.softmax_scale *= 1.2
        return layer

    monkeypatch.setattr(MlaDecode, "from_attention", wrong)
    assert demo.main(["--device", "cpu"]) == 1
    assert "TOO LARGE" in capsys.readouterr().out


def test_demo_refuses_a_gpu_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--device", "cuda"])
    assert "no SM90 GPU here" in capsys.readouterr().err


def test_the_models_own_attention_comes_back():
    network = model.build_model(CPU)
    own = [layer.self_attn for layer in network.model.layers]
    prompts = torch.zeros(1, 3, dtype=torch.int64)
    generate.generate_paged(network, prompts, 2)
    assert [layer.self_attn for layer in network.model.layers] == own


def test_a_generation_can_follow_given_tokens():
    network = model.build_model(CPU)
    prompts = torch.arange(10)[None]
    free = generate.generate_paged(network, prompts, 4)
    followed = generate.generate_paged(network, prompts, 4, follow=free.tokens)
    assert torch.equal(free.tokens, followed.tokens)
    assert torch.equal(free.logits, followed.logits)
    other = (free.tokens + 1) % model.VOCABULARY
    followed = generate.generate_paged(network, prompts, 4, follow=other)
    assert torch.equal(free.logits[:, 0], followed.logits[:, 0])
    assert not torch.equal(free.logits[:, 1], followed.logits[:, 1])


def test_comparison_finds_the_first_divergence_and_weighs_it():
    network = model.build_model(CPU)
    prompts = torch.arange(20).view(2, 10)
    own = generate.generate_own(network, prompts, 4)
    same = generate.compare(network, prompts, own, own, own)
    assert same.ok
    assert same.divergences == []
    assert 0 < same.own_error == same.our_error

    changed = own.tokens.clone()
    changed[1, 2:] = (changed[1, 2:] + 1) % model.VOCABULARY
    ours = generate.Generation(changed, own.logits, 0.0, 0.0)
    found = generate.compare(network, prompts, own, ours, own)
    assert [(d.sequence, d.index, d.ours) for d in found.divergences] == [(1, 2, int(changed[1, 2]))]
    assert not found.ok  # an arbitrary other token is further away than rounding can explain

    noisy = generate.Generation(own.tokens, own.logits + 5 * same.own_error, 0.0, 0.0)
    assert not generate.compare(network, prompts, own, own, noisy).ok


@pytest.mark.parametrize(("gap", "explained"), [(0.019, True), (0.02, True), (0.021, False)])
def test_a_divergence_is_explained_by_two_roundings_at_most(gap, explained):
    assert generate.Divergence(0, 0, 1, 2, gap, 0.01).explained is explained


def test_tokenizer_returns_the_text_and_prompts_are_passages_of_it():
    text = model.TEXT.read_text(encoding="utf-8")
    tokenizer = model.train_tokenizer(text)
    assert tokenizer.get_vocab_size() == model.VOCABULARY
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    prompts = model.read_prompts(tokenizer, text, 3, 50)
    assert prompts.shape == (3, 50)
    assert all(tokenizer.decode(prompt.tolist()) in text for prompt in prompts)
    assert text.startswith(tokenizer.decode(prompts[0].tolist()))


def test_kernel_rows_are_checked_and_set_against_the_roofline(monkeypatch):
    row = kernels.Row(2, 2, 70, 16, causal=True)
    ceilings = Ceilings(copy_gbs=1.0, read_gbs=2.0, matmul_tflops=1e6)
    (result,) = kernels.run_rows([row], ceilings, CPU, repeats=2)
    assert result.wrong == ""
    assert result.roofline_us == pytest.approx(row.bytes / 2e3)
    assert str(result).endswith(" ok")

    def wrong_reference(inputs):
        out, lse = reference(inputs)
        return out * 1.05, lse

    reference = kernels.reference
    monkeypatch.setattr(kernels, "reference", wrong_reference)
    (result,) = kernels.run_rows([row], ceilings, CPU, repeats=2)
    assert "wrong result" in str(result)
