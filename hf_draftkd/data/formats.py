"""From dataset columns to token ids and labels.

`SFTTrainer` prepares every format that it knows, and trips over columns and values that it does not expect. So rows are
normalised here before it looks; and alignment rows, which carry the exact tokens that the target read and wrote, are
never tokenised a second time.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, Json, LargeList, List, Value
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset
from trl.data_utils import get_dataset_column_names, maybe_convert_to_chatml

from hf_draftkd.data.collator import INDEX_COLUMN, SETTING_COLUMN, UNKNOWN_SETTING, addresses, setting_feature
from hf_draftkd.data.columns import column_values, is_transformed, list_lengths, row_lengths, tables, without_format
from hf_draftkd.data.messages import read_messages, read_options, read_tools, template_form
from hf_draftkd.data.rows import AUTHOR_COLUMNS, author_of, authors, other_authors
from hf_draftkd.decoding.setting import SETTING_COLUMNS, DecodingSetting
from hf_draftkd.models.identity import ModelIdentity

logger = logging.getLogger(__name__)

# What one of these sets of columns makes trainable. The first that is present is used.
FORMATS: tuple[tuple[str, ...], ...] = (
    ("prompt_ids", "completion_ids"),
    ("input_ids",),
    ("prompt", "completion"),
    ("messages",),
    ("conversations",),
)
# What SFTTrainer reads beside the columns of a format. The first stand for each token of `input_ids`.
PER_TOKEN = ("labels", "completion_mask", "assistant_masks")
_BESIDE_IDS = (*PER_TOKEN, "seq_lengths")
_BESIDE_MESSAGES = ("tools", "chat_template_kwargs")
# Who speaks in ShareGPT's `conversations`, whose `from` and `value` TRL renames. Chat templates write nothing, or
# something else, for a role that they do not know.
_SPEAKERS = {"human": "user", "gpt": "assistant"}
# What a row of alignment data is read for.
_READ = {"prompt_ids", "completion_ids", "ids_source", *AUTHOR_COLUMNS, *SETTING_COLUMNS}


def check_format(dataset: Dataset | IterableDataset, name: str, *, text_field: str = "text") -> None:
    """Refuse a dataset that nothing can be learned from, before anything else happens."""
    if next(iter(dataset), None) is None:
        raise ValueError(f"The {name} dataset is empty. Give one with at least one row.")
    columns = get_dataset_column_names(dataset)
    if images := {"image", "images"} & set(columns):
        raise ValueError(
            f"The {name} dataset has the column {sorted(images)[0]!r}, but drafts are text-only causal LMs. "
            "Remove the column if the answers do not depend on it."
        )
    if format_of(dataset, text_field) is None:
        raise ValueError(
            f"The {name} dataset has the columns {columns}, none of which can be trained on. It needs one of: "
            + ", ".join(" + ".join(f"`{column}`" for column in needed) for needed in (*FORMATS, (text_field,)))
            + ". `draftkd generate` makes rows with `prompt_ids` and `completion_ids` from prompts."
        )


def format_of(dataset: Dataset | IterableDataset, text_field: str = "text") -> tuple[str, ...] | None:
    """The columns by which a data set is read: those of the first format that it has; None where it has none.

    Ids are lists of whole numbers: a column `input_ids` of anything else is a name for something else.
    """
    columns = set(get_dataset_column_names(dataset))
    for names in (*FORMATS, (text_field,)):
        ids = [column for column in names if column.endswith("_ids")]
        if set(names) <= columns and all(_holds_whole_numbers(dataset, column) for column in ids):
            return names
    return None


def check_token_ids(dataset: Dataset | IterableDataset, name: str, vocab_size: int) -> None:
    """Raise a `ValueError` for a token id that is negative or from `vocab_size` on, and name its row of the data set.

    Otherwise the draft's embedding would fail on it in the middle of training. A stream is not read.
    """
    if not isinstance(dataset, Dataset):
        return
    columns = [column for column in format_of(dataset) or () if column.endswith("_ids")]
    for column in columns:
        for first, table in tables(dataset, [column]):
            ids = pc.list_flatten(table[column]).to_numpy()
            wrong = (ids < 0) | (ids >= vocab_size)
            if not wrong.any():
                continue
            found, row = ids[wrong.argmax()], first + _entry_rows(table, column)[wrong.argmax()]
            if found < 0:
                raise ValueError(
                    f"Row {row} (counted from 0) of the {name} dataset holds {found} in `{column}`, which is no token. "
                    "What is not to be learned is -100 in `labels` alone."
                )
            raise ValueError(
                f"Row {row} (counted from 0) of the {name} dataset holds the token id {found} in `{column}`, but the "
                f"draft's vocabulary has {vocab_size} rows. If the target pads its vocabulary further, give the "
                "target, or fit the draft to it with `align_vocabulary` and save it; otherwise the row is of another "
                "tokenizer."
            )


def as_messages(dataset: Any) -> Any:
    """ShareGPT's `conversations` as `messages`, by which alone SFTTrainer tells a chat; all other data as they are."""
    if format_of(dataset) != ("conversations",):
        return dataset

    def renamed(row: dict[str, Any]) -> dict[str, Any]:
        for message in row["conversations"] or ():
            if isinstance(message, dict) and "from" in message:
                message["from"] = _SPEAKERS.get(message["from"], message["from"])
        return maybe_convert_to_chatml(row)

    options = {}
    if isinstance(dataset, Dataset):
        kept = {name: kind for name, kind in dataset.features.items() if name != "conversations"}
        options["features"] = Features({**kept, "messages": Json()})
    return dataset.map(renamed, remove_columns=["conversations"], **options)


