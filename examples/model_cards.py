"""The cards in `model_cards/`: four drafts of the demo pair, each trained in a different way, measured and described.

python examples/model_cards.py                                # write the cards again from the stored reports
python examples/model_cards.py --train full lora on_policy tvd_plus_plus  # train first: ten minutes

What is stored is what was measured (`report.json`) and what was done (`provenance.json`); the card is made from these
two alone. `tests/hub/test_model_cards.py` compares, so a card can neither drift from the code nor be edited by hand.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig
from trl import TrlParser

from hf_draftkd import (
    DraftDistillConfig,
    DraftDistillTrainer,
    DraftModelCard,
    evaluate_draft,
    generate_alignment_data,
    load_draft,
    load_target,
)
from hf_draftkd.data.prompts import load_prompts
from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.hub.provenance import Provenance
from hf_draftkd.hub.public_names import public_report
from hf_draftkd.models.demo import demo_path
from hf_draftkd.models.draft_length import draft_length_settings, store_draft_settings
from hf_draftkd.models.loading import load_tokenizer

FOLDER = Path(__file__).resolve().parent.parent / "model_cards"

# How each draft differs from plain offline distillation with forward KL.
RECIPES: dict[str, dict] = {
    "full": {},
    "lora": {"learning_rate": 5e-3, "peft": LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")},
    "on_policy": {"lmbda": 1.0},
    "tvd_plus_plus": {"divergence": "tvd_plus_plus"},
}


@dataclass
class Options:
    """Sizes of the runs; the stored cards were made with the defaults."""

    train: list[str] = field(default_factory=list, metadata={"help": f"Drafts to train again: {', '.join(RECIPES)}."})
    num_train_prompts: int = field(default=160, metadata={"help": "Training queries the target answers."})
    num_test_prompts: int = field(default=32, metadata={"help": "Test queries the drafts are measured on."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the target's answers."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling and training."})

    def __post_init__(self) -> None:
        if unknown := set(self.train) - set(RECIPES):
            raise ValueError(f"There is no recipe {sorted(unknown)}. Choose among {', '.join(RECIPES)}.")


def card_of(folder: Path) -> DraftModelCard:
    """The card of a stored draft, from `report.json` and `provenance.json` and nothing else."""
    return DraftModelCard.from_report(
        SpeculationReport.load(folder / "report.json"),
        provenance=Provenance.load(folder),
        name=f"demo-draft-{folder.name.replace('_', '-')}",
        license="apache-2.0",
        language=["en", "code"],
    )


def train_and_measure(name: str, options: Options) -> None:
    """Train one recipe on the demo pair, measure it beside the stock draft, and store what a card is made from."""
    target, tokenizer = load_target(demo_path("target"), dtype="float32"), load_tokenizer(demo_path("target"))
    prompts = load_prompts(demo_path("train.jsonl"), limit=options.num_train_prompts)
    answers = generate_alignment_data(
        target, tokenizer, prompts, max_new_tokens=options.max_new_tokens, temperatures=(1.0,), batch_size=32
    )
    recipe = {"learning_rate": 2e-3} | RECIPES[name]
    peft_config = recipe.pop("peft", None)
    with tempfile.TemporaryDirectory() as parent:
        output_dir = str(Path(parent) / f"demo-draft-{name.replace('_', '-')}")
        trainer = DraftDistillTrainer(
            model=demo_path("draft"),
            target_model=target,
            args=DraftDistillConfig(
                output_dir=output_dir,
                num_train_epochs=options.num_train_epochs,
                per_device_train_batch_size=16,
                lr_scheduler_type="cosine",
                warmup_steps=10,
                save_strategy="no",
                report_to="none",
                seed=options.seed,
                **recipe,
            ),
            train_dataset=answers,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        trainer.train()
        trainer.save_model()
        draft = load_draft(output_dir, dtype="float32")
        report = evaluate_draft(
            draft,
            target,
            tokenizer,
            load_prompts(demo_path("test.jsonl"), limit=options.num_test_prompts),
            baseline=load_draft(demo_path("draft"), dtype="float32"),
            temperatures=(0.0, 1.0),
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
            source="the demo pair's test queries",
            domain="function calling",
        )
        if report.recommendation is not None:
            for model in (draft, trainer.model):
                store_draft_settings(model, draft_length_settings(report.recommendation.num_assistant_tokens))
        trainer.create_model_card(report=report)
        made = Provenance.load(output_dir)
        assert made is not None
        folder = FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        made.public().save(folder)
        public_report(report).save(folder / "report.json")


def main() -> None:
    (options,) = TrlParser(Options).parse_args_and_config()
    for name in options.train:
        print(f"{name}: the target answers, the draft learns, both drafts are measured")
        train_and_measure(name, options)
    for path in sorted(FOLDER.glob("*/report.json")):
        print(card_of(path.parent).save(path.parent / "README.md"))


if __name__ == "__main__":
    main()
