"""The target's distributions, kept beside each completion token, for training without the target in memory.

Two forms, from one forward pass of the target over the exact tokens of each row:

- `top_k=K`: the K likeliest tokens with their log-probabilities, and the log-probability of all others together.
  Serves every divergence; it is biased for the Kullback-Leibler ones, since the tail's shape is lost.
- `sampled=N`: N draws from p, kept as tokens and counts. Unbiased for forward KL and cross-entropy, and only for them
  (https://arxiv.org/abs/2503.16870).

Log-probabilities are float16 by default: each is off by at most 2**-11 of its size (2**-25 next to 0), that is by less
than 0.04% of the probability of any token with p > 0.5 and 1.1% at p = 1e-10. Ask for float32 where that matters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl.data_utils import get_dataset_column_names

from hf_draftkd.losses.sparse import sample_target, top_k_target
from hf_draftkd.models.forward import evaluating, logits_at
from hf_draftkd.models.identity import weights_fingerprint
from hf_draftkd.models.loading import require_loaded
from hf_draftkd.models.tokenizers import tokenizer_size
from hf_draftkd.utils.checks import in_range, one_of, whole_number
from hf_draftkd.utils.hashing import derived_seed, sha256

logger = logging.get_logger(__name__)

CACHE_COLUMNS = ("completion_logprobs", "target_token_ids", "target_logprobs", "target_tail_logprob", "target_counts")
TEMPERATURE_COLUMN, VOCAB_COLUMN = "target_temperature", "target_vocab_size"
_WIDTH = {"uint8": 1, "uint16": 2, "int32": 4, "float16": 2, "float32": 4}
_POSITIONS = 256  # positions turned to float32 at a time: a vocabulary of 152,000 takes 0.15 GB of them


@dataclass(frozen=True)
class CacheOptions:
    """What is kept of the target's distributions; see `cache_target_distributions`.

    Raises:
        ValueError: Both forms are asked for, or a value is out of range.
    """

    top_k: int | None = None
    sampled: int | None = None
    loss_temperature: float = 1.0
    dtype: str = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.top_k is not None and self.sampled is not None:
            raise ValueError(f"Choose one form of cache, got top_k={self.top_k} and sampled={self.sampled}.")
        if self.top_k is not None:
            whole_number("top_k", self.top_k)
        if self.sampled is not None:
            whole_number("sampled", self.sampled, 1, 2**16 - 1)  # counts are kept in two bytes at most
        in_range("loss_temperature", self.loss_temperature, 0, open_low=True)
        one_of("`dtype` of a cache", self.dtype, ("float16", "float32"))

    def within(self, vocab_size: int) -> "CacheOptions":
        """The same for a target of V tokens, of which top-k keeps 64 unless another number is asked for.

        Raises:
            ValueError: There are not so many tokens.
        """
        if self.sampled is not None:
            return self
        top_k = min(64, vocab_size) if self.top_k is None else self.top_k
        if top_k > vocab_size:
            raise ValueError(f"`top_k` must lie between 1 and the vocabulary's {vocab_size}, got {top_k}.")
        return replace(self, top_k=top_k)

    def features(self, vocab_size: int) -> Features:
        """Types of the cache columns: the smallest integers that hold the ids and the counts."""
        ids = Value("uint16" if vocab_size <= 2**16 else "int32")
        number = Value(self.dtype)
        columns: dict[str, Any] = {"completion_logprobs": List(number), "target_token_ids": List(List(ids))}
        if self.sampled is None:
            columns |= {"target_logprobs": List(List(number)), "target_tail_logprob": List(number)}
        else:
            columns["target_counts"] = List(List(Value("uint8" if self.sampled < 2**8 else "uint16")))
        return Features({**columns, TEMPERATURE_COLUMN: Value("float64"), VOCAB_COLUMN: Value("int32")})


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
        padded rows included, to which a draft is fitted where the target is not at hand.

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
        columns = cache_columns(target_model, options, vocab_size, rows["prompt_ids"], rows["completion_ids"])
        return {**rows, **columns}

    # `map` would pickle the target to name its result; this names it by what decides it.
    decisive = (dataset._fingerprint, weights_fingerprint(target_model), options, vocab_size)
    return dataset.map(
        add,
        batched=True,
        batch_size=batch_size,
        features=Features({**dataset.features, **options.features(vocab_size)}),
        new_fingerprint=sha256([repr(decisive)])[:16],
        desc="Target's distributions",
    )


def with_cache(
    rows: Dataset, target_model: PreTrainedModel, options: CacheOptions, vocab_size: int, batch_size: int
) -> Dataset:
    """The rows of one shard with their cache columns, in memory."""
    features = options.features(vocab_size)
    columns: dict[str, list[Any]] = {name: [] for name in features}
    for part in rows.select_columns(["prompt_ids", "completion_ids"]).iter(batch_size=batch_size):
        found = cache_columns(target_model, options, vocab_size, part["prompt_ids"], part["completion_ids"])
        for name, values in found.items():
            columns[name] += values
    return concatenate_datasets([rows, Dataset.from_dict(columns, features=features)], axis=1)


def real_vocab_size(target_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Rows of the target's output that stand for tokens."""
    rows = _rows(target_model)
    return rows if tokenizer is None else min(rows, tokenizer_size(tokenizer))


