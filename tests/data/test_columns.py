"""Columns read as Arrow."""

import pytest
from datasets import Dataset

from hf_draftkd.data import columns
from hf_draftkd.data.columns import distinct, row_lengths, tables


@pytest.fixture
def rows(monkeypatch):
    """Some rows, in another order than they are stored in, and read two at a time."""
    monkeypatch.setattr(columns, "_ROWS", 2)
    data = Dataset.from_dict(
        {"a": ["x", "y", None, "x", "x"], "b": [1, None, 1, 1, 2], "ids": [[1], None, [], [4, 5], [6]]}
    )
    return data.select([4, 3, 2, 1, 0])


def test_parts_say_which_row_is_their_first(rows):
    """A message that names a row of the file, or of the part, and not of the data set as it was given."""
    parts = [(first, table["b"].to_pylist()) for first, table in tables(rows, ["b"])]
    assert parts == [(0, [2, 1]), (2, [1, None]), (4, [1])]


def test_combinations_of_values_are_found_once(rows, monkeypatch):
    """Values of two parts twice, rows without a value dropped; or all columns copied, as `Dataset.unique` does."""
    monkeypatch.setattr(Dataset, "flatten_indices", None)
    found = [tuple(row.values()) for row in distinct(rows, ["a", "b"])]
    assert sorted(found, key=str) == [("x", 1), ("x", 2), ("y", None), (None, 1)]


def test_lengths_of_rows(rows):
    """A row without a list taken for one with an empty list; nothing at all."""
    assert row_lengths(rows, "ids").tolist() == [1, 2, 0, -1, 1]
    assert row_lengths(rows.select([]), "ids").tolist() == []
