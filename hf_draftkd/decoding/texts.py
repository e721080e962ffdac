"""The texts that are being written: one buffer of ids, in which every row has a length of its own; and what `generate`
returns of them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from hf_draftkd.models.forward import CACHE


def left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """A batch of prompts as `generate` takes it: `input_ids` and `attention_mask`, [B, L] each."""
    rows = [torch.tensor(list(prompt)) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


class Piece(NamedTuple):
    """What a model is to read next, one row for each text that is still being written."""

    ids: Tensor
    """[A, K] token ids."""
    positions: Tensor
    """[A, K]: place of each token in its text, padding not counted."""
    is_token: Tensor | None
    """[A, K] bool: False for padding and for what was read before. None: all are tokens."""

    def part(self, columns: slice) -> "Piece":
        """Some of its columns."""
        is_token = None if self.is_token is None else self.is_token[:, columns]
        return Piece(self.ids[:, columns], self.positions[:, columns], is_token)


class Texts:
    """Prompts, what was written so far, and behind each end the tokens that are drafted but not yet verified.

    Args:
        prompts: [B, P] ids, left-padded.
        mask: [B, P], 0 where padding is; None where there is none.
        max_length: Longest text in columns of `prompts`, padding included.
        spare: Columns kept for drafted tokens behind `max_length`.

    Attributes:
        ids: [B, max_length + spare]; right of a text's end there is no meaning.
        lengths: Columns of each of the B texts, its padding on the left included.
        padding: Columns of each of the B texts that are padding.
        done: Whether each of the B texts has ended.
        rows: The texts in the models' caches, in their order: those that are still being written, and where a cache
            cannot let go of rows, the others too.
    """

    def __init__(self, prompts: Tensor, mask: Tensor | None, max_length: int, spare: int) -> None:
        batch_size, self.prompt_length = prompts.shape
        columns = torch.arange(max_length + spare, device=prompts.device)
        self.ids = torch.nn.functional.pad(prompts.long(), (0, len(columns) - self.prompt_length))
        self.max_length = max_length
        self.lengths = [self.prompt_length] * batch_size
        self.done = [False] * batch_size
        self.rows = list(range(batch_size))
        padding = prompts.new_zeros(batch_size) if mask is None else (mask == 0).sum(1)
        self.padding: list[int] = padding.tolist()
        self._has_padding = any(self.padding)
        # Rows that end earlier are read along with longer ones: no position may leave a model's table.
        self._positions = (columns - padding[:, None]).clamp(0, max_length - 1)
        self._is_token = columns >= padding[:, None]
        self._columns = columns

    @property
    def is_single(self) -> bool:
        """Whether there is one text, which needs no bookkeeping of holes."""
        return len(self.lengths) == 1

    @property
    def needs_mask(self) -> bool:
        """Whether a model must be told which columns are tokens."""
        return self._has_padding or not self.is_single

    def most_remaining(self) -> int:
        """Tokens that the shortest unfinished text may still get."""
        return self.max_length - min(self.lengths[row] for row in self.rows if not self.done[row])

    def piece(self, read: list[int], num_drafted: int = 0) -> Piece:
        """What a model that has `read` so many columns has not read yet of the unfinished texts, with `num_drafted`
        tokens behind their ends.
        """
        if self.is_single:
            length = self.lengths[0]
            columns = slice(read[0], length + num_drafted)
            is_token = self._is_token[:, columns] if self._has_padding else None
            return Piece(self.ids[:, columns], self._positions[:, columns], is_token)
        lengths = [self.lengths[row] for row in self.rows]
        width = max(length - seen for length, seen in zip(lengths, read, strict=True))
        # All rows end in the last column, and what a row has read before is masked in front of it. One transfer: where
        # each row ends, and what it has seen.
        ends, seen, rows = self.ids.new_tensor([lengths, read, self.rows])[:, :, None]
        index = (ends - width + self._columns[: width + num_drafted]).clamp(min=0)
        is_token = self._is_token[rows, index] & (index >= seen)
        return Piece(self.ids[rows, index], self._positions[rows, index], is_token)

    def write(self, tokens: Tensor, offset: int) -> None:
        """Put `tokens` [A, K] behind the ends of the unfinished texts, `offset` columns further."""
        width = tokens.shape[1]
        if self.is_single:
            start = self.lengths[0] + offset
            self.ids[:, start : start + width] = tokens
            return
        rows, starts = self.ids.new_tensor([self.rows, [self.lengths[row] + offset for row in self.rows]])[:, :, None]
        self.ids[rows, starts + self._columns[:width]] = tokens

    def finished(self, pad_token_id: int) -> Tensor:
        """[B, L]: all texts, padded on the right to the longest."""
        longest = max(self.lengths)
        lengths = self.ids.new_tensor(self.lengths)[:, None]
        return self.ids[:, :longest].masked_fill(self._columns[:longest] >= lengths, pad_token_id)


class Outputs:
    """Scores and logits of every written token, where they were asked for: rows advance by different numbers."""

    def __init__(self, config: GenerationConfig, batch_size: int) -> None:
        self._is_dict = bool(config.return_dict_in_generate)
        self._scores = self._texts(config.output_scores, batch_size)
        self._logits = self._texts(config.output_logits, batch_size)

    def _texts(self, is_wanted: bool | None, batch_size: int) -> list[list[Tensor]] | None:
        return [[] for _ in range(batch_size)] if self._is_dict and is_wanted else None

    def add(self, row: int, scores: Tensor, logits: Tensor) -> None:
        """Note scores and logits [K, V] of the next tokens of a text."""
        if self._scores is not None:
            self._scores[row].extend(scores.float())
        if self._logits is not None:
            self._logits[row].extend(logits.float())

    def result(self, sequences: Tensor, cache: Any) -> GenerateDecoderOnlyOutput | Tensor:
        """What `generate` returns: `sequences`, or a dictionary where that was asked for."""
        if not self._is_dict:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=_by_step(self._scores),
            logits=_by_step(self._logits),
            **{CACHE: cache},
        )


def _by_step(texts: list[list[Tensor]] | None) -> tuple[Tensor, ...] | None:
    """One [B, V] a step, zero where a text had ended."""
    if texts is None:
        return None
    nothing = torch.zeros_like(texts[0][0])
    steps = max(map(len, texts))
    return tuple(torch.stack([text[k] if k < len(text) else nothing for text in texts]) for k in range(steps))
