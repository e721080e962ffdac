"""Does it pay to predict several tokens in one pass? Ordinary and parallel drafts of the demo pair, side by side.

    python examples/parallel_draft.py --output_dir parallel           # all runs, some three quarters of an hour
    python examples/parallel_draft.py --output_dir parallel --runs 1  # the next one; call again for those after it
    python examples/parallel_draft.py --output_dir parallel --table   # what there is

Every draft starts from the same weights and is trained for the same seconds (of processor time, on one thread, the
target's included): as an ordinary draft; as a parallel one from the beginning; or half the time as the one and half as
the other. Each is judged on the same texts of the target, exactly, and by the clock. The draft of one layer is the demo
pair's; deeper ones are the target's first layers. Numbers are means over seeds, with the lowest and highest.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from shared import claim, write_json
from transformers import TrainerCallback

KINDS = {"ordinary, then parallel": (0.5, 0.5), "ordinary": (1.0, 0.0), "parallel": (0.0, 1.0)}
LENGTHS = (1, 2, 3, 4, 6, 8)


class StopAfter(TrainerCallback):
    """Ends training after some seconds of this process's own time: other programs take none of it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = time.process_time() - self._began > self._seconds


def texts(folder: Path, options: argparse.Namespace) -> Any:
    """The target's answers to training and test queries, greedy and at temperature 1; written once."""
    from datasets import Dataset

    from hf_draftkd import generate_alignment_data, load_target
    from hf_draftkd.data.prompts import load_prompts
    from hf_draftkd.models.demo import demo_path
    from hf_draftkd.models.loading import load_tokenizer

    found = {}
    for split, count in (("train", options.prompts), ("test", options.test_prompts)):
        path = folder / f"{split}.parquet"
        if not path.is_file():
            rows = generate_alignment_data(
                load_target(demo_path("target"), dtype="float32"),
                load_tokenizer(demo_path("target")),
                load_prompts(demo_path(f"{split}.jsonl"), limit=count),
                max_new_tokens=options.answer_tokens,
                temperatures=(0.0, 1.0),
                batch_size=32,
            )
            unfinished = path.with_name(f"_{path.name}")
            rows.to_parquet(str(unfinished))
            unfinished.rename(path)
        found[split] = Dataset.from_parquet(str(path), cache_dir=str(folder / ".cache"))
    return found


