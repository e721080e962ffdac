"""Where rows come from: the Hub, a file, a folder or memory."""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetNotFoundError

# File suffix -> the builder of `datasets` that reads it.
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


def open_dataset(
    source: Any, *, split: str | None = None, config: str | None = None, text_column: str = "text"
) -> Dataset:
    """Rows of any kind: a Hub id, a JSONL, JSON, Parquet, CSV or text file, a folder, a `Dataset`, or a list.

    Args:
        source: See `load_prompts`.
        split: Split to take where there are several; `train` by default.
        config: Configuration (subset) of a Hub dataset.
        text_column: The name that the lines of a text file, or a list's strings, get.

    Raises:
        ValueError: Nothing there, no such split, or a line that is not JSON.
    """
    if isinstance(source, Dataset):
        return source
    if isinstance(source, DatasetDict):
        return _pick_split(source, split)
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_file():
            # A file has no splits but itself.
            return _pick_split(DatasetDict(train=_read_file(path, text_column)), split)
        return _pick_split(_load(str(path) if path.is_dir() else str(source), config, path.is_dir()), split)
    if isinstance(source, Sequence):
        if not source:
            raise ValueError("The list of prompts is empty, so there is nothing to answer.")
        if all(isinstance(item, Mapping) and "role" not in item for item in source):
            return Dataset.from_list([dict(item) for item in source])
        return Dataset.from_dict({text_column: list(source)})
    raise ValueError(
        f"Prompts must be a Hub id, a path, a `datasets.Dataset` or a list, got {type(source).__name__}. An "
        "`IterableDataset` has no row numbers to resume from: save it first, or load it without `streaming=True`."
    )


def _load(name: str, config: str | None, is_local: bool) -> DatasetDict:
    looks_local = name.startswith((".", "/", "~")) or Path(name).suffix in _BUILDERS or name.count("/") > 1
    if looks_local and not is_local:
        raise ValueError(f"There is no file or folder {name!r} (looked from {Path.cwd()}).")
    try:
        loaded = load_dataset(name, config)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError, OSError) as error:
        raise ValueError(
            f"{name!r} is neither a local path nor a dataset that could be read from the Hub: {error}"
        ) from error
    return loaded


def _read_file(path: Path, column: str) -> Dataset:
    builder = _BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise ValueError(f"Cannot read {path.name!r}: give one of {', '.join(_BUILDERS)}, or a folder or Hub dataset.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty, so there is nothing to answer.")
    if path.suffix.lower() == ".jsonl":
        _check_json_lines(path)
    dataset = load_dataset(builder, data_files=str(path), split="train")
    if builder == "text":
        dataset = dataset.filter(lambda row: row["text"].strip() != "")
        return dataset if column == "text" else dataset.rename_column("text", column)
    return dataset


def _check_json_lines(path: Path) -> None:
    # `datasets` reports a broken line by its byte offset in a block, or not at all.
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} holds a {type(row).__name__} where a JSON object is needed.")


def _pick_split(splits: DatasetDict, split: str | None) -> Dataset:
    if split is None:
        split = next(iter(splits)) if len(splits) == 1 else "train"
    if split not in splits:
        raise ValueError(unknown("split", split, list(splits)))
    return splits[split]


def unknown(kind: str, given: str, known: Sequence[str]) -> str:
    """A message for a name that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(given, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"There is no {kind} {given!r}; there are: {', '.join(known)}.{hint}"


def row_numbers(rows: Sequence[int], shown: int = 10) -> str:
    """Numbers of rows for a message, the first few by name."""
    named = ", ".join(map(str, rows[:shown])) + (f" and {len(rows) - shown} more" if len(rows) > shown else "")
    return f"{'row' if len(rows) == 1 else 'rows'} {named} (counted from 0)"
