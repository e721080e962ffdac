"""A draft from scratch: build it from a config, pretrain it, align it with its target (https://arxiv.org/abs/2403.00858).

    python examples/direct_alignment.py --output_dir direct_alignment [--seeds 0 1 2]

(one seed took 43 minutes on a core that other work shared; started again with the same options, it does only what is
left)

The recipe of the Llama 2 chat drafter, with the demo target in the place of Llama 2 chat:

1. a config with the target's vocabulary, a tenth of its size, and random weights;
2. pretraining on plain text, here the source of the standard library, with the target's tokenizer;
3. the target answers seed instructions at temperatures 0, 0.3, 0.7 and 1.0 with top-p 0.95;
4. distillation on nine parts of these answers to one part of pretraining text, once with each of the paper's losses:
   KLD (`forward_kl`), TVD (`total_variation`) and TVD++ (`tvd_plus_plus`).

Every draft is measured on queries that nothing was trained on, and on documentation to be continued, which is outside
what the target was asked in training: there the paper's drafts fell behind their pretrained start. Some of these
docstrings are in the pretraining text of all drafts; what is compared is the target's own continuation of them.

Prints tokens per target call with 95% intervals over prompts; writes `direct_alignment.json`.
"""

import argparse
import time
from functools import cached_property
from pathlib import Path
from statistics import mean

import numpy as np
from alignment_data import docstrings
from datasets import Dataset
from demo_pair import corpus
from demo_pair.pretraining import Schedule, base_config, pretrain
from demo_pair.tokenizer import encode_documents
from shared import cell, claim, read_seconds, write_json
from transformers.utils import logging

from hf_draftkd import (
    DraftDistillConfig,
    DraftDistillTrainer,
    evaluate_draft,
    generate_alignment_data,
    load_draft,
    load_target,
)
from hf_draftkd.data.curation import curate_prompts
from hf_draftkd.data.mixing import parse_mix
from hf_draftkd.data.prompts import load_prompts
from hf_draftkd.evaluation.config import EvaluationConfig
from hf_draftkd.models.demo import demo_path
from hf_draftkd.models.loading import load_tokenizer

LOSSES = {"KLD": "forward_kl", "TVD": "total_variation", "TVD++": "tvd_plus_plus"}
PRETRAINED = "pretrained"


class Recipe:
    """The stages of the recipe; each leaves its result in the run's folder, and is skipped where it is there."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.output_dir
        self.target = load_target(demo_path("target"), dtype="float32")
        self.tokenizer = load_tokenizer(demo_path("target"))

    @cached_property
    def documents(self):
        """Plain text to train on."""
        return corpus.training_documents()[: self.options.documents]

    def pretrained(self):
        """Stages 1 and 2. Returns the folder of the pretrained draft."""
        folder = self.folder / PRETRAINED
        if not (self.folder / f"{PRETRAINED}.json").exists():
            held_out = corpus.source_documents(held_out=True)[: self.options.documents]
            streams = [encode_documents(self.tokenizer, texts) for texts in (self.documents, held_out)]
            schedule = Schedule(steps=self.options.pretraining_steps, tokens_per_step=self.options.tokens_per_step)
            model, stage = pretrain(
                base_config(self.tokenizer, draft=True), *streams, schedule, self.folder / "pretraining", seed=0
            )
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            write_json(self.folder / f"{PRETRAINED}.json", stage)
        return folder

    def plain_text(self):
        """Pieces of the pretraining text, to be mixed in."""
        pieces = [text[start : start + 800] for text in self.documents for start in range(0, len(text), 800)]
        chosen = np.random.default_rng(0).permutation(len(pieces))[: self.options.prompts]
        return Dataset.from_dict({"text": [pieces[index] for index in chosen]})

    def answers(self, prompts, name, **settings):
        """Stage 3, and the texts that everything is measured on."""
        return generate_alignment_data(
            self.target,
            self.tokenizer,
            prompts,
            max_new_tokens=self.options.max_new_tokens,
            batch_size=32,
            output_dir=self.folder / name,
            **settings,
        )

    def aligned(self, divergence, seed):
        """Stage 4. Returns the folder of the draft."""
        name = f"{divergence}-{seed}"
        if not (self.folder / f"{name}.json").exists():
            start = load_draft(str(self.pretrained()), dtype="float32")
            prompts = load_prompts(demo_path("train.jsonl"), limit=self.options.prompts)
            rows = self.answers(prompts, "answers", temperatures=(0.0, 0.3, 0.7, 1.0), top_p=0.95)
            args = DraftDistillConfig(
                output_dir=str(self.folder / f"training_{name}"),
                divergence=divergence,
                mix=self.options.mix,
                num_train_epochs=self.options.epochs,
                per_device_train_batch_size=self.options.batch_size,
                learning_rate=self.options.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
                save_strategy="no",
                logging_steps=20,
                report_to=[],
                seed=seed,
            )
            trainer = DraftDistillTrainer(
                model=start,
                target_model=self.target,
                args=args,
                train_dataset=rows,
                mix_dataset=self.plain_text() if self.options.mix else None,
                processing_class=self.tokenizer,
            )
            began = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - began
            trainer.save_model(str(self.folder / name))
            write_json(self.folder / f"{name}.json", {"seconds": seconds})  # last: without it, the draft is made again
        return self.folder / name

    def reports(self, folders):
        """All drafts on both kinds of text, greedily and sampled at temperature 1: exact, on the target's own text."""
        drafts = [load_draft(str(folder), dtype="float32") for folder in folders]
        openings, _ = curate_prompts(docstrings(), self.tokenizer, opening_tokens=32, limit=self.options.queries)
        asked = {
            "function calls": (load_prompts(demo_path("test.jsonl"), limit=self.options.queries), "queries"),
            "documentation": (openings, "curated"),
        }
        return {
            domain: evaluate_draft(
                drafts,
                self.target,
                self.tokenizer,
                dataset=self.answers(
                    prompts, f"test_{domain.replace(' ', '_')}", temperatures=(0.0, 1.0), scenario=scenario
                ),
                num_assistant_tokens=self.options.num_assistant_tokens,
                measure_speed=False,
                domain=domain,
            )
            for domain, (prompts, scenario) in asked.items()
        }


