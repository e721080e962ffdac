"""Is there a causal language model under this name? Answered from file names and the config, before any weight is read.

    check_model("org/name")     # returns the config, or raises a ValueError that says what is wrong and what to do

Every fault that can be seen without the weights is found here, so that a long run never starts with a bad name.
"""

import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache

# HTTPError is that of huggingface_hub's own HTTP client, which has changed its package before.
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_SAFE_WEIGHTS_NAME = "adapter_model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
_HUB_TIMEOUT_SECONDS = 10
# All that is asked about a repository that can only be seen through the local cache.
_FILES_OF_INTEREST = (
    CONFIG_NAME,
    SAFE_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    *TOKENIZER_FILES,
)


@dataclass(frozen=True)
class Checkpoint:
    """Where a model lies, and the names of the files there.

    Args:
        name: Local directory or Hub id.
        revision: Branch, tag or commit on the Hub; None for a local directory and for the Hub's default branch.
        files: File names at the top level.
        is_local: Whether `name` is a directory on this machine.
    """

    name: str
    revision: str | None
    files: frozenset[str]
    is_local: bool

    @property
    def has_weights(self) -> bool:
        return bool(self.files & {SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME})

    @property
    def is_adapter(self) -> bool:
        return ADAPTER_CONFIG_NAME in self.files and not self.has_weights


def find_checkpoint(name_or_path: Any, revision: str | None = None) -> Checkpoint:
    """Find a local directory or a Hub repository and list its files.

    Args:
        name_or_path: Local directory, Hub id, or any object with `repo_id` and `revision` (as `find_drafts` returns).
        revision: Branch, tag or commit on the Hub; wins over the object's own.

    Raises:
        ValueError: Nothing is there, or the Hub cannot say and the local cache has nothing.
    """
    if hasattr(name_or_path, "repo_id"):
        revision = revision or getattr(name_or_path, "revision", None)
        name_or_path = name_or_path.repo_id
    if not isinstance(name_or_path, str | os.PathLike):
        raise ValueError(
            f"A model is named by a local directory or a Hub id, got {type(name_or_path).__name__}. A model that is "
            "already loaded needs no loading: pass it where the model itself is wanted."
        )
    name = os.fspath(name_or_path)
    if not name.strip():  # which the operating system takes for the working directory
        raise ValueError(f"A model needs a name, got {name!r}. Give a local directory or a Hub id.")
    path = Path(name).expanduser()
    if path.is_dir():
        # "main" is what launchers pass when the user said nothing.
        if revision not in (None, "main"):
            raise ValueError(
                f"revision={revision!r} was given for {name!r}, which is a local directory and has no revisions. Leave "
                "the revision out, or give the Hub id."
            )
        return Checkpoint(str(path), None, frozenset(os.listdir(path)), is_local=True)
    if path.is_file():
        raise ValueError(f"{name!r} is a file; a model is a directory with {CONFIG_NAME} and safetensors. Give that.")
    if isinstance(name_or_path, os.PathLike) or _looks_like_a_path(name):
        raise ValueError(f"There is no directory {name!r}.{_similar_directory(path)}")
    return Checkpoint(name, revision, _list_hub_files(name, revision, path), is_local=False)


