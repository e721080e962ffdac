"""What a card says beyond the report: how a draft was trained, how the pair fits, where the files come from.

Plain data. Every field is optional and absent where it is not known: a card never guesses. `Provenance` is stored
beside the weights as `provenance.json`, so that a draft can be published long after, and far from, its training.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from transformers import GenerationConfig, PreTrainedConfig

from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.schema import from_plain, key, to_plain
from hf_draftkd.hub.access import redacted
from hf_draftkd.hub.public_names import public_name, without_paths
from hf_draftkd.models.draft_length import recorded_vocabulary
from hf_draftkd.models.parallel import parallel_draft
from hf_draftkd.models.tokenizers import SPECIAL_IDS
from hf_draftkd.utils.checks import one_of
from hf_draftkd.utils.files import write_text

PROVENANCE_FILE = "provenance.json"

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
    "data_and_draft": "the data set and the draft, mixed",
}


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """How a draft came to be.

    Raises:
        ValueError: `signal` or `completions` is not a known one.
    """

    target: str | None = key("The model it was aligned with: Hub id or path.", default=None)
    target_is_local: bool | None = key("Whether `target` was a folder where it was trained.", default=None)
    target_revision: str | None = key("The target's commit.", default=None)
    draft: str | None = key("Where the draft's weights started: Hub id or path.", default=None)
    draft_is_local: bool | None = key("Whether `draft` was a folder where it was trained.", default=None)
    draft_revision: str | None = key("Its commit.", default=None)
    built_from: str | None = key("How a new draft was made, in words: `layers 0 and 7 of the target`.", default=None)
    signal: str | None = key("What was learned from: `white_box`, `cached` or `black_box`.", default=None)
    divergence: str | None = key("Name of the loss as in `hf_draftkd.losses`.", default=None)
    divergence_options: dict[str, Any] | None = key("Its options: `beta`, `eta`, ...", default=None)
    loss_temperature: float | None = key("Loss temperature (not a sampling temperature).", default=None)
    completions: str | None = key(
        "Who wrote the completions: `data`, `target`, `draft`, `mixed` or `data_and_draft`.", default=None
    )
    lmbda: float | None = key("Fraction of batches whose completions the draft wrote.", default=None)
    skd_top_k: int | None = key(
        "SKD: tokens of the draft outside the target's so many likeliest were the target's own.", default=None
    )
    dataset: str | None = key("Training data: Hub id or path.", default=None)
    dataset_is_local: bool | None = key("Whether `dataset` was a file or folder there.", default=None)
    dataset_revision: str | None = key("Its commit.", default=None)
    scenarios: list[str] | None = key("`queries`, `curated`, `synthetic`.", default=None)
    num_rows: int | None = key("Rows of training data.", default=None)
    num_mixed_rows: int | None = key("Rows of other text that were mixed in.", default=None)
    num_tokens: int | None = key("Completion tokens of training data.", default=None)
    sampling: list[DecodingSetting] | None = key("Decoding settings under which the data was written.", default=None)
    peft: str | None = key("The adapter that was trained and merged, in words: `LoRA, rank 16`.", default=None)
    num_steps: int | None = key("Optimiser steps.", default=None)
    num_epochs: float | None = key("Passes over the data.", default=None)
    seed: int | None = key("Random seed.", default=None)
    hyperparameters: dict[str, Any] | None = key("Training arguments that differ from their defaults.", default=None)
    metrics: dict[str, float] | None = key(
        "The last `trainer.evaluate()`; shown as measured in training.", default=None
    )
    online: bool | None = key("Whether the draft learned from served traffic.", default=None)

    def __post_init__(self) -> None:
        if self.signal is not None:
            one_of("`signal`", self.signal, SIGNALS)
        if self.completions is not None:
            one_of("`completions`", self.completions, COMPLETIONS)

    def public_name(self, which: str) -> str | None:
        """The `target`, `draft` or `dataset` as a stranger may read it; None where it is not known."""
        name = getattr(self, which)
        # What was recorded decides, not whether a path of that name exists where the card is written.
        return public_name(name, getattr(self, f"{which}_is_local")) if name else None


@dataclass(frozen=True, kw_only=True)
class PairFacts:
    """What decides which engines can run a pair. Serving commands appear on a card only where these are known."""

    draft_vocab_size: int | None = key("Rows of the draft's output layer, padding included.", default=None)
    target_vocab_size: int | None = key("Rows of the target's.", default=None)
    same_special_ids: bool | None = key("Whether bos, eos and pad ids agree in both configs.", default=None)
    draft_parameters: int | None = key("Parameters of the draft.", default=None)
    target_parameters: int | None = key("Parameters of the target.", default=None)
    tokenizer_fingerprint: str | None = key("As `hf_draftkd.models.tokenizer_fingerprint` gives it.", default=None)
    has_chat_template: bool | None = key("Whether the tokenizer carries a chat template.", default=None)
    num_assistant_tokens: int | None = key("Draft length in the draft's generation config, if tuned.", default=None)
    draft_vocabulary_size: int | None = key(
        "Ids in the `draft_vocabulary` of the draft's generation config, if there is one.", default=None
    )
    parallel_tokens: int | None = key(
        "Tokens that the draft was trained to predict in one pass; absent for an ordinary draft.", default=None
    )

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
        listed = recorded_vocabulary(draft_generation_config) if draft_generation_config else None
        at_once = parallel_draft(draft_config)
        return cls(
            draft_vocab_size=draft.vocab_size,
            target_vocab_size=target.vocab_size,
            same_special_ids=all(getattr(draft, name, None) == getattr(target, name, None) for name in SPECIAL_IDS),
            num_assistant_tokens=tuned_length(draft_generation_config),
            draft_vocabulary_size=len(listed) if listed else None,
            parallel_tokens=at_once.num_tokens if at_once else None,
            **facts,
        )


def tuned_length(config: GenerationConfig | None) -> int | None:
    """The draft length that a generation config fixes; None where transformers would change it while decoding."""
    if config is None or config.num_assistant_tokens_schedule != "constant":
        return None
    return config.num_assistant_tokens if config.assistant_confidence_threshold == 0 else None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where the files of a draft come from; stored beside them as `provenance.json`."""

    command: str | None = key("Command line or script that made the draft, without secrets.", default=None)
    created: str | None = key("ISO date and time.", default=None)
    versions: dict[str, str] | None = key("Package to version.", default=None)
    commit: str | None = key("Commit of the code, when it ran from a git checkout.", default=None)
    hardware: str | None = key("What it was trained on, in words.", default=None)
    weights_sha256: str | None = key("`weights_checksum` of the folder: ties a report to the weights.", default=None)
    training: TrainingSummary | None = key("How the draft was trained.", default=None)
    pair: PairFacts | None = key("How the draft fits its target.", default=None)
    notes: list[str] | None = key("Sentences that the card must carry.", default=None)

    def to_json(self) -> str:
        """JSON text without absent fields."""
        return json.dumps(to_plain(self), indent=2, ensure_ascii=False) + "\n"

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `provenance.json` into a folder, whole or not at all."""
        return write_text(Path(folder) / PROVENANCE_FILE, self.to_json())

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Self | None:
        """Read `provenance.json` of a folder; None where there is none.

        Raises:
            ValueError: The file is not JSON, a key is unknown, or a value has the wrong type.
        """
        path = Path(folder) / PROVENANCE_FILE
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}.") from None
        return from_plain(cls, data, PROVENANCE_FILE)

    def public(self) -> Self:
        """The same as strangers may read it: without paths of this machine and without tokens."""
        training = self.training
        if training is not None:
            names: dict[str, Any] = {which: training.public_name(which) for which in ("target", "draft", "dataset")}
            training = dataclasses.replace(training, **names)
        return dataclasses.replace(
            self,
            command=redacted(without_paths(self.command)) if self.command else None,
            training=training,
            notes=[without_paths(note) for note in self.notes] if self.notes else None,
        )
