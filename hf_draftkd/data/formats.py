"""From dataset columns to token ids and labels.

`SFTTrainer` prepares every format that it knows. What it does not know is done here, before it looks: alignment rows
carry the exact tokens that the target read and wrote, and must never be tokenised a second time.
"""

import logging
from collections.abc import Iterable
from typing import Any

import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from trl import pack_dataset
from trl.data_utils import get_dataset_column_names

from hf_draftkd.data.collator import UNKNOWN_SETTING, addresses, setting_feature
from hf_draftkd.decoding.setting import SETTING_COLUMNS, DecodingSetting

logger = logging.getLogger(__name__)

# What one of these sets of columns makes trainable. The first that is present is used.
FORMATS: tuple[tuple[str, ...], ...] = (
    ("prompt_ids", "completion_ids"),
    ("input_ids",),
    ("prompt", "completion"),
    ("messages",),
    ("conversations",),
)
# What a row of alignment data is read for.
_READ = {"prompt_ids", "completion_ids", "ids_source", "target", *SETTING_COLUMNS}


def check_format(dataset: Dataset | IterableDataset, name: str, *, text_field: str = "text") -> None:
    """Refuse a dataset that nothing can be learnt from, before anything else happens.

    Raises:
        ValueError: The dataset is empty, holds images, or has none of the column sets that are understood.
    """
    if next(iter(dataset), None) is None:
        raise ValueError(f"The {name} dataset is empty. Give one with at least one row.")
    columns = get_dataset_column_names(dataset)
    if images := {"image", "images"} & set(columns):
        raise ValueError(
            f"The {name} dataset has the column {sorted(images)[0]!r}, but drafts are text-only causal LMs. "
            "Remove the column if the answers do not depend on it."
        )
    formats = [*FORMATS, (text_field,)]
    if not any(set(needed) <= set(columns) for needed in formats):
        raise ValueError(
            f"The {name} dataset has the columns {columns}, none of which can be trained on. Needed is one of: "
            + ", ".join(" + ".join(f"`{column}`" for column in needed) for needed in formats)
            + ". `draftkd generate` makes rows with `prompt_ids` and `completion_ids` from prompts."
        )


def exact_features(
    dataset: Dataset | IterableDataset, target_name: str | None, *, first_row: int | None = None, **map_kwargs: Any
) -> Any:
    """Turn rows that already hold token ids into `input_ids`, `labels` and `decoding`; leave all others alone.

    Alignment rows (`prompt_ids`, `completion_ids`) become their concatenation with the prompt masked. A
    `completion_mask` that comes with `input_ids` becomes `labels`, which `SFTTrainer` would ignore.

    Args:
        dataset: Rows in any format.
        target_name: The target in use. Only rows that this target wrote keep their decoding setting: block
            efficiency is exact for such text and for no other.
        first_row: Number of the first row in the `CachedDistributions` in use, if any.
        map_kwargs: Passed on to `datasets.map`.

    Returns:
        The dataset, with `decoding` = [temperature, top_p, top_k, repetition_penalty], nan where unknown, and with
        `cache_index`, aligned with `input_ids`, where a cache is in use.
    """
    columns = get_dataset_column_names(dataset)
    if {"prompt_ids", "completion_ids"} <= set(columns):
        # Cached distributions are heavy: not even read here.
        light = [name for name in columns if name in _READ]

        def features(row: dict[str, Any], index: int) -> dict[str, Any]:
            prompt, completion = row["prompt_ids"], row["completion_ids"]
            made = {
                "input_ids": prompt + completion,
                "labels": [-100] * len(prompt) + completion,
                "decoding": _recorded_setting(row, target_name),
            }
            if first_row is not None:
                made["cache_index"] = addresses(first_row + index, len(prompt), len(completion))
            return made

        rows = dataset.select_columns(light)
        return rows.map(features, with_indices=True, remove_columns=light, **map_kwargs)
    if {"input_ids", "completion_mask"} <= set(columns) and "labels" not in columns:

        def masked(row: dict[str, Any]) -> dict[str, Any]:
            pairs = zip(row["input_ids"], row["completion_mask"], strict=True)
            return {"labels": [token if counts else -100 for token, counts in pairs]}

        return dataset.map(masked, remove_columns=["completion_mask"], **map_kwargs)
    return dataset


def packed(dataset: Dataset, length: int | None, map_kwargs: dict[str, Any]) -> Dataset:
    """Whole texts in rows of at most `length` tokens, as SFTTrainer packs them; each token keeps its cache index."""
    if length is None:
        raise ValueError("Packing needs `max_length`: the length of a packed row.")
    return pack_dataset(dataset.select_columns(["input_ids", "labels", "cache_index"]), length, "bfd", map_kwargs)


def has_labels(dataset: Dataset) -> bool:
    """Whether any token of prepared rows is learnt from. The first of a row is predicted by nothing."""
    return any(label != -100 for labels in _column(dataset, "labels") for label in labels[1:])


def warn_of_cuts(dataset: Dataset | IterableDataset, name: str, max_length: int | None) -> None:
    """Say how many prepared rows are longer than `max_length`: what is cut off them is not learnt from.

    Args:
        dataset: Rows with `input_ids` and `labels`, still whole. A stream is not counted.
        name: What messages call the data set.
        max_length: The longest row that is kept whole; None is no limit.
    """
    if max_length is None or isinstance(dataset, IterableDataset) or not PartialState().is_main_process:
        return
    cut = lost = longest = 0
    for table in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=1000):
        lengths = pc.list_value_length(table["input_ids"]).to_numpy()
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


def longest_text(dataset: Dataset) -> int:
    """Tokens of the longest text in prepared rows; packed rows hold several."""
    if "seq_lengths" in dataset.column_names:
        return max((max(lengths) for lengths in _column(dataset, "seq_lengths") if lengths), default=0)
    return max(map(len, _column(dataset, "input_ids")), default=0)


def _column(dataset: Dataset, name: str) -> Iterable[Any]:
    return (row for batch in dataset.select_columns([name]).iter(batch_size=1000) for row in batch[name])


def _recorded_setting(row: dict[str, Any], target_name: str | None) -> list[float]:
    is_exact = row.get("ids_source") == "generated" and row.get("target") == target_name
    if not is_exact or any(row.get(name) is None for name in SETTING_COLUMNS):
        return UNKNOWN_SETTING
    return setting_feature(DecodingSetting.from_row(row))
