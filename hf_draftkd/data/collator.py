"""From prepared rows to batches, with each row's decoding setting and the target's cached distributions.

The distributions are a hundred times heavier than the text. So they never travel through `datasets.map`, truncation or
packing: each completion token carries one whole number that says where its distribution lies, and the collator looks
it up in the memory-mapped data the moment a batch is made.
"""

import bisect
import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_draftkd.data.kept_distributions import CACHE_COLUMNS
from hf_draftkd.decoding.setting import SETTING_COLUMNS, DecodingSetting

# Columns of prepared rows beside SFTTrainer's, named as no user names theirs: how a row was decoded, and where the
# distribution of each of its tokens lies.
SETTING_COLUMN, INDEX_COLUMN = "hf_draftkd_setting", "hf_draftkd_cache_index"
# A token's address: row number, then its place in the row's completion.
_PLACE_BITS = 24
UNKNOWN_SETTING = [math.nan] * len(SETTING_COLUMNS)


class CachedDistributions:
    """The caches of every data set in use, and where each token's distribution lies in them."""

    def __init__(self) -> None:
        self._datasets: list[Dataset] = []
        self._first_rows: list[int] = [0]

    def add(self, dataset: Dataset) -> int:
        """Take up one more data set; returns the number of its first row, for `addresses`."""
        columns = [name for name in CACHE_COLUMNS if name in dataset.column_names]
        self._datasets.append(dataset.select_columns(columns).with_format("arrow"))
        self._first_rows.append(self._first_rows[-1] + len(dataset))
        return self._first_rows[-2]

    def lookup(self, addresses: Tensor) -> dict[str, Tensor]:
        """The distributions of N tokens of one data set, at `addresses` [N] int64.

        Returns:
            The cache columns: `completion_logprobs` and `target_tail_logprob` [N]; `target_token_ids`,
            `target_logprobs` and `target_counts` [N, k]. Draws are padded with token 0, drawn 0 times.
        """
        rows, places = (addresses >> _PLACE_BITS).numpy(), (addresses & (2**_PLACE_BITS - 1)).numpy()
        # Without a single token the shapes still have to be right: any row tells them.
        wanted, row_of_token = np.unique(rows if len(rows) else np.array(self._first_rows[:1]), return_inverse=True)
        which = bisect.bisect_right(self._first_rows, int(wanted[0])) - 1
        table = self._datasets[which][(wanted - self._first_rows[which]).tolist()]
        lengths = pc.list_value_length(table["completion_logprobs"]).to_numpy()
        starts = np.cumsum(lengths) - lengths
        tokens = starts[row_of_token[: len(rows)]] + places
        return {name: _at(table[name], tokens) for name in table.column_names}


@dataclass
class DraftDistillCollator(DataCollatorForLanguageModeling):
    """TRL's collator, which also gives each row's decoding setting and, with a `cache`, the target's distributions.

    Those are of the batch's N completion tokens, in row-major order of the positions that predict one: see
    `CachedDistributions.lookup`.
    """

    cache: CachedDistributions | None = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch: `input_ids`, `labels` [B, L], ..., `decoding` [B, 4] unless it is padding-free, cache columns."""
        batch = super().torch_call(examples)
        if not self.padding_free:
            rows = [example.get(SETTING_COLUMN) or UNKNOWN_SETTING for example in examples]
            # In float32, since not every accelerator has float64.
            batch["decoding"] = torch.tensor(rows, dtype=torch.float32)
        if self.cache is not None:
            # SFTTrainer truncates `input_ids` and `labels` only; what it cut off is at the end.
            kept = [torch.tensor(row[INDEX_COLUMN][: len(row["input_ids"])]) for row in examples]
            labels = batch["labels"]
            index = torch.full_like(labels, -1)
            for row, places in zip(index, [torch.cat(kept)] if self.padding_free else kept, strict=True):
                row[: len(places)] = places
            batch |= self.cache.lookup(index[:, 1:][labels[:, 1:] != -100])
        return batch

    def padded(self) -> "DraftDistillCollator":
        """The same for one text per row."""
        made = copy.copy(self)
        made.padding_free = False
        return made


def setting_feature(setting: DecodingSetting) -> list[float]:
    """A setting as four numbers, in the order of `SETTING_COLUMNS`; `rows_by_setting` reads them back."""
    return [float(value) for value in setting.to_dict().values()]


def rows_by_setting(decoding: torch.Tensor) -> dict[DecodingSetting, list[int]]:
    """Which rows of a batch were written under which setting; rows without a known one are in none.

    Each row of `decoding` [B, 4] is a `setting_feature` or `UNKNOWN_SETTING`.
    """
    groups: dict[DecodingSetting, list[int]] = {}
    for index, values in enumerate(decoding.tolist()):
        # In float32, 0.7 is 0.699999988: six digits are what it keeps of any number.
        numbers = [float(f"{value:.6g}") for value in values]
        if not math.isnan(numbers[0]):
            setting = DecodingSetting.from_row(dict(zip(SETTING_COLUMNS, numbers, strict=True)))
            groups.setdefault(setting, []).append(index)
    return groups


def addresses(row: int, num_prompt_tokens: int, num_completion_tokens: int) -> list[int]:
    """Where the distribution of each token of a text lies, -1 for the prompt, which has none.

    `row` is its number, counted from `CachedDistributions.add`.
    """
    first = row << _PLACE_BITS
    return [-1] * num_prompt_tokens + list(range(first, first + num_completion_tokens))


def _at(column: pa.ChunkedArray, tokens: np.ndarray) -> Tensor:
    """The entries of a column [rows, T] or [rows, T, k] at `tokens`, counted through all rows."""
    flat: Any = column.combine_chunks().flatten()
    if not pa.types.is_nested(flat.type):
        return _tensor(flat)[tokens]
    widths = pc.list_value_length(flat).to_numpy()
    values = _tensor(flat.flatten())
    if len(widths) and (widths == widths[0]).all():
        return values.view(-1, int(widths[0]))[tokens]
    starts, widths = (np.cumsum(widths) - widths)[tokens], widths[tokens]
    columns = np.arange(widths.max(initial=0))
    used = columns < widths[:, None]
    padded = values.new_zeros(used.shape)
    padded[torch.from_numpy(used)] = values[(starts[:, None] + columns)[used]]
    return padded


def _tensor(values: Any) -> Tensor:
    array = values.to_numpy(zero_copy_only=False)
    # Ids and counts of any width serve as indices.
    return torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array.copy())
