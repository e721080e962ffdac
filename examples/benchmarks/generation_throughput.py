"""How fast does `generate_alignment_data` answer, beside a plain batched `generate` loop and one prompt at a time?

    python examples/benchmarks/generation_throughput.py --prompts 128 --batch_size 16

All three answer the same prompts greedily with the demo target, in turn and several times, and their tokens are
compared: a faster way that writes other tokens would be no gain. Rates count completion tokens without padding.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_draftkd import generate_alignment_data, load_target
from hf_draftkd.data.backends import cut_completion
from hf_draftkd.data.prompts import load_prompts
from hf_draftkd.data.rows import render_prompts
from hf_draftkd.decoding.setting import DecodingSetting, end_token_ids
from hf_draftkd.models.demo import demo_path
from hf_draftkd.models.loading import load_tokenizer

Answers = list[list[int]]


def plain_loop(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Answers, max_new_tokens: int, batch_size: int
) -> Answers:
    """What one would write by hand: pad on the left, batch in the given order, cut."""
    config = DecodingSetting().generation_config(target, max_new_tokens, pad_token_id=tokenizer.pad_token_id)
    answers: Answers = []
    for start in range(0, len(ids), batch_size):
        batch = ids[start : start + batch_size]
        width = max(map(len, batch))
        padded = torch.tensor([[tokenizer.pad_token_id] * (width - len(each)) + each for each in batch])
        mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in batch])
        output = target.generate(
            padded.to(target.device), attention_mask=mask.to(target.device), generation_config=config
        )
        answers += [cut_completion(row[width:], end_token_ids(target))[0] for row in output.tolist()]
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", help="few CPUs compute in bfloat16")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    target, tokenizer = load_target(demo_path("target"), dtype=options.dtype), load_tokenizer(demo_path("target"))
    prompts: Dataset = load_prompts(demo_path("train.jsonl"), limit=options.prompts)
    ids = render_prompts(prompts, tokenizer)
    new, size = options.max_new_tokens, options.batch_size

    def ours() -> Answers:
        rows = generate_alignment_data(target, tokenizer, prompts, max_new_tokens=new, batch_size=size)
        return [list(each) for each in rows["completion_ids"]]

    ways: dict[str, Callable[[], Answers]] = {
        "`generate_alignment_data`": ours,
        "plain batched loop": lambda: plain_loop(target, tokenizer, ids, new, size),
        "one prompt at a time": lambda: plain_loop(target, tokenizer, ids, new, 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, Answers] = {}
    for way in ways.values():  # caches, allocators, threads
        way() if way is ours else plain_loop(target, tokenizer, ids[:size], new, size)
    for _ in range(options.repeats):
        for name, way in ways.items():  # in turn, so that a busy machine is busy for all
            start = time.perf_counter()
            answers[name] = way()
            seconds[name].append(time.perf_counter() - start)

    reference = answers["one prompt at a time"]
    print(f"{len(ids)} prompts, batch size {size}, {new} new tokens at most, median of {options.repeats} runs")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {target.dtype}\n")
    print("| way | seconds | rows/s | completion tokens/s | rows equal to one at a time |\n|---|---|---|---|---|")
    for name in ways:
        median = statistics.median(seconds[name])
        tokens = sum(map(len, answers[name]))
        equal = sum(ours == theirs for ours, theirs in zip(answers[name], reference, strict=True))
        print(f"| {name} | {median:.2f} | {len(ids) / median:.1f} | {tokens / median:.0f} | {equal} of {len(ids)} |")


if __name__ == "__main__":
    main()
