"""`python -m tools.demo`: generate twice, compare, and on an H100 run the kernels at real DeepSeek head sizes.

Exit code 0: the generations agree, or every first divergence is explained, and all kernel outputs are right. Else 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import tokenizers
import torch
import transformers

from tools.bench.roofline import measure_ceilings
from tools.demo import kernels
from tools.demo.generate import Comparison, Generation, compare, generate_own, generate_paged
from tools.demo.model import TEXT, build_model, read_prompts, train_tokenizer

PROMPTS = 4
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
    config = model.config
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    _say(
        f"model: DeepseekV3ForCausalLM of transformers {transformers.__version__}, random bf16 weights, "
        f"{millions:.1f} M parameters, {config.num_hidden_layers} layers, {config.num_attention_heads} heads, "
        f"hidden {config.hidden_size}, latent {config.kv_lora_rank}+{config.qk_rope_head_dim}"
    )
    _say(
        f"text: {TEXT.name}, {len(text)} characters, {len(tokenizer.encode(text).ids)} tokens by a byte-level BPE of "
        f"{tokenizer.get_vocab_size()}; {PROMPTS} prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} generated for each"
    )
    start = time.perf_counter()
    own = generate_own(model, prompts, NEW_TOKENS)
    _say(f"generated with transformers' attention in {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    ours = generate_paged(model, prompts, NEW_TOKENS)
    _say(f"generated with cutehop's attention in {time.perf_counter() - start:.1f} s")
    comparison = compare(model, prompts, own, ours, generate_paged(model, prompts, NEW_TOKENS, follow=own.tokens))
    _say("compared with the same weights in fp32\n")
    shown = 1
    _say(f"prompt ...{tokenizer.decode(prompts[shown].tolist())[-60:]!r} goes on (weights are random: expect no sense)")
    _say(f"  own:  {tokenizer.decode(own.tokens[shown].tolist())[:90]!r}")
    _say(f"  ours: {tokenizer.decode(ours.tokens[shown].tolist())[:90]!r}\n")
    _print_comparison(comparison, own, tokenizer)
    _print_times(device, own, ours)
    return comparison.ok


def _print_comparison(comparison: Comparison, own: Generation, tokenizer: tokenizers.Tokenizer) -> None:
    sequences, count = own.tokens.shape
    equal = sequences - len(comparison.divergences)
    _say(f"tokens: {equal} of {sequences} sequences equal in all {count} tokens")
    for d in comparison.divergences:
        verdict = "explained: bf16 rounding swaps them" if d.explained else "NOT EXPLAINED by bf16 rounding"
        _say(
            f"  sequence {d.sequence}: first difference at token {d.index}, own {tokenizer.decode([d.own])!r}, ours "
            f"{tokenizer.decode([d.ours])!r}; fp32 logits {d.gap:.4f} apart, bf16 error {d.error:.4f} each; {verdict}"
        )
    verdict = "ok" if comparison.our_error <= 2 * comparison.own_error else "TOO LARGE"
    _say(
        f"logits against fp32: largest error {comparison.own_error:.4f} (own), {comparison.our_error:.4f} (ours), "
        f"limit twice own: {verdict}\n"
    )


def _print_times(device: torch.device, own: Generation, ours: Generation) -> None:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    rows = (
        ("transformers", own, f"torch on {gpu or 'CPU'}"),
        ("cutehop", ours, f"{gpu} kernels" if gpu else "CPU reference"),
    )
    _say(f"{'attention':<14} {'prefill ms':>11} {'ms per step':>12} {'ms per token':>13}   ran on")
    for name, run, where in rows:
        per_token = run.step_ms / len(run.tokens)
        _say(f"{name:<14} {run.prefill_ms:>11.1f} {run.step_ms:>12.2f} {per_token:>13.2f}   {where}")
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
