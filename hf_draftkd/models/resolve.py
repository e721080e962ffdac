"""Look a checkpoint up once: a local directory or a Hub id becomes a `Checkpoint` that everything else takes.

    checkpoint = resolve("org/name")    # lists its files and pins the commit
    checkpoint.config                   # its config; a ValueError says why this is not a usable causal LM
    checkpoint.tokenizer
    load_target(checkpoint)             # nothing is looked up again

Everything that can be seen without the weights is checked here, so that a long run never starts with a bad name.
"""

import inspect
import json
import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

# HTTPError is that of huggingface_hub's own HTTP client, which has changed its package before.
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING,
)
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)

from hf_draftkd.models.forward import CACHE
from hf_draftkd.models.text_model import is_multimodal, text_class, text_config
from hf_draftkd.utils.checks import nearest

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


@dataclass(frozen=True)
class Checkpoint:
    """A model that was looked up: where its files are and what they are called. Config and tokenizer are read once.

    `name` is a local directory or a Hub id, of which `revision` is the commit; `files` of a directory are those at its
    top level. `trust_remote_code` says whether code that comes with the model may run, and `gguf_file` is the file that
    holds everything, for a model that exists only as GGUF.
    """

    name: str
    revision: str | None
    files: frozenset[str]
    is_local: bool
    trust_remote_code: bool = False
    gguf_file: str | None = None

    def __post_init__(self) -> None:
        if self.gguf_file is not None and self.gguf_file not in self.files:
            found = ", ".join(sorted(file for file in self.files if file.endswith(".gguf"))) or "none"
            raise ValueError(
                f"{self.name!r} has no file {self.gguf_file!r}. Its GGUF files: {found}. Name one of them."
            )

    @property
    def has_weights(self) -> bool:
        return bool(self.files & {SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME})

    @property
    def is_adapter(self) -> bool:
        return ADAPTER_CONFIG_NAME in self.files and not self.has_weights and self.gguf_file is None

    @property
    def is_multimodal(self) -> bool:
        return not self.is_adapter and is_multimodal(self._config)

    @cached_property
    def base(self) -> "Checkpoint":
        """For a PEFT adapter: the model it was trained on, into which it can be merged; else a `ValueError`."""
        config = _adapter_config(self)
        try:
            base = resolve(
                config.base_model_name_or_path, revision=config.revision, trust_remote_code=self.trust_remote_code
            )
            base.config  # noqa: B018 - raises where it is not usable
        except ValueError as error:
            raise ValueError(
                f"{self.name!r} is a PEFT adapter, and its base model cannot be used: {error} Correct "
                f"`base_model_name_or_path` in its {ADAPTER_CONFIG_NAME}, or merge it where the base is at hand."
            ) from error
        return base

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config of this model, of an adapter's base, or of a multimodal model's text part.

        It is read once it is clear that a causal LM can be loaded: a `ValueError` if the weights are missing or only a
        pickle, or this is not a decoder-only language model.
        """
        _check_files(self)
        if self.is_adapter:
            return self.base.config
        config = self._config
        if self.is_multimodal and text_class(config) is not None:
            config = text_config(config, repr(self.name))  # what `load_target` takes out of it
        check_config(config, self.name)
        if self.gguf_file is None:
            _check_quantisation(self._config, self.name)
        if SAFE_WEIGHTS_NAME not in self.files and self.gguf_file is None:
            # transformers reads whatever file the index names, pickles too.
            names = read_index(Path(str(cached_file(self.name, SAFE_WEIGHTS_INDEX_NAME, revision=self.revision))))
            missing = [name for name in names if self.is_local and not (Path(self.name) / name).is_file()]
            if missing:
                raise ValueError(
                    f"{self.name!r} lacks {missing[0]!r}, which its {SAFE_WEIGHTS_INDEX_NAME} names. Copy or "
                    "download the model again."
                )
        # transformers ignores a broken one, and with it the ids that end a chat model's answer.
        if broken := _broken_json(self, GENERATION_CONFIG_NAME):
            raise ValueError(f"{broken}. Save it again, or delete it.")
        return self._config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; of an adapter that was saved without one, that of its base."""
        instead = "Save the target's there: `tokenizer.save_pretrained(directory)`; a draft shares its tokenizer."
        if not self.files & set(TOKENIZER_FILES) and self.gguf_file is None:
            if self.is_adapter:
                return self.base.tokenizer
            raise ValueError(f"{self.name!r} has no tokenizer ({TOKENIZER_FILES[0]} or the like). {instead}")
        config = None
        with suppress(ValueError):  # a broken one is not asked for here
            config = self._config if CONFIG_NAME in self.files else None
        try:
            return AutoTokenizer.from_pretrained(
                self.name,
                config=config,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                # Beside tokenizer files of its own, which are exact, the copy in a GGUF file is not read.
                gguf_file=None if self.files & set(TOKENIZER_FILES) else self.gguf_file,
            )
        except ImportError:  # says which package is missing
            raise
        except Exception as error:  # the tokenizers' own parser raises bare `Exception`
            reason = _broken_json(self, *TOKENIZER_FILES) or str(error).rstrip(".")
            raise ValueError(f"The tokenizer of {self.name!r} cannot be read: {reason}. {instead}") from error

    @cached_property
    def _config(self) -> PreTrainedConfig:
        # Where a GGUF file was cut off, both parsers say only that bytes are missing.
        other = () if self.gguf_file is None else (ValueError, struct.error)
        try:
            return AutoConfig.from_pretrained(
                self.name,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                **({} if self.gguf_file is None else {"gguf_file": self.gguf_file}),
            )
        except (OSError, json.JSONDecodeError, StrictDataclassError, *other) as error:
            raise ValueError(f"The {self.gguf_file or CONFIG_NAME} of {self.name!r} cannot be read: {error}") from error

    def __deepcopy__(self, memo: Any) -> "Checkpoint":
        return self  # a loaded model keeps its checkpoint, and models are copied


