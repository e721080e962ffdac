"""Which default values matter? One option at a time is changed, on the demo pair.

    python examples/benchmarks/ablation.py --output_dir ablation --jobs 2
    python examples/benchmarks/ablation.py --output_dir ablation --report

Every draft is the demo's, trained for the same number of steps with its learning rate falling to 0, and judged exactly
on texts that the target wrote in answer to the dev queries, greedily and at temperature 1: what defaults are chosen by
should not be what the results are reported on. Runs are short, and start from a draft that is hardly ever right: they
show which value gets ahead early, not where training ends. What a tuned draft gains from another divergence, from its
own text or from chosen tokens is among the claims (`examples/claims`). Started again, it does what is left.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from demo_texts import GAMMA, TEMPERATURES, metrics, pooled, ratio, texts, the_target, write_texts
from resumable import done_so_far, run_all

DEFAULT = "default"
# Not values of the configuration: `source`, which of the target's texts; `cached`, the k likeliest tokens are kept.
OWN = ("source", "cached")


def cells() -> dict[str, dict[str, Any]]:
    """Name -> what differs from the default."""
    from hf_draftkd.losses import DIVERGENCES

    options: dict[str, tuple[Any, ...]] = {
        "learning_rate": (1e-4, 1e-3, 3e-3),
        "divergence": tuple(name for name in DIVERGENCES if name != "forward_kl"),
        "loss_temperature": (0.5, 2.0),
        "cross_entropy_weight": (0.5,),
        "token_selection": ("after_first_rejection", "after_first_mismatch", "adaspec"),
        "source": tuple(TEMPERATURES.values()),
        "seq_kd": (True,),
        "lmbda": (0.5, 1.0),
        "cached": (64,),
    }
    changes = [{name: value} for name, values in options.items() for value in values]
    changes += [{"divergence": "generalized_jsd", "beta": beta} for beta in (0.1, 0.9)]
    changes += [{"divergence": "lk_hybrid", "eta": eta} for eta in (1.0, 10.0)]
    changes += [{"divergence": "tvd_plus_plus", "tvd_estimator": "full"}]
    changes += [{"divergence": "tvd_plus_plus", "tvd_statistics": "token"}]
    changes += [{"divergence": name, "learning_rate": 3e-3} for name in ("negative_log_acceptance", "total_variation")]
    changes += [{"lmbda": 1.0, "learning_rate": 3e-3}]
    return {DEFAULT: {}} | {", ".join(f"{key} {value}" for key, value in change.items()): change for change in changes}


def train(draft: Any, rows: Any, job: dict[str, Any], change: dict[str, Any], reference: Any = None) -> Any:
    """Train `draft` as `change` says."""
    from hf_draftkd import DraftDistillConfig, DraftDistillTrainer, cache_target_distributions
    from hf_draftkd.models.demo import demo_path
    from hf_draftkd.models.loading import load_tokenizer

    own = {key: value for key, value in change.items() if key not in OWN}
    if own.get("lmbda") or own.get("seq_kd"):
        own["max_new_tokens"] = job["max_new_tokens"]
    target = the_target()
    if "source" in change:
        wanted = {name: temperature for temperature, name in TEMPERATURES.items()}[change["source"]]
        rows = rows.filter(lambda row: row["temperature"] == wanted)
    if "cached" in change:
        rows = cache_target_distributions(rows, target, top_k=change["cached"], batch_size=32)
        target = None
    with tempfile.TemporaryDirectory() as folder:
        trainer = DraftDistillTrainer(
            model=draft,
            target_model=target,
            args=DraftDistillConfig(
                output_dir=folder,
                max_steps=job["steps"],
                per_device_train_batch_size=job["batch_size"],
                seed=job["seed"],
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                **own,
            ),
            train_dataset=rows,
            processing_class=load_tokenizer(demo_path("target")),
            reference_model=reference,
        )
        trainer.train()
    return trainer.model


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One cell with one seed: its metrics on the dev queries."""
    from hf_draftkd import load_draft
    from hf_draftkd.models.demo import demo_path

    def stock() -> Any:
        return load_draft(demo_path("draft"), dtype="float32")

    folder, change = Path(job["folder"]), job["change"]
    if change is None:
        return {"metrics": metrics(stock(), folder, "dev")}
    rows = texts(folder, "train")
    reference = train(stock(), rows, job, {}) if change.get("token_selection") == "adaspec" else None
    draft = train(stock(), rows, job, change, reference)
    return {"metrics": metrics(draft, folder, "dev")}


