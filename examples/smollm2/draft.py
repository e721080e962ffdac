"""Step 3: a draft that fits: layers of the target, and a list of the tokens that it proposes.

python examples/smollm2/draft.py --work_dir WORK

A step of the target reads 30 layers of 3.5M weights and a head of 28M. The draft may read 0.12 of that: so its head is
cut to the tokens that the target writes, and what is left goes into layers. Where the list has room for more, tokens of
the questions fill it: names, which the target repeats.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from journey import bytes_read, held_out, read_answers, read_prompts, write_result
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl import TrlParser

from hf_draftkd import build_draft, load_target, load_tokenizer
from hf_draftkd.data.vocabulary import choose_draft_vocabulary
from hf_draftkd.models.draft_length import store_draft_settings


@dataclass
class Options:
    """Which draft to make."""

    work_dir: str = field(default="smollm2", metadata={"help": "Folder of the whole journey: weights, data, results."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of prompt files; by default the Hub's."})
    sets: list[str] = field(default_factory=lambda: ["seeds", "synthetic"], metadata={"help": "Besides the domain."})
    held_out: int = field(default=128, metadata={"help": "Last rows of the domain, which are not looked at."})
    layers: list[int] = field(default_factory=lambda: [0, 1, 28, 29], metadata={"help": "Of the target."})
    vocabulary: int = field(default=3072, metadata={"help": "Tokens that it may propose."})


def listed(answers: Dataset, questions: Dataset, tokenizer: PreTrainedTokenizerBase, size: int) -> list[int]:
    """The tokens of the answers, the most frequent first, then those of all questions of the domain."""
    asked = tokenizer([row["content"] for (row,) in questions["prompt"]])["input_ids"]
    written = choose_draft_vocabulary(answers, size, keep=[tokenizer.eos_token_id])
    return choose_draft_vocabulary(Dataset.from_dict({"completion_ids": asked}), size, keep=written)


def main() -> None:
    (options,) = TrlParser(Options).parse_args_and_config()
    logging.disable_progress_bar()
    work = Path(options.work_dir)
    target = load_target(str(work / "target"), dtype="float32")
    tokenizer = load_tokenizer(str(work / "target"))
    learned, _ = held_out(read_answers(work, "gsm8k"), options.held_out)
    answers = concatenate_datasets([learned, *(read_answers(work, name) for name in options.sets)])
    questions = read_prompts("gsm8k_train", options.data_dir)
    ids = listed(answers, questions, tokenizer, options.vocabulary)
    draft = build_draft(target, layers=options.layers)
    store_draft_settings(draft, {"draft_vocabulary": ids})
    draft.save_pretrained(work / "draft")
    tokenizer.save_pretrained(work / "draft")
    share = bytes_read(draft, len(ids)) / bytes_read(target)
    write_result(work, "draft", {"layers": options.layers, "vocabulary": len(ids), "share_of_bytes": share})
    print(f"{work / 'draft'} reads {share:.3f} of what the target reads a step")


if __name__ == "__main__":
    main()
