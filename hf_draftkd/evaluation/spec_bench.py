"""Prompts from Spec-Bench's question files (https://arxiv.org/abs/2401.07851), by its six tasks."""

from typing import Any

from datasets import Dataset

# MT-Bench's own categories; the other five tasks carry their name.
MT_BENCH = frozenset({"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"})


def is_spec_bench(dataset: Dataset) -> bool:
    """Whether rows are questions in Spec-Bench's format: `category` and `turns`, and no prompt."""
    return {"category", "turns"} <= set(dataset.column_names) and "prompt" not in dataset.column_names


def spec_bench_prompts(dataset: Dataset) -> Dataset:
    """One conversation of one user turn per question, with its task as `category`.

    Only first turns are taken: a second turn needs the answer to the first, and would then depend on who gave it.

    Raises:
        ValueError: A row has no turn.
    """

    def convert(row: dict[str, Any], number: int) -> dict[str, Any]:
        turns = row["turns"]
        if not turns or not isinstance(turns[0], str) or not turns[0].strip():
            raise ValueError(
                f"Question {number} (counted from 0) has no first turn: `turns` must be a list of strings."
            )
        task = "mt_bench" if row["category"] in MT_BENCH else row["category"]
        return {"prompt": [{"role": "user", "content": turns[0]}], "category": task}

    return dataset.map(convert, with_indices=True, remove_columns=dataset.column_names)
