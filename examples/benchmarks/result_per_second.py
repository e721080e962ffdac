"""How good is the draft after 30, 60 and 120 seconds of training: ours beside TRL's distillation trainers?

    python examples/benchmarks/result_per_second.py --output_dir race
    python examples/benchmarks/result_per_second.py --output_dir race --report

Same draft, target, rows, batch size, float32, constant learning rate and one thread for every trainer. The clock runs
from the start of training and stops while weights are stored; text that a trainer writes counts, the target's text
exists before. Judged exactly on what the target wrote in answer to the test queries. Each trainer runs
with one seed at every learning rate; the best of them, by the dev queries at the last mark, and the shared one run with
the other seeds too. Started again, it does what is left.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from demo_texts import GAMMA, TEMPERATURES, metrics, pooled, ratio, texts, the_target, write_texts
from peers import BUILDERS
from resumable import done_so_far, run_all
from transformers import TrainerCallback

# Name -> builder, options. `new_tokens` is set for those that write text.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours, default": ("ours", {}),
    "GKDTrainer, lmbda 0": ("gkd", {"lmbda": 0.0}),
    "GKDTrainer, lmbda 0.5": ("gkd", {"lmbda": 0.5}),
    "DistillationTrainer": ("distillation", {}),
}
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
SHARED_RATE = 3e-4


class Marks(TrainerCallback):
    """Puts the weights aside at the first step's end after each mark, and ends training after the last."""

    def __init__(self, marks: list[float]) -> None:
        self.left = sorted(marks)
        self.kept: list[dict[str, Any]] = []
        self._began = self._aside = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        now = time.perf_counter()
        seconds = now - self._began - self._aside
        while self.left and seconds >= self.left[0]:
            weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
            at = {"mark": self.left.pop(0), "seconds": round(seconds, 2), "steps": state.global_step}
            self.kept.append(at | {"weights": weights})
        self._aside += time.perf_counter() - now
        control.should_training_stop = not self.left


