"""What does learning from cached distributions cost, beside plain fine-tuning of the same draft on the same tokens?

    python examples/benchmarks/cached_throughput.py
    python examples/benchmarks/cached_throughput.py --vocab_size 4096 --steps 10 --rounds 5

`DraftDistillTrainer` without a target, from rows that keep the k likeliest tokens and the tail, beside
`trl.SFTTrainer`. Both run in separate processes, in turn and several times. Seconds are medians over the steps
after the first; memory is the peak of resident memory above what the process held with its draft loaded. With
`--results FILE` every result is written there as it arrives, and an interrupted run resumes from it.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

from peers import BUILDERS, StepClock
from processes import forget_peak, median, resident_mb, rounds
from synthetic import Sizes, model_of, rows_of, tokenizer_of, with_cached_distributions

OURS, SFT = "ours, cached", "SFTTrainer"


def work(job: dict[str, Any]) -> None:
    """Train for a few steps in this process, and print what they cost."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sizes = Sizes(**job["sizes"])
    context = sizes.prompt_tokens + sizes.completion_tokens
    draft = model_of(sizes.vocab_size, sizes.draft_layers, sizes.draft_width, context, seed=1)
    tokenizer, rows = tokenizer_of(sizes.vocab_size), rows_of(sizes, (job["steps"] + 1) * sizes.batch_size)
    options: dict[str, Any] = {}
    if job["contender"] == OURS:
        rows = with_cached_distributions(rows, sizes.vocab_size, job["top_k"])
        options = {"divergence": job["divergence"]}
    clock = StepClock(job["steps"] + 1)
    with tempfile.TemporaryDirectory() as folder:
        args = {"output_dir": folder, "per_device_train_batch_size": sizes.batch_size, "learning_rate": 1e-4}
        builder = BUILDERS["ours" if job["contender"] == OURS else "sft"]
        trainer = builder(draft, None, tokenizer, rows, args, clock, **options)
        forget_peak()
        loaded = resident_mb()
        trainer.train()
    seconds = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    peak = resident_mb("VmHWM") - loaded
    print(json.dumps({"seconds": seconds, "peak_mb": peak, "threads": torch.get_num_threads()}))


def report(sizes: Sizes, top_k: int, results: dict[str, list[dict[str, Any]]]) -> None:
    """A table, and the two ratios."""
    print(
        f"\nVocabulary {sizes.vocab_size:,}, {top_k} tokens kept; draft {sizes.draft_layers} x {sizes.draft_width}; a "
        f"step: {sizes.batch_size} rows of {sizes.prompt_tokens} + {sizes.completion_tokens} tokens\n"
    )
    print("| trainer | seconds a step (fastest to slowest) | completion tokens/s | peak MB over the draft |")
    print("|---|---|---|---|")
    seconds = {name: median(runs, "seconds") for name, runs in results.items()}
    peaks = {name: median(runs, "peak_mb") for name, runs in results.items()}
    for name, runs in results.items():
        every = [value for run in runs for value in run["seconds"]]
        spread = f"{min(every):.3f} to {max(every):.3f}"
        rate = sizes.step_tokens / seconds[name]
        print(f"| {name} | {seconds[name]:.3f} ({spread}) | {rate:,.0f} | {peaks[name]:,.0f} |")
    print(
        f"\n- {OURS}: {seconds[SFT] / seconds[OURS]:.2f} times the throughput of {SFT}, "
        f"{peaks[OURS] / peaks[SFT]:.2f} times its memory"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, nargs="+", default=[4096, Sizes.vocab_size])
    parser.add_argument("--batch_size", type=int, default=Sizes.batch_size)
    parser.add_argument("--prompt_tokens", type=int, default=Sizes.prompt_tokens)
    parser.add_argument("--completion_tokens", type=int, default=Sizes.completion_tokens)
    parser.add_argument("--draft_layers", type=int, default=Sizes.draft_layers)
    parser.add_argument("--draft_width", type=int, default=Sizes.draft_width)
    parser.add_argument("--top_k", type=int, default=64)
    parser.add_argument("--divergence", default="forward_kl")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a process, after one that is not")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, help="JSON lines: written as results arrive, read to resume")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        work(json.loads(options.job))
        return
    names = ("batch_size", "prompt_tokens", "completion_tokens", "draft_layers", "draft_width")
    for vocab_size in options.vocab_size:
        if not 1 <= options.top_k < vocab_size:
            parser.error(f"--top_k must lie between 1 and the vocabulary's {vocab_size} - 1, got {options.top_k}.")
    for vocab_size in options.vocab_size:
        sizes = Sizes(vocab_size=vocab_size, **{name: getattr(options, name) for name in names})
        shared = {"steps": options.steps, "sizes": vars(sizes)}
        jobs = {
            OURS: {"contender": OURS, "top_k": options.top_k, "divergence": options.divergence, **shared},
            SFT: {"contender": SFT, **shared},
        }
        results = rounds(__file__, jobs, options.rounds, options.results)
        report(sizes, options.top_k, results)
        medians = f"medians over {options.rounds} rounds of {options.steps} steps"
        print(f"\n{platform.machine()}, {results[OURS][0]['threads']} threads, {medians}")


if __name__ == "__main__":
    main()
