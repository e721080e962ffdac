"""Step 3: a draft that fits: layers of the target, and a list of the tokens that it proposes.

python examples/smollm2/draft.py --work_dir WORK --compare   # which layers, which list: a short training of each
python examples/smollm2/draft.py --work_dir WORK             # make the one that was chosen

A step of the target reads 30 layers of 3.5M weights and a head of 28M. The draft may read 0.12 of that: so its head is
cut to the tokens that the target writes, and what is left goes into layers. Where the list has room for more, tokens of
the questions fill it: names, which the target repeats.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from journey import bytes_read, held_out, read_answers, read_prompts, write_result
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl import TrlParser

from hf_draftkd import DraftDistillConfig, DraftDistillTrainer, build_draft, load_target, load_tokenizer
from hf_draftkd.data.vocabulary import choose_draft_vocabulary
from hf_draftkd.models.draft_length import store_draft_settings

# Layers of the target, and tokens on the list: each reads 0.11 to 0.12 of what the target reads.
CANDIDATES: dict[str, tuple[list[int], int]] = {
    "0, 1, 29, 8192 tokens": ([0, 1, 29], 8192),
    "0, 15, 29, 8192 tokens": ([0, 15, 29], 8192),
    "0, 1, 28, 29, 3072 tokens": ([0, 1, 28, 29], 3072),
    "0, 1, 2, 29, 3072 tokens": ([0, 1, 2, 29], 3072),
}


@dataclass
class Options:
    """Which draft to make, or how long each candidate is trained to compare them."""

    work_dir: str = field(default="smollm2", metadata={"help": "Folder of the whole journey: weights, data, results."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of prompt files; by default the Hub's."})
    sets: list[str] = field(default_factory=lambda: ["seeds", "synthetic"], metadata={"help": "Besides the domain."})
    compare: bool = field(default=False, metadata={"help": "Train every candidate a little, and compare."})
    rows: int = field(default=128, metadata={"help": "Rows that the candidates are trained on."})
    epochs: float = field(default=2.0, metadata={"help": "Passes over them."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the comparison."})
    held_out: int = field(default=128, metadata={"help": "Last rows of the domain, to compare on."})
    layers: list[int] = field(default_factory=lambda: [0, 1, 28, 29], metadata={"help": "Layers of the draft to make."})
    vocabulary: int = field(default=3072, metadata={"help": "Tokens that it may propose."})
    dtype: str = field(default="bfloat16", metadata={"help": "bfloat16, or float32 for older CPUs."})


def listed(answers: Dataset, questions: Dataset, tokenizer: PreTrainedTokenizerBase, size: int) -> list[int]:
    """The tokens of the answers, the most frequent first, then those of all questions of the domain."""
    asked = tokenizer([row["content"] for (row,) in questions["prompt"]])["input_ids"]
    written = choose_draft_vocabulary(answers, size, keep=[tokenizer.eos_token_id])
    return choose_draft_vocabulary(Dataset.from_dict({"completion_ids": asked}), size, keep=written)


def make(target: PreTrainedModel, layers: list[int], ids: list[int]) -> PreTrainedModel:
    """These layers of the target, and the list of tokens in the generation config."""
    draft = build_draft(target, layers=layers)
    store_draft_settings(draft, {"draft_vocabulary": ids})
    return draft


def try_out(draft: PreTrainedModel, learned: Dataset, unseen: Dataset, options: Options) -> dict[str, Any]:
    """Train a little, and measure on questions that it did not see."""
    args = DraftDistillConfig(
        output_dir=str(Path(options.work_dir) / "trials"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=32,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        draft_vocabulary="recorded",
        save_strategy="no",
        report_to="none",
        logging_steps=20,
        use_cpu=True,
        bf16=options.dtype == "bfloat16",
        train_sampling_strategy="group_by_length",
    )
    trainer = DraftDistillTrainer(
        model=draft,
        args=args,
        train_dataset=learned.select(range(options.rows)),
        eval_dataset=unseen,
        processing_class=load_tokenizer(str(Path(options.work_dir) / "target")),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    metrics = trainer.evaluate()
    return {name: metrics[f"eval_{name}_t0"] for name in ("acceptance_rate", "block_efficiency")} | {"seconds": seconds}


def main() -> None:
    (options,) = TrlParser(Options).parse_args_and_config()
    logging.disable_progress_bar()
    if options.dtype == "bfloat16":
        torch.set_float32_matmul_precision("medium")  # as in step 4
    work = Path(options.work_dir)
    target = load_target(str(work / "target"), dtype="float32")
    tokenizer = load_tokenizer(str(work / "target"))
    learned, unseen = held_out(read_answers(work, "gsm8k"), options.held_out)
    answers = concatenate_datasets([learned, *(read_answers(work, name) for name in options.sets)])
    questions = read_prompts("gsm8k_train", options.data_dir)
    whole = bytes_read(target)
    if not options.compare:
        ids = listed(answers, questions, tokenizer, options.vocabulary)
        draft = make(target, options.layers, ids)
        draft.save_pretrained(work / "draft")
        tokenizer.save_pretrained(work / "draft")
        share = bytes_read(draft, len(ids)) / whole
        write_result(work, "draft", {"layers": options.layers, "vocabulary": len(ids), "share_of_bytes": share})
        print(f"{work / 'draft'} reads {share:.3f} of what the target reads a step")
        return
    path = work / "results" / "candidates.json"
    results = json.loads(path.read_text(encoding="utf-8"))["candidates"] if path.exists() else {}
    for name, (layers, size) in CANDIDATES.items():
        if name in results:
            continue
        ids = listed(answers, questions, tokenizer, size)
        draft = make(target, layers, ids)
        results[name] = {
            "share_of_bytes": bytes_read(draft, len(ids)) / whole,
            **try_out(draft, learned, unseen, options),
        }
        print(name, results[name])
        write_result(work, "candidates", {"rows": options.rows, "epochs": options.epochs, "candidates": results})


if __name__ == "__main__":
    main()
