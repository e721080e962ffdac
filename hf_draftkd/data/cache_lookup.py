"""Cached distributions read back: from the rows that hold them to the tokens of a batch.

The distributions are a hundred times heavier than the text. So they never travel through `datasets.map`, truncation or
packing: each completion token carries one whole number that says where its distribution lies, and the collator looks
it up in the memory-mapped data the moment a batch is made.
"""

import bisect
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from torch import Tensor
from trl.data_utils import get_dataset_column_names

from hf_draftkd.data.target_cache import CACHE_COLUMNS, TEMPERATURE_COLUMN

logger = logging.getLogger(__name__)

# A token's address: row number, then its place in the row's completion.
_PLACE_BITS = 24
_TOP_K = ("completion_logprobs", "target_token_ids", "target_logprobs", "target_tail_logprob")
_DRAWS = ("completion_logprobs", "target_token_ids", "target_counts")


@dataclass(frozen=True)
class CacheFacts:
    """What all rows of one data set's cache share.

    Attributes:
        top_k: How many of the likeliest tokens were kept; None for draws.
        loss_temperature: The one that the distributions were kept at.
    """

    top_k: int | None
    loss_temperature: float


def missing_cache_columns(dataset: Dataset | IterableDataset) -> list[str]:
    """The columns that training from cached distributions needs and this data lacks; empty if it can be done."""
    columns = set(get_dataset_column_names(dataset))
    form = _DRAWS if "target_counts" in columns else _TOP_K
    needed = ("prompt_ids", "completion_ids", *form, TEMPERATURE_COLUMN)
    return [name for name in needed if name not in columns]


def rows_with_distributions(
    dataset: Dataset | IterableDataset, name: str, *, warn: bool = True
) -> Dataset | IterableDataset:
    """Leave out answers of a server that came without usable log-probabilities, and warn how many they are.

    Other rows without distributions are not meant to be there: `cache_facts` refuses them.

    Args:
        dataset: The rows.
        name: What messages call the data set.
        warn: Whether to say so.
    """
    columns = ["completion_ids", "target", "target_token_ids"]
    if isinstance(dataset, IterableDataset) or not set(columns) <= set(dataset.column_names):
        return dataset
    kept = []
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        written = pc.and_(*(pc.is_valid(table[column]) for column in columns[:2]))
        kept.append(~pc.and_(written, pc.is_null(table["target_token_ids"])).to_numpy())
    keep = np.flatnonzero(np.concatenate(kept)) if kept else np.arange(0)
    if len(keep) in (0, len(dataset)):  # none at all: said by `cache_facts`
        return dataset
    if warn and PartialState().is_main_process:
        logger.warning(
            "%d of %d rows of the %s dataset are left out: their answers came without usable log-probabilities. To "
            'learn from them too, give the target, or learn from text with `divergence="cross_entropy"`.',
            len(dataset) - len(keep),
            len(dataset),
            name,
        )
    return dataset.select(keep)


