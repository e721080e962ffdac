"""The pair for `examples/claims`: the journey's target, a draft, and GSM8K's questions with their given answers.

python examples/smollm2/pair.py  --work_dir WORK --draft distilled
python examples/claims/run.py    --pair WORK/pair --sizes small --only A3
python examples/claims/render.py --pair WORK/pair --sizes small --only A3 \\
    --output examples/smollm2/claims.md
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from journey import conversations, read_rows
from trl import TrlParser


@dataclass
class Options:
    """Which draft, and which questions."""

    work_dir: str = field(default="smollm2", metadata={"help": "Folder of the whole journey: weights, data, results."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of prompt files; by default the Hub's."})
    draft: str = field(default="distilled", metadata={"help": "Folder in --work_dir of the draft."})
    first: int = field(default=1024, metadata={"help": "First question to train on, behind those it learned."})
    dev: int = field(default=64, metadata={"help": "Last questions, by which learning rates are chosen."})


def with_given_answers(name: str, data_dir: str | None) -> Dataset:
    """Questions as conversations, with what a teacher wrote; without the calculator's annotations."""
    rows = conversations(read_rows(name, data_dir), "question")
    answers = [re.sub(r"<<.*?>>", "", answer) for answer in rows["answer"]]
    return rows.remove_columns("answer").add_column("reference", answers)


def main() -> None:
    (options,) = TrlParser(Options).parse_args_and_config()
    work = Path(options.work_dir)
    folder = work / "pair"
    folder.mkdir(exist_ok=True)
    for name, model in (("target", "target"), ("draft", options.draft)):
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..") / model)
    train = with_given_answers("gsm8k_train", options.data_dir)
    end = len(train) - options.dev
    if options.first >= end:
        raise SystemExit(f"Of {len(train)} questions none is left from --first {options.first} on: give a lower one.")
    train.select(range(options.first, end)).to_json(folder / "train.jsonl")
    train.select(range(end, len(train))).to_json(folder / "dev.jsonl")
    with_given_answers("gsm8k_test", options.data_dir).to_json(folder / "test.jsonl")
    print(f"{folder}: {end - options.first} questions to train on")


if __name__ == "__main__":
    main()
