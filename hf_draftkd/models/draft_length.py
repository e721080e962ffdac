"""A fixed draft length, as transformers has to be told: in the *draft's* generation config, with two companions."""

from typing import Any

from transformers import PreTrainedModel


def draft_length_settings(num_assistant_tokens: int) -> dict[str, Any]:
    """The generation-config entries that make a draft propose exactly γ tokens a step.

    transformers' defaults (20 tokens, given up early below a confidence of 0.4, which adapts itself where scikit-learn
    is installed) do not give a fixed length.

    Raises:
        ValueError: γ is not a positive whole number.
    """
    if num_assistant_tokens != int(num_assistant_tokens) or num_assistant_tokens < 1:
        raise ValueError(f"`num_assistant_tokens` must be a whole number, 1 or above, got {num_assistant_tokens}.")
    return {
        "num_assistant_tokens": int(num_assistant_tokens),
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }


def store_draft_length(draft_model: PreTrainedModel, num_assistant_tokens: int) -> None:
    """Keep γ in the draft's generation config, where `generate(assistant_model=...)` and `save_pretrained` find it."""
    draft_model.generation_config.update(**draft_length_settings(num_assistant_tokens))
