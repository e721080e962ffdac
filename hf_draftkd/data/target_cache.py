"""The target's distributions kept beside each completion token, for training without the target in memory.

`generate_alignment_data(..., cache_distributions=...)` keeps them while the target writes, from the logits that its
tokens were chosen from. For data that exist, `cache_target_distributions` computes them in one forward pass of the
target over the exact tokens of each row. Which forms there are, `kept_distributions.py` says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, concatenate_datasets
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl.data_utils import get_dataset_column_names

from hf_draftkd.data.columns import list_lengths, tables
from hf_draftkd.data.kept_distributions import (
    CACHE_COLUMNS,
    TEMPERATURE_COLUMN,
    VOCAB_COLUMN,
    CacheOptions,
    KeptDistributions,
)
from hf_draftkd.models.forward import evaluating, logits_at
from hf_draftkd.models.identity import weights_fingerprint
from hf_draftkd.models.loading import require_loaded
from hf_draftkd.models.tokenizers import tokenizer_size
from hf_draftkd.utils.hashing import sha256

logger = logging.get_logger(__name__)

_DIFFERENT_SIZES = (
    "Rows of the {name} dataset keep different numbers of tokens ({widths}): they were cached with different `top_k`. "
    "Cache all of them with one."
)


def cache_target_distributions(
    dataset: Dataset,
    target_model: PreTrainedModel,
    *,
    top_k: int | None = None,
    sampled: int | None = None,
    loss_temperature: float = 1.0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "float16",
    batch_size: int = 8,
    seed: int = 0,
) -> Dataset:
    """Add the target's next-token distributions to alignment data.

    Args:
        dataset: Rows with `prompt_ids` and `completion_ids` (alignment data), T completion tokens per row.
        target_model: The target that wrote them, V tokens.
        top_k: Keep the k likeliest tokens and the tail. 64 unless `sampled` is given.
        sampled: Keep this many draws from p instead.
        loss_temperature: p is softmax(logits / loss_temperature). Training at another one is refused, since
            neither a tail nor draws can be re-tempered.
        tokenizer: Its tokenizer; ids beyond it are padding, and left out of p. By default all V rows count.
        dtype: `float16` or `float32` for the log-probabilities.
        batch_size: Rows per forward pass.
        seed: Seed of the draws.

    Returns:
        The dataset with `completion_logprobs` [T] (log p of the written token), `target_token_ids` [T, k] and
        `target_logprobs` [T, k] (likeliest first) and `target_tail_logprob` [T] (-inf where k = V); or, for draws,
        `target_token_ids` and `target_counts` [T, up to N]; with `target_temperature`, and with `target_vocab_size`,
        padded rows included, to which a draft is fitted where the target is not at hand. An older cache is replaced.

    Raises:
        ValueError: Columns are missing, both forms are asked for, or a value is out of range.
    """
    require_loaded(target_model)
    missing = [name for name in ("prompt_ids", "completion_ids") if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"The dataset has no {' and no '.join(missing)} (columns: {', '.join(dataset.column_names)}). "
            "Distributions are kept for exact tokens: make the data with `generate_alignment_data`, or see "
            "`with_token_ids`."
        )
    vocab_size = real_vocab_size(target_model, tokenizer)
    options = CacheOptions(top_k, sampled, loss_temperature, dtype, seed).within(vocab_size)
    if len(dataset) == 0:
        raise ValueError("The dataset is empty, so there is nothing to cache.")

    def add(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found = cache_columns(target_model, options, vocab_size, rows["prompt_ids"], rows["completion_ids"])
        return {**rows, **{name: [each[name] for each in found] for name in options.features(vocab_size)}}

    # `map` would pickle the target to name its result; this names it by what decides it.
    decisive = (dataset._fingerprint, weights_fingerprint(target_model), options, vocab_size)
    rows = dataset.with_format(None)  # lists, whatever `set_format` made of them
    # An older cache goes whole: counts of its draws would be read beside the tokens of this one.
    rows = rows.remove_columns([name for name in CACHE_COLUMNS if name in rows.column_names])
    return rows.map(
        add,
        batched=True,
        batch_size=batch_size,
        features=Features({**rows.features, **options.features(vocab_size)}),
        new_fingerprint=sha256([repr(decisive)])[:16],
        desc="Target's distributions",
    )


def real_vocab_size(target_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Rows of the target's output that stand for tokens."""
    rows = num_rows(target_model)
    return rows if tokenizer is None else min(rows, tokenizer_size(tokenizer))


