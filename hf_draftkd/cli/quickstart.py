"""`draftkd quickstart`: the whole journey on the bundled demo pair, in three to eight minutes on one core.

A chat-tuned target has drifted away from its stock draft. The target answers training queries, the draft is distilled
on the answers, both drafts are measured on test queries nobody trained on, and the distilled one is saved ready for
`generate(assistant_model=...)`.
"""

from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console

from hf_draftkd.cli.errors import usage_errors
from hf_draftkd.cli.options import new_directory, parse
from hf_draftkd.data.generation import generate_alignment_data
from hf_draftkd.data.prompts import load_prompts
from hf_draftkd.evaluation.config import EvaluationConfig
from hf_draftkd.evaluation.evaluate import evaluate_draft
from hf_draftkd.evaluation.html import save_page
from hf_draftkd.evaluation.plots import block_efficiency_figure, save_figure
from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.evaluation.tables import ReportTable
from hf_draftkd.models.demo import demo_path
from hf_draftkd.models.draft_length import draft_length_settings, store_draft_settings
from hf_draftkd.models.loading import load_draft, load_target
from hf_draftkd.models.resolve import resolve
from hf_draftkd.training.config import DraftDistillConfig
from hf_draftkd.training.trainer import DraftDistillTrainer
from hf_draftkd.utils.checks import in_range, whole_number
from hf_draftkd.utils.fields import option

PLOT = "block_efficiency.png"


@dataclass
class QuickstartOptions:
    """The defaults produced the numbers in the README."""

    output_dir: str = option("quickstart", "Where everything is written.")
    num_train_prompts: int = option(320, "Training queries the target answers.")
    num_test_prompts: int = option(80, "Test queries both drafts are measured on.")
    num_speed_prompts: int = option(12, "Test queries decoded every way against the clock.")
    num_train_epochs: float = option(3.0, "Passes over the target's answers.")
    max_new_tokens: int = option(96, "Longest answer, in tokens.")
    seed: int = option(0, "Seed of sampling and training.")
    overwrite_output_dir: bool = option(False, "Write into a directory of another name that is not empty.")


def run(argv: list[str]) -> int:
    (options,) = parse("quickstart", (QuickstartOptions,), argv, "Distil and measure a draft on the bundled demo pair.")
    console = Console()
    with usage_errors():
        # The default folder is replaced when the command is run again; another may hold a draft of the user's.
        replaces = options.overwrite_output_dir or options.output_dir == QuickstartOptions.output_dir
        out = new_directory(options.output_dir, overwrite=replaces)
        whole_number("seed", options.seed, 0, 2**32 - 1)  # numpy's bounds, met when training begins
        in_range("num_train_epochs", options.num_train_epochs, 0, open_low=True)
        config = EvaluationConfig(
            temperatures=[0.0, 1.0],
            max_new_tokens=options.max_new_tokens,
            batch_size=16,
            num_speed_prompts=options.num_speed_prompts,
            num_answers=3,
            seed=options.seed,
        )
        checkpoint = resolve(demo_path("target"))
        tokenizer = checkpoint.tokenizer
        # float32: the fastest format on most CPUs, and one in which greedy decoding has hardly any ties.
        target = load_target(checkpoint, dtype=torch.float32)
        stock = load_draft(demo_path("draft"), dtype=torch.float32)
        train_prompts = load_prompts(demo_path("train.jsonl"), limit=options.num_train_prompts)
        test_prompts = load_prompts(demo_path("test.jsonl"), limit=options.num_test_prompts)

    console.rule("1/3  the target answers")
    console.print(f"A target of {target.num_parameters():,} parameters answers {len(train_prompts)} training queries.")
    how = {"max_new_tokens": options.max_new_tokens, "temperatures": (1.0,), "batch_size": 32, "seed": options.seed}
    answers = generate_alignment_data(target, tokenizer, train_prompts, **how)
    console.rule("2/3  the draft learns")
    console.print(f"A stock draft of {stock.num_parameters():,} parameters learns from the target's distributions.")
    trainer = distil(target, answers, tokenizer, options)

    console.rule("3/3  both drafts are measured")
    draft = load_draft(trainer.args.output_dir, dtype=torch.float32)
    source = "the demo pair's test queries"
    report = evaluate_draft(draft, target, tokenizer, test_prompts, baseline=stock, config=config, source=source)
    write(report, trainer, draft, out)
    console.print(ReportTable(report))
    for warning in report.warnings:
        console.print(f"Note: {warning}", markup=False)
    written = ", ".join(str(out / name) for name in ("report.html", "report.json", "draft") if (out / name).exists())
    lines = _lines(out / "draft", options.max_new_tokens)
    print(f"\nWritten: {written} (weights, tokenizer, card and plot).\n")
    print(f"The draft at work on the first test query, which nobody trained on:\n\n{indent(lines, '    ')}")
    print("These lines print:\n")
    exec(lines, {})
    return 0


def distil(target: Any, answers: Dataset, tokenizer: Any, options: QuickstartOptions) -> DraftDistillTrainer:
    """Distil a fresh copy of the stock draft on the target's answers, and save it into `OUT/draft`."""
    trainer = DraftDistillTrainer(
        model=demo_path("draft"),
        target_model=target,
        args=DraftDistillConfig(
            output_dir=str(Path(options.output_dir) / "draft"),
            num_train_epochs=options.num_train_epochs,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            seed=options.seed,
        ),
        train_dataset=answers,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return trainer


def write(report: SpeculationReport, trainer: DraftDistillTrainer, draft: Any, out: Path) -> None:
    """The report, the plot, and the draft with its tuned length and its card."""
    report.save(out / "report.json")
    folder = Path(trainer.args.output_dir)
    if report.recommendation is not None:
        settings = draft_length_settings(report.recommendation.num_assistant_tokens)
        store_draft_settings(draft, settings)
        store_draft_settings(trainer.model, settings)
        draft.generation_config.save_pretrained(folder)
    report.save(folder / "report.json")
    plots = {}
    try:
        save_figure(block_efficiency_figure(report), folder / PLOT)
        plots["Block efficiency by draft length"] = PLOT
        save_page(report, out / "report.html", trainer.state.log_history)
    except ImportError as error:
        print(f"No plot: {error}")
    trainer.create_model_card(model_name="draftkd-quickstart", report=report, plots=plots)


def _lines(draft: Path, max_new_tokens: int) -> str:
    """What a user can type to see a draft of the demo's target work."""
    return f"""\
from time import perf_counter
from hf_draftkd import SpeculativeDecoding, load_draft, load_prompts, load_target, load_tokenizer
from hf_draftkd.models.demo import demo_path

target, tokenizer = load_target(demo_path("target"), dtype="float32"), load_tokenizer(demo_path("target"))
draft = load_draft({str(draft.absolute())!r}, dtype="float32")
query = load_prompts(demo_path("test.jsonl"), limit=1)[0]["prompt"]
inputs = tokenizer.apply_chat_template(query, add_generation_prompt=True, return_dict=True, return_tensors="pt")
target.generate(**inputs, max_new_tokens=1)  # the first call is slow
for name, way in (("without", {{}}), ("with", {{"custom_generate": SpeculativeDecoding(draft)}})):
    start = perf_counter()
    output = target.generate(**inputs, **way, do_sample=False, max_new_tokens={max_new_tokens})
    seconds = perf_counter() - start
    print(f"{{seconds:.2f}} s {{name}} the draft:", tokenizer.decode(output[0, inputs.input_ids.shape[1] :]))
"""