def report(results: dict[str, dict[str, Any]], sizes: dict[str, Any]) -> None:
    """A Markdown table: block efficiency, and its difference from the default on the same texts."""
    from hf_draftkd.acceptance import bootstrap_paired_ratio_difference as difference
    from hf_draftkd.acceptance import bootstrap_ratio

    by_cell: dict[str, list[dict[str, Any]]] = {}
    for name, result in results.items():
        by_cell.setdefault(name.rpartition(" #")[0], []).append(result)
    print(
        f"{sizes['steps']} steps of {sizes['batch_size']} rows, {sizes['train']} training prompts, "
        f"{sizes['held_out']} dev queries, at most {sizes['max_new_tokens']} new tokens, {sizes['seeds']} seeds. "
        f"Block efficiency at γ = {GAMMA} with 95 % intervals over prompts, seeds pooled; in brackets the range over "
        "seeds; Δ is the difference from the default on the same texts.\n"
    )
    print("| changed | " + " | ".join(f"{name} | Δ {name}" for name in TEMPERATURES.values()) + " |")
    print("|---|" + "---|" * (2 * len(TEMPERATURES)))
    for cell, runs in by_cell.items():
        found, parts = [run["metrics"] for run in runs], []
        for setting in TEMPERATURES.values():
            columns = pooled(found, setting)
            value, seeds = bootstrap_ratio(*columns), [ratio(each, setting) for each in found]
            spread = f" ({min(seeds):.3f} to {max(seeds):.3f})" if len(seeds) > 1 else ""
            parts.append(f"{value.value:.3f} ± {(value.high - value.low) / 2:.3f}{spread}")
            # The stock draft has one run, the default one for each seed: of ratios, the number of runs cancels out.
            base = [run["metrics"] for run in by_cell.get(DEFAULT, [])]
            if cell == DEFAULT or not base:
                parts.append("")
                continue
            gap = difference(*columns, *pooled(base, setting))
            clear = "**" if gap.low > 0 or gap.high < 0 else ""
            parts.append(f"{clear}{gap.value:+.3f}{clear} [{gap.low:+.3f}, {gap.high:+.3f}]")
        print(f"| {cell} | {' | '.join(parts)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("ablation"))
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with one thread; 0: all in this one")
    parser.add_argument("--report", action="store_true", help="only print the table of what is done")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=320, help="training prompts, each answered twice")
    parser.add_argument("--held_out", type=int, default=64, help="dev queries, each answered twice")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--cells", nargs="+", metavar="NAME", help="only these, as the table calls them")
    options = parser.parse_args()

    names = ("steps", "batch_size", "seeds", "train", "held_out", "max_new_tokens")
    sizes = {name: getattr(options, name) for name in names}
    folder: Path = options.output_dir.absolute()
    record, lines = folder / "sizes.json", folder / "runs.jsonl"
    if options.report and not record.is_file():
        parser.error(f"nothing was run in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    if record.is_file():
        found = json.loads(record.read_text())
        if options.report:
            sizes = found
        elif found != sizes:
            parser.error(f"{folder} holds runs of other sizes, {found}: give another --output_dir")
    if options.report:
        report(done_so_far(lines), sizes)
        return
    record.write_text(json.dumps(sizes))
    write_texts(folder, **{name: sizes[name] for name in ("train", "held_out", "max_new_tokens")})

    wanted: dict[str, dict[str, Any]] = {}
    chosen = {"stock": None} | cells()
    if options.cells and (unknown := set(options.cells) - set(chosen)):
        parser.error(f"no cell is called {unknown.pop()!r}; there are: {'; '.join(chosen)}")
    # Seed after seed, so that an interrupted run has every cell once before any cell twice.
    for seed in range(options.seeds):
        for cell, change in chosen.items():
            if (options.cells and cell not in options.cells) or (change is None and seed):
                continue
            job = {"folder": str(folder), "seed": seed, "change": change}
            wanted[f"{cell} #{seed}"] = sizes | job
    report(run_all(work, wanted, lines, jobs=options.jobs), sizes)


if __name__ == "__main__":
    main()