def resolve(
    name_or_path: Any, *, revision: str | None = None, trust_remote_code: bool = False, gguf_file: str | None = None
) -> Checkpoint:
    """Find a local directory or a Hub repository, and list its files.

    Args:
        name_or_path: Local directory, Hub id, any object with `repo_id` and `revision` (as `find_drafts` returns), or
            a `Checkpoint`, which is returned as it is.
        revision: Branch, tag or commit on the Hub; wins over the object's own.
        trust_remote_code: Whether code that comes with the model may run.
        gguf_file: Name of the GGUF file among the model's files, where that is to be read.

    Raises:
        ValueError: Nothing is there, or the Hub cannot be asked and the local cache does not hold it.
    """
    if isinstance(name_or_path, Checkpoint):
        for option, given in {"revision": revision, "gguf_file": gguf_file}.items():
            if given not in (None, getattr(name_or_path, option)):
                raise ValueError(f"{name_or_path.name!r} was looked up already: give `{option}` to `resolve`.")
        return name_or_path
    if hasattr(name_or_path, "repo_id"):
        revision = revision or getattr(name_or_path, "revision", None)
        name_or_path = name_or_path.repo_id
    if not isinstance(name_or_path, str | os.PathLike):
        raise ValueError(
            f"A model is named by a local directory or a Hub id, got {type(name_or_path).__name__}. A model that is "
            "already loaded needs no loading: pass it where the model itself is wanted."
        )
    name = os.fspath(name_or_path)
    if not name.strip():  # the operating system takes it for the working directory
        raise ValueError(f"A model needs a name, got {name!r}. Give a local directory or a Hub id.")
    path = Path(name).expanduser()
    if path.is_dir():
        # "main" is what launchers pass when the user said nothing.
        if revision not in (None, "main"):
            raise ValueError(
                f"revision={revision!r} was given for {name!r}, which is a local directory and has no revisions. Leave "
                "the revision out, or give the Hub id."
            )
        return Checkpoint(str(path), None, frozenset(os.listdir(path)), True, trust_remote_code, gguf_file)
    if path.is_file():
        raise ValueError(f"{name!r} is a file; a model is a directory with {CONFIG_NAME} and safetensors. Give that.")
    if isinstance(name_or_path, os.PathLike) or not is_hub_id(name):
        similar = _similar_directory(path, " Did you mean {!r}?")
        raise ValueError(f"There is no directory {name!r}, and it is not a Hub id either.{similar}")
    commit, files = _look_up_on_hub(name, revision, path)
    return Checkpoint(name, commit, frozenset(files), False, trust_remote_code, gguf_file)


def check_config(config: PreTrainedConfig, name: str) -> None:
    """Refuse a config that is not a decoder-only language model's, or of a model from whose cache tokens cannot be
    taken back.
    """
    instead = "Speculative decoding needs two decoder-only causal language models: choose one."
    kind = f"{name!r} (model type {config.model_type!r})"
    if config.is_encoder_decoder:
        raise ValueError(f"{kind} is an encoder-decoder model. {instead}")
    if is_multimodal(config):
        if text_class(config):
            instead += " Its text model alone will do: `extract_text_model(model)`, or `draftkd init --text_of NAME`."
        raise ValueError(f"{kind} is a model with other input than text. {instead}")
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return  # The model brings its own code, and trust_remote_code was given or the config would not have loaded.
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{kind} is not a language model. {instead}")
    causal = {c for classes in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for c in _as_tuple(classes)}
    # A bare "...Model" is let through: with tied weights it is complete, and loading finds out where it is not.
    other = [name for name in config.architectures or [] if name not in causal and not name.endswith("Model")]
    if other:
        raise ValueError(f"{kind} was saved as {other[0]}, which has no language-modelling head. {instead}")
    # (GPT-NeoX has `is_decoder=False`, and is one.)
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING or config.model_type == "bert-generation"
    if is_encoder and not getattr(config, "is_decoder", False):
        raise ValueError(f"{kind} reads text in both directions (its config has no `is_decoder=True`). {instead}")
    for model_class in _as_tuple(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]):
        if reason := _no_rollback(model_class):
            raise ValueError(
                f"{kind} {reason}, so transformers cannot use it for speculative decoding. Choose a model with an "
                "ordinary key-value cache."
            )