def measured(reports, length):
    """By draft, domain and temperature: tokens per target call, and the difference to the domain's best draft.

    The best is the one with the highest mean over both temperatures, so at one of them another may be ahead of it.
    """
    found = {}
    for domain, report in reports.items():
        for result in report.drafts:
            of = found.setdefault(Path(result.draft.name).name, {}).setdefault(domain, {})
            for place, setting in enumerate(result.settings):
                key = f"temperature {setting.decoding.temperature:g}"
                of[key] = {"block_efficiency": setting.block_efficiency[length].to_dict()}
                of[key]["acceptance_rate"] = setting.acceptance_rate.to_dict()
                if result.paired_difference:
                    difference = result.paired_difference[place].block_efficiency[length]
                    of[key]["minus_best"] = difference.to_dict()
    return found


def tables(found, seeds, seconds):
    """One line a draft; with several seeds, one line a loss below."""
    columns = [(domain, key) for domain, of in found[PRETRAINED].items() for key in of]
    names = {PRETRAINED: PRETRAINED}
    names |= {f"{divergence}-{seed}": f"{loss}, seed {seed}" for loss, divergence in LOSSES.items() for seed in seeds}
    head = " | ".join(f"{domain}, {key}" for domain, key in columns)
    lines = [f"| draft | {head} | seconds |", f"|---|{'---|' * (len(columns) + 1)}"]
    for name, title in names.items():
        cells = [cell(found[name][domain][key]["block_efficiency"]) for domain, key in columns]
        lines.append(f"| {title} | {' | '.join(cells)} | {seconds[name]:.0f} |")
    lines += [
        "",
        f"| minus the domain's best, by the mean of both temperatures | {head} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for name, title in names.items():
        ours = [found[name][domain][key] for domain, key in columns]
        lines.append(f"| {title} | {' | '.join(cell(of['minus_best']) if 'minus_best' in of else '' for of in ours)} |")
    if len(seeds) > 1:
        lines += ["", f"| mean over {len(seeds)} seeds (lowest to highest) | {head} |", f"|---|{'---|' * len(columns)}"]
        for loss, divergence in LOSSES.items():
            cells = []
            for domain, key in columns:
                values = [found[f"{divergence}-{seed}"][domain][key]["block_efficiency"]["value"] for seed in seeds]
                cells.append(f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
            lines.append(f"| {loss} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("direct_alignment"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the distillation")
    parser.add_argument("--documents", type=int, help="files of pretraining text (default: all)")
    parser.add_argument("--pretraining_steps", type=int, default=400)
    parser.add_argument("--tokens_per_step", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=128, help="seed instructions, each answered four times")
    parser.add_argument("--queries", type=int, default=64, help="test prompts of each domain")
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--mix", default="9:1", help="answers to pretraining text; '' mixes nothing in")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_assistant_tokens", type=int, default=3, help="draft length of the results; the paper's")
    options = parser.parse_args()
    options.mix = options.mix or None
    # What would otherwise be found wrong only after the pretraining.
    if options.mix:
        parse_mix(options.mix)
    EvaluationConfig(max_new_tokens=options.max_new_tokens, num_assistant_tokens=options.num_assistant_tokens)
    settings = claim(options.output_dir, options)
    logging.set_verbosity_error()
    recipe = Recipe(options)
    folders = [recipe.pretrained()]
    folders += [recipe.aligned(divergence, seed) for divergence in LOSSES.values() for seed in options.seeds]
    reports = recipe.reports(folders)
    found = measured(reports, options.num_assistant_tokens)
    seconds = {folder.name: read_seconds(options.output_dir / f"{folder.name}.json") for folder in folders}
    print(tables(found, options.seeds, seconds))
    write_json(
        options.output_dir / "direct_alignment.json", {"settings": settings, "drafts": found, "seconds": seconds}
    )


if __name__ == "__main__":
    main()
