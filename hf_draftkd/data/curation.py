"""Prompts from domain text that holds no queries: questions where a column has them, else openings of documents."""

from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_draftkd.data.rows import require_chat_template
from hf_draftkd.data.sources import open_dataset
from hf_draftkd.utils.checks import one_of, whole_number

logger = logging.get_logger(__name__)

_CHARACTERS_A_TOKEN = 16  # generous: few texts have more
_LEAST_TOKENS = 8  # of a document


def curate_prompts(
    source: "str | Path | Dataset | list[Any]",
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_column: str = "text",
    question_column: str | None = None,
    opening_tokens: int = 64,
    instruction: str | None = None,
    split: str | None = None,
    config: str | None = None,
    limit: int | None = None,
) -> tuple[Dataset, dict[str, int]]:
    """Cut domain text into prompts, for the target to answer or to continue.

    `source`, `split`, `config` and `limit` are as in `load_prompts`. Each entry of a `question_column` becomes a
    prompt, with a chat template the user's message, and no documents are cut. Otherwise the prompt is the first
    `opening_tokens` of a document in `text_column`, as plain text, or a user's message: the `instruction` with the
    opening in the place of `{text}`. Documents of fewer than 8 tokens are left out.

    Returns:
        The prompts (column `prompt`) with the other columns, and how many rows were `kept`, `empty`, `too_short`, or
        `repeated`.

    Raises:
        ValueError: No such column, nothing left, or an instruction without `{text}` or without a chat template.
    """
    column = question_column or text_column
    whole_number("opening_tokens", opening_tokens)
    if instruction is not None and "{text}" not in instruction:
        raise ValueError(f"`instruction` must say where the text goes with {{text}}, got {instruction!r}.")
    if instruction is not None:
        require_chat_template(tokenizer)
    data = open_dataset(source, split=split, config=config, text_column=column)
    one_of("column", column, data.column_names)
    if limit is not None:
        data = data.take(whole_number("limit", limit))
    as_chat = instruction is not None or (question_column is not None and bool(tokenizer.chat_template))
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    rows, prompts = [], []
    for number, text in enumerate(data[column]):
        text = "" if text is None else text  # an empty cell of a CSV file
        if not isinstance(text, str):
            raise ValueError(f"Row {number} (counted from 0) of column {column!r} is not text ({type(text).__name__}).")
        prompt = text.strip() if question_column else opening(text, tokenizer, opening_tokens)
        if not prompt:
            reason = "empty"
        elif not question_column and not has_tokens(text, tokenizer, _LEAST_TOKENS):
            reason = "too_short"
        elif prompt in seen:
            reason = "repeated"
        else:
            reason = "kept"
            rows.append(number)
            content = prompt if instruction is None else instruction.replace("{text}", prompt)
            prompts.append([{"role": "user", "content": content}] if as_chat else content)
        seen.add(prompt)
        counts[reason] += 1
    if not rows:
        raise ValueError(
            f"No prompt could be cut from {len(data)} rows ({dict(counts)}). Is {column!r} the right column? Documents "
            f"of fewer than {_LEAST_TOKENS} tokens are left out."
        )
    logger.info(f"Cut {counts['kept']} prompts from {len(data)} rows: {dict(counts)}.")
    cut = Dataset.from_dict({"prompt": prompts})
    others = [name for name in data.column_names if name not in (column, "prompt")]
    if others:
        cut = concatenate_datasets([cut, data.select_columns(others).select(rows).flatten_indices()], axis=1)
    return cut, dict(counts)


def has_tokens(text: str, tokenizer: PreTrainedTokenizerBase, count: int) -> bool:
    """Whether a text has this many tokens, found out on as little of it as it takes: it may be a whole book."""
    size = max(count, 1) * _CHARACTERS_A_TOKEN
    while len(tokenizer(text[:size], add_special_tokens=False)["input_ids"]) < count:
        if size >= len(text):
            return False
        # Few tokens in many characters: long runs of one character can be single tokens.
        size *= 4
    return True


def opening(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """The first tokens of a document as text, cut back to the end of a word where the script has spaces."""
    text = text.strip()
    # A few characters per token are enough; a whole book need not be tokenised for its first sentence.
    start = text[: tokens * _CHARACTERS_A_TOKEN]
    ids = tokenizer(start, add_special_tokens=False)["input_ids"]
    if len(ids) <= tokens and len(start) == len(text):
        return text
    cut = tokenizer.decode(ids[:tokens], clean_up_tokenization_spaces=False).rstrip("\ufffd")
    if cut and start.startswith(cut) and start[len(cut) : len(cut) + 1].isspace():
        return cut.rstrip()
    words, _, last = cut.rpartition(" ")
    return words.rstrip() if words and len(last) <= 20 else cut.rstrip()
