"""`python -m tools.demo`: a small DeepSeek-V3 model generates with transformers' layers and with cutehop's; compared.

Experts are spread over ranks, two on a CPU, eight on a GPU that they share. On an H100 kernels run at real DeepSeek
head sizes too. Exit code 0: the generations agree up to rounding, and all kernel outputs are right. Else 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
import transformers

from tools.bench.roofline import measure_ceilings
from tools.demo import kernels
from tools.demo.generate import Comparison, Generation, compare, generate_own
from tools.demo.model import TEXT, build_model, read_prompts, train_tokenizer
from tools.demo.ranks import Request, generate_on_ranks

RANKS = {"cpu": 2, "cuda": 8}
PROMPTS = 8  # split evenly among the ranks
PROMPT_TOKENS = 120
NEW_TOKENS = 40  # the sequences cross from their second page to the third


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where an sm_90 GPU is, else cpu")
    choice = parser.parse_args(argv).device
    if choice == "cuda" and not _has_sm90():
        parser.error("--device cuda: there is no SM90 GPU here; leave the option out to run the CPU reference")
    device = torch.device(choice or ("cuda" if _has_sm90() else "cpu"))
    agrees = _generate_and_compare(device)
    kernels_right = device.type == "cpu" or _run_kernels(device)
    return 0 if agrees and kernels_right else 1


def _generate_and_compare(device: torch.device) -> bool:
    text = TEXT.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text)
    prompts = read_prompts(tokenizer, text, PROMPTS, PROMPT_TOKENS).to(device)
    model = build_model(device)
    config, ranks = model.config, RANKS[device.type]
    expert_layers = config.num_hidden_layers - config.first_k_dense_replace
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    _say(
        f"model: DeepseekV3ForCausalLM of transformers {transformers.__version__}, random bf16 weights, "
        f"{millions:.1f} M parameters, {config.num_hidden_layers} layers, hidden {config.hidden_size}; attention: "
        f"{config.num_attention_heads} heads, latent {config.kv_lora_rank}+{config.qk_rope_head_dim}; "
        f"experts: {config.num_experts_per_tok} of {config.n_routed_experts} in the best {config.topk_group} of "
        f"{config.n_group} groups, and a shared one, in {expert_layers} layers"
    )
    _say(
        f"text: {TEXT.name}, {len(text)} characters, {len(tokenizer.encode(text).ids)} tokens by a byte-level BPE of "
        f"{tokenizer.get_vocab_size()}; {PROMPTS} prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} generated for each"
    )
    generate_own(model, prompts, 4)  # so that neither side is timed cold
    start = time.perf_counter()
    own = generate_own(model, prompts, NEW_TOKENS)
    _say(f"generated with transformers' layers in {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="cutehop-demo-") as folder:
        ours = generate_on_ranks(Request(prompts.cpu(), NEW_TOKENS, device.type), ranks, Path(folder))
    if ours is None:
        _say("a rank failed: nothing to compare")
        return False
    _say(
        f"generated with cutehop's layers on {ranks} ranks in {time.perf_counter() - start:.1f} s, their start included"
    )
    comparison = compare(model, prompts, own, ours)
    _say("compared with the same weights in fp32\n")
    shown = -1
    _say(f"prompt ...{tokenizer.decode(prompts[shown].tolist())[-60:]!r} goes on (weights are random: expect no sense)")
    _say(f"  own:  {tokenizer.decode(own.tokens[shown].tolist())[:90]!r}")
    _say(f"  ours: {tokenizer.decode(ours.tokens[shown].tolist())[:90]!r}\n")
    _print_comparison(comparison, own, tokenizer)
    _print_times(device, own, ours)
    return comparison.ok


def _print_comparison(comparison: Comparison, generation: Generation, tokenizer: tokenizers.Tokenizer) -> None:
    sequences, count = generation.tokens.shape
    own, ours = comparison.own, comparison.ours
    _say(f"tokens: {sequences - len(comparison.divergences)} of {sequences} sequences equal in all {count} tokens")
    for d in comparison.divergences:
        _say(
            f"  sequence {d.sequence}: first difference at token {d.index}, own {tokenizer.decode([d.own])!r}, ours "
            f"{tokenizer.decode([d.ours])!r}; {d.rerouted} tokens read until then went to other experts"
        )
    _say("each against the model in fp32 that reads the same tokens and takes the same experts:")
    rows = (
        ("largest error of a logit", own.logits, ours.logits, 2 * own.logits, comparison.logits_ok),
        ("logit of a chosen token below the best", own.token, ours.token, 2 * own.logits, comparison.tokens_ok),
        (
            "score of a chosen expert below the best",
            own.routes,
            ours.routes,
            2 * (own.scores or 0),
            comparison.routes_ok,
        ),
    )
    for what, theirs, mine, limit, ok in rows:
        verdict = "ok" if ok else "TOO LARGE: bf16 rounding does not explain it"
        _say(f"  {what:<40} {theirs:.4f} (own) {mine:.4f} (ours), limit {limit:.4f}: {verdict}")
    _say(
        f"  experts that fp32 would not have chosen: {own.rerouted} (own) and {ours.rerouted} (ours) of "
        f"{comparison.decisions} choices\n"
    )


def _print_times(device: torch.device, own: Generation, ours: Generation) -> None:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    ranks = RANKS[device.type]
    rows = (
        ("transformers", own, f"one process, torch on {gpu or f'the CPU, {torch.get_num_threads()} threads'}"),
        (
            "cutehop",
            ours,
            f"{ranks} ranks, {f'{gpu}, decode in a CUDA graph' if gpu else 'CPU references, gloo, 1 thread each'}",
        ),
    )
    _say(f"{'layers':<14} {'prefill ms':>11} {'ms per step':>12} {'tokens per s':>13}   ran on")
    for name, run, where in rows:
        rate = 1e3 * len(run.tokens) / run.step_ms
        _say(f"{name:<14} {run.prefill_ms:>11.1f} {run.step_ms:>12.2f} {rate:>13.0f}   {where}")
    _say(f"one step makes one token for each of the {len(own.tokens)} sequences; medians of {NEW_TOKENS - 1} steps")


def _run_kernels(device: torch.device) -> bool:
    _say(f"\nkernels at DeepSeek-V3's head sizes on {torch.cuda.get_device_name(device)}, bf16, 64-token pages")
    ceilings = measure_ceilings(device)
    _say(f"roofline measured now: {ceilings.stream_gbs:.0f} GB/s, {ceilings.matmul_tflops:.0f} TFLOPS (bf16 matmul)")
    _say(kernels.HEADER)
    right = True
    for result in kernels.run_rows(kernels.ROWS, ceilings, device):
        _say(str(result))
        right = right and not result.wrong
    return right


def _has_sm90() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def _say(line: str) -> None:
    print(line, flush=True)  # flushed, so that progress shows through a pipe


if __name__ == "__main__":
    sys.exit(main())
