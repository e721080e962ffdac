"""What a draft's generation config says of drafting: a fixed length, as transformers has to be told, and the tokens
that it may propose, which `SpeculativeDecoding` reads.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from hf_draftkd.utils.checks import whole_number


def draft_length_settings(num_assistant_tokens: int) -> dict[str, Any]:
    """The generation-config entries that make a draft propose exactly γ tokens a step.

    transformers' defaults (20 tokens, given up early below a confidence of 0.4, which adapts itself where scikit-learn
    is installed) do not give a fixed length.

    Raises:
        ValueError: γ is not a positive whole number.
    """
    return {
        "num_assistant_tokens": whole_number("num_assistant_tokens", num_assistant_tokens),
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
    return _write(folder, draft_length_settings(num_assistant_tokens), trust_remote_code)


def write_draft_vocabulary(folder: Path, ids: list[int], trust_remote_code: bool = False) -> Path:
    """Keep the ids that a saved draft may propose in its generation config; everything else in it stays.

    They stand in the file itself, as `draft_vocabulary`: transformers keeps keys that it does not know, so the list
    follows the draft through `save_pretrained`, `from_pretrained`, checkpoints and the Hub, where a file beside it
    would be left behind. 16,000 ids are some 160 kB. `generate(assistant_model=...)` and other engines ignore them.

    Args:
        folder: The draft's folder.
        ids: The likeliest first, so that the first n are the list of size n.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The file.
    """
    return _write(folder, {"draft_vocabulary": ids}, trust_remote_code)


def store_draft_vocabulary(draft_model: PreTrainedModel, ids: list[int]) -> None:
    """The same for a loaded draft, whose `save_pretrained` then writes them."""
    drop_idle_sampling(draft_model.generation_config)
    _set(draft_model.generation_config, {"draft_vocabulary": ids})


def recorded_vocabulary(config: GenerationConfig) -> list[int] | None:
    """The ids that a draft's generation config says it may propose, the likeliest first; None for all."""
    return getattr(config, "draft_vocabulary", None)


def _write(folder: Path, settings: dict[str, Any], trust_remote_code: bool) -> Path:
    try:
        config = GenerationConfig.from_pretrained(folder)
    except OSError:  # a draft saved without one: transformers then derives it from the model's config
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        config = GenerationConfig.from_model_config(model_config)
    drop_idle_sampling(config)
    _set(config, settings)
    config.save_pretrained(folder)
    return folder / GENERATION_CONFIG_NAME


def _set(config: GenerationConfig, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(config, name, value)
    # transformers reads keys that it does not know only from its own config classes.
    config._from_model_config = False