def normalize_rows(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    text_field: str = "text",
    formatting_func: Callable[[dict], str] | None = None,
) -> Any:
    """Rows of one format, perhaps a stream, as SFTTrainer takes them: what the format needs, and nothing beside it.

    Messages, tools and template options come as the chat template reads them (see `messages.py`), and as JSON, in which
    rows that differ do not lend each other their keys. A `formatting_func` makes the text of a row that holds no token
    ids. Ids come as lists, whatever `set_format` made of them: arrays would be added up where lists are joined.
    """
    if is_transformed(dataset):
        raise ValueError(
            f"Rows of the {name} dataset are made by a transform (`set_transform`), but they are read once, before "
            "training. Make them with `map`; or let the transform give `input_ids` and `labels`, and set "
            '`dataset_kwargs={"skip_prepare_dataset": True}` and `remove_unused_columns=False`.'
        )
    dataset = without_format(dataset)
    if next(iter(dataset), None) is None:
        return dataset
    if formatting_func is None:
        dataset = as_messages(dataset)
    names, columns = format_of(dataset, text_field), get_dataset_column_names(dataset)
    if formatting_func is not None and (names is None or not names[0].endswith("_ids")):
        return dataset.map(lambda row: {text_field: formatting_func(row)}, remove_columns=columns)
    if names is None:
        return dataset
    if isinstance(dataset, Dataset):
        _check_filled(dataset, names, name)
    if names == FORMATS[0]:  # exact ids bring columns that say what they are
        return dataset
    if names == ("input_ids",):
        beside = [column for column in _BESIDE_IDS if column in columns and _holds_whole_numbers(dataset, column)]
        if isinstance(dataset, Dataset):
            _check_unpadded(dataset, name, masked=bool(set(PER_TOKEN) & set(beside)))
        dataset = dataset.select_columns([*names, *beside])
        if isinstance(dataset, Dataset):
            _check_masks(dataset, name)
        return dataset
    first = next(iter(dataset))
    if not any(isinstance(first[column], list | tuple) for column in names):
        return dataset.select_columns(list(names))
    columns = [*names, *(column for column in _BESIDE_MESSAGES if column in columns)]
    return _with_read_messages(dataset.select_columns(columns), columns, tokenizer, name)


