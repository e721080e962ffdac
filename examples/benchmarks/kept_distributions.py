"""What a cache of the target's distributions costs: kept while the target writes, beside a second pass of it.

    python examples/benchmarks/kept_distributions.py
    python examples/benchmarks/kept_distributions.py --target ./SmolLM2-135M-Instruct --prompts questions.jsonl

The same prompts are answered in three ways, in turn and several times: text alone; text with its distributions
(`cache_distributions`); and text alone, then `cache_target_distributions`, a forward pass over prompt and answer. Both
caches are compared. Seconds are those of the CPU, which other programs on the machine do not lengthen much, and of the
clock; memory is the most anonymous memory that a way adds while it runs. Linux only.
"""

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from generation_memory import resident, watching
from transformers.utils import logging

from hf_draftkd import cache_target_distributions, generate_alignment_data, load_target, load_tokenizer
from hf_draftkd.data.prompts import load_prompts
from hf_draftkd.models.demo import demo_path


def measured(way: Callable[[], Dataset]) -> tuple[Dataset, dict[str, float]]:
    """Its rows, and what it took."""
    gc.collect()
    before, cpu, clock = resident("RssAnon"), time.process_time(), time.perf_counter()
    with watching() as peaks:
        rows = way()
    taken = {"CPU seconds": time.process_time() - cpu, "seconds": time.perf_counter() - clock}
    return rows, taken | {"MB": peaks["RssAnon"] - before}


def largest_difference(one: Dataset, other: Dataset) -> float:
    """Between the probabilities of the written tokens, as they are stored."""
    pairs = zip(one["completion_logprobs"], other["completion_logprobs"], strict=True)
    return max(
        float((torch.tensor(these).double().exp() - torch.tensor(those).double().exp()).abs().max())
        for these, those in pairs
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=str(demo_path("target")), help="a name or a folder")
    parser.add_argument("--gguf_file", help="where the target exists only as GGUF")
    parser.add_argument("--prompts", default=str(demo_path("train.jsonl")))
    parser.add_argument("--prompt_column", default="prompt")
    parser.add_argument("--num_prompts", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--top_k", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", help="few CPUs compute in bfloat16")
    options = parser.parse_args()
    logging.disable_progress_bar()
    disable_progress_bars()
    target = load_target(options.target, dtype=options.dtype, gguf_file=options.gguf_file)
    tokenizer = load_tokenizer(options.target)
    prompts = load_prompts(options.prompts, column=options.prompt_column, limit=options.num_prompts)
    how: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size}
    how["temperatures"] = [options.temperature]

    def text() -> Dataset:
        return generate_alignment_data(target, tokenizer, prompts, **how)

    def kept() -> Dataset:
        return generate_alignment_data(target, tokenizer, prompts, cache_distributions=f"top_k={options.top_k}", **how)

    def again() -> Dataset:
        size = options.batch_size
        return cache_target_distributions(text(), target, top_k=options.top_k, tokenizer=tokenizer, batch_size=size)

    ways = {"text alone": text, "kept while writing": kept, "a second pass": again}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    rows: dict[str, Dataset] = {}
    for number in range(options.repeats + 1):
        for name, way in ways.items():
            rows[name], figures = measured(way)
            if number > 0:  # the first fills caches and allocators
                taken[name].append(figures)

    assert rows["kept while writing"]["completion_ids"] == rows["a second pass"]["completion_ids"]
    tokens = sum(map(len, rows["text alone"]["completion_ids"]))
    print(f"{len(prompts)} prompts, {tokens} tokens, vocabulary {len(tokenizer):,}, {target.dtype}, ", end="")
    print(f"batches of {options.batch_size}, {options.top_k} tokens kept")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, median of {options.repeats} runs (least to most)\n")
    print("| way | CPU seconds | of text alone | seconds | MB at most |\n|---|---|---|---|---|")
    base = statistics.median(each["CPU seconds"] for each in taken["text alone"])
    for name, runs in taken.items():
        cpu, clock, most = (sorted(each[kind] for each in runs) for kind in ("CPU seconds", "seconds", "MB"))
        middle = statistics.median(cpu)
        seconds = f"{middle:.1f} ({cpu[0]:.1f} to {cpu[-1]:.1f})"
        print(f"| {name} | {seconds} | {middle / base:.2f} | {statistics.median(clock):.1f} | {most[-1]:.0f} |")
    difference = largest_difference(rows["kept while writing"], rows["a second pass"])
    print(f"\nProbabilities of the written tokens differ by {difference:.1e} at most (float16 as stored).")


if __name__ == "__main__":
    main()
