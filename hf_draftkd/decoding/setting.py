"""How a text was decoded: the one description of a sampling setting that generation and evaluation share.

Block efficiency holds only for text that the target wrote under the very setting being reported, so a setting is
recorded with every row and compared as a value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from hf_draftkd.models.tokenizers import listed_ids

# What `generate` may still take from the model's own generation config: in which pieces it reads a prompt, and which
# ids are not tokens at all (`align_vocabulary` records the padded rows of a draft in `suppress_tokens`). Never what it
# samples, nor its kind of cache: a draft cannot be used with most of them.
_INHERITED = frozenset({"prefill_chunk_size", "suppress_tokens"})

# The values at which a parameter changes nothing, as None and an empty list do. A generation config with any other
# value of one of these cannot be written as a `DecodingSetting`.
_SAMPLING: dict[str, Any] = {"min_p": 0, "top_h": 1, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}
_CHOOSING: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "encoder_repetition_penalty", "guidance_scale"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_new_tokens", "min_length"), 0),
    **dict.fromkeys(("bad_words_ids", "sequence_bias", "begin_suppress_tokens", "watermarking_config")),
    **dict.fromkeys(("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id")),
}
# These only end a text early.
_STOPPING: dict[str, Any] = dict.fromkeys(("stop_strings", "max_time"))


class CompleteGenerationConfig(GenerationConfig):
    """A generation config in which "unset" means "off", instead of "whatever the model's own config says".

    `generate` fills every field of a passed config that is `None` from `model.generation_config`
    (`GenerationMixin._prepare_generation_config`), and `None` is the only neutral value that `bad_words_ids`,
    `sequence_bias` or `watermarking_config` have. So a target published with a repetition penalty, or with `min_p`,
    would apply it to text that claims to be written without. This class declines that filling.
    """

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        # The model's own values are the only update that comes with both flags.
        if defaults_only and allow_custom_entries:
            kwargs = {name: value for name, value in kwargs.items() if name in _INHERITED}
        return super().update(defaults_only=defaults_only, allow_custom_entries=allow_custom_entries, **kwargs)


@dataclass(frozen=True, order=True)
class DecodingSetting:
    """One way of choosing the next token. Settings are sorted by temperature first, then field by field.

    Args:
        temperature: 0 is greedy decoding; 1 samples from the model's own distribution.
        top_p: Smallest probability mass kept by nucleus sampling; 1 keeps everything.
        top_k: Number of likeliest tokens kept; 0 keeps everything (transformers' own default is 50).
        repetition_penalty: As in transformers; 1 is none.

    Raises:
        ValueError: A value is out of range, or greedy decoding is combined with a sampling filter.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        # Rows are seeded by the setting as it is written out: 1 in a YAML file is the 1.0 of the command line.
        for name in ("temperature", "top_p", "repetition_penalty"):
            object.__setattr__(self, name, float(getattr(self, name)))
        # `not (... )` rather than the opposite comparison, so that nan is refused as well.
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be 0 (greedy) or a positive number, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must lie in (0, 1], got {self.top_p}. Use 1.0 to keep every token.")
        if not self.top_k >= 0 or self.top_k != int(self.top_k):
            raise ValueError(
                f"`top_k` must be a whole number, 0 or above, got {self.top_k}. Use 0 to keep every token."
            )
        object.__setattr__(self, "top_k", int(self.top_k))
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"`repetition_penalty` must be positive, got {self.repetition_penalty}. Use 1.0 for none.")
        if self.is_greedy and (self.top_p < 1 or self.top_k > 0):
            raise ValueError(
                f"temperature 0 is greedy decoding, which `top_p` and `top_k` cannot change, got top_p={self.top_p} "
                f"and top_k={self.top_k}. Leave them at 1.0 and 0, or sample with a temperature above 0."
            )

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "DecodingSetting":
        """The setting recorded in a row of alignment data.

        Raises:
            ValueError: The row does not record a setting.
        """
        missing = [field.name for field in fields(cls) if row.get(field.name) is None]
        if missing:
            raise ValueError(
                f"This row does not say how it was decoded: {', '.join(missing)} missing (columns: {', '.join(row)}). "
                "Make the data with `draftkd generate`, which records the setting of every row."
            )
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    @classmethod
    def from_generation_config(cls, config: GenerationConfig) -> "DecodingSetting":
        """What `generate` would do under `config`, transformers' own defaults included (`top_k` 50 when sampling).

        Raises:
            ValueError: The config holds something that a setting cannot express, such as beams or `min_p`.
        """
        sampled = config.do_sample is True
        if inexpressible := _effective(config, _CHOOSING | (_SAMPLING if sampled else {})):
            raise ValueError(
                f"The generation config decodes with {', '.join(inexpressible)}, which cannot be written as "
                "temperature, top_p, top_k and repetition_penalty. Name the setting to use instead."
            )
        defaults = GenerationConfig._get_default_generation_params()

        def of(name: str) -> Any:
            value = getattr(config, name, None)
            return defaults[name] if value is None else value

        if not sampled:
            return cls(repetition_penalty=of("repetition_penalty"))
        return cls(**{field.name: of(field.name) for field in fields(cls)})

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def __str__(self) -> str:
        """The setting in words: "greedy", or "temperature 1, top-p 0.95"; what changes nothing is left out."""
        first = "greedy" if self.is_greedy else f"temperature {self.temperature:g}"
        return ", ".join([first, *(f"{words} {value:g}" for words, _, value in self._filters())])

    @property
    def log_suffix(self) -> str:
        """The setting in the name of a logged metric: `_t0`, `_t0.7`, `_t0.7_p0.95_k50_r1.1`."""
        return "".join([f"_t{self.temperature:g}", *(f"_{letter}{value:g}" for _, letter, value in self._filters())])

    def _filters(self) -> list[tuple[str, str, float]]:
        """(words, letter, value) of everything beside the temperature that changes the distribution."""
        filters = (("top-p", "p", self.top_p, 1), ("top-k", "k", self.top_k, 0))
        penalty = ("repetition penalty", "r", self.repetition_penalty, 1)
        return [(words, letter, value) for words, letter, value, neutral in (*filters, penalty) if value != neutral]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def generation_config(self, model: PreTrainedModel, max_new_tokens: int, **overrides: Any) -> GenerationConfig:
        """A complete `GenerationConfig` for `model.generate`, with further fields in `overrides`.

        From the model come only its special ids (`eos_token_id` may be a list, or None) and its `suppress_tokens`; no
        penalty, no sampling default and no kind of cache of its own. Pass `suppress_tokens=[]` to drop those too.
        """
        own = model.generation_config
        sampling: dict[str, Any] = {"do_sample": False}
        if not self.is_greedy:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        values: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "bos_token_id": own.bos_token_id,
            "eos_token_id": own.eos_token_id,
            "pad_token_id": own.pad_token_id,
            "num_beams": 1,
            "use_cache": True,
            **sampling,
        }
        return CompleteGenerationConfig(**(values | overrides))