def check_model(name_or_path: Any, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Make sure that a causal LM with safetensors weights is there; reads the config, never a weight.

    Args:
        name_or_path: As in `find_checkpoint`. For a PEFT adapter its base model is checked too.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The model's config (of the base model where an adapter was named).

    Raises:
        ValueError: No model there, weights only as pickle, or not a decoder-only language model.
    """
    return check_checkpoint(find_checkpoint(name_or_path, revision), trust_remote_code=trust_remote_code)


def check_checkpoint(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """`check_model` for a checkpoint that has been found."""
    _check_files(checkpoint)
    if checkpoint.is_adapter:
        base, base_revision = adapter_base(checkpoint)
        try:
            return check_model(base, revision=base_revision, trust_remote_code=trust_remote_code)
        except ValueError as error:
            raise ValueError(
                f"{checkpoint.name!r} is a PEFT adapter, and its base model cannot be used: {error} Correct "
                f"`base_model_name_or_path` in its {ADAPTER_CONFIG_NAME}, or merge it where the base is at hand."
            ) from error
    try:
        config = AutoConfig.from_pretrained(
            checkpoint.name, revision=checkpoint.revision, trust_remote_code=trust_remote_code
        )
    except (OSError, json.JSONDecodeError, StrictDataclassError) as error:
        raise ValueError(f"The {CONFIG_NAME} of {checkpoint.name!r} cannot be read: {error}") from error
    check_config(config, checkpoint.name)
    _check_index(checkpoint)
    _check_generation_config(checkpoint)
    return config


def _check_index(checkpoint: Checkpoint) -> None:
    """Refuse shards that are no safetensors: transformers reads whatever file the index names, pickles too."""
    if SAFE_WEIGHTS_NAME in checkpoint.files or SAFE_WEIGHTS_INDEX_NAME not in checkpoint.files:
        return
    try:
        index = cached_file(checkpoint.name, SAFE_WEIGHTS_INDEX_NAME, revision=checkpoint.revision)
        shards = set(json.loads(Path(str(index)).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # one that cannot be read is refused when the weights are
    other = sorted(str(shard) for shard in shards if not str(shard).endswith(".safetensors"))
    if other:
        raise ValueError(
            f"The {SAFE_WEIGHTS_INDEX_NAME} of {checkpoint.name!r} names {other[0]!r}, which is no safetensors file. "
            "Only those are read, since a pickle can run code: save the model again, where you trust it."
        )


def _check_generation_config(checkpoint: Checkpoint) -> None:
    """A broken one is passed over by transformers, and with it the ids that end a chat model's answer."""
    path = Path(checkpoint.name) / GENERATION_CONFIG_NAME
    if checkpoint.is_local and path.is_file():
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path} is not valid JSON: {error}. Save it again, or delete it to do without."
            ) from error


def check_config(config: PreTrainedConfig, name: str) -> None:
    """Refuse a config that is not a decoder-only language model's.

    Raises:
        ValueError: Encoder-decoder, vision or audio model, a classifier, or a model whose state cannot be rolled back.
    """
    instead = "Speculative decoding needs two decoder-only causal language models: choose one."
    kind = f"{name!r} (model type {config.model_type!r})"
    if config.is_encoder_decoder:
        raise ValueError(f"{kind} is an encoder-decoder model. {instead}")
    modality = next((m for m in ("vision", "audio") if getattr(config, f"{m}_config", None) is not None), None)
    if modality:
        raise ValueError(
            f"{kind} is a model with {modality} input. {instead} If it has a text model of its own, save that alone "
            "and give its directory."
        )
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return  # The model brings its own code, and trust_remote_code was given or the config would not have loaded.
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{kind} is not a language model. {instead}")
    causal = {c for classes in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for c in _as_tuple(classes)}
    # A bare "...Model" is let through: with tied weights it is complete, and loading finds out where it is not.
    other = [name for name in config.architectures or [] if name not in causal and not name.endswith("Model")]
    if other:
        raise ValueError(f"{kind} was saved as {other[0]}, which has no language-modelling head. {instead}")
    if any(getattr(c, "_is_stateful", False) for c in _as_tuple(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])):
        raise ValueError(
            f"{kind} keeps a running state that cannot be taken back when a drafted token is rejected, so transformers "
            "does not decode with it speculatively. Choose a model with an ordinary key-value cache."
        )


def adapter_base(checkpoint: Checkpoint) -> tuple[str, str | None]:
    """The base model an adapter was trained on, and that base's revision.

    Raises:
        ValueError: The adapter does not say, its config cannot be read, or it is of a kind that cannot become part of
            the base's weights.
    """
    from peft import PeftConfig, PromptLearningConfig

    try:
        config = PeftConfig.from_pretrained(checkpoint.name, revision=checkpoint.revision)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"The {ADAPTER_CONFIG_NAME} of {checkpoint.name!r} cannot be read ({type(error).__name__}: {error}). Save "
            "the adapter again, or update peft if a newer one wrote it."
        ) from error
    if isinstance(config, PromptLearningConfig):
        raise ValueError(
            f"{checkpoint.name!r} is a {config.peft_type.value} adapter, which cannot be merged into a plain model. "
            "Use LoRA or another adapter of weights."
        )
    if not config.base_model_name_or_path:
        raise ValueError(
            f"{checkpoint.name!r} is a PEFT adapter that does not name its base model. Add `base_model_name_or_path` "
            f"to its {ADAPTER_CONFIG_NAME}, or merge it yourself and save the merged model."
        )
    return config.base_model_name_or_path, config.revision


