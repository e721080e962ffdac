"""What a draft's generation config says of drafting: a fixed length, as transformers has to be told, and the tokens
that it may propose, which `SpeculativeDecoding` reads.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from hf_draftkd.utils.checks import whole_number

# Beside transformers' own key: what pays in one pass of a parallel draft would not pay one token at a time.
_PARALLEL_LENGTH = "parallel_num_assistant_tokens"


def draft_length_settings(num_assistant_tokens: int, *, parallel: bool = False) -> dict[str, Any]:
    """The generation-config entries that make a draft propose exactly γ tokens a step.

    transformers' defaults (20 tokens, given up early below a confidence of 0.4, which adapts itself where scikit-learn
    is installed) do not give a fixed length. `parallel`: of a step of `SpeculativeDecoding` that drafts them in one
    pass; `assistant_model=` is not touched.
    """
    length = whole_number("num_assistant_tokens", num_assistant_tokens)
    if parallel:
        return {_PARALLEL_LENGTH: length}
    return {
        "num_assistant_tokens": length,
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


def recorded_parallel_length(config: GenerationConfig) -> int | None:
    """The tokens that a parallel draft's generation config says to draft in one pass; None where it does not say."""
    return getattr(config, _PARALLEL_LENGTH, None)


def recorded_vocabulary(config: GenerationConfig) -> list[int] | None:
    """The ids that a draft's generation config says it may propose, the likeliest first; None for all."""
    return getattr(config, "draft_vocabulary", None)


def store_draft_settings(draft_model: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Keep entries in a draft's generation config, where decoding and `save_pretrained` find them.

    They are `draft_length_settings(γ)`, or `{"draft_vocabulary": ids}` with the likeliest id first, so that the first n
    are the list of size n. transformers keeps keys that it does not know: so the list follows the draft through
    `save_pretrained`, `from_pretrained`, checkpoints and the Hub, where a file beside it would be left behind. 16,000
    ids take about 160 kB. `generate(assistant_model=...)` and other engines ignore them.
    """
    _store(draft_model.generation_config, settings)


def derived_generation_config(folder: Path, trust_remote_code: bool = False) -> GenerationConfig:
    """What transformers derives from the model's config for a draft saved without a generation config: its special ids.

    It does so no longer once there is a file, which must hold them then.
    """
    return GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))


def write_draft_settings(folder: Path, settings: dict[str, Any], trust_remote_code: bool = False) -> Path:
    """The same for a saved draft, in whose generation config everything else stays; returns the file."""
    try:
        config = GenerationConfig.from_pretrained(folder)
    except OSError:  # a draft saved without one
        config = derived_generation_config(folder, trust_remote_code)
    _store(config, settings)
    # What is there may be hours of work: it goes only once the new file is whole.
    with TemporaryDirectory(prefix=".settings-", dir=folder) as scratch:
        config.save_pretrained(scratch)
        return Path(scratch, GENERATION_CONFIG_NAME).replace(folder / GENERATION_CONFIG_NAME)


def _store(config: GenerationConfig, settings: dict[str, Any]) -> None:
    drop_idle_sampling(config)
    for name, value in settings.items():
        setattr(config, name, value)
    # transformers reads keys that it does not know only from its own config classes.
    config._from_model_config = False