def run(kind: str, layers: int, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train one draft and measure it."""
    from hf_draftkd import (
        DraftDistillConfig,
        DraftDistillTrainer,
        build_draft,
        evaluate_draft,
        load_draft,
        load_target,
    )
    from hf_draftkd.models.demo import demo_path
    from hf_draftkd.models.loading import load_tokenizer

    rows = texts(folder, options)
    target, tokenizer = load_target(demo_path("target"), dtype="float32"), load_tokenizer(demo_path("target"))
    draft = load_draft(demo_path("draft"), dtype="float32")
    if layers > 1:
        draft = build_draft(target, num_layers=layers)
    steps = {}
    for share, tokens in zip(KINDS[kind], (1, options.parallel_tokens), strict=True):
        if not share:
            continue
        trainer = DraftDistillTrainer(
            model=draft,
            target_model=target,
            args=DraftDistillConfig(
                output_dir=str(folder / "trainer"),
                max_steps=100_000,
                per_device_train_batch_size=8,
                learning_rate=options.learning_rate,
                lr_scheduler_type="constant",
                parallel_tokens=tokens,
                parallel_weights="uniform" if tokens == 1 else options.parallel_weights,
                seed=seed,
                data_seed=seed,
                save_strategy="no",
                report_to="none",
                logging_steps=100_000,
                disable_tqdm=True,
            ),
            train_dataset=rows["train"],
            processing_class=tokenizer,
            callbacks=[StopAfter(share * options.seconds)],
        )
        trainer.train()
        steps[str(tokens)] = trainer.state.global_step
    report = evaluate_draft(
        draft.eval(), target, tokenizer, dataset=rows["test"], num_speed_prompts=options.speed_prompts, batch_size=16
    )
    return {"steps": steps, "report": report.to_dict()}


def mean(values: list[float], digits: int = 2) -> str:
    """A mean with the lowest and the highest."""
    if not values:
        return "–"
    span = f" [{min(values):.{digits}f}, {max(values):.{digits}f}]" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{span}"


def table(results: dict[tuple[int, str], list[dict[str, Any]]]) -> str:
    """One row for each depth of draft, way of training and way of drafting; one table for each setting."""
    lines = []
    for index, setting in enumerate(("greedy", "T = 1")):
        heads = ["layers", "trained", "drafts", *(f"τ({length})" for length in LENGTHS), "γ", "predicted", "measured"]
        lines += [f"**{setting}**", "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        for (layers, kind), runs in sorted(results.items()):
            settings = [run["report"]["settings"][index] for run in runs]
            for way in ("one by one", "in one pass"):
                if way == "in one pass" and "parallel" not in settings[0]:
                    continue
                found = [each if way == "one by one" else each["parallel"] for each in settings]
                decoded = [each["speculative"] for each in found]
                efficiency = [each["block_efficiency"] for each in found]
                cells = [mean([each[str(g)]["value"] for each in efficiency if str(g) in each]) for g in LENGTHS]
                cells.append("/".join(sorted({str(each["num_assistant_tokens"]) for each in decoded})))
                cells.append(mean([each["predicted_speedup"] for each in decoded]))
                cells.append(mean([each["speedup"]["value"] for each in decoded]))
                lines.append(f"| {layers} | {kind} | {way} | {' | '.join(cells)} |")
        lines.append("")
    heads = ["layers", "trained", "steps", *(f"depth {depth}" for depth in LENGTHS)]
    for index, setting in enumerate(("greedy", "T = 1")):
        title = f"**Acceptance by depth, {setting}**"
        lines += [title, "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        for (layers, kind), runs in sorted(results.items()):
            settings = [run["report"]["settings"][index] for run in runs]
            steps = " + ".join(
                f"{sum(run['steps'][tokens] for run in runs) / len(runs):.0f}" for tokens in runs[0]["steps"]
            )
            rates: list[list[float]] = [[each["acceptance_rate"]["value"] for each in settings]]
            if "parallel" in settings[0]:
                by_depth = [each["parallel"]["acceptance_by_depth"] for each in settings]
                rates = [[each[depth - 1]["value"] for each in by_depth if depth <= len(each)] for depth in LENGTHS]
            cells = [mean(rate, 3) for rate in rates] + ["–"] * (len(LENGTHS) - len(rates))
            lines.append(f"| {layers} | {kind} | {steps} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3], help="Layers of the drafts to try.")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="Ways of training to try.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60, help="Training of each draft.")
    parser.add_argument("--parallel_tokens", type=int, default=8)
    parser.add_argument("--parallel_weights", default="uniform")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--prompts", type=int, default=256, help="Training queries, each answered twice.")
    parser.add_argument("--test_prompts", type=int, default=64)
    parser.add_argument("--answer_tokens", type=int, default=64, help="Longest answer.")
    parser.add_argument("--speed_prompts", type=int, default=12, help="Prompts decoded by the clock.")
    parser.add_argument("--runs", type=int, default=None, help="Stop after so many runs.")
    parser.add_argument("--table", action="store_true", help="Only print what there is.")
    options = parser.parse_args()
    folder = options.output_dir
    free = ("runs", "table", "layers", "kinds", "seeds")
    claim(folder, argparse.Namespace(**{name: value for name, value in vars(options).items() if name not in free}))
    results: dict[tuple[int, str], list[dict[str, Any]]] = {}
    left = options.runs
    for seed in range(options.seeds):
        for layers in options.layers:
            for kind in options.kinds:
                path = folder / f"{layers}-{kind.replace(', ', '-').replace(' ', '-')}-{seed}.json"
                if not path.is_file() and not options.table and left != 0:
                    write_json(path, run(kind, layers, seed, folder, options))
                    left = None if left is None else left - 1
                if path.is_file():
                    found = json.loads(path.read_text(encoding="utf-8"))
                    results.setdefault((layers, kind), []).append(found)
    print(table(results))


if __name__ == "__main__":
    main()
