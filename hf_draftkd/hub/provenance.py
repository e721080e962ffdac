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

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.schema import from_plain, optional, read_json, to_plain
from hf_draftkd.hub.access import redacted
from hf_draftkd.hub.llama_cpp import conversion_facts
from hf_draftkd.hub.public_names import public_name, without_paths
from hf_draftkd.models.draft_length import recorded_vocabulary
from hf_draftkd.models.parallel import parallel_draft
from hf_draftkd.models.tokenizers import SPECIAL_IDS, tokenizer_fingerprint
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
    """How a draft came to be; a `ValueError` for an unknown `signal` or `completions`."""

    target: str | None = optional("The model it was aligned with: Hub id or path.")
    target_is_local: bool | None = optional("Whether `target` was a folder where it was trained.")
    target_revision: str | None = optional("The target's commit.")
    draft: str | None = optional("Where the draft's weights started: Hub id or path.")
    draft_is_local: bool | None = optional("Whether `draft` was a folder where it was trained.")
    draft_revision: str | None = optional("Its commit.")
    built_from: str | None = optional("How a new draft was made, in words: `layers 0 and 7 of the target`.")
    signal: str | None = optional("What was learned from: `white_box`, `cached` or `black_box`.")
    divergence: str | None = optional("Name of the loss as in `hf_draftkd.losses`.")
    divergence_options: dict[str, Any] | None = optional("Its options: `beta`, `eta`, ...")
    loss_temperature: float | None = optional("Loss temperature (not a sampling temperature).")
    completions: str | None = optional(
        "Who wrote the completions: `data`, `target`, `draft`, `mixed` or `data_and_draft`."
    )
    lmbda: float | None = optional("Fraction of batches whose completions the draft wrote.")
    skd_top_k: int | None = optional(
        "SKD's k: drafted tokens outside the target's k likeliest were replaced by the target's own."
    )
    dataset: str | None = optional("Training data: Hub id or path.")
    dataset_is_local: bool | None = optional("Whether `dataset` was a file or folder there.")
    dataset_revision: str | None = optional("Its commit.")
    scenarios: list[str] | None = optional("`queries`, `curated`, `synthetic`.")
    num_rows: int | None = optional("Rows of training data.")
    num_mixed_rows: int | None = optional("Rows of other text that were mixed in.")
    num_tokens: int | None = optional("Completion tokens of training data.")
    sampling: list[DecodingSetting] | None = optional("Decoding settings under which the data was written.")
    peft: str | None = optional("The adapter that was trained and merged, in words: `LoRA, rank 16`.")
    num_steps: int | None = optional("Optimiser steps.")
    num_epochs: float | None = optional("Passes over the data.")
    seed: int | None = optional("Random seed.")
    hyperparameters: dict[str, Any] | None = optional("Training arguments that differ from their defaults.")
    metrics: dict[str, float] | None = optional("The last `trainer.evaluate()`; shown as measured in training.")
    online: bool | None = optional("Whether the draft learned from served traffic.")

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

    draft_vocab_size: int | None = optional("Rows of the draft's output layer, padding included.")
    target_vocab_size: int | None = optional("Rows of the target's.")
    same_special_ids: bool | None = optional("Whether bos, eos and pad ids agree in both configs.")
    draft_parameters: int | None = optional("Parameters of the draft.")
    target_parameters: int | None = optional("Parameters of the target.")
    tokenizer_fingerprint: str | None = optional("As `hf_draftkd.models.tokenizers.tokenizer_fingerprint` gives it.")
    has_chat_template: bool | None = optional("Whether the tokenizer carries a chat template.")
    llama_cpp_converts: bool | None = optional(
        "Whether llama.cpp's converter knows the tokenizer; absent where only trying it tells."
    )
    llama_cpp_pre_tokenizer: str | None = optional(
        "llama.cpp's name for how a tokenizer that its converter does not know splits text, where it has one."
    )
    num_assistant_tokens: int | None = optional("Draft length in the draft's generation config, if tuned.")
    draft_vocabulary_size: int | None = optional(
        "Ids in the `draft_vocabulary` of the draft's generation config, if there is one."
    )
    parallel_tokens: int | None = optional(
        "Tokens that the draft was trained to predict in one pass; absent for an ordinary draft."
    )

    @classmethod
    def from_configs(
        cls,
        draft_config: PreTrainedConfig,
        target_config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        draft_generation_config: GenerationConfig | None = None,
        draft_parameters: int | None = None,
        target_parameters: int | None = None,
    ) -> Self:
        """Read the facts off two configs and the tokenizer they share; numbers of parameters are the caller's."""
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
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            has_chat_template=bool(tokenizer.chat_template),
            draft_parameters=draft_parameters,
            target_parameters=target_parameters,
            **conversion_facts(tokenizer),
        )


def tuned_length(config: GenerationConfig | None) -> int | None:
    """The draft length that a generation config fixes; None where transformers would change it while decoding."""
    if config is None or config.num_assistant_tokens_schedule != "constant":
        return None
    return config.num_assistant_tokens if config.assistant_confidence_threshold == 0 else None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where the files of a draft come from; stored beside them as `provenance.json`."""

    command: str | None = optional("Command line or script that made the draft, without secrets.")
    created: str | None = optional("ISO date and time.")
    versions: dict[str, str] | None = optional("Package to version.")
    commit: str | None = optional("Commit of the code, when it ran from a git checkout.")
    hardware: str | None = optional("What it was trained on, in words.")
    weights_sha256: str | None = optional("`weights_checksum` of the folder: ties a report to the weights.")
    training: TrainingSummary | None = optional("How the draft was trained.")
    pair: PairFacts | None = optional("How the draft fits its target.")
    notes: list[str] | None = optional("Sentences that the card must carry.")

    def to_json(self) -> str:
        """JSON text without absent fields."""
        return json.dumps(to_plain(self), indent=2, ensure_ascii=False) + "\n"

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `provenance.json` into a folder, whole or not at all."""
        return write_text(Path(folder) / PROVENANCE_FILE, self.to_json())

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Self | None:
        """Read `provenance.json` of a folder; None where there is none, a `ValueError` where it is not one."""
        path = Path(folder) / PROVENANCE_FILE
        if not path.is_file():
            return None
        return from_plain(cls, read_json(path.read_bytes(), str(path)), PROVENANCE_FILE)

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