def cache_facts(dataset: Dataset | IterableDataset, name: str) -> CacheFacts:
    """Check the cache of a data set that has all its columns.

    Args:
        dataset: The rows.
        name: What messages call the data set.

    Raises:
        ValueError: It is a stream, a row has no distributions or not one for each completion token, or rows were cached
            with different options.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"The {name} dataset is a stream, but cached distributions are looked up by row. Load it without "
            "`streaming=True`: it is read from disk as needed, not into memory."
        )
    draws = "target_counts" in dataset.column_names
    columns = ["completion_ids", "completion_logprobs", "target_token_ids"]
    seen: set[int] = set()
    first = 0
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        lengths = [pc.fill_null(pc.list_value_length(table[column]), -1).to_numpy() for column in columns]
        wrong = np.flatnonzero((lengths[0] != lengths[1]) | (lengths[0] != lengths[2]))
        if len(uncached := np.flatnonzero(lengths[0] < 0)):
            raise ValueError(
                f"Row {first + int(uncached[0])} of the {name} dataset is text without the target's distributions, but "
                "`target_model` is None: give the target, or mix in "
                "`cache_target_distributions(with_token_ids(text, tokenizer), target, ...)`."
            )
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"Row {first + row} of the {name} dataset has {lengths[0][row]} completion tokens, but "
                f"{'no distributions' if lengths[2][row] < 0 else f'{lengths[2][row]} distributions'}. Cache them with "
                "`cache_target_distributions` as the last step, after mixing and editing."
            )
        if not draws:
            for chunk in table["target_token_ids"].chunks:
                seen.update(pc.unique(pc.list_value_length(chunk.flatten())).to_pylist())
        first += len(table)
    if len(seen) > 1:
        raise ValueError(
            f"Rows of the {name} dataset keep different numbers of tokens ({sorted(seen)[:5]}): they were cached with "
            "different `top_k`. Cache all of them with one."
        )
    temperatures = dataset.unique(TEMPERATURE_COLUMN)
    if len(temperatures) > 1:
        raise ValueError(
            f"Rows of the {name} dataset were cached at different temperatures ({temperatures[:5]}). Cache all of "
            "them at one."
        )
    return CacheFacts(None if draws else seen.pop() if seen else 0, temperatures[0])


class CachedDistributions:
    """The caches of every data set in use, and where each token's distribution lies in them.

    Args:
        vocab_size: Tokens that the draft can predict; a cache that names others was made for another pair. May be set
            later.
    """

    def __init__(self, vocab_size: int | None = None) -> None:
        self.vocab_size = vocab_size
        self._datasets: list[Dataset] = []
        self._first_rows: list[int] = [0]

    def add(self, dataset: Dataset) -> int:
        """Take up one more data set; returns the number of its first row, for `addresses`."""
        columns = [name for name in CACHE_COLUMNS if name in dataset.column_names]
        self._datasets.append(dataset.select_columns(columns).with_format("arrow"))
        self._first_rows.append(self._first_rows[-1] + len(dataset))
        return self._first_rows[-2]

    def lookup(self, addresses: Tensor) -> dict[str, Tensor]:
        """The distributions of N tokens of one data set.

        Args:
            addresses: [N] int64, from `addresses`.

        Returns:
            The cache columns: `completion_logprobs` and `target_tail_logprob` [N]; `target_token_ids`,
            `target_logprobs` and `target_counts` [N, k]. Draws are padded with token 0, drawn 0 times.

        Raises:
            ValueError: A token lies outside the vocabulary.
        """
        rows, places = (addresses >> _PLACE_BITS).numpy(), (addresses & (2**_PLACE_BITS - 1)).numpy()
        # Without a single token the shapes still have to be right: any row tells them.
        wanted, row_of_token = np.unique(rows if len(rows) else np.array(self._first_rows[:1]), return_inverse=True)
        which = bisect.bisect_right(self._first_rows, int(wanted[0])) - 1
        table = self._datasets[which][(wanted - self._first_rows[which]).tolist()]
        lengths = pc.list_value_length(table["completion_logprobs"]).to_numpy()
        starts = np.cumsum(lengths) - lengths
        tokens = starts[row_of_token[: len(rows)]] + places
        batch = {name: _at(table[name], tokens) for name in table.column_names}
        ids = batch["target_token_ids"]
        if self.vocab_size is not None and ids.numel() and int(ids.max()) >= self.vocab_size:
            raise ValueError(
                f"The cached distributions name token {int(ids.max())}, but draft and tokenizer share "
                f"{self.vocab_size} tokens. Cache with the pair's `tokenizer`, so that padded rows are left out, or "
                "check that the draft has the tokenizer of the target that wrote these rows."
            )
        return batch


def addresses(row: int, num_prompt_tokens: int, num_completion_tokens: int) -> list[int]:
    """Where the distribution of each token of a text lies: -1 for the prompt, which has none.

    Args:
        row: Number of the row, counted from `CachedDistributions.add`.
        num_prompt_tokens: Length of the prompt.
        num_completion_tokens: Length of the completion.
    """
    first = row << _PLACE_BITS
    return [-1] * num_prompt_tokens + list(range(first, first + num_completion_tokens))


def _at(column: pa.ChunkedArray, tokens: np.ndarray) -> Tensor:
    """The entries of a column [rows, T] or [rows, T, k] at `tokens`, counted through all rows."""
    flat: Any = column.combine_chunks().flatten()
    if not (pa.types.is_list(flat.type) or pa.types.is_large_list(flat.type) or pa.types.is_fixed_size_list(flat.type)):
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
