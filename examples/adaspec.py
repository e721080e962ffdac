"""AdaSPEC (arXiv 2510.19779) on the demo pair: distil a reference, then a draft from the tokens that it can learn.

python examples/adaspec.py [--max_steps 200] [--selected_share 0.4] [--prompts 512]

The reference is a copy of the draft distilled from all tokens: it is also the baseline AdaSPEC has to beat.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

from trl import TrlParser

from hf_draftkd import DraftDistillConfig, DraftDistillTrainer, generate_alignment_data, load_draft, load_target
from hf_draftkd.data.prompts import load_prompts
from hf_draftkd.models.demo import demo_path
from hf_draftkd.models.loading import load_tokenizer


@dataclass
class Options:
    prompts: int = field(default=512, metadata={"help": "Prompts that the target answers; a quarter is held out."})
    answer_tokens: int = field(default=96, metadata={"help": "Longest answer, in tokens."})


options, args = TrlParser((Options, DraftDistillConfig)).parse_args_and_config()
args.report_to, args.save_strategy = [], "no"
target = load_target(demo_path("target"), dtype="float32")
tokenizer = load_tokenizer(demo_path("target"))
prompts = load_prompts(demo_path("train.jsonl"), limit=options.prompts)
answers = generate_alignment_data(target, tokenizer, prompts, max_new_tokens=options.answer_tokens, batch_size=32)
answers = answers.train_test_split(0.25, seed=args.seed)


def distil(selection, reference=None):
    """A new draft, trained on the tokens that `selection` says; and its metrics before and after."""
    own = copy.deepcopy(args)
    own.token_selection, own.output_dir = selection, str(Path(args.output_dir, selection))
    if selection == "all":
        own.selected_share = DraftDistillConfig.selected_share  # another is refused: nothing would read it
    trainer = DraftDistillTrainer(
        model=load_draft(demo_path("draft"), dtype="float32"),
        target_model=target,
        args=own,
        train_dataset=answers["train"],
        eval_dataset=answers["test"],
        processing_class=tokenizer,
        reference_model=reference,
    )
    before = trainer.evaluate()
    trainer.train()
    return trainer.model, before, trainer.evaluate()


reference, stock, everything = distil("all")
_, _, selected = distil("adaspec", reference)

# Draft length -> metric: the one that --eval_num_assistant_tokens asks for is there once, under the plain name.
efficiency = {8: "block_efficiency_at_8"} | {args.eval_num_assistant_tokens: "block_efficiency"}
columns = {f"tokens per target call, γ = {length}": name for length, name in sorted(efficiency.items())}
columns["acceptance rate, greedy"] = "acceptance_rate_t0"
print(f"| draft | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
for name, metrics in (
    ("stock", stock),
    ("distilled on all tokens (the reference)", everything),
    (f"distilled on {args.selected_share:.0%} of the tokens", selected),
):
    values = [metrics[f"eval_{key}"] for key in columns.values()]
    print(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |")
