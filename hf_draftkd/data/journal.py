"""The completions of an unfinished shard, on disk as they come in: a killed run loses a batch, not the shard."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, List, Value

from hf_draftkd.data.backends import Completion
from hf_draftkd.data.kept_distributions import as_stored

_OWN = {
    "setting": Value("int32"),
    "number": Value("int32"),
    "token_ids": List(Value("int32")),
    "finish_reason": Value("string"),
    "text": Value("string"),
    "ids_source": Value("string"),
}


class Journal:
    """What the target has answered of one shard, while the rest is being written.

    The file is an Arrow stream: its schema, then a record batch for each group of completions that came in together.
    It is only ever appended to, so after a kill it holds whole groups and perhaps a part of one, which is cut off.

    Args:
        path: The file; it is continued where it exists, and deleted once the shard is whole. None: there is none.
        brought: Columns that completions bring along as their `distributions`.
        on_finished: Called with each group of completions, and with `written=False` for those found in the file.
    """

    def __init__(self, path: Path | None, brought: Features | None, on_finished: Callable[..., None]) -> None:
        self._path, self._on_finished = path, on_finished
        self._brought = brought or Features()
        self._features = Features({**_OWN, **self._brought})
        self._found: dict[tuple[int, int], Completion] = {}
        if path is None:
            return
        content = path.read_bytes() if path.exists() else b""
        end = self._read(content)
        if end == 0:
            path.write_bytes(self._features.arrow_schema.serialize())
        elif end < len(content):
            os.truncate(path, end)
        on_finished(self._found, written=False)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._path is not None and kind is None:
            self._path.unlink(missing_ok=True)  # the first process tidies up as soon as every shard is there

    def finished(self, setting: int) -> dict[int, Completion]:
        """The completions that were there under the setting of this place in the config, by their numbers."""
        return {number: completion for (place, number), completion in self._found.items() if place == setting}

    def add(self, setting: int, completions: Mapping[int, Completion]) -> None:
        """Note completions under a setting, by their numbers; they are kept together or not at all."""
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(self._packed(setting, completions))
        self._on_finished(completions)

    def _packed(self, setting: int, completions: Mapping[int, Completion]) -> pa.Buffer:
        columns: dict[str, list[Any]] = {"setting": [setting] * len(completions), "number": list(completions)}
        for name in list(_OWN)[2:]:
            columns[name] = [getattr(completion, name) for completion in completions.values()]
        brought = [as_stored(completion.distributions, self._brought) for completion in completions.values()]
        for name in self._brought:
            columns[name] = [each[name] for each in brought]
        table = Dataset.from_dict(columns, features=self._features).with_format("arrow")[:]
        (batch,) = table.combine_chunks().to_batches()
        return batch.serialize()

    def _read(self, content: bytes) -> int:
        """Take in what the file holds; returns where that ends, 0 if it is no journal of these columns."""
        source = pa.BufferReader(content)
        end = 0
        try:
            reader = pa.ipc.open_stream(source)
            if reader.schema != self._features.arrow_schema:  # of another version
                return 0
            while True:
                end = source.tell()
                reader.read_next_batch()
        except (StopIteration, pa.ArrowInvalid, OSError):  # the end, or where a kill has cut it off
            pass
        if end == 0:
            return 0
        rows = Dataset.from_buffer(pa.py_buffer(content[:end]))
        for row in rows:
            own = {name: row[name] for name in list(_OWN)[2:]}
            # A server may have withheld them.
            known = self._brought and row["completion_logprobs"] is not None
            distributions = as_stored(row, self._brought) if known else None
            self._found[row["setting"], row["number"]] = Completion(**own, distributions=distributions)
        return end
