"""One served request, and the target's distribution at every token it wrote.

The target computed a distribution for each token of the text while it checked the draft. `SpeculativeDecoding` hands
them over round by round, and `KeptDistributions` cuts them to the k likeliest tokens at once, so that learning needs no
further pass of the target and `[tokens, vocabulary]` is never held.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.losses import SparseTarget
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
