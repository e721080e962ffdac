"""One served request, and the target's distribution at every token it wrote.

The target computed a distribution for each token of the text while it checked the draft. `SpeculativeDecoding` hands
them over round by round, and they are cut to the k likeliest tokens at once, so that learning needs no further pass of
the target and `[tokens, vocabulary]` is never held.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.losses import SparseTarget, top_k_target
from hf_draftkd.utils.hashing import hash_number


@dataclass(frozen=True)
class ServedRequest:
    """A request to learn from.

    Args:
        prompt_ids: [P] int64.
        completion_ids: [T] int64, what the target wrote.
        target: Its distributions [T, k] at these tokens, unprocessed but for the loss temperature.
        setting: How it was decoded; None where that cannot be written as a `DecodingSetting`.
    """

    prompt_ids: Tensor
    completion_ids: Tensor
    target: SparseTarget
    setting: DecodingSetting | None

    def is_held_out(self, share: float, seed: int) -> bool:
        """Whether its prompt belongs to the share of prompts that is never learnt from."""
        return hash_number(f"{seed}:{self.prompt_ids.tolist()}") < share * 2**64


class KeptDistributions:
    """The target's distributions at the tokens of one `generate` call, text by text.

    Of each the `top_k` likeliest tokens (of the `vocab_size` that draft and target share) are kept, at the loss
    temperature.
    """

    def __init__(self, *, top_k: int, loss_temperature: float, vocab_size: int) -> None:
        self._top_k, self._loss_temperature, self._vocab_size = top_k, loss_temperature, vocab_size
        self._parts: dict[int, list[SparseTarget]] = {}

    def add(self, text: int, logits: Tensor) -> None:
        """Keep what is likeliest by logits [K, V] of the next K tokens of a text."""
        kept = top_k_target(logits[:, : self._vocab_size], self._top_k, self._loss_temperature)
        self._parts.setdefault(text, []).append(kept)

    def num_tokens(self, text: int) -> int:
        """Tokens of a text so far."""
        return sum(len(part.token_ids) for part in self._parts[text])

    def target(self, text: int, num_tokens: int) -> SparseTarget:
        """The distributions of a text's first tokens, on the CPU."""
        kept = SparseTarget.concatenate(self._parts[text])[:num_tokens]
        # int32 takes half the bytes of int64; no vocabulary has more than 2**31 tokens.
        return SparseTarget(kept.token_ids.int().cpu(), kept.logprobs.cpu(), kept.tail_logprob.cpu())


def served_setting(config: GenerationConfig, kwargs: Mapping[str, Any]) -> DecodingSetting | None:
    """How `generate` decodes with this config and these arguments; None where temperature, top-k, top-p and repetition
    penalty do not describe it.
    """
    if kwargs.get("logits_processor") or kwargs.get("prefix_allowed_tokens_fn"):
        return None
    try:
        return DecodingSetting.from_generation_config(config)
    except ValueError:
        return None


def prompt_of(input_ids: Tensor, attention_mask: Tensor | None, row: int) -> Tensor:
    """[P] the tokens of one request of a batch [B, L] that are not padding."""
    ids = input_ids[row]
    return ids.cpu() if attention_mask is None else ids[attention_mask[row].bool()].cpu()
