"""The target that answers, wherever it runs: its backend, what the manifest says of it, and what it brings along."""

from collections.abc import Sequence
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

from hf_draftkd.data.backends import Backend, continuous_backend, pipeline_backend
from hf_draftkd.data.endpoint import endpoint_backend, endpoint_logprobs, without_login
from hf_draftkd.data.fingerprints import weights_fingerprint
from hf_draftkd.data.target_cache import (
    CacheRows,
    cache_features,
    check_cache_options,
    distribution_cache,
    real_vocab_size,
)
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.models.context import context_length
from hf_draftkd.models.identity import model_revision, resolved_revision
from hf_draftkd.models.tokenizers import tokenizer_size


@dataclass(frozen=True)
class Answering:
    """Who answers: the backend, what the manifest says of it, and the columns that come on top of the answers."""

    backend: Backend
    identity: dict[str, Any]
    brought: Features | None = None  # columns that the completions bring along
    cache: tuple[CacheRows, Features] | None = None  # columns computed from the finished rows


def local_target(
    target_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    batch_size: int,
    continuous_batching: "bool | ContinuousBatchingConfig",
    cache_options: dict[str, Any] | None,
    revision: str | None,
) -> Answering:
    """A target on this machine."""
    suppressed = ids_without_token(target_model, tokenizer)
    if continuous_batching:
        backend = continuous_backend(
            target_model,
            max_new_tokens=max_new_tokens,
            suppress_tokens=suppressed,
            config=None if continuous_batching is True else continuous_batching,
        )
    else:
        backend = pipeline_backend(
            target_model, tokenizer, max_new_tokens=max_new_tokens, batch_size=batch_size, suppress_tokens=suppressed
        )
    identity = {
        "target": target_model.name_or_path,
        "target_revision": (
            resolved_revision(target_model.name_or_path, revision) if revision else model_revision(target_model)
        ),
        "target_weights": weights_fingerprint(target_model),
        "target_dtype": str(target_model.dtype),
        "backend": "continuous batching" if continuous_batching else "pipeline",
        "suppressed_tokens": suppressed,
    }
    cache = None if cache_options is None else _prepare_cache(target_model, tokenizer, cache_options)
    return Answering(backend, identity, cache=cache)


def remote_target(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    endpoint: str,
    max_new_tokens: int,
    settings: Sequence[DecodingSetting],
    cache_options: dict[str, Any] | None,
    options: dict[str, Any] | None,
) -> Answering:
    """A target behind a server, which is asked for a few tokens to see that it answers."""
    top_logprobs = endpoint_logprobs(cache_options)
    backend = endpoint_backend(
        endpoint,
        name,
        tokenizer,
        max_new_tokens=max_new_tokens,
        settings=settings,
        top_logprobs=top_logprobs,
        **{"end_ids": served_end_ids(name, tokenizer), **(options or {})},
    )
    brought = None if top_logprobs is None else cache_features(tokenizer_size(tokenizer), None, "float16")
    identity = {"target": name, "target_revision": None, "backend": "endpoint", "endpoint": without_login(endpoint)[0]}
    if extra := (options or {}).get("extra_body"):  # may steer the sampling
        identity["extra_body"] = extra
    return Answering(backend, identity, brought=brought)


def served_context(name: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The longest text of a target behind a server, in tokens, as far as a config beside its tokenizer says."""
    for place in _places(name, tokenizer):
        config = _read(AutoConfig, place)
        if config is not None and (context := context_length(config)) is not None:
            return context
    return None


def served_end_ids(name: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a text of a target behind a server, as far as the files beside its tokenizer say."""
    for place in _places(name, tokenizer):
        for config in (GenerationConfig, AutoConfig):
            ids = getattr(_read(config, place), "eos_token_id", None)
            if ids is not None:
                return [ids] if isinstance(ids, int) else list(ids)
    return []


def _places(name: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    # A server's name for a model may be anybody's on the Hub; where the tokenizer came from, the user said.
    return [*([name] if Path(name).is_dir() else []), *filter(None, [tokenizer.name_or_path])]


def _read(kind: Any, place: str) -> Any:
    try:
        return kind.from_pretrained(place)
    except (OSError, ValueError, HTTPError):  # not there, not readable without code of its own, or no network
        return None


def _prepare_cache(
    target_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> tuple[CacheRows, Features]:
    options = {"top_k": None, "sampled": None, "loss_temperature": 1.0, "dtype": "float16", **options}
    known = {"top_k", "sampled", "loss_temperature", "dtype", "seed"}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"`cache_distributions` does not know {unknown[0]!r}; it takes {', '.join(sorted(known))}.")
    vocab_size = real_vocab_size(target_model, tokenizer)
    dtype = options.pop("dtype")
    options["top_k"] = check_cache_options(
        options["top_k"], options["sampled"], options["loss_temperature"], dtype, vocab_size
    )
    features = cache_features(vocab_size, options["sampled"], dtype)
    return distribution_cache(target_model, vocab_size=vocab_size, **options), features


def ids_without_token(target_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Rows of a padded vocabulary that stand for no token, and what the target suppresses itself; None if none."""
    vocab_size = target_model.get_output_embeddings().weight.shape[0]
    own = target_model.generation_config.suppress_tokens or []
    ids = sorted({*own, *range(tokenizer_size(tokenizer), vocab_size)})
    return ids or None