def _rows(target_model: PreTrainedModel) -> int:
    return target_model.get_output_embeddings().weight.shape[0]


def bytes_per_token(features: Features, entries: float) -> float:
    """Bytes that the cache of one token takes in memory, before Parquet's compression and without list offsets.

    Args:
        features: The columns, from `CacheOptions.features`.
        entries: Tokens kept: k, or the average number of distinct draws.
    """
    kinds = [features[name].feature for name in CACHE_COLUMNS if name in features]
    return sum(_WIDTH[kind.feature.dtype] * entries if isinstance(kind, List) else _WIDTH[kind.dtype] for kind in kinds)


def cache_columns(
    target_model: PreTrainedModel,
    options: CacheOptions,
    vocab_size: int,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
) -> dict[str, list[Any]]:
    """The cache columns of some rows, from one forward pass over their prompt and completion tokens."""
    columns: dict[str, list[Any]] = {name: [] for name in options.features(vocab_size)}
    logits = _completion_logits(target_model, prompts, completions).split([len(each) for each in completions])
    for prompt, completion, of_row in zip(prompts, completions, logits, strict=True):
        # Seeded by the row itself, so that neither the batch size nor the order of rows changes its draws.
        seed = derived_seed(options.seed, list(prompt), list(completion))
        generator = torch.Generator().manual_seed(seed)
        row: dict[str, list[Any]] = {name: [] for name in columns}
        for start in range(0, len(completion), _POSITIONS):
            written = torch.tensor(completion[start : start + _POSITIONS], dtype=torch.long)
            part = of_row[start : start + _POSITIONS, :vocab_size].float().cpu()
            for name, values in _kept(part, written, options, generator).items():
                row[name] += values
        row |= {TEMPERATURE_COLUMN: options.loss_temperature, VOCAB_COLUMN: _rows(target_model)}  # type: ignore[dict-item]
        for name, values in row.items():
            columns[name].append(values)
    return columns


