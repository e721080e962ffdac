"""The target's distributions, kept beside each completion token, for training without the target in memory.

Two forms, from one forward pass of the target over the exact tokens of each row:

- `top_k=K`: the K likeliest tokens with their log-probabilities, and the log-probability of all others together.
  Serves every divergence; it is biased for the Kullback-Leibler ones, since the tail's shape is lost.
- `sampled=N`: N draws from p, kept as tokens and counts. Unbiased for forward KL and cross-entropy, and only for them
  (https://arxiv.org/abs/2503.16870).

Log-probabilities are float16 by default: each is off by at most 2**-11 of its size (2**-25 next to 0), that is by less
than 0.04% of the probability of any token with p > 0.5 and 1.1% at p = 1e-10. Ask for float32 where that matters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl.data_utils import get_dataset_column_names

from hf_draftkd.data.fingerprints import weights_fingerprint
from hf_draftkd.models.forward import evaluating
from hf_draftkd.models.loading import require_loaded
from hf_draftkd.models.tokenizers import tokenizer_size
from hf_draftkd.utils.hashing import derived_seed, sha256

logger = logging.get_logger(__name__)

CACHE_COLUMNS = ("completion_logprobs", "target_token_ids", "target_logprobs", "target_tail_logprob", "target_counts")
TEMPERATURE_COLUMN = "target_temperature"
_TOP_K = ("completion_logprobs", "target_token_ids", "target_logprobs", "target_tail_logprob")
_DRAWS = ("completion_logprobs", "target_token_ids", "target_counts")
_POSITIONS = 256  # positions turned to float32 at a time: a vocabulary of 152,000 takes 0.15 GB of them

CacheRows = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], dict[str, list[Any]]]
"""(prompt_ids, completion_ids) of some rows -> the cache columns of these rows."""


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
        dataset: Rows with `prompt_ids` and `completion_ids` (alignment data), T completion tokens a row.
        target_model: The target that wrote them, V tokens.
        top_k: Keep the k likeliest tokens and the tail. 64 unless `sampled` is given.
        sampled: Keep this many draws from p instead.
        loss_temperature: p is softmax(logits / loss_temperature). Training at another one is refused, since
            neither a tail nor draws can be re-tempered.
        tokenizer: Its tokenizer; ids beyond it are padding, and left out of p. By default all V rows count.
        dtype: `float16` or `float32` for the log-probabilities.
        batch_size: Rows a forward pass.
        seed: Seed of the draws.

    Returns:
        The dataset with `completion_logprobs` [T] (log p of the written token), `target_token_ids` [T, k] and
        `target_logprobs` [T, k] (likeliest first) and `target_tail_logprob` [T] (-inf where k = V); or, for draws,
        `target_token_ids` and `target_counts` [T, up to N]; and with `target_temperature`.

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
    top_k = check_cache_options(top_k, sampled, loss_temperature, dtype, vocab_size)
    if len(dataset) == 0:
        raise ValueError("The dataset is empty, so there is nothing to cache.")
    cache_rows = distribution_cache(
        target_model, vocab_size=vocab_size, top_k=top_k, sampled=sampled, loss_temperature=loss_temperature, seed=seed
    )
    features = Features({**dataset.features, **cache_features(vocab_size, sampled, dtype)})

    def add(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {**rows, **cache_rows(rows["prompt_ids"], rows["completion_ids"])}

    # `map` would pickle the target to name its result; this names it by what decides it.
    options = (dataset._fingerprint, weights_fingerprint(target_model), top_k, sampled, loss_temperature, dtype, seed)
    fingerprint = sha256([repr((*options, vocab_size))])[:16]
    return dataset.map(
        add,
        batched=True,
        batch_size=batch_size,
        features=features,
        new_fingerprint=fingerprint,
        desc="Target's distributions",
    )


def add_cache_columns(rows: Dataset, cache_rows: CacheRows, features: Features, batch_size: int) -> Dataset:
    """The rows of one shard with their cache columns, in memory."""
    columns: dict[str, list[Any]] = {name: [] for name in features}
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        for name, values in cache_rows(part["prompt_ids"], part["completion_ids"]).items():
            columns[name] += values
    return concatenate_datasets([rows, Dataset.from_dict(columns, features=features)], axis=1)


def check_cache_options(
    top_k: int | None, sampled: int | None, loss_temperature: float, dtype: str, vocab_size: int
) -> int | None:
    """Refuse what cannot work; returns the top-k to use, None for draws."""
    if top_k is not None and sampled is not None:
        raise ValueError(f"Choose one form of cache, got top_k={top_k} and sampled={sampled}.")
    if sampled is not None:
        if not 1 <= sampled < 2**16:  # counts are kept in two bytes at most
            raise ValueError(
                f"`sampled` must lie between 1 and {2**16 - 1:,}, got {sampled:,}. 50 keeps about 12 distinct tokens."
            )
    else:
        top_k = min(64, vocab_size) if top_k is None else top_k
        if not 1 <= top_k <= vocab_size:
            raise ValueError(f"`top_k` must lie between 1 and the vocabulary's {vocab_size}, got {top_k}.")
    if not 0 < loss_temperature < float("inf"):
        raise ValueError(f"`loss_temperature` must be a positive number, got {loss_temperature}.")
    if dtype not in ("float16", "float32"):
        raise ValueError(f"`dtype` must be 'float16' or 'float32', got {dtype!r}.")
    return top_k


def real_vocab_size(target_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Rows of the target's output that stand for tokens."""
    rows = target_model.get_output_embeddings().weight.shape[0]
    return rows if tokenizer is None else min(rows, tokenizer_size(tokenizer))


