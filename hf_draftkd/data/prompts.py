"""Prompts in: from the Hub, a file, a folder or memory, checked before anything runs, rendered to token ids once."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Json, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_draftkd.data.sources import open_dataset, row_numbers, unknown

logger = logging.get_logger(__name__)

Prompt = str | list[dict[str, Any]]
# How a chat template asks for the date.
_CLOCK = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<form>.*?)(?P=quote)\s*\)""")


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
            are no prompts); a folder that `load_dataset` reads; a `Dataset`; or a list of strings, of message lists,
            or of rows.
        column: The column that holds the prompts: strings, or lists of `{"role", "content"}` messages. It is
            renamed to `prompt`; the other columns are kept.
        split: Split to take where there are several. Defaults to `train`.
        config: Configuration (subset) of a Hub dataset.
        limit: Take only the first so many rows.
        drop_last_answer: Take away assistant messages at the end of a conversation, so that the target answers anew.
        skip_invalid: Leave out prompts that are empty or malformed, and say how many, instead of refusing them.

    Returns:
        A dataset with a `prompt` column.

    Raises:
        ValueError: Nothing there, no rows, no such column or split, a line that is not JSON, or malformed prompts
            (with their row numbers, counted from 0).
    """
    dataset = open_dataset(source, split=split, config=config, text_column=column)
    if column not in dataset.column_names:
        raise ValueError(
            f"{unknown('column', column, dataset.column_names)} Say which holds the prompts: `load_prompts(..., "
            "column=...)`, or `draftkd generate --prompt_column ...`."
        )
    if column != "prompt":
        dataset = dataset.remove_columns([name for name in ["prompt"] if name in dataset.column_names])
        dataset = dataset.rename_column(column, "prompt")
    if limit is not None:
        if limit < 1:
            raise ValueError(f"`limit` must be at least 1, got {limit}.")
        dataset = dataset.select(range(min(limit, len(dataset))))
    if len(dataset) == 0:
        raise ValueError(f"{_name(source)} holds no rows, so there is nothing to answer.")
    if drop_last_answer:
        dataset = dataset.map(_without_last_answer)
    return _check_prompts(dataset, _name(source), skip_invalid)


def render_prompt(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, *, tools: Any = None, **template_options: Any
) -> list[int]:
    """The exact token ids that the target reads for one prompt. See `render_prompts`."""
    if not isinstance(prompt, str):
        return tokenizer.apply_chat_template(
            [clean_message(message) for message in prompt],
            tools=tool_schemas(tools),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **template_options,
        )
    ids = tokenizer(prompt)["input_ids"]
    # A tokenizer that closes every text would close the prompt before the target could continue it.
    if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]
    # Text that was already rendered brings its own beginning-of-text token.
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos] and not prompt.startswith(str(tokenizer.bos_token) * 2):
        ids = ids[1:]
    return ids


def render_prompts(
    prompts: "Dataset | Sequence[Prompt]",
    tokenizer: PreTrainedTokenizerBase,
    *,
    first_row: int = 0,
    **template_options: Any,
) -> list[list[int]]:
    """Turn prompts into the token ids that the target reads, once and for all.

    Messages go through the tokenizer's chat template with `add_generation_prompt=True` and receive no further special
    tokens. Strings are encoded as plain text, with the special tokens the tokenizer puts in front of a text.

    Args:
        prompts: Strings and message lists; or a dataset with a `prompt` column and, if it likes, a `tools` column and
            a `chat_template_kwargs` column (as in TRL). Tools may be schemas or their JSON; in schemas, keys without a
            value are left out, since Arrow adds them where the schemas of two tools differ.
        tokenizer: The target's tokenizer.
        first_row: Number of the first prompt, for messages.
        **template_options: Further arguments of the chat template, such as `enable_thinking=False`.

    Returns:
        One list of token ids a prompt.

    Raises:
        ValueError: Messages are given and the tokenizer has no chat template, or the template refuses them.
    """
    rows: Iterable[Mapping[str, Any]]
    rows = prompts if isinstance(prompts, Dataset) else ({"prompt": prompt} for prompt in prompts)
    rendered = []
    for number, row in enumerate(rows, start=first_row):
        if not isinstance(row["prompt"], str):
            require_chat_template(tokenizer)
        options = {**template_options, **(row.get("chat_template_kwargs") or {})}
        try:
            rendered.append(render_prompt(row["prompt"], tokenizer, tools=row.get("tools"), **options))
        except Exception as error:
            # Templates raise whatever their author chose; all of it is about this row.
            raise ValueError(f"The chat template cannot render prompt {number} (from 0): {error}") from error
    return rendered


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `ValueError` if `tokenizer` cannot render messages."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"The prompts are chat messages, but the tokenizer {tokenizer.name_or_path!r} has no chat template. Give "
            "the prompts as plain strings, or use a chat-tuned target, or set `tokenizer.chat_template`."
        )


def dated(tokenizer: PreTrainedTokenizerBase, day: str) -> dict[str, Any]:
    """Template options under which a template shows a given day (ISO) as today's; none where it shows no date.

    Those of Llama 3.2 and gpt-oss write the date into every prompt, so that a run which goes on the next day would read
    other tokens than it was begun with. transformers gives templates nothing but plain data, so the day stands in them.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str) or not _CLOCK.search(template):
        return {}
    moment = datetime.fromisoformat(day)
    return {"chat_template": _CLOCK.sub(lambda call: json.dumps(moment.strftime(call["form"])), template)}


def fitting_rows(
    lengths: Sequence[int],
    context: int | None,
    max_new_tokens: int,
    *,
    skip_too_long: bool = False,
    beginning: Callable[[int], str] | None = None,
) -> list[int]:
    """The numbers of the prompts that leave room for `max_new_tokens`.

    Args:
        lengths: Tokens of each prompt.
        context: The model's context length; None is no limit.
        max_new_tokens: Room to leave, in tokens.
        skip_too_long: Leave longer prompts out and warn, instead of refusing them.
        beginning: How the prompt of a row begins, for messages.

    Raises:
        ValueError: Prompts are empty or too long; their row numbers are listed.
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


def tool_schemas(tools: Any) -> Any:
    """A row's `tools` as a chat template takes them: read from their JSON, and without the keys that Arrow adds."""
    return json.loads(tools) if isinstance(tools, str) else (_without_nulls(tools) or None)


def clean_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without the empty keys that Arrow adds where rows differ: a template may ask whether a key is there.

    Inside tool calls as well, where a null that was meant cannot be told from one of Arrow's.
    """
    return {key: _without_nulls(value) for key, value in message.items() if value is not None or key == "content"}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list | tuple) else value


def prompt_problem(prompt: Any) -> str | None:
    """What is wrong with a prompt, or None."""
    if isinstance(prompt, str):
        return None if prompt.strip() else "is empty"
    if not isinstance(prompt, list | tuple):
        return f"is neither text nor a list of messages ({type(prompt).__name__})"
    if not prompt:
        return "is empty"
    for message in prompt:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return "holds a message without a role"
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            return "holds a message whose content is not text"
    if all(_is_blank(message.get("content")) for message in prompt):
        return "is empty"
    if prompt[-1]["role"] == "user" and _is_blank(prompt[-1].get("content")):
        return "ends with an empty message of the user"
    if prompt[-1]["role"] == "assistant":
        return "ends with the assistant's answer (with `drop_last_answer` the target answers anew)"
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
