"""Alignment data mixed with pretraining text, so that a draft does not forget what lies outside its data.

The drafter of https://arxiv.org/abs/2403.00858 was fine-tuned on nine parts of alignment data to one of such text.
"""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, interleave_datasets

from hf_draftkd.data.collator import INDEX_COLUMN, SETTING_COLUMN
from hf_draftkd.data.formats import format_columns, formats_of
from hf_draftkd.data.sources import row_numbers


def parse_mix(mix: str) -> tuple[float, float]:
    """`"9:1"` as two positive numbers: parts of alignment data, parts of pretraining text."""
    if not isinstance(mix, str):
        raise ValueError(
            f"A mix is text such as '9:1', got {mix!r}. YAML needs the quotes: it reads 9:1 as a time, 541."
        )
    try:
        alignment, pretraining = (float(part) for part in mix.split(":"))
    except ValueError:
        raise ValueError(f"A mix is written as two numbers, such as 9:1, got {mix!r}.") from None
    if not (0 < alignment < math.inf and 0 < pretraining < math.inf):
        raise ValueError(f"Both parts of a mix must be positive, got {mix!r}. Leave the pretraining text out instead.")
    return alignment, pretraining


def mix_datasets(alignment: Dataset, pretraining: Dataset, *, mix: str = "9:1", seed: int = 0) -> Dataset:
    """Interleave two data sets at random, `mix` being the parts of the first and of the second, `seed` the order.

    Every row of `alignment` comes once, in its order. Rows of `pretraining` come in its order and are repeated if there
    are too few of them. Columns that one of them lacks are None in its rows. A `ValueError` if they do not go together.
    """
    first, second = parse_mix(mix)
    if isinstance(alignment, IterableDataset) or isinstance(pretraining, IterableDataset):
        raise ValueError(
            "A stream does not say how many rows it has, so its share cannot be kept. Load both data sets without "
            "`streaming=True`: they are read from disk as needed, not into memory."
        )
    if not len(alignment) or not len(pretraining):
        raise ValueError(f"Cannot mix {len(alignment)} rows with {len(pretraining)}: one of the data sets is empty.")
    pretraining = _with_types_of(alignment, pretraining)
    share = second / (first + second)
    # Enough that the alignment data run out first: the others number n s / (1 - s), give or take sqrt(n s) / (1 - s).
    expected = len(alignment) * share / (1 - share)
    needed = math.ceil(expected + 8 * math.sqrt(len(alignment) * share) / (1 - share) + 8)
    repeated = concatenate_datasets([pretraining] * -(-needed // len(pretraining)))
    return interleave_datasets(
        [alignment, repeated], probabilities=[1 - share, share], seed=seed, stopping_strategy="first_exhausted"
    )


def _with_types_of(alignment: Dataset, pretraining: Dataset) -> Dataset:
    for name in sorted(set(alignment.column_names) & set(pretraining.column_names)):
        wanted, given = alignment.features[name], pretraining.features[name]
        if wanted == given or Value("null") in (wanted, given):
            continue
        try:  # numbers of another width
            pretraining = pretraining.cast_column(name, wanted)
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise ValueError(
                f"The column {name!r} is {wanted} in one data set and {given} in the other, so that their rows do not "
                "fit into one. Rename or remove it in the text that is mixed in."
            ) from error
    return pretraining


def mixed_in(train_dataset: Any, mix_dataset: Any, mix: str | None, seed: int, *, text_field: str = "text") -> Any:
    """The training data with the rows of `mix_dataset` interleaved, if there is one; `mix` is 9:1 unless said
    otherwise. What is not needed to read the rows that are mixed in is left behind.
    """
    if mix_dataset is None:
        if mix is not None:
            raise ValueError(
                f"`mix={mix!r}` says how much text to mix in, but there is no `mix_dataset` to take it from."
            )
        return train_dataset
    if train_dataset is None:
        raise ValueError("`mix_dataset` is mixed into `train_dataset`, which was not given.")
    if not isinstance(mix_dataset, IterableDataset):
        formats = formats_of(mix_dataset, text_field)
        if not formats:
            raise ValueError(
                f"`mix_dataset` has the columns {mix_dataset.column_names}, none of which can be trained on: give it a "
                f"column {text_field!r}."
            )
        mix_dataset = mix_dataset.select_columns(format_columns(mix_dataset, formats[0]))
    return mix_datasets(train_dataset, mix_dataset, mix=mix or "9:1", seed=seed)


def split_by_format(dataset: Dataset, name: str, *, text_field: str = "text") -> list[tuple[Dataset, np.ndarray]]:
    """Mixed rows, apart: each read by the first of `FORMATS` whose columns it fills; a `ValueError` if there is none.

    Returns a data set a format that occurs, with the numbers of its rows. Data of one format come back as they are.
    """
    present = formats_of(dataset, text_field)
    if not present:  # a `formatting_func` reads it
        return [(dataset, np.arange(len(dataset)))]
    columns = sorted({column for names in present for column in names})
    chosen = []
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        filled = {column: pc.is_valid(table[column]).to_numpy() for column in columns}
        fits = np.stack([np.logical_and.reduce([filled[column] for column in names]) for names in present])
        chosen.append(np.where(fits.any(0), fits.argmax(0), -1))
    way = np.concatenate(chosen)
    if unread := np.flatnonzero(way < 0).tolist():
        raise ValueError(
            f"In the {name} dataset {row_numbers(unread)} cannot be trained on: filled must be "
            + ", or ".join(" and ".join(f"`{column}`" for column in names) for names in present)
            + "."
        )
    rows = [(present[number], np.flatnonzero(way == number)) for number in np.unique(way)]
    if len(rows) == 1:
        return [(dataset, rows[0][1])]
    return [
        (dataset.select(numbers).select_columns(format_columns(dataset, names)), numbers) for names, numbers in rows
    ]


def rejoined(parts: list[tuple[Dataset, np.ndarray]]) -> Dataset:
    """Prepared rows in the order of the rows they were made from."""
    if len(parts) == 1:
        return parts[0][0]
    kept = ("input_ids", "labels", SETTING_COLUMN, INDEX_COLUMN)
    alike = [part.select_columns([name for name in kept if name in part.column_names]) for part, _ in parts]
    types = {name: kind for part in alike for name, kind in part.features.items()}
    alike = [part.cast(Features({name: types[name] for name in part.column_names})) for part in alike]
    return concatenate_datasets(alike).select(np.argsort(np.concatenate([rows for _, rows in parts])))
