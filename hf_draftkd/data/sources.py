"""Where rows come from: the Hub, a file, a folder or memory."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from datasets.config import DATASET_STATE_JSON_FILENAME, REPOCARD_FILENAME, REPOYAML_FILENAME
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from pyarrow import ArrowException

from hf_draftkd.data.columns import without_format
from hf_draftkd.utils.checks import one_of

# File suffix -> the builder of `datasets` that reads it.
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
_UNREADABLE = (DatasetGenerationError, ArrowException, UnicodeDecodeError)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_BLOCK = 2**20  # bytes of a JSONL file parsed at a time; the 10 MB of `datasets` take ten times as much memory
HALF_PAIR = re.compile("[\ud800-\udfff]")  # what no UTF-8, and so no Arrow table, holds


def open_dataset(
    source: Any, *, split: str | None = None, config: str | None = None, text_column: str = "text"
) -> Dataset:
    """Rows of any kind (see `load_prompts`): a Hub id, a JSONL, JSON, Parquet, CSV or text file, a folder, a `Dataset`,
    a list; a `ValueError` if there are none, or none that can be read.

    `text_column` is the name that the lines of a text file, or a list's strings, get; `split` is `train` by default.
    """
    is_name = isinstance(source, str | Path)
    if config is not None and (not is_name or Path(source).expanduser().is_file()):
        what = str(source) if is_name else f"a {type(source).__name__}"
        raise ValueError(f"Only a dataset of the Hub or a folder has configurations, not {what}: leave out {config!r}.")
    if isinstance(source, Dataset):
        return without_format(source)
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
            raise ValueError("The list of rows is empty. Give at least one.")
        if all(isinstance(item, Mapping) and "role" not in item for item in source):
            # `Dataset.from_list` would drop every column that the first row lacks.
            names = dict.fromkeys(name for item in source for name in item)
            columns = {name: [item.get(name) for item in source] for name in names}
        else:
            columns = {text_column: list(source)}
        return Dataset.from_dict(columns, on_mixed_types="use_json")
    raise ValueError(
        f"Rows must be a Hub id, a path, a `datasets.Dataset` or a list, got {type(source).__name__}. An "
        "`IterableDataset` has no row numbers to resume from: save it first, or load it without `streaming=True`."
    )


def _load(name: str, config: str | None, is_local: bool) -> DatasetDict:
    # Where the Hub cannot be reached, `datasets` takes a bare name for that of any folder which it read before.
    looks_local = name.startswith((".", "/", "~")) or Path(name).suffix in _BUILDERS or name.count("/") != 1
    if looks_local and not is_local:
        raise ValueError(
            f"There is no file or folder {name!r} (looked from {Path.cwd()}). A dataset of the Hub is named with its "
            "owner: org/name."
        )
    if is_local and (Path(name) / DATASET_STATE_JSON_FILENAME).is_file():  # of `save_to_disk`
        return DatasetDict(train=Dataset.load_from_disk(name))
    try:
        if is_local:
            _check_one_kind(Path(name))
        return load_dataset(name, config)
    except _UNREADABLE as error:
        if is_local:
            for path in sorted(Path(name).rglob("*.jsonl")):
                _check_json_lines(path)  # names file and line
        raise ValueError(f"{name!r} cannot be read: {_reason(error)}.") from error
    except (DatasetNotFoundError, ConnectionError, OSError) as error:
        if is_local:
            raise ValueError(f"The folder {name!r} cannot be read: {error}") from error
        raise ValueError(
            f"{name!r} is neither a local path nor a dataset that could be read from the Hub: {error}"
        ) from error


def _check_one_kind(folder: Path) -> None:
    """Refuse a folder with rows in files of several kinds: `datasets` reads the commonest and is silent on the others.

    Text beside files of rows may be notes or a licence. A card or YAML file says itself which files are meant.
    """
    declaring = [path for name in (REPOCARD_FILENAME, REPOYAML_FILENAME) if (path := folder / name).is_file()]
    if any("configs:" in path.read_text("utf-8", "replace") for path in declaring):
        return
    found = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    suffixes = Counter(Path(file).suffix.lower() for file in chain(*found.values()))
    kinds = Counter(_BUILDERS[suffix] for suffix in suffixes.elements() if suffix in _BUILDERS)
    texts = kinds.pop("text", 0)
    if len(kinds) > 1 or (kinds and texts > max(kinds.values())):
        named = ", ".join(f"{count} {suffix}" for suffix, count in sorted(suffixes.items()) if suffix in _BUILDERS)
        raise ValueError(
            f"{folder} holds files of several kinds ({named}), of which `datasets` would read one and pass over the "
            "rest. Name one of the files, or a folder with one kind."
        )


def _read_file(path: Path, column: str) -> Dataset:
    suffix = path.suffix.lower()
    if suffix not in _BUILDERS:
        raise ValueError(f"Cannot read {path.name!r}: give one of {', '.join(_BUILDERS)}, or a folder or Hub dataset.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty. Give a file with at least one row.")
    options = {"chunksize": _check_json_lines(path)} if suffix == ".jsonl" else {}
    try:
        dataset = load_dataset(_BUILDERS[suffix], data_files=str(path), split="train", **options)
    except (*_UNREADABLE, ValueError) as error:
        raise ValueError(f"{path} cannot be read as {_BUILDERS[suffix]}: {_reason(error)}.") from error
    if suffix != ".txt":
        return dataset
    # A byte order mark, which Windows puts in front of a file, is not part of the first prompt.
    dataset = dataset.map(lambda row: {"text": row["text"].removeprefix("\ufeff")})
    dataset = dataset.filter(lambda row: row["text"].strip() != "")
    return dataset if column == "text" else dataset.rename_column("text", column)


def _reason(error: Exception) -> str:
    return str(error.__cause__ or error).strip().splitlines()[0].rstrip(".")


def _check_json_lines(path: Path) -> int:
    """Check each line; returns how many bytes to parse as one block.

    `datasets` reports a broken line by its byte offset in a block, or not at all. It takes the columns and their types
    from the first block: a key that is new in a later one fails, and a list where texts stood silently becomes the
    text of its JSON. So the first block reaches to the last line that brings something new.
    """
    kinds: set[tuple[str, str]] = set()
    position, block = 0, _BLOCK
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            position += len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number} is not valid JSON: {error.msg} (column {error.colno})."
                ) from error
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number} is not UTF-8 ({error.reason}): convert the file.") from error
            # pyarrow names neither the file's line nor the character.
            if _SURROGATE.search(line) and HALF_PAIR.search(json.dumps(row, ensure_ascii=False)):
                raise ValueError(f"{path}, line {number} holds half of a surrogate pair (\\ud800 to \\udfff): mend it.")
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} holds a {type(row).__name__} where a JSON object is needed.")
            before = len(kinds)
            _note_kinds(row, "", kinds)
            if len(kinds) > before:
                block = max(block, position)
    return block


def _note_kinds(value: Any, place: str, kinds: set[tuple[str, str]]) -> None:
    kinds.add((place, type(value).__name__))
    if isinstance(value, dict):
        for name, each in value.items():
            _note_kinds(each, f"{place}.{name}", kinds)
    elif isinstance(value, list):
        for each in value:
            _note_kinds(each, f"{place}[]", kinds)


def _pick_split(splits: DatasetDict, split: str | None) -> Dataset:
    if split is None:
        split = next(iter(splits)) if len(splits) == 1 else "train"
    return without_format(splits[one_of("split", split, splits)])


def row_numbers(rows: Sequence[int]) -> str:
    """Numbers of rows for a message, the first few by name."""
    named = ", ".join(map(str, rows[:10])) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
    return f"{'row' if len(rows) == 1 else 'rows'} {named} (counted from 0)"