def _check_files(checkpoint: Checkpoint) -> None:
    name, files = checkpoint.name, checkpoint.files
    if ADAPTER_CONFIG_NAME in files and checkpoint.has_weights:
        raise ValueError(
            f"{name!r} holds both a whole model and a PEFT adapter, and whether the adapter is already part of the "
            f"weights cannot be told. Remove {ADAPTER_CONFIG_NAME} and the adapter's weights if it is, or "
            f"{SAFE_WEIGHTS_NAME} if the adapter is what you want."
        )
    pickled = sorted(f for f in files if f.endswith((".bin", ".pt", ".pth", ".ckpt")) and "model" in f)
    if checkpoint.is_adapter:
        if ADAPTER_SAFE_WEIGHTS_NAME not in files:
            found = f"only {pickled[0]}, a pickle, which can run code when it is read" if pickled else "no weights"
            raise ValueError(f"{name!r} is a PEFT adapter with {found}; {ADAPTER_SAFE_WEIGHTS_NAME} is needed.")
        return
    if CONFIG_NAME not in files:
        gguf = any(f.endswith(".gguf") for f in files)
        held = "GGUF files" if gguf else _preview(files)
        raise ValueError(
            f"{name!r} is not a model: it has no {CONFIG_NAME} (it holds {held}). Give the directory that "
            "`save_pretrained` wrote" + (", or the repository the GGUF files were made from." if gguf else ".")
        )
    if not checkpoint.has_weights:
        if pickled:
            raise ValueError(
                f"{name!r} has its weights only as pickle ({pickled[0]}), which can run code when it is read, so it "
                "is not. Convert it once, where you trust it: `from_pretrained(name).save_pretrained(directory)` of "
                "transformers' AutoModelForCausalLM, or with the Space huggingface.co/spaces/safetensors/convert."
            )
        raise ValueError(
            f"{name!r} has a {CONFIG_NAME} but no weights: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. "
            "Give a directory that `save_pretrained` of a whole model wrote."
        )


def _list_hub_files(repo_id: str, revision: str | None, path: Path) -> frozenset[str]:
    here = f"There is no directory {repo_id!r}{_similar_directory(path, ' (did you mean {!r}?)')}, and "
    try:
        # Not `list_repo_files`, which tries five times over half a minute where there is no network.
        siblings = HfApi().model_info(repo_id, revision=revision, timeout=_HUB_TIMEOUT_SECONDS).siblings
        return frozenset(sibling.rfilename for sibling in siblings or [])
    except HFValidationError as error:
        raise ValueError(f"{here}it is not a Hub id either: {error}") from error
    except GatedRepoError as error:
        raise ValueError(
            f"{repo_id!r} is gated: ask for access at https://huggingface.co/{repo_id}, then `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{here}the Hub has no repository of that name, or it is private. Check the spelling, or `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(
            f"{repo_id!r} has no revision {revision!r}. Leave it out, or take one from "
            f"https://huggingface.co/{repo_id}/commits/main."
        ) from error
    except (OSError, HTTPError) as error:  # no network, offline mode, a proxy's 403, the Hub's 5xx
        cached = frozenset(f for f in _FILES_OF_INTEREST if _is_cached(repo_id, f, revision))
        if not cached:
            raise ValueError(
                f"{here}the Hub cannot be asked ({type(error).__name__}: {_first_line(error)}); the local cache "
                "does not hold it. Check the spelling and the connection, or give a local directory."
            ) from error
        return cached


def _is_cached(repo_id: str, filename: str, revision: str | None) -> bool:
    return isinstance(try_to_load_from_cache(repo_id, filename, revision=revision), str)


def _looks_like_a_path(name: str) -> bool:
    return (
        name.startswith(("/", "./", "../", "~", ".\\", "..\\")) or "\\" in name or name.count("/") > 1 or name == ".."
    )


def _similar_directory(path: Path, form: str = " Did you mean {!r}?") -> str:
    parent = path.parent
    siblings = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return form.format(str(parent / near[0])) if near else ""


def _preview(files: frozenset[str]) -> str:
    shown = sorted(files)[:4]
    return ", ".join(shown) + (", ..." if len(files) > 4 else "") if shown else "nothing"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