def count_writing(draft: Any) -> list[float]:
    """A list that gets the seconds of every call of the draft's `generate`."""
    seconds: list[float] = []
    generate = draft.generate

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return generate(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - began)

    draft.generate = timed
    return seconds


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One run: its metrics on the test queries at every mark, and on the dev queries at the last."""
    from hf_draftkd import load_draft
    from hf_draftkd.models.demo import demo_path
    from hf_draftkd.models.loading import load_tokenizer

    folder, marks = Path(job["folder"]), Marks(job["marks"])
    builder, options = CONTENDERS[job["contender"]]
    if builder != "ours":
        options = options | {"new_tokens": job["max_new_tokens"]}
    draft, target = load_draft(demo_path("draft"), dtype="float32"), the_target()
    tokenizer = load_tokenizer(demo_path("target"))
    writing = count_writing(draft)
    with tempfile.TemporaryDirectory() as output:
        args = {
            "output_dir": output,
            "per_device_train_batch_size": job["batch_size"],
            "learning_rate": job["learning_rate"],
            "seed": job["seed"],
            "use_cpu": True,
        }
        rows = texts(folder, "train")
        trainer = BUILDERS[builder](draft, target, tokenizer, rows, args, marks, **options)
        trainer.train()
    del draft.generate
    results = []
    for kept in marks.kept:
        draft.load_state_dict(kept.pop("weights"))
        results.append(kept | {"metrics": metrics(draft, folder)})
    dev = metrics(draft, folder, "dev")
    return {
        "marks": results,
        "dev": sum(ratio(dev, setting) for setting in TEMPERATURES.values()) / len(TEMPERATURES),
        "writing_seconds": round(math.fsum(writing), 1),
    }


def name_of(contender: str, rate: float, seed: int) -> str:
    return f"{contender} @ {rate:g} #{seed}"


def best_rate(contender: str, results: dict[str, dict[str, Any]]) -> float | None:
    """The learning rate whose first seed does best on the dev queries; None before all are done."""
    names = {rate: name_of(contender, rate, 0) for rate in RATES}
    if any(name not in results for name in names.values()):
        return None
    return max(RATES, key=lambda rate: results[names[rate]]["dev"])


def report(results: dict[str, dict[str, Any]], sizes: dict[str, Any]) -> None:
    """A Markdown table for the shared learning rate, one for each trainer's best, and all rates with one seed."""
    from hf_draftkd.acceptance import bootstrap_ratio

    print(
        f"Batches of {sizes['batch_size']} rows; {sizes['train']} training prompts, answered by the target greedily "
        f"and at temperature 1 in {sizes['text_seconds']:.0f} s ({sizes['text_threads']} thread(s)) before the clock "
        f"starts; {sizes['held_out']} test queries, at most {sizes['max_new_tokens']} new tokens. "
        f"Block efficiency at γ = {GAMMA} with 95 % intervals over prompts, seeds pooled; in brackets "
        "the range over seeds."
    )
    marks = sizes["marks"]
    columns = [f"{name}, {mark:g} s" for name in TEMPERATURES.values() for mark in marks]
    head = f"| trainer | learning rate | seeds | {' | '.join(columns)} | steps | seconds writing |"
    for title, rate_of in (
        (f"At the shared learning rate, {SHARED_RATE:g}", lambda contender: SHARED_RATE),
        ("At each one's best learning rate", lambda contender: best_rate(contender, results)),
    ):
        print(f"\n{title}:\n\n{head}\n|{'---|' * (len(columns) + 5)}")
        for contender in CONTENDERS:
            rate = rate_of(contender)
            if rate is None:
                continue
            names = [name_of(contender, rate, seed) for seed in range(sizes["seeds"])]
            runs = [results[name] for name in names if name in results]
            if not runs:
                continue
            cells = []
            for setting in TEMPERATURES.values():
                for index in range(len(marks)):
                    found = [run["marks"][index]["metrics"] for run in runs]
                    value, seeds = bootstrap_ratio(*pooled(found, setting)), [ratio(each, setting) for each in found]
                    spread = f" ({min(seeds):.3f} to {max(seeds):.3f})" if len(seeds) > 1 else ""
                    cells.append(f"{value.value:.3f} ± {(value.high - value.low) / 2:.3f}{spread}")
            steps = sum(run["marks"][-1]["steps"] for run in runs) / len(runs)
            writing = sum(run["writing_seconds"] for run in runs) / len(runs)
            print(f"| {contender} | {rate:g} | {len(runs)} | {' | '.join(cells)} | {steps:.0f} | {writing:.0f} |")
    print("\nOn the dev queries at the last mark, greedy and T=1 averaged, one seed:\n")
    print(f"| trainer | {' | '.join(f'{rate:g}' for rate in RATES)} |\n|{'---|' * (len(RATES) + 1)}")
    for contender in CONTENDERS:
        found = [results.get(name_of(contender, rate, 0)) for rate in RATES]
        print(f"| {contender} | {' | '.join('' if run is None else format(run['dev'], '.3f') for run in found)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("race"))
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with one thread; 0: all in this one")
    parser.add_argument("--report", action="store_true", help="only print the tables of what is done")
    parser.add_argument("--marks", type=float, nargs="+", default=[30.0, 60.0, 120.0], help="seconds of training")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=1000, help="training prompts, each answered twice")
    parser.add_argument("--held_out", type=int, default=48, help="dev and test queries each, each answered twice")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--rates", type=float, nargs="+", choices=RATES, default=list(RATES), metavar="RATE")
    options = parser.parse_args()

    names = ("marks", "batch_size", "seeds", "train", "held_out", "max_new_tokens")
    sizes = {name: getattr(options, name) for name in names} | {"marks": sorted(options.marks)}
    folder: Path = options.output_dir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    record, lines = folder / "sizes.json", folder / "runs.jsonl"
    found = json.loads(record.read_text()) if record.is_file() else None
    if options.report:
        if found is None:
            parser.error(f"nothing was run in {folder}")
        report(done_so_far(lines), found)
        return
    if found is not None and {name: found[name] for name in names} != sizes:
        parser.error(f"{folder} holds runs of other sizes, {found}: give another --output_dir")
    written = write_texts(folder, **{name: sizes[name] for name in ("train", "held_out", "max_new_tokens")})
    sizes |= {"text_seconds": written["seconds"]["train"], "text_threads": written["threads"]}
    record.write_text(json.dumps(sizes))

    def jobs(rates: dict[str, set[float]], seeds: range) -> dict[str, dict[str, Any]]:
        return {
            name_of(contender, rate, seed): sizes
            | {"folder": str(folder), "contender": contender, "learning_rate": rate, "seed": seed}
            for seed in seeds
            for contender, chosen in rates.items()
            for rate in sorted(chosen)
        }

    run_all(work, jobs({name: set(options.rates) for name in options.contenders}, range(1)), lines, jobs=options.jobs)
    done = done_so_far(lines)
    further = {
        name: {SHARED_RATE, best_rate(name, done) or SHARED_RATE} & set(options.rates) for name in options.contenders
    }
    run_all(work, jobs(further, range(1, options.seeds)), lines, jobs=options.jobs)
    report(done_so_far(lines), sizes)


if __name__ == "__main__":
    main()