def _with_read_messages(dataset: Any, columns: list[str], tokenizer: PreTrainedTokenizerBase, name: str) -> Any:
    """Conversations, and what the template reads beside them, in the form in which it reads them."""
    form = template_form(tokenizer)

    def read(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            made = maybe_convert_to_chatml(row)
            for column, value in dict(made).items():
                if column == "tools":
                    made[column] = read_tools(value)
                elif column == "chat_template_kwargs":
                    made[column] = read_options(value)
                elif not value:
                    raise ValueError(f"`{column}` holds no message. Take the row out.")
                elif isinstance(value, str):
                    raise ValueError(f"`{column}` is text, but the row's other column holds messages. Give both alike.")
                else:
                    made[column] = read_messages(value, form)
        except ValueError as error:
            raise ValueError(f"Row {index} (counted from 0) of the {name} dataset: {error}") from error
        return made

    options: dict[str, Any] = {}
    if isinstance(dataset, Dataset):
        features = Features({column: Json() for column in columns})
        options = {"features": features, "desc": f"Reading messages of {name} dataset"}
    return dataset.map(read, with_indices=True, **options)


def _holds_whole_numbers(dataset: Any, column: str) -> bool:
    """Whether a column holds lists of whole numbers."""
    if dataset.features is None:
        value = next(iter(dataset)).get(column)
        return isinstance(value, list) and all(isinstance(each, int) for each in value)
    kind = dataset.features.get(column)
    return (
        isinstance(kind, List | LargeList)
        and isinstance(kind.feature, Value)
        and kind.feature.dtype.lstrip("u").startswith(("int", "bool"))
    )


def _check_filled(dataset: Dataset, names: Sequence[str], name: str) -> None:
    for first, table in tables(dataset, names):
        empty = np.logical_or.reduce([pc.is_null(table[column]).to_numpy() for column in names])
        if empty.any():
            needed = " and ".join(f"`{column}`" for column in names)
            raise ValueError(
                f"Row {first + int(empty.argmax())} (counted from 0) of the {name} dataset lacks {needed}, by which "
                "its rows are read. Take it out; rows of another format can be mixed in as `mix_dataset`."
            )


def _entry_rows(table: pa.Table, column: str) -> np.ndarray:
    """The row in which each entry of the rows' lists stands, in the order of `list_flatten`."""
    return np.repeat(np.arange(len(table)), list_lengths(table, column).clip(min=0))


def _check_unpadded(dataset: Dataset, name: str, *, masked: bool) -> None:
    """Refuse ids that a tokenizer padded: the collator makes its own mask, and padding would be learned like text.

    Where labels have `masked` what is not learned, padding may stand behind a text, and in front would be read as text.
    """
    if not _holds_whole_numbers(dataset, "attention_mask"):
        return
    for first, table in tables(dataset, ["attention_mask"]):
        is_text = pc.list_flatten(table["attention_mask"]).to_numpy() != 0
        rows = _entry_rows(table, "attention_mask")
        wrong = ~is_text
        if masked:  # padding right before text of the same row
            wrong = wrong[:-1] & is_text[1:] & (rows[:-1] == rows[1:])
        if wrong.any():
            raise ValueError(
                f"Row {first + int(rows[wrong.argmax()])} (counted from 0) of the {name} dataset holds padding (its "
                "`attention_mask` has zeros), which would be read and learned like text. Tokenize without `padding`, "
                "since batches are padded as they are made; padding behind a text may stay where `labels` are -100."
            )


def _check_masks(dataset: Dataset, name: str) -> None:
    masks = [column for column in PER_TOKEN if column in dataset.column_names]
    for first, table in tables(dataset, ["input_ids", *masks]):
        for column in masks:
            fits = list_lengths(table, column) == list_lengths(table, "input_ids")
            if not fits.all():
                raise ValueError(
                    f"Row {first + int(fits.argmin())} (counted from 0) of the {name} dataset has `input_ids` and "
                    f"`{column}` of different lengths: each token needs its own. Correct the column, or remove it to "
                    "learn from all tokens."
                )


def exact_features(
    dataset: Dataset | IterableDataset, target: ModelIdentity | None, *, first_row: int | None = None, **map_kwargs: Any
) -> Any:
    """Turn alignment rows (`prompt_ids`, `completion_ids`) into `input_ids`, `labels` and their setting; leave all
    others alone.

    The two become one text with the prompt masked. Only rows that the target in use wrote keep their decoding setting:
    block efficiency is exact for such text and for no other. It is [temperature, top_p, top_k, repetition_penalty], nan
    where unknown, in `SETTING_COLUMN`. Where a cache is in use, in which `first_row` is the number of the first row,
    `INDEX_COLUMN` is aligned with `input_ids`.
    """
    columns = get_dataset_column_names(dataset)
    if not {"prompt_ids", "completion_ids"} <= set(columns):
        return dataset
    # Cached distributions are heavy: not even read here.
    light = [name for name in columns if name in _READ]

    def features(row: dict[str, Any], index: int) -> dict[str, Any]:
        prompt, completion = row["prompt_ids"], row["completion_ids"]
        made = {
            "input_ids": prompt + completion,
            "labels": [-100] * len(prompt) + completion,
            SETTING_COLUMN: _recorded_setting(row, target),
        }
        if first_row is not None:
            made[INDEX_COLUMN] = addresses(first_row + index, len(prompt), len(completion))
        return made

    rows = dataset.select_columns(light)
    return rows.map(features, with_indices=True, remove_columns=light, **map_kwargs)


def packed(dataset: Dataset, length: int | None, map_kwargs: dict[str, Any]) -> Dataset:
    """Whole texts in rows of at most `length` tokens, as SFTTrainer packs them; each token keeps its cache index."""
    if length is None:
        raise ValueError("Packing needs `max_length`: the length of a packed row.")
    return pack_dataset(dataset.select_columns(["input_ids", "labels", INDEX_COLUMN]), length, "bfd", map_kwargs)


def check_labels(dataset: Dataset | IterableDataset, name: str, max_length: int | None) -> None:
    """Raise a `ValueError` if prepared rows hold no token to learn from. A stream is read until the first such token.

    The first token of a row, which nothing predicts, counts as masked. Rows without labels, which the user prepared
    (`skip_prepare_dataset`), are learned from on all their tokens.
    """
    first = next(iter(dataset), None)  # of a stream, whose rows may all have been dropped
    if first is not None and "labels" not in first:
        return
    if not any(label != -100 for labels in column_values(dataset, "labels") for label in labels[1:]):
        raise ValueError(
            f"Nothing is left to learn from in the {name} dataset: every token is masked, or the prompts alone "
            f"fill `max_length={max_length}`. Check the masks, or raise `max_length`."
        )


def learnable_rows(dataset: Any, name: str, max_length: int | None, map_kwargs: dict[str, Any]) -> Any:
    """The prepared rows whose first `max_length` tokens hold something to learn; a `ValueError` if there are none."""

    def is_kept(labels: list[int]) -> bool:
        return any(label != -100 for label in labels[1:max_length])

    dataset = dataset.filter(is_kept, input_columns="labels", **map_kwargs)
    check_labels(dataset, name, max_length)
    return dataset


def warn_of_cuts(dataset: Dataset | IterableDataset, name: str, max_length: int | None) -> None:
    """Say how many prepared rows, still whole, are longer than `max_length`: what is cut off them is not learned from.

    None is no limit; a stream is not counted.
    """
    if max_length is None or isinstance(dataset, IterableDataset) or not PartialState().is_main_process:
        return
    cut = lost = longest = 0
    for _, table in tables(dataset, ["input_ids", "labels"]):
        lengths = list_lengths(table, "input_ids")
        longest = max(longest, int(lengths.max(initial=0)))
        too_long = table["labels"].take((lengths > max_length).nonzero()[0])
        cut += len(too_long)
        lost += sum(all(label == -100 for label in row[:max_length]) for row in too_long.to_pylist())
    if cut:
        logger.warning(
            "%d of %d rows of the %s dataset are longer than `max_length=%d` tokens (the longest has %d): %d are cut "
            "at the end, and %d, of which nothing to learn is left, are dropped. Raise `max_length` to keep them.",
            *(cut, len(dataset), name, max_length, longest, cut - lost, lost),
        )


def warn_of_other_authors(dataset: Dataset | IterableDataset, name: str, target: ModelIdentity | None) -> None:
    """Warn of rows that another model wrote, which count for no block efficiency.

    The rows are evaluation data, not yet prepared. A stream is not looked through.
    """
    if target is None or isinstance(dataset, IterableDataset) or not PartialState().is_main_process:
        return
    if others := other_authors(authors(dataset), target):
        logger.warning(
            "Rows of the %s dataset were written by %s, the target here is %s: they count for no block efficiency.",
            *(name, ", ".join(others), target),
        )


def longest_text(dataset: Dataset) -> int:
    """Tokens of the longest text in prepared rows; packed rows hold several."""
    if "seq_lengths" in dataset.column_names:
        return max((max(lengths) for lengths in column_values(dataset, "seq_lengths") if lengths), default=0)
    return int(row_lengths(dataset, "input_ids").max(initial=0))


def _recorded_setting(row: dict[str, Any], target: ModelIdentity | None) -> list[float]:
    author = author_of(row)
    is_own = author.matches(target) if author and target else author is target
    if row.get("ids_source") != "generated" or not is_own or any(row.get(name) is None for name in SETTING_COLUMNS):
        return UNKNOWN_SETTING
    return setting_feature(DecodingSetting.from_row(row))