def cache_features(vocab_size: int, sampled: int | None, dtype: str) -> Features:
    """Types of the cache columns: the smallest integers that hold the ids and the counts."""
    ids = Value("uint16" if vocab_size <= 2**16 else "int32")
    columns: dict[str, Any] = {"completion_logprobs": List(Value(dtype)), "target_token_ids": List(List(ids))}
    if sampled is None:
        columns |= {"target_logprobs": List(List(Value(dtype))), "target_tail_logprob": List(Value(dtype))}
    else:
        columns["target_counts"] = List(List(Value("uint8" if sampled < 2**8 else "uint16")))
    return Features({**columns, TEMPERATURE_COLUMN: Value("float64")})


def bytes_per_token(features: Features, entries: float) -> float:
    """Bytes that the cache of one token takes in memory, before Parquet's compression and without list offsets.

    Args:
        features: The columns, from `cache_features`.
        entries: Tokens kept: k, or the average number of distinct draws.
    """
    total = 0.0
    for name in CACHE_COLUMNS:
        if name in features:
            inner = features[name].feature
            nested = isinstance(inner, List)
            width = _WIDTH[inner.feature.dtype if nested else inner.dtype]
            total += width * (entries if nested else 1)
    return total


_WIDTH = {"uint8": 1, "uint16": 2, "int32": 4, "float16": 2, "float32": 4}


def distribution_cache(
    target_model: PreTrainedModel,
    *,
    vocab_size: int,
    top_k: int | None = None,
    sampled: int | None = None,
    loss_temperature: float = 1.0,
    seed: int = 0,
) -> CacheRows:
    """A function from rows to their cache columns. Options as in `cache_target_distributions`, already checked."""

    def cache_rows(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {}
        for prompt, completion, logits in zip(
            prompts, completions, _completion_logits(target_model, prompts, completions), strict=True
        ):
            row: dict[str, list[Any]] = {}
            generator = _generator(seed, prompt, completion) if sampled else None
            for start in range(0, max(len(completion), 1), _POSITIONS):
                written = torch.tensor(completion[start : start + _POSITIONS], dtype=torch.long)
                part = logits[start : start + _POSITIONS, :vocab_size].float().cpu()
                for name, values in _keep(part, written, top_k, sampled, loss_temperature, generator).items():
                    row.setdefault(name, []).extend(values)
            for name, values in row.items():
                columns.setdefault(name, []).append(values)
            columns.setdefault(TEMPERATURE_COLUMN, []).append(loss_temperature)
        return columns

    return cache_rows


def _keep(
    logits: torch.Tensor,
    written: torch.Tensor,
    top_k: int | None,
    sampled: int | None,
    loss_temperature: float,
    generator: torch.Generator | None,
) -> dict[str, list[Any]]:
    """What is kept of `logits` [T, V] at `written` [T] tokens."""
    log_p = torch.log_softmax(logits / loss_temperature, dim=-1)
    if not torch.isfinite(log_p.amax(-1)).all():
        raise FloatingPointError("The target's logits hold NaN or infinite values; check its weights and dtype.")
    kept = {"completion_logprobs": log_p.gather(-1, written[:, None]).squeeze(-1).tolist()}
    if sampled is None:
        assert top_k is not None
        likeliest, ids = log_p.topk(top_k, dim=-1)
        # Summed over the tail itself: 1 - (sum of the top) would be lost in rounding.
        tail = log_p.scatter(-1, ids, float("-inf")).logsumexp(-1)
        return kept | {
            "target_token_ids": ids.tolist(),
            "target_logprobs": likeliest.tolist(),
            "target_tail_logprob": tail.tolist(),
        }
    if not len(written):
        return kept | {"target_token_ids": [], "target_counts": []}
    draws = torch.multinomial(log_p.exp(), sampled, replacement=True, generator=generator)
    pairs = [torch.unique(row, return_counts=True) for row in draws]
    return kept | {
        "target_token_ids": [ids.tolist() for ids, _ in pairs],
        "target_counts": [counts.tolist() for _, counts in pairs],
    }


@torch.no_grad()
def _completion_logits(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Logits [T, V] that predict the T completion tokens of each row, from one forward pass."""
    texts = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    if not all(prompts):
        raise ValueError("A row has no prompt tokens, so nothing predicts its first completion token.")
    longest = max(map(len, texts))
    # Right padding: under a causal mask nothing before it can see it, whatever its id and whatever the positions.
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=model.device)
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device=model.device)
    first = min(map(len, prompts)) - 1
    kept = {}
    if model._supports_logits_to_keep():
        kept["logits_to_keep"] = torch.arange(first, longest, device=model.device)
    else:
        first = 0
    with evaluating(model):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **kept).logits
    return [
        logits[row, len(prompt) - 1 - first : len(text) - 1 - first]
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]


def _generator(seed: int, prompt: Sequence[int], completion: Sequence[int]) -> torch.Generator:
    # Seeded by the row itself, so that neither the batch size nor the order of rows changes its draws.
    return torch.Generator().manual_seed(derived_seed(seed, list(prompt), list(completion)))


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