def num_rows(target_model: PreTrainedModel) -> int:
    """Rows of the target's output, padding included."""
    return target_model.get_output_embeddings().weight.shape[0]


def cache_columns(
    target_model: PreTrainedModel,
    options: CacheOptions,
    vocab_size: int,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
) -> list[dict[str, Any]]:
    """The cache columns of some rows, from one forward pass over their prompt and completion tokens."""
    kept = KeptDistributions(options, vocab_size, prompts)
    logits = _completion_logits(target_model, prompts, completions).split([len(each) for each in completions])
    for text, (written, of_text) in enumerate(zip(completions, logits, strict=True)):
        kept.add(text, torch.tensor(written, dtype=torch.long, device=of_text.device), of_text)
    return [kept.columns(text, len(written), num_rows(target_model)) for text, written in enumerate(completions)]


@torch.no_grad()
def _completion_logits(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Logits [N, V] that predict the N completion tokens of all rows, row after row, from one forward pass."""
    if not all(prompts):
        raise ValueError("A row has no prompt tokens, so nothing predicts its first completion token.")
    # Right padding: under a causal mask nothing before it can see it, whatever its id and whatever the positions.
    ids = pad_sequence([torch.tensor([*p, *c]) for p, c in zip(prompts, completions, strict=True)], batch_first=True)
    places = torch.arange(ids.shape[1])
    starts, lengths = (torch.tensor([len(each) for each in texts])[:, None] for texts in (prompts, completions))
    keep = (places >= starts - 1) & (places < starts + lengths - 1)
    inputs = {"input_ids": ids, "attention_mask": (places < starts + lengths).long()}
    with evaluating(model):
        return logits_at(model, inputs, keep)


@dataclass(frozen=True)
class CacheFacts:
    """What all rows of one data set's cache share.

    Attributes:
        top_k: How many of the likeliest tokens were kept; None for draws.
        largest_id: The greatest token id among those that were kept.
        loss_temperature: The one that the distributions were kept at.
        vocab_size: Rows of the target's vocabulary, padding included; None where nothing says it.
    """

    top_k: int | None
    largest_id: int
    loss_temperature: float
    vocab_size: int | None


def missing_cache_columns(dataset: Dataset | IterableDataset) -> list[str]:
    """The columns that training from cached distributions needs and this data lacks; empty if it can be done."""
    columns = set(get_dataset_column_names(dataset))
    form = CacheOptions(sampled=1 if "target_counts" in columns else None).features(vocab_size=1)
    return [name for name in ("prompt_ids", "completion_ids", *form) if name not in columns | {VOCAB_COLUMN}]


def read_cache(dataset: Dataset | IterableDataset, name: str) -> tuple[Dataset, CacheFacts]:
    """The rows of a data set that hold distributions, and what these have in common. No cache column may be missing.

    Answers of a server that came without usable log-probabilities are left out. Messages call the data set `name`.

    Raises:
        ValueError: It is a stream, a row has not one distribution for each completion token, or rows were cached with
            different options.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"The {name} dataset is a stream, but cached distributions are looked up by row. Load it without "
            "`streaming=True`: it is read from disk as needed, not into memory."
        )
    if {"target_counts", "target_logprobs"} <= set(dataset.column_names):
        raise ValueError(
            f"The {name} dataset holds both kinds of cache, likeliest tokens (`target_logprobs`) and draws "
            "(`target_counts`), and no row may be read as the other kind. Cache all rows in one way."
        )
    lists = ("completion_ids", "completion_logprobs", "target_token_ids")
    columns = [*lists, *({"target", TEMPERATURE_COLUMN, VOCAB_COLUMN} & set(dataset.column_names))]
    kept_rows: list[np.ndarray] = []
    widths: set[int] = set()
    temperatures: set[float] = set()
    sizes: set[int | None] = set()
    largest = 0
    for first, table in tables(dataset, columns):
        written, logged, kept = (list_lengths(table, column) for column in lists)
        withheld = (kept < 0) & (written >= 0)
        # Only a row that a target wrote may come without: others were never cached.
        withheld &= pc.is_valid(table["target"]).to_numpy() if "target" in columns else False
        wrong = ~withheld & ((written != logged) | (written != kept))
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(_not_cached(first + row, name, written[row], kept[row]))
        kept_rows.append(first + np.flatnonzero(~withheld))
        table = table.filter(pa.array(~withheld)) if withheld.any() else table
        of_tokens = pc.list_flatten(table["target_token_ids"])
        widths.update(pc.unique(pc.list_value_length(of_tokens)).to_pylist())
        largest = max(largest, pc.max(pc.list_flatten(of_tokens)).as_py() or 0)
        temperatures.update(pc.unique(table[TEMPERATURE_COLUMN]).to_pylist())
        sizes.update(pc.unique(table[VOCAB_COLUMN]).to_pylist() if VOCAB_COLUMN in columns else ())
    keep = np.concatenate(kept_rows) if kept_rows else np.zeros(0, dtype=np.int64)
    if not len(keep):
        raise ValueError(_not_cached(0, name, len(dataset[0]["completion_ids"]), -1))
    draws = "target_counts" in dataset.column_names
    if len(widths) > 1 and not draws:
        raise ValueError(_DIFFERENT_SIZES.format(name=name, widths=sorted(widths)[:5]))
    if len(temperatures) > 1:
        raise ValueError(
            f"Rows of the {name} dataset were cached at different temperatures ({list(temperatures)[:5]}). Cache all "
            "of them at one."
        )
    vocab_size = max((size for size in sizes if size is not None), default=None)
    facts = CacheFacts(None if draws else max(widths, default=0), largest, temperatures.pop(), vocab_size)
    return dataset if len(keep) == len(dataset) else dataset.select(keep), facts


