"""Plain decoding, `assistant_model=` and `SpeculativeDecoding`, interleaved in one run.

    python examples/benchmarks/decoding.py --model DRAFT [--batch_sizes 1 4 16] [--prompts 32] [--max_new_tokens 96]
    python examples/benchmarks/decoding.py --forced_acceptance 0.6 [--dtype bfloat16]
    python examples/benchmarks/decoding.py --model DRAFT --memory 16

The first form decodes test queries of the demo pair (or of `--target_model` and `--dataset`), greedily and at
temperature 1. The second has a random target of 30 layers and width 576, whose draft is its first 3 layers; the heads
of both are overruled so that the given share of drafted tokens is accepted. The third prints the peak memory of plain
and of speculative decoding of one batch, each in a process of its own.

Every group of prompts is decoded in all ways in turn, starting with another one each time. Ratios are of tokens per
second, with 95% intervals from resampling groups. The limit is τ·t ÷ (γ·t_draft + t_verify): τ as counted, and single
forward passes timed in the same run.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_draftkd import SpeculativeDecoding, align_vocabulary, load_draft, load_prompts, load_target, load_tokenizer
from hf_draftkd.acceptance import Estimate, bootstrap_paired_ratio_quotient, bootstrap_ratio
from hf_draftkd.evaluation.assisted import fixed_draft_length
from hf_draftkd.models.demo import demo_path
from hf_draftkd.models.forward import CACHE

VOCAB_SIZE = 49_152  # of the random pair: that of SmolLM2-135M, whose shape it has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=demo_path("draft"), help="the draft; the demo pair's stock draft by default")
    parser.add_argument("--target_model", default=demo_path("target"))
    parser.add_argument("--dataset", default=demo_path("test.jsonl"), help="prompts")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--num_assistant_tokens", type=int, help="γ; the draft's own, or 4, by default")
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=1, help="times that every group is decoded in every way")
    parser.add_argument("--forced_acceptance", type=float, help="random models of which this share is accepted")
    parser.add_argument("--compile", action="store_true", help="SpeculativeDecoding(compile=True) as one more way")
    parser.add_argument("--memory", type=int, metavar="BATCH_SIZE", help="peak memory of one batch instead of speed")
    parser.add_argument("--only", choices=["plain", "speculative"], help=argparse.SUPPRESS)
    parser.add_argument("--output_file", type=Path, help="the same numbers as JSON")
    options = parser.parse_args()

    if options.memory and not options.only:
        compare_memory()
        return
    target, draft, prompts, pad = random_pair(options) if options.forced_acceptance else trained_pair(options)
    gamma = options.num_assistant_tokens or draft.generation_config.num_assistant_tokens or 4
    if options.memory:
        batch = padded(prompts[: options.memory], pad)
        extra = {"custom_generate": SpeculativeDecoding(draft, gamma)} if options.only == "speculative" else {}
        target.generate(**batch, max_new_tokens=options.max_new_tokens, do_sample=False, **extra)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return

    print(f"{torch.get_num_threads()} threads, {options.dtype}, γ = {gamma}, {options.max_new_tokens} tokens a text")
    steps = step_seconds(target, draft, gamma, length=prompts[0].shape[1] + options.max_new_tokens // 2)
    print("seconds of a forward pass: " + ", ".join(f"{name} {seconds:.5f}" for name, seconds in steps.items()))
    results = []
    for temperature in options.temperatures:
        for batch_size in options.batch_sizes:
            result = measure(target, draft, prompts, pad, temperature, batch_size, gamma, steps, options)
            results.append(result)
            print("\n" + table(result))
    if options.output_file:
        options.output_file.write_text(json.dumps({"steps": steps, "gamma": gamma, "results": results}, indent=1))


def trained_pair(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel, list[torch.Tensor], int]:
    tokenizer = load_tokenizer(options.target_model)
    target = load_target(options.target_model, dtype=options.dtype)
    draft = align_vocabulary(load_draft(options.model, dtype=options.dtype), target, tokenizer)
    prompts = []
    for row in load_prompts(options.dataset, limit=options.prompts):
        prompt = row["prompt"]
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        prompts.append(encoded["input_ids"])
    return target, draft, prompts, tokenizer.pad_token_id


def random_pair(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel, list[torch.Tensor], int]:
    """A target of SmolLM2-135M's shape with random weights, and its first 3 layers; they agree as often as is asked."""
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB_SIZE, "hidden_size": 576, "intermediate_size": 1536, "tie_word_embeddings": True}
    shape |= {"num_attention_heads": 9, "num_key_value_heads": 3, "eos_token_id": None, "pad_token_id": 0}
    dtype = getattr(torch, options.dtype)
    target = LlamaForCausalLM(LlamaConfig(num_hidden_layers=30, **shape)).to(dtype).eval()
    draft = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **shape)).to(dtype).eval()
    draft.load_state_dict(target.state_dict(), strict=False)
    agrees = torch.rand(VOCAB_SIZE) < options.forced_acceptance

    def overrule(model: PreTrainedModel, follow: Callable[[torch.Tensor], torch.Tensor]) -> None:
        def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            logits = output.logits
            ids = (args[0] if args else kwargs["input_ids"])[:, -logits.shape[1] :]
            logits.scatter_(2, follow(ids)[..., None], 1e4)

        model.register_forward_hook(hook, with_kwargs=True)

    def right(ids: torch.Tensor) -> torch.Tensor:
        return (13 * ids + 12_347) % VOCAB_SIZE  # visits every id before one comes back

    overrule(target, right)
    overrule(draft, lambda ids: torch.where(agrees[ids], right(ids), (right(ids) + 1) % VOCAB_SIZE))
    return target, draft, [torch.randint(1, VOCAB_SIZE, (1, 32)) for _ in range(options.prompts)], 0


