"""What the steps share: prompts, the data that the target wrote, and results that say where they come from."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from torch import nn
from transformers import PreTrainedModel

from hf_draftkd.evaluation.environment import processor_name
from hf_draftkd.hub.public_names import without_paths
from hf_draftkd.utils.files import write_text
from hf_draftkd.utils.versions import package_versions

# Name of a set: the file of it in --data_dir, what `load_dataset` takes where there is no such folder, the column.
SETS = {
    "gsm8k_train": ("gsm8k_train.jsonl", {"path": "openai/gsm8k", "name": "main", "split": "train"}, "question"),
    "gsm8k_test": ("gsm8k_test.jsonl", {"path": "openai/gsm8k", "name": "main", "split": "test"}, "question"),
    "seeds": (
        "seed_instructions.jsonl",
        {
            "path": "json",
            "data_files": "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/seed_tasks.jsonl",
            "split": "train",
        },
        "instruction",
    ),
    "spec_bench": (
        "spec_bench.jsonl",
        {
            "path": "json",
            "data_files": "https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl",
            "split": "train",
        },
        "turns",
    ),
}


def read_rows(name: str, data_dir: str | None) -> Dataset:
    """The rows of a set as they are published."""
    file, published, _ = SETS[name]
    if data_dir is None:
        return load_dataset(**published)
    path = Path(data_dir) / file
    if not path.exists():
        raise SystemExit(f"{path} is missing. Put it there, or leave out --data_dir to load it by its address.")
    return load_dataset("json", data_files=str(path), split="train")


def conversations(rows: Dataset, column: str, kept: Sequence[str] = ("answer",)) -> Dataset:
    """A column of questions as a `prompt` of conversations with one message, beside the columns that are kept."""

    def conversation(row: dict) -> dict:
        text = row[column] if isinstance(row[column], str) else row[column][0]  # of several turns the first
        return {"prompt": [{"role": "user", "content": text}]}

    kept = [*kept, "prompt"]
    return rows.map(conversation, remove_columns=[each for each in rows.column_names if each not in kept])


def read_prompts(name: str, data_dir: str | None, limit: int | None = None) -> Dataset:
    """The prompts of a set as conversations of one message; of Spec-Bench with the `category` of each."""
    rows = read_rows(name, data_dir)
    # The seeds have another column where somebody has prepared them.
    column = "prompt" if "prompt" in rows.column_names else SETS[name][2]
    rows = conversations(rows, column, kept=["category"])
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def read_answers(work: Path, name: str) -> Dataset:
    """The finished shards of a set that step 2 writes, with those of later questions (`--first`)."""
    folders = [work / "data" / name, *sorted((work / "data").glob(f"{name}-from-*"))]
    files = [str(path) for folder in folders for path in sorted(folder.glob("data/*.parquet"))]
    return load_dataset("parquet", data_files=files, split="train")


def bytes_read(model: PreTrainedModel, vocabulary: int | None = None) -> int:
    """Bytes of the matrices that one token passes through, which is what a step costs where memory is the limit.

    An embedding is one row of its table and costs nothing; the head is cut to `vocabulary` rows.
    """
    head = model.get_output_embeddings()
    layers = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    rows = head.weight.shape[0] if vocabulary is None else vocabulary
    return (layers + rows * head.weight.shape[1]) * head.weight.element_size()


def held_out(domain: Dataset, count: int) -> tuple[Dataset, Dataset]:
    """Rows to learn from, and the last ones, on which choices are made: the test split is for results."""
    if not 0 < count < len(domain):
        raise SystemExit(f"Of {len(domain)} rows {count} cannot be held out: give another --held_out, or write more.")
    return domain.select(range(len(domain) - count)), domain.select(range(len(domain) - count, len(domain)))


def write_result(work: Path, name: str, value: dict[str, Any]) -> None:
    """Keep a result in `WORK/results`, with what it was run as and on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    provenance = {
        "command": without_paths(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "commit": commit.stdout.strip() or None,
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "versions": package_versions(),
    }
    folder = work / "results"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.json", json.dumps({**value, "provenance": provenance}, indent=2) + "\n")
