"""`draftkd quickstart`: the whole journey on the bundled demo pair, in about three minutes on two cores.

A chat-tuned target has drifted away from its stock draft. The target answers training queries, the draft is distilled
on the answers, both drafts are measured on test queries nobody trained on, and the better one is saved ready for
`generate(assistant_model=...)`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from hf_draftkd.cli.errors import usage_errors
from hf_draftkd.cli.options import parse
from hf_draftkd.data.generation import generate_alignment_data
from hf_draftkd.data.prompts import load_prompts
from hf_draftkd.evaluation.evaluate import evaluate_draft, store_draft_length
from hf_draftkd.evaluation.plots import plot_block_efficiency
from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.hub.card import DraftModelCard
from hf_draftkd.models.demo import demo_path
from hf_draftkd.models.loading import load_draft, load_target, load_tokenizer
from hf_draftkd.training.config import DraftDistillConfig
from hf_draftkd.training.trainer import DraftDistillTrainer


@dataclass
class QuickstartOptions:
    """The defaults are what the README's figures were made with."""

    output_dir: str = field(default="quickstart", metadata={"help": "Where everything is written."})
    num_train_prompts: int = field(default=600, metadata={"help": "Training queries the target answers."})
    num_test_prompts: int = field(default=120, metadata={"help": "Test queries both drafts are measured on."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the target's answers."})
    max_new_tokens: int = field(default=96, metadata={"help": "Longest answer, in tokens."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling and training."})


def run(argv: list[str]) -> int:
    """`draftkd quickstart *argv`; returns the exit code."""
    (options,) = parse(
        "quickstart", (QuickstartOptions,), argv, "Distil and measure a draft on the bundled demo pair."
    )
    with usage_errors():
        out = Path(options.output_dir)
        out.mkdir(parents=True, exist_ok=True)
        tokenizer = load_tokenizer(demo_path("target"))
        # float32: the fastest format on most CPUs, and the one in which greedy texts have no ties.
        target = load_target(demo_path("target"), dtype=torch.float32)
        stock = load_draft(demo_path("draft"), dtype=torch.float32)
        train_prompts = load_prompts(demo_path("train.jsonl"), limit=options.num_train_prompts)
        test_prompts = load_prompts(demo_path("test.jsonl"), limit=options.num_test_prompts)

    print(f"\n1/3  The target ({target.num_parameters():,} parameters) answers {len(train_prompts)} training queries.")
    answers = generate_alignment_data(
        target,
        tokenizer,
        train_prompts,
        max_new_tokens=options.max_new_tokens,
        temperatures=(1.0,),
        batch_size=32,
        seed=options.seed,
    )
    print(f"\n2/3  The stock draft ({stock.num_parameters():,} parameters) learns from the target's distributions.")
    trainer = distil(target, answers, tokenizer, options)
    draft = trainer.model.eval()
    print(f"\n3/3  Stock and distilled draft are measured on {len(test_prompts)} test queries.")
    report = evaluate_draft(
        draft,
        target,
        tokenizer,
        prompts=test_prompts,
        baseline=stock,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
    )
    ...
    return 0
