"""What is kept of the target's distributions at each completion token, and the reduction of logits to it.

Two forms:

- `top_k=K`: the K likeliest tokens with their log-probabilities, and the log-probability of all others together.
  Serves every divergence; it is biased for the Kullback-Leibler ones, since the tail's shape is lost.
- `sampled=N`: N draws from p, kept as tokens and counts. Unbiased for forward KL and cross-entropy, and only for them
  (https://arxiv.org/abs/2503.16870).

Log-probabilities are float16 by default: each is off by at most 2**-11 of its size (2**-25 next to 0), that is by less
than 0.04% of the probability of any token with p > 0.5 and 1.1% at p = 1e-10. Ask for float32 where that matters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from datasets import Features, List, Value
from torch import Tensor

from hf_draftkd.acceptance import token_logprob
from hf_draftkd.losses.sparse import SparseTarget, sample_target, top_k_target
from hf_draftkd.utils.checks import in_range, one_of, whole_number
from hf_draftkd.utils.hashing import derived_seed

CACHE_COLUMNS = ("completion_logprobs", "target_token_ids", "target_logprobs", "target_tail_logprob", "target_counts")
TEMPERATURE_COLUMN, VOCAB_COLUMN = "target_temperature", "target_vocab_size"
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
            ValueError: There are fewer tokens.
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


def as_stored(columns: Mapping[str, Any] | None, features: Features) -> dict[str, Any]:
    """A row's cache columns in the types of `features`, lists as NumPy arrays; all None where there are none.

    Whether they come from tensors, a server or a file, Arrow then takes them together.
    """
    if columns is None:
        return dict.fromkeys(features)

    def array(values: Any, kind: Any) -> Any:
        if not isinstance(kind, List):
            return values
        if isinstance(kind.feature, List):
            return [array(each, kind.feature) for each in values]
        return np.asarray(values, dtype=kind.feature.dtype)

    return {name: array(columns[name], kind) for name, kind in features.items()}


class KeptDistributions:
    """The target's distributions at the tokens of some texts, reduced as soon as their logits are there.

    Logits come before any processor: those of a step or a round of `generate`, or of a whole text. They are reduced on
    their own device, and only what is kept stays.

    Args:
        options: What is kept.
        vocab_size: V, the tokens that p is over; logits behind them, of padded rows, are left out.
        prompts: The tokens of each text's prompt. Only draws need them: a draw depends on the seed and on the text up
            to and including the written token, so that the batch does not matter.
    """

    def __init__(self, options: CacheOptions, vocab_size: int, prompts: Sequence[Sequence[int]] = ()) -> None:
        self._options, self._vocab_size = options, vocab_size
        self._seeds = [derived_seed(options.seed, list(prompt)) for prompt in prompts]
        # By text: pieces of it, each with log p of the written tokens and then what the form keeps.
        self._pieces: dict[int, list[tuple[Any, ...]]] = {}

    def add(self, text: int, tokens: Tensor, logits: Tensor) -> None:
        """Keep what is wanted of logits [K, rows], from which the next K tokens [K] of a text were chosen."""
        for part, of_part in zip(tokens.split(_POSITIONS), logits.split(_POSITIONS), strict=True):
            piece = self._reduced([text] * len(part), part, of_part)
            self._pieces.setdefault(text, []).append(piece)

    def add_step(self, tokens: Tensor, logits: Tensor) -> None:
        """The same for the next token of every text: tokens [B], logits [B, rows]."""
        reduced = self._reduced(range(len(tokens)), tokens, logits)
        for text in range(len(tokens)):
            piece = tuple(values[text : text + 1] for values in reduced)
            self._pieces.setdefault(text, []).append(piece)

    def num_tokens(self, text: int) -> int:
        """Tokens of a text so far."""
        return sum(len(piece[0]) for piece in self._pieces[text])

    def target(self, text: int, num_tokens: int) -> SparseTarget:
        """The likeliest tokens at the first places of a text, on the CPU."""
        _, token_ids, logprobs, tail = self._first(text, num_tokens)
        return SparseTarget(token_ids, logprobs, tail)

    def columns(self, text: int, num_tokens: int, num_rows: int) -> dict[str, Any]:
        """The cache columns of a row of alignment data, numbers as NumPy arrays.

        Args:
            text: Which text.
            num_tokens: T, the length of its completion; what came behind it is left out.
            num_rows: Rows of the target's vocabulary, padding included.

        Raises:
            FloatingPointError: The target's logits hold NaN or infinite values.
        """
        of_written, token_ids, *others = self._first(text, num_tokens)
        _require_numbers(of_written)
        if self._options.sampled is None:
            kept = dict(zip(("target_logprobs", "target_tail_logprob"), (each.numpy() for each in others), strict=True))
            kept["target_token_ids"] = token_ids.numpy()
        else:
            kept = {"target_token_ids": token_ids, "target_counts": others[0]}
        constants = {TEMPERATURE_COLUMN: self._options.loss_temperature, VOCAB_COLUMN: num_rows}
        return {"completion_logprobs": of_written.numpy(), **kept, **constants}

    def _first(self, text: int, num_tokens: int) -> list[Any]:
        return [
            torch.cat(parts)[:num_tokens].cpu() if isinstance(parts[0], Tensor) else [*chain(*parts)][:num_tokens]
            for parts in zip(*self._pieces[text], strict=True)
        ]

    def _reduced(self, texts: Sequence[int], tokens: Tensor, logits: Tensor) -> tuple[Any, ...]:
        """What is kept of K positions: log p of the written tokens, and the columns of the form."""
        options, logits = self._options, logits[:, : self._vocab_size].float()
        if options.sampled is not None:  # on the CPU: other devices draw other tokens
            tokens, logits = tokens.cpu(), logits.cpu()
        # An id of a padded row stands for no token: p, taken over the tokens, has nothing for it.
        outside = tokens >= self._vocab_size
        scaled = logits if options.loss_temperature == 1 else logits / options.loss_temperature
        of_written = token_logprob(scaled, tokens.masked_fill(outside, 0)).masked_fill(outside, -math.inf)
        of_written = of_written.masked_fill(~logits.amax(-1).isfinite(), math.nan)
        if options.sampled is None:
            assert options.top_k is not None
            top = top_k_target(scaled, options.top_k)
            # int32 takes half the bytes of int64; no vocabulary has more than 2**31 tokens.
            return self._stored(of_written), top.token_ids.int(), *map(self._stored, (top.logprobs, top.tail_logprob))
        _require_numbers(of_written)
        drawn = [self._draw(*each) for each in zip(texts, tokens.tolist(), scaled, strict=True)]
        return self._stored(of_written), [ids for ids, _ in drawn], [counts for _, counts in drawn]

    def _draw(self, text: int, token: int, logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Distinct tokens and their counts, of `sampled` draws at one place of a text."""
        assert self._options.sampled is not None
        self._seeds[text] = derived_seed(self._seeds[text], token)
        generator = torch.Generator().manual_seed(self._seeds[text])
        drawn = sample_target(logits, self._options.sampled, generator=generator)
        return drawn.token_ids.numpy(), drawn.counts.numpy()

    def _stored(self, logprobs: Tensor) -> Tensor:
        return logprobs.to(getattr(torch, self._options.dtype))


def _require_numbers(of_written: Tensor) -> None:
    if of_written.isnan().any():
        raise FloatingPointError("The target's logits hold NaN or infinite values; check its weights and dtype.")
