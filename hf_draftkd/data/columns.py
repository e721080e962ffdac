"""Columns of a data set, read as Arrow: some rows at a time, without what lies beside them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

_ROWS = 256  # read at a time: a long row with its distributions takes a megabyte


def tables(dataset: Dataset, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """Some columns in parts of a few hundred rows, each with the number of its first row."""
    rows = dataset.select_columns(list(columns)).with_format("arrow")
    for first in range(0, len(rows), _ROWS):
        yield first, rows[first : first + _ROWS]


def is_transformed(dataset: Any) -> bool:
    """Whether a transform (`set_transform`) makes the rows, whatever the columns are."""
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def without_format(dataset: Any) -> Any:
    """All columns of a data set or stream as plain values, whatever `set_format` made of them; a transform stays."""
    return dataset if is_transformed(dataset) else dataset.with_format(None)


def distinct(dataset: Dataset, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The different combinations of values in some columns, in the order of the rows.

    `Dataset.unique` copies all columns of a data set of which some rows were selected.
    """
    found = {}
    for _, table in tables(dataset, columns):
        for row in table.group_by(list(columns), use_threads=False).aggregate([]).to_pylist():
            found[tuple(row.values())] = row
    return list(found.values())


def list_lengths(table: pa.Table, column: str) -> np.ndarray:
    """How many entries each row's list has, -1 where there is none."""
    return pc.fill_null(pc.list_value_length(table[column]), -1).to_numpy()


def row_lengths(dataset: Dataset, column: str) -> np.ndarray:
    """`list_lengths` of all rows."""
    parts = [list_lengths(table, column) for _, table in tables(dataset, [column])]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def column_values(dataset: Dataset | IterableDataset, name: str) -> Iterable[Any]:
    """The entries of one column, row by row, without the memory that a whole column takes."""
    return (row for batch in dataset.select_columns([name]).iter(batch_size=_ROWS) for row in batch[name])
