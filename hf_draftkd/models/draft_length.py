"""A fixed draft length, as transformers has to be told: in the *draft's* generation config, with two companions."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME


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


# What transformers' own check calls meaningless while `do_sample` is off.
_SAMPLING = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")


def drop_idle_sampling(config: GenerationConfig) -> None:
    """Take sampling settings out of a draft's generation config that does not sample, as it cannot be saved with them.

    Published configs often hold a temperature without `do_sample`. transformers writes such a config back as long as
    nothing else in it was changed, and a draft's special ids and its length are.
    """
    if config.do_sample is not True:
        for name in _SAMPLING:
            setattr(config, name, None)


def store_draft_length(draft_model: PreTrainedModel, num_assistant_tokens: int) -> None:
    """Keep γ in the draft's generation config, where `generate(assistant_model=...)` and `save_pretrained` find it."""
    drop_idle_sampling(draft_model.generation_config)
    draft_model.generation_config.update(**draft_length_settings(num_assistant_tokens))


def write_draft_length(folder: Path, num_assistant_tokens: int, trust_remote_code: bool = False) -> Path:
    """Keep γ in the generation config of a saved draft; everything else in it stays.

    Returns:
        The file.
    """
    try:
        config = GenerationConfig.from_pretrained(folder)
    except OSError:  # a draft saved without one: transformers then derives it from the model's config
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        config = GenerationConfig.from_model_config(model_config)
    drop_idle_sampling(config)
    config.update(**draft_length_settings(num_assistant_tokens))
    config.save_pretrained(folder)
    return folder / GENERATION_CONFIG_NAME
