"""What `generate` returns besides the texts, collected while rows advance by different numbers of tokens."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput


class Outputs:
    """Scores and logits of every written token, where they were asked for."""

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
            past_key_values=cache,
        )


def _by_step(texts: list[list[Tensor]] | None) -> tuple[Tensor, ...] | None:
    """One [B, V] a step, zero where a text had ended."""
    if texts is None:
        return None
    nothing = torch.zeros_like(texts[0][0])
    steps = max(map(len, texts))
    return tuple(torch.stack([text[k] if k < len(text) else nothing for text in texts]) for k in range(steps))
