"""The demo on a CPU: it passes as it is, it fails when a layer is wrong, and its judgement is right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from cutehop.layers import ExpertParallelMoE, MlaDecode, mla_cache
from tools.bench.roofline import Ceilings
from tools.demo import __main__ as demo
from tools.demo import generate, kernels, model, routing

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PROMPTS", 2)
    monkeypatch.setattr(demo, "PROMPT_TOKENS", 60)
    monkeypatch.setattr(demo, "NEW_TOKENS", 8)  # decode crosses into the second page


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our generation in this process, where tests can change it, with all experts on one rank."""

    def generate_here(request, ranks, folder):
        return generate.generate_paged(model.build_model(CPU), request.prompts, request.count)

    monkeypatch.setattr(demo, "generate_on_ranks", generate_here)


@pytest.mark.dist
@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU path of the command")
def test_demo_passes_on_two_ranks(capsys):
    assert demo.main(["--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "2 ranks, CPU references, gloo" in output
    assert output.count(": ok") == 3


def test_a_failed_rank_fails_the_demo(monkeypatch, capsys):
    monkeypatch.setattr("cutehop.launch.main", lambda arguments: 1)
    assert demo.main(["--device", "cpu"]) == 1
    assert "a rank failed" in capsys.readouterr().out


def test_one_plan_per_step(here, monkeypatch):
    plans = []

    def counted(*args):
        plans.append(args)
        return plan(*args)

    plan = mla_cache.get_mla_metadata
    monkeypatch.setattr(mla_cache, "get_mla_metadata", counted)
    assert demo.main(["--device", "cpu"]) == 0
    assert len(plans) == 8  # one chunk of prompt and seven decode steps; three layers share each


def wrong_attention(layer: MlaDecode) -> None:
    layer.softmax_scale *= 1.2


def wrong_experts(layer: ExpertParallelMoE) -> None:
    layer.experts.down_proj = torch.nn.Parameter(layer.experts.down_proj * 1.2)


def wrong_router(layer: ExpertParallelMoE) -> None:
    layer.gate.e_score_correction_bias = None


@pytest.mark.parametrize(
    ("kind", "method", "spoil", "line"),
    [
        (MlaDecode, "from_attention", wrong_attention, "largest error of a logit"),
        (ExpertParallelMoE, "from_moe", wrong_experts, "largest error of a logit"),
        (ExpertParallelMoE, "from_moe", wrong_router, "score of a chosen expert"),
    ],
)
def test_demo_fails_if_a_layer_is_wrong(here, monkeypatch, capsys, kind, method, spoil, line):
    right = getattr(kind, method)

    def wrong(*args, **options):
        layer = right(*args, **options)
        spoil(layer)
        return layer

    monkeypatch.setattr(kind, method, wrong)
    assert demo.main(["--device", "cpu"]) == 1
    (judged,) = (each for each in capsys.readouterr().out.splitlines() if line in each)
    assert "TOO LARGE" in judged


def test_demo_refuses_a_gpu_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--device", "cuda"])
    assert "no SM90 GPU here" in capsys.readouterr().err


def test_comparison_finds_the_first_divergence_and_weighs_it():
    network = model.build_model(CPU)
    prompts = torch.arange(20).view(2, 10)
    own = generate.generate_own(network, prompts, 4)
    same = generate.compare(network, prompts, own, own)
    assert same.ok
    assert same.divergences == []
    assert 0 < same.own.logits == same.ours.logits
    assert same.decisions == 2 * 2 * 13

    changed = own.tokens.clone()
    changed[1, 2:] = (changed[1, 2:] + 1) % model.VOCABULARY
    found = generate.compare(network, prompts, own, replace(own, tokens=changed))
    assert [(d.sequence, d.index, d.ours, d.rerouted) for d in found.divergences] == [(1, 2, int(changed[1, 2]), 0)]
    assert not found.tokens_ok  # an arbitrary other token is further away than rounding can explain

    noisy = generate.compare(network, prompts, own, replace(own, logits=own.logits + 5 * same.own.logits))
    assert (noisy.logits_ok, noisy.tokens_ok, noisy.routes_ok) == (False, True, True)

    routes = own.routes.clone()
    routes[1, 0, 5] = (routes[1, 0, 5] + 1) % network.config.n_routed_experts
    moved = generate.compare(network, prompts, own, replace(own, routes=routes))
    assert not moved.routes_ok
    assert moved.ours.rerouted > moved.own.rerouted


def test_regret_is_what_a_score_would_have_to_change():
    scores = torch.tensor([[0.9, 0.1, 0.8, 0.7, 0.3, 0.2]])  # groups of two: 1.0, 1.5, 0.5

    def regret(*chosen):
        return routing.regret(scores, torch.tensor([chosen]), 3, 2).item()

    assert regret(0, 2) == 0
    assert regret(2, 0) == 0
    assert regret(0, 3) == pytest.approx(0.1)  # instead of 2, in a group that it chose from
    assert regret(2, 4) == pytest.approx(max(0.7 - 0.3, (1.0 - 0.5) / 2))  # 3 passed over, and the group's place
    assert regret(2, 3) == 0  # of one group: whether 0 was looked at does not show


def test_imposed_routes_are_taken_and_recorded():
    network = model.build_model(CPU)
    gates, ids = model.routers(network), torch.arange(6)[None]
    routes = torch.arange(2 * 6 * 4).view(2, 6, 4) % 32
    with torch.inference_mode(), routing.imposed(gates, routes) as scores, routing.recorded(gates) as latest:
        network(ids)
    assert torch.equal(torch.stack([routing.choices(each) for each in latest]), routes)
    weights = scores[0].gather(1, routes[0])
    torch.testing.assert_close(latest[0][1], weights / weights.sum(1, keepdim=True) * 2.5)
    assert not any(gate._forward_hooks for gate in gates)


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