def _no_rollback(model_class: type[PreTrainedModel]) -> str | None:
    """Why tokens that a model of this class has read cannot be taken back; None where they can."""
    if getattr(model_class, "_is_stateful", False):
        return "keeps a running state that cannot be taken back when a drafted token is rejected"
    if not model_class._supports_default_dynamic_cache():
        return "has a cache of its own that cannot be rolled back when a drafted token is rejected"
    if CACHE not in inspect.signature(model_class.forward).parameters:
        return "has no cache and reads the whole text for each token"
    return None


def read_index(index: Path) -> list[str]:
    """The names of a sharded model's weight files; a `ValueError` if one is not safetensors, or the index is broken."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        other = [name for name in names if not name.endswith(".safetensors")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} cannot be read: {type(error).__name__}: {error}. Save the model again.") from error
    if other:
        raise ValueError(
            f"{index} names {other[0]!r}, which is not a safetensors file. Only those are read, since a pickle can run "
            "code: save the model again, where you trust it."
        )
    return names


def is_hub_id(name: object) -> bool:
    """Whether a name can be the id of a repository on the Hub (`org/name` or `name`), as opposed to a local path."""
    if not isinstance(name, str) or name.startswith((".", "/", "~")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _look_up_on_hub(repo_id: str, revision: str | None, path: Path) -> tuple[str, Iterable[str]]:
    """The commit and the files of a repository; from the local cache where the Hub cannot be asked."""
    here = f"There is no directory {repo_id!r}{_similar_directory(path, ' (did you mean {!r}?)')}, and "
    try:
        # Not `list_repo_files`, which tries five times over half a minute where there is no network.
        info = HfApi().model_info(repo_id, revision=revision, timeout=_HUB_TIMEOUT_SECONDS)
        # Files are fetched by commit; this notes the branch's in the cache, where a run without a network looks for it.
        HfApi().resolve_revision(repo_id, revision=revision)
        return str(info.sha), [sibling.rfilename for sibling in info.siblings or []]
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
        try:
            folder = snapshot_download(repo_id, revision=revision, local_files_only=True)
        except OSError:
            raise ValueError(
                f"{here}the Hub cannot be asked ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}); "
                "the local cache does not hold it. Check the spelling and the connection, or give a local directory."
            ) from error
        return Path(folder).name, os.listdir(folder)


def _similar_directory(path: Path, form: str) -> str:
    parent = path.parent
    near = nearest(path.name, [p.name for p in parent.iterdir() if p.is_dir()]) if parent.is_dir() else None
    return form.format(str(parent / near)) if near else ""


def _adapter_config(checkpoint: Checkpoint) -> Any:
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
    return config


def _check_files(checkpoint: Checkpoint) -> None:
    """Refuse what shows in the names of the files."""
    name, files = checkpoint.name, checkpoint.files
    if checkpoint.gguf_file is not None:
        return
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
        held, instead = ", ".join([*sorted(files)[:4], *["..."][: len(files) > 4]]) or "nothing", ""
        if any(f.endswith(".gguf") for f in files):
            held = "GGUF files"
            instead = ", or the repository they were made from; or name a target's GGUF file as `gguf_file`"
        raise ValueError(
            f"{name!r} is not a model: it has no {CONFIG_NAME} (it holds {held}). Give the directory that "
            f"`save_pretrained` wrote{instead}."
        )
    if not checkpoint.has_weights and pickled:
        raise ValueError(
            f"{name!r} has its weights only as pickle ({pickled[0]}), which can run code when it is read, so it "
            "is not. Convert it once, where you trust it: `from_pretrained(name).save_pretrained(directory)` of "
            "transformers' AutoModelForCausalLM, or with the Space huggingface.co/spaces/safetensors/convert."
        )
    if not checkpoint.has_weights:
        raise ValueError(
            f"{name!r} has a {CONFIG_NAME} but no weights: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. "
            "Give a directory that `save_pretrained` of a whole model wrote."
        )


def _check_quantisation(config: PreTrainedConfig, name: str) -> None:
    """Refuse weights quantised in a way that transformers does not know: it would take their codes for the weights."""
    stored = getattr(config, "quantization_config", None)
    if stored and not AutoHfQuantizer.supports_quant_method(stored):
        raise ValueError(
            f"The weights of {name!r} are quantised by {stored['quant_method']!r}, which transformers does not read. "
            "Choose the model that they were made from, or one that is quantised in another way."
        )


def _broken_json(checkpoint: Checkpoint, *names: str) -> str | None:
    """The first of a local checkpoint's files that is not JSON: parsers say where they stumbled, not in which file."""
    for path in (Path(checkpoint.name) / name for name in names if name.endswith(".json")):
        try:
            if path.is_file():
                json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            return f"{path} ({error}) is not valid JSON"
    return None


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
