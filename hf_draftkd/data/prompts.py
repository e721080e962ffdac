"""Prompts in: from the Hub, a file, a folder or memory, checked before anything runs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Json, concatenate_datasets
from transformers.utils import logging

from hf_draftkd.data.columns import column_values
from hf_draftkd.data.sources import open_dataset, row_numbers
from hf_draftkd.decoding.setting import SETTING_COLUMNS
from hf_draftkd.utils.checks import did_you_mean, whole_number

logger = logging.get_logger(__name__)


def load_prompts(
    source: "str | Path | Dataset | DatasetDict | Sequence[Any]",
    *,
    column: str = "prompt",
    split: str | None = None,
    config: str | None = None,
    limit: int | None = None,
    drop_last_answer: bool = False,
    skip_invalid: bool = False,
) -> Dataset:
    """Load prompts and check every one of them.

    Args:
        source: A dataset id on the Hub; a local JSONL, JSON, Parquet, CSV or text file (one prompt a line, blank lines
            are no prompts); a folder that `load_dataset` reads or `save_to_disk` wrote; a `Dataset`; or a list of
            strings, of message lists, or of rows.
        column: The column with the prompts, strings or lists of messages: renamed to `prompt`; the others are kept. In
            alignment data, which hold a prompt once for each of its completions, each `prompt` is taken once.
        split: Split to take where there are several. Defaults to `train`.
        config: Configuration (subset) of a Hub dataset.
        limit: Take only this many rows (of alignment data: prompts), from the start.
        drop_last_answer: Take away assistant messages at the end of a conversation, so that the target answers again.
        skip_invalid: Leave out prompts that are empty or malformed, and say how many, instead of refusing them.

    Raises:
        ValueError: Nothing there, no rows, no such column or split, a line that is not JSON, or malformed prompts
            (with their row numbers, counted from 0).
    """
    dataset = open_dataset(source, split=split, config=config, text_column=column)
    if column not in dataset.column_names:
        raise ValueError(_no_column(column, dataset.column_names, _name(source)))
    if column == "prompt" and is_answered(dataset):
        dataset = _each_prompt_once(dataset, _name(source))
    if column != "prompt":
        dataset = dataset.remove_columns([name for name in ["prompt"] if name in dataset.column_names])
        dataset = dataset.rename_column(column, "prompt")
    if limit is not None:
        dataset = dataset.take(whole_number("limit", limit))
    if len(dataset) == 0:
        raise ValueError(f"{_name(source)} holds no rows, so there is nothing to answer.")
    if drop_last_answer:
        if any(isinstance(prompt, str) for prompt in column_values(dataset, "prompt")):
            raise ValueError(
                f"`drop_last_answer` takes the last answer out of a conversation, but {_name(source)} holds prompts "
                "that are text. Leave it out, or name the column with the messages."
            )
        dataset = dataset.map(_without_last_answer)
    return _check_prompts(dataset, _name(source), skip_invalid)


def _no_column(column: str, given: Sequence[str], name: str) -> str:
    advice = "Name the one with the prompts: `--prompt_column`, in Python `column` of `load_prompts`."
    if "messages" in given:
        advice = (
            "Of conversations take the questions: `--prompt_column messages --drop_last_answer`, or the like in Python."
        )
    return f"{name} has no column {column!r}.{did_you_mean(column, given)} It has: {', '.join(given)}. {advice}"


def is_answered(dataset: Dataset) -> bool:
    """Whether rows are alignment data, one for each completion of a prompt, and say how each was decoded."""
    return {"prompt_ids", "completion_ids", *SETTING_COLUMNS} <= set(dataset.column_names)


def _each_prompt_once(dataset: Dataset, name: str) -> Dataset:
    first: dict[tuple[int, ...], int] = {}
    for number, ids in enumerate(column_values(dataset, "prompt_ids")):
        first.setdefault(tuple(ids), number)
    if len(first) == len(dataset):
        return dataset
    logger.warning(f"{name} holds {len(dataset)} completions of {len(first)} prompts: each of these is taken once.")
    return dataset.select(first.values())


def fitting_rows(
    lengths: Sequence[int],
    context: int | None,
    max_new_tokens: int,
    *,
    skip_too_long: bool = False,
    beginning: Callable[[int], str] | None = None,
) -> list[int]:
    """The rows of the prompts that leave room for `max_new_tokens` in the context (None: no limit).

    `lengths` are those of the prompts, in tokens. `beginning` says how the prompt of a row begins, for messages. A
    `ValueError` lists prompts that are empty or, unless `skip_too_long`, too long.
    """
    empty = [row for row, length in enumerate(lengths) if length == 0]
    if empty:
        raise ValueError(f"The tokenizer turns {row_numbers(empty)} into no tokens at all. Take them out.")
    if context is None:
        return list(range(len(lengths)))
    room = context - max_new_tokens
    if room < 1:
        raise ValueError(
            f"`max_new_tokens` is {max_new_tokens}, but the model reads at most {context} tokens, which leaves no "
            f"room for a prompt. Use at most {context - 1}."
        )
    too_long = [row for row, length in enumerate(lengths) if length > room]
    if not too_long:
        return list(range(len(lengths)))
    shown = "" if beginning is None else f"; the first of them begins {beginning(too_long[0])}"
    text = (
        f"{row_numbers(too_long)} longer than {room} tokens (context {context} - max_new_tokens {max_new_tokens}; the "
        f"longest has {max(lengths)}{shown})"
    )
    if not skip_too_long:
        raise ValueError(
            f"{text}. Shorten them, leave them out (when generating data, `skip_too_long=True` does), or lower "
            "`max_new_tokens`."
        )
    if len(too_long) == len(lengths):
        raise ValueError(f"{text}: no prompt is left. Lower `max_new_tokens`.")
    logger.warning(f"Left out {text}.")
    return [row for row, length in enumerate(lengths) if length <= room]


def prompt_problem(prompt: Any) -> str | None:
    """What is wrong with a prompt, or None."""
    if isinstance(prompt, str):
        return None if prompt.strip() else "is empty"
    if not isinstance(prompt, list | tuple):
        return f"is neither text nor a list of messages ({type(prompt).__name__})"
    if not prompt:
        return "is empty"
    if all(isinstance(item, int) for item in prompt):
        return "is a list of numbers, where text or messages are expected (ids are not taken)"
    for message in prompt:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return "holds a message without a role"
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            return "holds a message whose content is not text"
    if all(_is_blank(message.get("content")) for message in prompt):
        return "is empty"
    if prompt[-1]["role"] == "user" and _is_blank(prompt[-1].get("content")):
        return "ends with an empty user message"
    if prompt[-1]["role"] == "assistant":
        return "ends with the assistant's answer (with `drop_last_answer` the target answers again)"
    return None


def _is_blank(content: Any) -> bool:
    return not (content.strip() if isinstance(content, str) else content)


def _check_prompts(dataset: Dataset, name: str, skip_invalid: bool) -> Dataset:
    problems: list[tuple[int, str]] = []
    first: dict[bool, int] = {}  # first row that is text, and first that is messages
    for row, item in enumerate(dataset.select_columns(["prompt"])):
        if problem := prompt_problem(item["prompt"]):
            problems.append((row, problem))
        else:
            first.setdefault(isinstance(item["prompt"], str), row)
    if problems and (not skip_invalid or not first):
        raise ValueError(_listing(problems, name))
    if len(first) > 1:
        raise ValueError(
            f"{name} mixes strings and message lists: row {first[True]} (counted from 0) is text, row {first[False]} "
            "holds messages. Give one kind, or generate in two runs."
        )
    if problems:
        logger.warning(f"Left out {len(problems)} of {len(dataset)} prompts. {_listing(problems, name)}")
        bad = {row for row, _ in problems}
        dataset = dataset.select([row for row in range(len(dataset)) if row not in bad])
    return _with_plain_type(dataset) if isinstance(dataset.features["prompt"], Json) else dataset


def _with_plain_type(dataset: Dataset) -> Dataset:
    # What stood among prompts that are left out made the whole column JSON; now text is text and messages are messages.
    prompts = Dataset.from_dict({"prompt": dataset["prompt"][:]}, on_mixed_types="use_json")
    others = dataset.remove_columns("prompt")
    return concatenate_datasets([prompts, others], axis=1) if others.column_names else prompts


def _without_last_answer(row: dict[str, Any]) -> dict[str, Any]:
    prompt = row["prompt"]
    if isinstance(prompt, list):
        while prompt and isinstance(prompt[-1], Mapping) and prompt[-1].get("role") == "assistant":
            prompt = prompt[:-1]
    return {"prompt": prompt}


def _listing(problems: list[tuple[int, str]], name: str) -> str:
    by_kind: dict[str, list[int]] = {}
    for row, problem in problems:
        by_kind.setdefault(problem, []).append(row)
    return f"{name}: " + "; ".join(f"{row_numbers(rows)} {problem}" for problem, rows in by_kind.items()) + "."


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else f"The given {type(source).__name__}"
