"""What a card says beyond the report: how a draft was trained, how the pair fits, where the files come from.

Plain data. Every field is optional and absent where it is not known: a card never guesses. `Provenance` is stored
beside the weights as `provenance.json`, so that a draft can be published long after, and far from, its training.
"""

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from transformers import GenerationConfig, PreTrainedConfig

PROVENANCE_FILE = "provenance.json"
# Far above any honest file; a limit on what is read into memory from a stranger's repository.
MAX_JSON_BYTES = 10 * 2**20

SIGNALS = {
    "white_box": "the target's full next-token distributions",
    "cached": "the target's cached next-token distributions",
    "black_box": "the target's text only (cross-entropy)",
}
COMPLETIONS = {
    "data": "the data set",
    "target": "the target",
    "draft": "the draft itself (on-policy)",
    "mixed": "the target and the draft, mixed",
}


@dataclass(frozen=True, kw_only=True)
class _Record:
    """A frozen record that is written to JSON without its absent fields and read back strictly."""

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in _plain(self).items() if value not in (None, {}, [])}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises: ValueError: a key is unknown or a value has the wrong type."""
        if not isinstance(data, Mapping):
            raise ValueError(f"{cls.__name__} must be an object with named values, got {type(data).__name__}.")
        fields = {item.name: item for item in dataclasses.fields(cls)}
        for name, value in data.items():
            if name not in fields:
                close = difflib.get_close_matches(str(name), fields, n=1)
                hint = f"Did you mean `{close[0]}`?" if close else f"Known are {', '.join(fields)}."
                raise ValueError(f"{cls.__name__} has no field {name!r}. {hint}")
            expected = fields[name].metadata.get("type")
            if expected and not (isinstance(value, expected) and (bool in expected or not isinstance(value, bool))):
                kinds = " or ".join(kind.__name__ for kind in expected)
                raise ValueError(f"`{name}` of {cls.__name__} must be {kinds}, got {value!r:.80}.")
        return cls(**data)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((item.name, _plain(getattr(value, item.name))) for item in dataclasses.fields(value))
        return {name: content for name, content in items if content not in (None, {}, [])}
    if isinstance(value, Mapping):
        return {str(name): _plain(content) for name, content in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _known(*types: type) -> Any:
    return field(default=None, metadata={"type": types})


def _one_of(choices: Mapping[str, str], value: str | None, name: str) -> None:
    if value is not None and value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.{hint}")


@dataclass(frozen=True, kw_only=True)
class TrainingSummary(_Record):
    """How a draft came to be.

    Args:
        target, target_revision: The model it was aligned with (Hub id or path) and its commit.
        draft, draft_revision: Where the draft's weights started (Hub id or path) and its commit.
        built_from: How a new draft was made, in words ("layers 0 and 7 of the target").
        signal: What was learned from: `white_box`, `cached` or `black_box`.
        divergence, divergence_options: Name of the loss as in `hf_draftkd.losses`, and its options.
        temperature: The loss temperature (not a sampling temperature).
        completions: Who wrote the completions: `data`, `target`, `draft` or `mixed`; `lmbda`: the draft's fraction.
        dataset, dataset_revision: Hub id of the training data, or a local name.
        scenarios: `queries`, `curated`, `synthetic`.
        num_rows, num_tokens: Size of the training data; tokens count completion tokens only.
        sampling: The decoding settings under which the target wrote the data, one mapping each.
        peft: The adapter in words, when one was trained and merged ("LoRA, rank 16, all linear layers").
        num_steps, num_epochs, seed: Length of the training.
        hyperparameters: Training arguments that differ from their defaults.
        metrics: The last `trainer.evaluate()`, and only that: it is shown as measured while training.
        online: Whether the draft learned from served traffic.
    """

    target: str | None = _known(str)
    target_revision: str | None = _known(str)
    draft: str | None = _known(str)
    draft_revision: str | None = _known(str)
    built_from: str | None = _known(str)
    signal: str | None = _known(str)
    divergence: str | None = _known(str)
    divergence_options: Mapping[str, Any] | None = _known(dict)
    temperature: float | None = _known(int, float)
    completions: str | None = _known(str)
    lmbda: float | None = _known(int, float)
    dataset: str | None = _known(str)
    dataset_revision: str | None = _known(str)
    scenarios: list[str] | None = _known(list, tuple)
    num_rows: int | None = _known(int)
    num_tokens: int | None = _known(int)
    sampling: list[Mapping[str, Any]] | None = _known(list, tuple)
    peft: str | None = _known(str)
    num_steps: int | None = _known(int)
    num_epochs: float | None = _known(int, float)
    seed: int | None = _known(int)
    hyperparameters: Mapping[str, Any] | None = _known(dict)
    metrics: Mapping[str, float] | None = _known(dict)
    online: bool | None = _known(bool)

    def __post_init__(self) -> None:
        _one_of(SIGNALS, self.signal, "signal")
        _one_of(COMPLETIONS, self.completions, "completions")


@dataclass(frozen=True, kw_only=True)
class PairFacts(_Record):
    """What decides which engines can run a pair. Serving commands appear on a card only where these are known.

    Args:
        draft_vocab_size, target_vocab_size: Rows of the output layers, padding included.
        same_special_ids: Whether bos, eos and pad ids agree in both configs.
        draft_parameters, target_parameters: Sizes, padding included.
        tokenizer_fingerprint: As `hf_draftkd.models.pairing.tokenizer_fingerprint` computes it.
        has_chat_template: Whether the tokenizer carries one.
        num_assistant_tokens: The draft length stored in the draft's generation config, if it was tuned.
    """

    draft_vocab_size: int | None = _known(int)
    target_vocab_size: int | None = _known(int)
    same_special_ids: bool | None = _known(bool)
    draft_parameters: int | None = _known(int)
    target_parameters: int | None = _known(int)
    tokenizer_fingerprint: str | None = _known(str)
    has_chat_template: bool | None = _known(bool)
    num_assistant_tokens: int | None = _known(int)

    @classmethod
    def from_configs(
        cls,
        draft_config: PreTrainedConfig,
        target_config: PreTrainedConfig,
        *,
        draft_generation_config: GenerationConfig | None = None,
        **facts: Any,
    ) -> Self:
        """Read the facts off two configs; further ones (sizes, fingerprint) are passed by name."""
        draft, target = draft_config.get_text_config(), target_config.get_text_config()
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        tuned = None
        # transformers reads the length from the draft's generation config and applies it as it stands only with a
        # constant schedule and without a confidence threshold; anything else is not a tuned length.
        generation = draft_generation_config
        if (
            generation is not None
            and generation.num_assistant_tokens_schedule == "constant"
            and generation.assistant_confidence_threshold == 0
        ):
            tuned = generation.num_assistant_tokens
        return cls(
            draft_vocab_size=draft.vocab_size,
            target_vocab_size=target.vocab_size,
            same_special_ids=all(getattr(draft, name, None) == getattr(target, name, None) for name in special),
            num_assistant_tokens=tuned,
            **facts,
        )


@dataclass(frozen=True, kw_only=True)
class Provenance(_Record):
    """Where the files of a draft come from; stored beside them as `provenance.json`.

    Args:
        command: The command line or script that made the draft, without tokens or passwords.
        created: ISO date and time.
        versions: Package name to version; `commit`: of the code, when it ran from a git checkout.
        hardware: What it ran on, in words.
        weights_sha256: `weights_checksum` of the folder's weights: ties a report to them.
        training, pair: See there.
        notes: Sentences that the card must carry (a mismatch that was allowed, for instance).
    """

    command: str | None = _known(str)
    created: str | None = _known(str)
    versions: Mapping[str, str] | None = _known(dict)
    commit: str | None = _known(str)
    hardware: str | None = _known(str)
    weights_sha256: str | None = _known(str)
    training: TrainingSummary | None = None
    pair: PairFacts | None = None
    notes: list[str] | None = _known(list, tuple)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises: ValueError: a key is unknown or a value has the wrong type."""
        nested = {"training": TrainingSummary, "pair": PairFacts}
        built = super().from_dict({name: value for name, value in data.items() if name not in nested})
        parts = {name: kind.from_dict(data[name]) for name, kind in nested.items() if name in data}
        return dataclasses.replace(built, **parts)

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `provenance.json` into a folder, whole or not at all."""
        return write_text(
            Path(folder) / PROVENANCE_FILE, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        )

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Self | None:
        """Read `provenance.json` of a folder; None where there is none.

        Raises:
            ValueError: The file is too large, no JSON, or of another shape.
        """
        path = Path(folder) / PROVENANCE_FILE
        return cls.from_dict(read_json(path)) if path.is_file() else None


def read_json(path: str | os.PathLike, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Parse a JSON file that may come from a stranger.

    Raises:
        ValueError: The file is larger than `max_bytes`, not UTF-8, not JSON, or nested beyond reason.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path.name} has {size:,} bytes; more than {max_bytes:,} are not read. Is it the right file?")
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not valid JSON: {error}.") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def write_text(path: Path, content: str) -> Path:
    """Write a file under a temporary name and rename it, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(content, encoding="utf-8", newline="")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
