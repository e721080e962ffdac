"""The target that answers, on this machine or behind a server."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Features
from huggingface_hub.errors import HTTPError
from transformers import (
    AutoConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from hf_draftkd.data.backends import Backend, continuous_backend, helping_length, local_backend
from hf_draftkd.data.config import AlignmentDataConfig
from hf_draftkd.data.endpoint import endpoint_backend, without_login
from hf_draftkd.data.messages import turn_end_id
from hf_draftkd.data.target_cache import num_rows, real_vocab_size
from hf_draftkd.decoding.setting import end_token_ids
from hf_draftkd.models.identity import ModelIdentity, identity_of, weights_fingerprint
from hf_draftkd.models.pairing import context_length
from hf_draftkd.models.resolve import is_hub_id
from hf_draftkd.models.tokenizers import listed_ids, tokenizer_size

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Target:
    """The target that answers, wherever it runs.

    `author` is what its rows say of it, `identity` what the manifest says, and `brought` are the columns that its
    completions bring along.
    """

    backend: Backend
    author: ModelIdentity
    identity: dict[str, Any]
    brought: Features | None = None


def local_target(
    target_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: AlignmentDataConfig,
    continuous_batching_config: ContinuousBatchingConfig | None,
    turn_end: int | None,
    draft_model: PreTrainedModel | None,
) -> Target:
    """A target on this machine, which a draft may help.

    `turn_end` is an id that ends its texts, beside those of its generation config.
    """
    name, suppressed = target_model.name_or_path, ids_without_token(target_model, tokenizer)
    how: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size}
    how |= {"suppress_tokens": suppressed, "turn_end": turn_end}
    brought = None
    if config.cache is not None:
        vocab_size = real_vocab_size(target_model, tokenizer)
        how["cache"] = config.cache.within(vocab_size), vocab_size
        brought = config.cache.features(vocab_size)
    if config.continuous_batching:
        backend = continuous_backend(target_model, config=continuous_batching_config, **how)
    else:
        backend = local_backend(target_model, tokenizer, draft_model=draft_model, **how)
    author = identity_of(target_model)
    identity = {
        "target": name,
        "target_revision": author.revision,
        # Quantised weights have one too: a run goes on with the very target that it was begun with.
        "target_weights": author.weights or weights_fingerprint(target_model),
        "target_dtype": str(target_model.dtype),
        "backend": "continuous batching" if config.continuous_batching else "generate",
        "suppressed_tokens": suppressed,
    }
    if turn_end is not None:
        identity["turn_end"] = turn_end
    if draft_model is not None:  # the rows are the target's, but which ones are sampled depends on the draft
        identity["draft"] = {
            "draft": draft_model.name_or_path,
            "draft_weights": weights_fingerprint(draft_model),
            "num_assistant_tokens": helping_length(draft_model),
        }
    if is_hub_id(name) and Path(name).is_dir():
        identity["target_is_local"] = True  # or a card, written elsewhere, would take it for an id on the Hub
    return Target(backend, author, identity, brought)


def missing_turn_end(
    target_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, is_text: bool, wanted: bool
) -> int | None:
    """The end of turn at which answers are to stop, beside the target's own end tokens; usually None.

    Where that is not `wanted`, and answers to messages would run on, it is warned of. A `ValueError` if it is wanted,
    and prompts are text, without turns, or the template ends its turns with no special token.
    """
    if is_text:
        if wanted:
            raise ValueError("`stop_at_turn_end` would do nothing: the prompts are text, without turns. Leave it out.")
        return None
    turn_end, own = turn_end_id(tokenizer), end_token_ids(target_model)
    if turn_end is None:
        if wanted:
            raise ValueError(
                "`stop_at_turn_end=True`, but no special token follows an answer in the chat template. Leave it out."
            )
        return None
    if turn_end in own:
        return None
    if wanted:
        return turn_end
    logger.warning(
        "The chat template ends a turn with %r (id %d), but the target's `generation_config.eos_token_id` is %s: its "
        "answers may run on behind the end of turn. Stop there with `stop_at_turn_end=True`, or add the id to the "
        "target's generation config if its users stop there too.",
        *(tokenizer.convert_ids_to_tokens(turn_end), turn_end, sorted(own) or None),
    )
    return None


def remote_target(
    name: str, tokenizer: PreTrainedTokenizerBase, config: AlignmentDataConfig, options: dict[str, Any] | None
) -> Target:
    """A target behind a server, which is asked for a few tokens to see that it answers."""
    options = {"end_ids": served_end_ids(tokenizer), **(options or {})}
    backend = endpoint_backend(config, name, tokenizer, **options)
    url, _ = without_login(str(config.endpoint))
    identity = {"target": name, "target_revision": None, "backend": "endpoint", "endpoint": url}
    if extra := options.get("extra_body"):  # may steer the sampling
        identity["extra_body"] = extra
    features = config.cache.features(tokenizer_size(tokenizer)) if config.cache else None
    return Target(backend, ModelIdentity(name), identity, features)


def served_context(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The longest text of a target behind a server, in tokens, as far as a config beside its tokenizer says."""
    config = _read(AutoConfig, tokenizer)
    return None if config is None else context_length(config)


def served_end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a text of a target behind a server, as far as the files beside its tokenizer say."""
    for kind in (GenerationConfig, AutoConfig):
        if ids := listed_ids(getattr(_read(kind, tokenizer), "eos_token_id", None)):
            return ids
    return []


def _read(kind: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    # A server's name for a model may be anybody's on the Hub; where the tokenizer came from, the user said.
    try:
        return kind.from_pretrained(tokenizer.name_or_path)
    except (OSError, ValueError, HTTPError):  # not there, not readable without custom code, or no network
        return None


def ids_without_token(target_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Rows of a padded vocabulary that stand for no token, and what the target suppresses itself; None if none."""
    own = target_model.generation_config.suppress_tokens or []
    ids = sorted({*own, *range(tokenizer_size(tokenizer), num_rows(target_model))})
    return ids or None