def padded(prompts: list[torch.Tensor], pad: int) -> dict[str, torch.Tensor]:
    longest = max(prompt.shape[1] for prompt in prompts)
    ids, mask = (
        torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=fill) for row in rows])
        for rows, fill in ((prompts, pad), ([torch.ones_like(prompt) for prompt in prompts], 0))
    )
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def step_seconds(target: PreTrainedModel, draft: PreTrainedModel, gamma: int, length: int) -> dict[str, float]:
    """Median seconds of one forward pass of one text, all kinds in turn."""
    kinds = {"target": (target, 1), "verify": (target, gamma + 1), "draft": (draft, 1)}
    caches, seconds = {}, {name: [] for name in kinds}
    for name, (model, _) in kinds.items():
        caches[name] = DynamicCache(config=model.config)
        model(torch.ones(1, length, dtype=torch.long), **{CACHE: caches[name]}, use_cache=True)
    for _ in range(60):
        for name, (model, width) in kinds.items():
            started = time.perf_counter()
            model(torch.ones(1, width, dtype=torch.long), **{CACHE: caches[name]}, use_cache=True)
            seconds[name].append(time.perf_counter() - started)
            caches[name].crop(-width)
    return {name: median(each) for name, each in seconds.items()}


def measure(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: list[torch.Tensor],
    pad: int,
    temperature: float,
    batch_size: int,
    gamma: int,
    steps: dict[str, float],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Decode all prompts in groups of `batch_size` in every way; compare tokens per second."""
    decoders = {
        f"speculative γ={gamma}": SpeculativeDecoding(draft, gamma),
        "speculative auto": SpeculativeDecoding(draft, "auto"),
    }
    if options.compile:
        decoders["speculative compiled"] = SpeculativeDecoding(draft, gamma, compile=True)
    ways: dict[str, dict[str, Any]] = {"plain": {}}
    if batch_size == 1:
        ways["assistant_model="] = {"assistant_model": draft}
    ways |= {name: {"custom_generate": decoding} for name, decoding in decoders.items()}
    sampling = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_k": 0}
    groups = [padded(prompts[i : i + batch_size], pad) for i in range(0, len(prompts), batch_size)]
    tokens: dict[str, list[int]] = {way: [] for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    equal = dict.fromkeys(ways, 0)

    def decode(group: dict[str, torch.Tensor], way: str) -> tuple[torch.Tensor, int, float]:
        started = time.perf_counter()
        texts = target.generate(**group, max_new_tokens=options.max_new_tokens, **sampling, **ways[way])
        took = time.perf_counter() - started
        new = texts[:, group["input_ids"].shape[1] :]
        return texts, int((new != pad).sum()), took

    with fixed_draft_length(draft, gamma):
        for way in ways:
            decode(groups[0], way)  # warm-up, and compilation
        for decoding in decoders.values():
            decoding.counts = type(decoding.counts)()
        names = list(ways)
        for number in range(len(groups) * options.repeats):
            group = groups[number % len(groups)]
            texts = {}
            for way in names[number % len(names) :] + names[: number % len(names)]:
                torch.manual_seed(number)
                texts[way], written, took = decode(group, way)
                tokens[way].append(written)
                seconds[way].append(took)
            for way, each in texts.items():
                equal[way] += int(torch.equal(each, texts["plain"]))
    tau = decoders[f"speculative γ={gamma}"].counts.mean_acceptance_length
    limit = tau * steps["target"] / (gamma * steps["draft"] + steps["verify"])
    return {
        "temperature": temperature,
        "batch_size": batch_size,
        "tokens_per_second": {way: ratio(tokens, seconds, way).to_dict() for way in ways},
        "over_plain": {way: ratio(tokens, seconds, way, "plain").to_dict() for way in ways if way != "plain"},
        "over_assistant": {
            way: ratio(tokens, seconds, way, "assistant_model=").to_dict()
            for way in decoders
            if "assistant_model=" in ways
        },
        "equal_groups": equal if temperature == 0 else None,
        "num_groups": len(groups) * options.repeats,
        "tokens_per_call": {way: decoding.counts.mean_acceptance_length for way, decoding in decoders.items()},
        "limit": limit if batch_size == 1 else None,
    }


def ratio(tokens: dict[str, list[int]], seconds: dict[str, list[float]], way: str, base: str | None = None) -> Estimate:
    if base is None:
        return bootstrap_ratio(tokens[way], seconds[way])
    return bootstrap_paired_ratio_quotient(tokens[way], seconds[way], tokens[base], seconds[base])


def table(result: dict[str, Any]) -> str:
    """One row for each way of decoding."""
    decoding = "greedy" if result["temperature"] == 0 else f"T={result['temperature']:g}"
    lines = [f"{decoding}, batch {result['batch_size']}"]
    if result["limit"]:
        lines[0] += f", limit {result['limit']:.2f} times plain"
    lines.append("| way | tokens/s | × plain | × assistant_model= | share of limit | tokens a call | equal |")
    lines.append("|---|---|---|---|---|---|---|")
    for way, rate in result["tokens_per_second"].items():
        cells = [way, f"{rate['value']:.1f}"]
        for name in ("over_plain", "over_assistant"):
            each = result[name].get(way)
            interval = f" ({each['low']:.2f} to {each['high']:.2f})" if each and "low" in each else ""
            cells.append(f"{each['value']:.2f}{interval}" if each else "")
        is_fixed = "γ=" in way or way == "assistant_model="
        share = result["over_plain"][way]["value"] / result["limit"] if result["limit"] and is_fixed else None
        cells.append(f"{share:.2f}" if share else "")
        calls = result["tokens_per_call"].get(way)
        cells.append(f"{calls:.2f}" if calls else "")
        cells.append(f"{result['equal_groups'][way]}/{result['num_groups']}" if result["equal_groups"] else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare_memory() -> None:
    """Peak resident memory of one batch, by a process for each way."""
    peaks = {}
    for way in ("plain", "speculative"):
        command = [sys.executable, *sys.argv, "--only", way]
        peaks[way] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]) / 1024
    print(", ".join(f"{way} {peak:.0f} MiB" for way, peak in peaks.items()))


if __name__ == "__main__":
    main()
