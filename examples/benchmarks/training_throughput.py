"""What does a training step cost, ours beside TRL's trainers: seconds, completion tokens per second, peak memory?

    python examples/benchmarks/training_throughput.py
    python examples/benchmarks/training_throughput.py --vocab_size 4096 --steps 10
    python examples/benchmarks/training_throughput.py --completion_tokens 256 1024 --contenders "ours, forward_kl"

Several `--completion_tokens` also show how memory grows: 4 rows of 256 and of 1,024 are 1,024 and 4,096 tokens in a
step.

Same models, same rows, same training arguments; every contender runs in a separate process, all of them in turn and
several times. With `--results FILE` every result is written there as it arrives, and an interrupted run resumes from
it. Seconds are medians over the steps after the first. Memory is the peak of resident memory above what the
process held with its models loaded: activations, logits, gradients, optimizer.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

from peers import BUILDERS, StepClock
from processes import forget_peak, median, resident_mb, rounds
from synthetic import Sizes, pair_of, rows_of, tokenizer_of

OURS, SFT, GKD, DISTILLATION = "ours, forward_kl", "SFTTrainer", "GKDTrainer", "DistillationTrainer, its text given"
# Name -> builder, options, whether the draft writes the text.
CONTENDERS: dict[str, tuple[str, dict[str, Any], bool]] = {
    OURS: ("ours", {}, False),
    SFT: ("sft", {}, False),
    GKD: ("gkd", {"lmbda": 0.0}, False),
    DISTILLATION: ("distillation", {"given_text": True}, False),
    "ours, the draft writes": ("ours", {"lmbda": 1.0}, True),
    "GKDTrainer, the draft writes": ("gkd", {"lmbda": 1.0}, True),
    "DistillationTrainer": ("distillation", {}, True),
    **{
        f"ours, {divergence}": ("ours", {"divergence": divergence}, False)
        for divergence in (
            "reverse_kl",
            "generalized_jsd",
            "total_variation",
            "tvd_plus_plus",
            "negative_log_acceptance",
            "lk_hybrid",
            "cross_entropy",
        )
    },
}


def work(job: dict[str, Any]) -> None:
    """Train for a few steps in this process, and print what they cost."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sizes = Sizes(**job["sizes"])
    builder, options, _ = CONTENDERS[job["contender"]]
    if builder in ("gkd", "distillation"):
        options = options | {"new_tokens": sizes.completion_tokens}
    elif options.get("lmbda"):
        options = options | {"max_new_tokens": sizes.completion_tokens}
    draft, target = pair_of(sizes)
    tokenizer, rows = tokenizer_of(sizes.vocab_size), rows_of(sizes, (job["steps"] + 1) * sizes.batch_size)
    clock = StepClock(job["steps"] + 1)
    with tempfile.TemporaryDirectory() as folder:
        args = {"output_dir": folder, "per_device_train_batch_size": sizes.batch_size, "learning_rate": 1e-4}
        trainer = BUILDERS[builder](draft, target, tokenizer, rows, args, clock, **options)
        forget_peak()
        loaded = resident_mb()
        trainer.train()
    seconds = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    peak = resident_mb("VmHWM") - loaded
    print(json.dumps({"seconds": seconds, "peak_mb": peak, "threads": torch.get_num_threads()}))


def report(sizes: Sizes, results: dict[str, list[dict[str, Any]]]) -> None:
    """A table, and the ratios that matter."""
    seconds = {name: median(runs, "seconds") for name, runs in results.items()}
    peaks = {name: median(runs, "peak_mb") for name, runs in results.items()}
    print(
        f"\nVocabulary {sizes.vocab_size:,}; draft {sizes.draft_layers} x {sizes.draft_width}, "
        f"target {sizes.target_layers} x {sizes.target_width}; a step: {sizes.batch_size} rows of "
        f"{sizes.prompt_tokens} + {sizes.completion_tokens} tokens\n"
    )
    fastest = ("fastest", "slowest")
    spread = f"{fastest[0]} to {fastest[1]}"
    print(f"| trainer | seconds a step ({spread}) | completion tokens/s | peak MB over the models |")
    print("|---|---|---|---|")
    for name, runs in results.items():
        all_seconds = [value for run in runs for value in run["seconds"]]
        spread = f"{min(all_seconds):.2f} to {max(all_seconds):.2f}"
        rate = sizes.step_tokens / seconds[name]
        print(f"| {name} | {seconds[name]:.2f} ({spread}) | {rate:,.0f} | {peaks[name]:,.0f} |")
    print()
    for ours, others in (
        (OURS, (SFT, GKD, DISTILLATION)),
        ("ours, the draft writes", ("GKDTrainer, the draft writes", "DistillationTrainer")),
    ):
        for other in others:
            if ours in results and other in results:
                print(
                    f"- {ours}: {seconds[other] / seconds[ours]:.2f} times the throughput of {other}, "
                    f"{peaks[ours] / peaks[other]:.2f} times its memory"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, default=Sizes.vocab_size)
    parser.add_argument("--batch_size", type=int, default=Sizes.batch_size)
    parser.add_argument("--prompt_tokens", type=int, default=Sizes.prompt_tokens)
    parser.add_argument("--completion_tokens", type=int, nargs="+", default=[Sizes.completion_tokens])
    parser.add_argument("--draft_layers", type=int, default=Sizes.draft_layers)
    parser.add_argument("--draft_width", type=int, default=Sizes.draft_width)
    parser.add_argument("--target_layers", type=int, default=Sizes.target_layers)
    parser.add_argument("--target_width", type=int, default=Sizes.target_width)
    parser.add_argument("--steps", type=int, default=3, help="timed steps a process, after one that is not")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, help="JSON lines: written as results arrive, read to resume")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        work(json.loads(options.job))
        return
    chosen = vars(options)
    peaks: dict[int, dict[str, float]] = {}
    for completion_tokens in options.completion_tokens:
        given = {name: chosen[name] for name in Sizes.__dataclass_fields__ if name != "completion_tokens"}
        sizes = Sizes(**given, completion_tokens=completion_tokens)
        jobs = {name: {"contender": name, "steps": options.steps, "sizes": vars(sizes)} for name in options.contenders}
        results = rounds(__file__, jobs, options.rounds, options.results)
        threads = next(iter(results.values()))[0]["threads"]
        report(sizes, results)
        peaks[sizes.step_tokens] = {name: median(runs, "peak_mb") for name, runs in results.items()}
        medians = f"medians over {options.rounds} rounds of {options.steps} steps"
        print(f"\n{platform.machine()}, {threads} threads, {medians}")
    few, many = min(peaks), max(peaks)
    if few < many:
        print()
        for name in options.contenders:
            growth = peaks[many][name] / peaks[few][name]
            print(f"- {name}: {growth:.2f} times the memory for {many:,} completion tokens as for {few:,}")


if __name__ == "__main__":
    main()