def _kept(
    logits: torch.Tensor, written: torch.Tensor, options: CacheOptions, generator: torch.Generator
) -> dict[str, list[Any]]:
    """What is kept of `logits` [T, V] at `written` [T] tokens."""
    if not torch.isfinite(logits.amax(-1)).all():
        raise FloatingPointError("The target's logits hold NaN or infinite values; check its weights and dtype.")
    log_p = (logits / options.loss_temperature).log_softmax(-1)
    # An id of a padded row stands for no token: p, taken over the tokens, has nothing for it.
    outside = written >= log_p.shape[-1]
    of_written = log_p.gather(-1, written.masked_fill(outside, 0)[:, None]).squeeze(-1)
    kept = {"completion_logprobs": of_written.masked_fill(outside, -math.inf).tolist()}
    if options.sampled is None:
        assert options.top_k is not None
        top = top_k_target(logits, options.top_k, options.loss_temperature)
        return kept | {
            "target_token_ids": top.token_ids.tolist(),
            "target_logprobs": top.logprobs.tolist(),
            "target_tail_logprob": top.tail_logprob.tolist(),
        }
    drawn = sample_target(logits, options.sampled, options.loss_temperature, generator)
    distinct = (drawn.counts > 0).sum(-1).tolist()  # the other places are padding
    return kept | {
        "target_token_ids": [ids[:n].tolist() for ids, n in zip(drawn.token_ids, distinct, strict=True)],
        "target_counts": [counts[:n].tolist() for counts, n in zip(drawn.counts, distinct, strict=True)],
    }


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
        loss_temperature: The one that the distributions were kept at.
        vocab_size: Rows of the target's vocabulary, padding included; None where nothing says it.
    """

    top_k: int | None
    loss_temperature: float
    vocab_size: int | None


def missing_cache_columns(dataset: Dataset | IterableDataset) -> list[str]:
    """The columns that training from cached distributions needs and this data lacks; empty if it can be done."""
    columns = set(get_dataset_column_names(dataset))
    form = CacheOptions(sampled=1 if "target_counts" in columns else None).features(vocab_size=1)
    return [name for name in ("prompt_ids", "completion_ids", *form) if name not in columns | {VOCAB_COLUMN}]


def rows_with_distributions(
    dataset: Dataset | IterableDataset, name: str, *, warn: bool = True
) -> Dataset | IterableDataset:
    """Leave out answers of a server that came without usable log-probabilities, and warn how many they are unless
    `warn` is False. Other rows without distributions are not meant to be there: `cache_facts` refuses them.
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
            *(len(dataset) - len(keep), len(dataset), name),
        )
    return dataset.select(keep)


def cache_facts(dataset: Dataset | IterableDataset, name: str) -> CacheFacts:
    """What the cache of a data set that has all its columns says of itself; messages call the data set `name`.

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
    widths: set[int] = set()
    first = 0
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        written, logged, kept = (pc.fill_null(pc.list_value_length(table[each]), -1).to_numpy() for each in columns)
        for row in np.flatnonzero((written < 0) | (written != logged) | (written != kept)):
            if written[row] < 0:
                raise ValueError(
                    f"Row {first + row} of the {name} dataset is text without the target's distributions, but "
                    "`target_model` is None: give the target, or mix in "
                    "`cache_target_distributions(with_token_ids(text, tokenizer), target, ...)`."
                )
            raise ValueError(
                f"Row {first + row} of the {name} dataset has {written[row]} completion tokens, but "
                f"{'no' if kept[row] < 0 else kept[row]} distributions. Cache them with `cache_target_distributions` "
                "as the last step, after mixing and editing."
            )
        for chunk in () if draws else table["target_token_ids"].chunks:
            widths.update(pc.unique(pc.list_value_length(chunk.flatten())).to_pylist())
        first += len(table)
    if len(widths) > 1:
        raise ValueError(
            f"Rows of the {name} dataset keep different numbers of tokens ({sorted(widths)[:5]}): they were cached "
            "with different `top_k`. Cache all of them with one."
        )
    temperatures = dataset.unique(TEMPERATURE_COLUMN)
    if len(temperatures) > 1:
        raise ValueError(
            f"Rows of the {name} dataset were cached at different temperatures ({temperatures[:5]}). Cache all of "
            "them at one."
        )
    sizes = dataset.unique(VOCAB_COLUMN) if VOCAB_COLUMN in dataset.column_names else []
    vocab_size = max((size for size in sizes if size is not None), default=None)
    return CacheFacts(None if draws else max(widths, default=0), temperatures[0], vocab_size)