SETTING_COLUMNS = tuple(field.name for field in fields(DecodingSetting))
"""Columns in which a row records its setting, in the order of the fields."""

UNFILTERED = DecodingSetting(temperature=1.0)
"""Sampling from the model's own distribution."""


def settings_at(
    temperatures: Sequence[float], *, top_p: float = 1.0, top_k: int = 0, repetition_penalty: float = 1.0
) -> list[DecodingSetting]:
    """One setting per temperature; the sampling filters apply above 0 only.

    Raises:
        ValueError: There is no temperature, one is given twice, or a value is out of range.
    """
    if isinstance(temperatures, int | float):
        raise ValueError(f"`temperatures` must be a list, got the number {temperatures}: write ({temperatures},).")
    if not temperatures:
        raise ValueError("`temperatures` is empty. Give at least one, such as 0 for greedy decoding.")
    if len(set(temperatures)) < len(temperatures):
        raise ValueError(
            f"`temperatures` repeats a value: {list(temperatures)}. Give each once; `draftkd generate` and "
            "`generate_alignment_data` write several completions with `num_completions`."
        )
    DecodingSetting(temperature=1.0, top_p=top_p, top_k=top_k)  # a bad filter is refused even if unused
    return [
        DecodingSetting(value, top_p if value else 1.0, top_k if value else 0, repetition_penalty)
        for value in temperatures
    ]


def left_out_warning(model: PreTrainedModel, settings: Sequence[DecodingSetting]) -> list[str]:
    """A sentence that names what a model's own generation config would change in text decoded under `settings`."""
    config = model.generation_config
    sampled = [setting for setting in settings if not setting.is_greedy]
    found = _effective(config, _CHOOSING | (_SAMPLING if sampled else {}) | _STOPPING)
    for name in SETTING_COLUMNS:
        value, used = getattr(config, name), settings if name == "repetition_penalty" else sampled
        if value not in (None, getattr(UNFILTERED, name)) and any(getattr(setting, name) != value for setting in used):
            found.append(f"{name}={value!r}")
    if not found:
        return []
    return [
        f"The target's generation config carries {', '.join(found)}, which the settings asked for leave out or "
        "replace: text that the target writes by default differs."
    ]


def _effective(config: GenerationConfig, neutral: Mapping[str, Any]) -> list[str]:
    """Those entries, as "name=value", that are not neutral."""
    values = {name: getattr(config, name, None) for name in neutral}
    return [f"{name}={value!r}" for name, value in values.items() if value not in (None, [], neutral[name])]


def own_penalty(model: PreTrainedModel) -> float:
    """The repetition penalty of a model's generation config, 1 where it has none."""
    return model.generation_config.repetition_penalty or 1.0


def end_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """The ids that end a text of `model`: none, one or several."""
    return frozenset(listed_ids(model.generation_config.eos_token_id))