def warn_of_withheld(dataset: Dataset, rows: Dataset, name: str) -> None:
    """Say how many rows of a data set `read_cache` left out."""
    if len(rows) < len(dataset) and PartialState().is_main_process:
        logger.warning(
            "%d of %d rows of the %s dataset are left out: their answers came without usable log-probabilities. To "
            'learn from them too, give the target, or learn from text with `divergence="cross_entropy"`.',
            *(len(dataset) - len(rows), len(dataset), name),
        )


def with_caches_alike(datasets: Sequence[Dataset], facts: Sequence[CacheFacts], name: str) -> Dataset:
    """The caches of several data sets as one; a `ValueError` if they keep different numbers of tokens."""
    if len(datasets) == 1:
        return datasets[0]
    if len(widths := {fact.top_k for fact in facts}) > 1:
        raise ValueError(_DIFFERENT_SIZES.format(name=name, widths=[width or "draws" for width in widths]))
    names = ("prompt_ids", "completion_ids", *CACHE_COLUMNS, TEMPERATURE_COLUMN, VOCAB_COLUMN)
    columns = [column for column in names if column in datasets[0].column_names]
    alike = [each.select_columns(columns) for each in datasets]
    types = alike[0].features
    # `cast` writes every column again, whatever their types are.
    return concatenate_datasets([each if each.features == types else each.cast(types) for each in alike])


def _not_cached(row: int, name: str, written: int, kept: int) -> str:
    return (
        f"Row {row} of the {name} dataset has {written} completion tokens, but {'no' if kept < 0 else kept} "
        "distributions. Cache them with `cache_target_distributions` as the last step, after mixing and editing."
    )
