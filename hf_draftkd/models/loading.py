"""Load a target (frozen, in eval mode) and a draft (trainable), with clear errors before any weight is read.

    target = load_target("org/target", dtype="bfloat16", device_map="auto")
    draft = load_draft("./draft")
    tokenizer = load_tokenizer("org/target")

Only safetensors are read, and code that comes with a model runs only when asked for.
"""

import copy
import json
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME, logging

from hf_draftkd.models.forward import reads_left_to_right
from hf_draftkd.models.identity import remember_checkpoint
from hf_draftkd.models.resolve import Checkpoint, check_config, resolve
from hf_draftkd.models.text_model import text_config, text_model_of
from hf_draftkd.utils.checks import one_of
from hf_draftkd.utils.processor import emulated_bfloat16, shared_cores

logger = logging.get_logger(__name__)

_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def load_target(
    name_or_path: Any,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    quantization_config: Any = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
) -> PreTrainedModel:
    """Load the big model: frozen, in eval mode.

    Args:
        name_or_path: Local directory, Hub id, an object with `repo_id` and `revision`, or a `Checkpoint`. A PEFT
            adapter is merged into its base model; of a multimodal model it is the text model (`extract_text_model`).
        revision: Branch, tag or commit on the Hub.
        dtype: Type of the weights: "auto" (as saved), a name such as "bfloat16", or a `torch.dtype`.
        device_map: As in transformers; None loads onto the CPU.
        quantization_config: As in transformers, e.g. `BitsAndBytesConfig(load_in_4bit=True)`.
        attn_implementation: As in transformers, e.g. "sdpa".
        trust_remote_code: Whether code that comes with the model may run.
        gguf_file: Name of a GGUF file in the directory or repository: it is read as transformers reads it, config
            included, into a plain model, which `save_pretrained` saves. Quantised weights are expanded.

    Returns:
        The model; no parameter requires a gradient.

    Raises:
        ValueError: There is no usable causal LM under this name (see `Checkpoint.config`), or an option is wrong.
        ImportError: The quantisation asked for needs a package that is not installed.
    """
    model = _load(
        resolve(name_or_path, revision=revision, trust_remote_code=trust_remote_code, gguf_file=gguf_file),
        dtype=dtype,
        device_map=device_map,
        quantization_config=quantization_config,
        attn_implementation=attn_implementation,
    )
    return model.requires_grad_(False).eval()


def load_draft(name_or_path: Any, **options: Any) -> PreTrainedModel:
    """Load the small model, trainable. Arguments, result and errors as in `load_target`.

    The model is in eval mode, as transformers loads it; a trainer switches it. What `find_drafts` returns can be passed
    as it is. A draft that is a PEFT adapter comes back merged: a plain model, every weight of it trainable.
    """
    model = load_target(name_or_path, **options)
    for parameter in model.parameters():
        # Merging leaves a base frozen. Packed integer weights of a quantised draft cannot have gradients.
        parameter.requires_grad_(parameter.is_floating_point())
    return model


def extract_text_model(model_or_path: Any, **options: Any) -> PreTrainedModel:
    """The causal LM of a multimodal model: the text layers and the head, without vision or audio tower.

    Args:
        model_or_path: A multimodal model, in plain weights on one device; or what names one, as in `load_target`.
        options: Where it is named: `revision`, `trust_remote_code`, and those of `from_pretrained`, such as `dtype`.

    Returns:
        The model, in eval mode. It shares its weights with a `model_or_path` that is a model: nothing is copied. Its
        config says "tied" exactly where embedding and head are one matrix, whatever the multimodal config says.

    Raises:
        ValueError: There is no text model that can stand alone, or its logits are not those of the whole; or weights
            cannot be read (see `load_target`).
    """
    if isinstance(model_or_path, PreTrainedModel):
        return text_model_of(model_or_path)
    named = {name: options.pop(name) for name in ("revision", "trust_remote_code") if name in options}
    return text_model_of(_load_whole(resolve(model_or_path, **named), options))


def load_without_weights(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model that `load_target` loads, as its configs describe it, on torch's meta device: no weight is read.

    A `ValueError` if there is no usable causal LM (see `Checkpoint.config`).
    """
    if checkpoint.is_adapter:
        return load_without_weights(checkpoint.base)
    config = copy.deepcopy(checkpoint.config)  # building changes it
    if checkpoint.is_multimodal:
        config = text_config(config, repr(checkpoint.name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=checkpoint.trust_remote_code)
    if checkpoint.gguf_file is None:  # beside a GGUF file transformers reads none
        with suppress(OSError):  # there is none: it was made from the config
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.name, revision=checkpoint.revision)
    return model


def load_tokenizer(
    name_or_path: Any, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer by local directory, Hub id, an object with `repo_id` and `revision`, or `Checkpoint`.

    For a PEFT adapter that was saved without one it is the tokenizer of its base model. A `ValueError` if there is
    none.
    """
    return resolve(name_or_path, revision=revision, trust_remote_code=trust_remote_code).tokenizer


def require_loaded(*models: Any) -> None:
    """Refuse what cannot be target or draft: the checks that loading makes of a checkpoint, of models in memory.

    A `ValueError` if one is a name or a path, is not a decoder-only language model that transformers can use for
    speculative decoding (see `check_config`), or reads text in both directions though no config says so.
    """
    for model in models:
        if isinstance(model, str | Path):
            raise ValueError(
                f"{str(model)!r} is a name: load the model with `load_target`, or `load_draft`, and give that."
            )
        name = model.name_or_path or type(model).__name__
        check_config(model.config, name)
        if not reads_left_to_right(model):
            raise ValueError(
                f"{name!r} (model type {model.config.model_type!r}) reads text in both directions: what follows a "
                "token changes the logits before it. Speculative decoding needs two decoder-only causal language "
                "models: choose one."
            )


@cache  # only before this process has worked is the load that of others
def _advise_on_threads() -> None:
    if not torch.accelerator.is_available() and (advice := shared_cores()):
        logger.warning(advice)


def _load(checkpoint: Checkpoint, **options: Any) -> PreTrainedModel:
    _advise_on_threads()
    dtype = options["dtype"]
    if not isinstance(dtype, torch.dtype):
        options["dtype"] = dtype = getattr(torch, one_of("`dtype`", dtype, _DTYPES), dtype)
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be a floating point type, got {dtype}.")
    config = checkpoint.config  # refuses what is not a usable causal LM
    if checkpoint.is_adapter:
        model = _load_merged(checkpoint, options)
    elif checkpoint.is_multimodal:
        model = _load_text_of(checkpoint, options)
    else:
        # Loading changes a config.
        model = _load_plain(checkpoint, options | {"config": copy.deepcopy(config), "gguf_file": checkpoint.gguf_file})
    remember_checkpoint(model, checkpoint)
    if model.dtype == torch.bfloat16 and model.device.type == "cpu" and (advice := emulated_bfloat16()):
        logger.warning_once(advice)
    return model


def _load_plain(checkpoint: Checkpoint, options: dict[str, Any]) -> PreTrainedModel:
    model = _from_pretrained(AutoModelForCausalLM, checkpoint, options)
    if checkpoint.gguf_file is not None:
        # Its weights were expanded: what says that they are quantised keeps them from being saved.
        model.hf_quantizer, model.is_quantized = None, False
        for key in ("quantization_config", "_pre_quantization_dtype"):
            vars(model.config).pop(key, None)
    return model


def _from_pretrained(model_class: Any, checkpoint: Checkpoint, options: dict[str, Any]) -> PreTrainedModel:
    name = checkpoint.name
    try:
        model, info = model_class.from_pretrained(
            name,
            revision=checkpoint.revision,
            trust_remote_code=checkpoint.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **{key: value for key, value in options.items() if value is not None},
        )
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"The weights of {name!r} cannot be read: {str(error).rstrip('.')}. Download or save the model again."
        ) from error
    for key, stored, expected in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"The weights of {name!r} do not fit its config: {key} is {list(stored)} in the file and {list(expected)} "
            "by the config. Restore the config that was saved with them, or save the model again."
        )
    # transformers fills what a checkpoint lacks with random numbers and continues.
    missing = sorted(set(info["missing_keys"]) & {key for key, _ in model.named_parameters()})
    if missing:
        raise ValueError(
            f"The weights of {name!r} are incomplete and would be filled with random numbers: {_first(missing, 3)} "
            "missing. Give a model that was saved whole, head included."
        )
    return model


def _load_text_of(checkpoint: Checkpoint, options: dict[str, Any]) -> PreTrainedModel:
    name = checkpoint.name
    if options["quantization_config"] is not None:
        raise ValueError(
            f"{name!r} is multimodal, and its text model cannot be taken out of quantised weights. Save it once, with "
            f"`draftkd init --text_of {name} --output_dir DIRECTORY`, and load that quantised."
        )
    return text_model_of(_load_whole(checkpoint, options))


def _load_whole(checkpoint: Checkpoint, options: dict[str, Any]) -> PreTrainedModel:
    """A multimodal model with its towers."""
    config = checkpoint.config
    if not checkpoint.is_multimodal:
        raise ValueError(f"{checkpoint.name!r} is a text model already ({config.model_type!r}): use it as it is.")
    # The class it was saved as: the automatic classes take some of these checkpoints for text models.
    whole_class = getattr(transformers, (config.architectures or [""])[0], None)
    if whole_class is None:
        raise ValueError(
            f"{checkpoint.name!r} does not say which class of transformers it was saved as (architectures: "
            f"{config.architectures}). Load it yourself and give the model to `extract_text_model`."
        )
    return _from_pretrained(whole_class, checkpoint, options).eval()


def _load_merged(checkpoint: Checkpoint, options: dict[str, Any]) -> PreTrainedModel:
    if options["quantization_config"] is not None:
        raise ValueError(
            f"{checkpoint.name!r} is a PEFT adapter, and merging it into quantised weights would round it. Load it "
            "without `quantization_config`, save the merged model, and load that one quantised."
        )
    from peft import PeftModel

    base = _load(checkpoint.base, **options)
    if checkpoint.base.is_multimodal:
        another = "Was it trained on the whole of its multimodal base? Merge it there, save the result, and load that."
    else:
        another = (
            f"Was the adapter trained on {checkpoint.base.name!r}? Correct `base_model_name_or_path` in its "
            f"{ADAPTER_CONFIG_NAME}, or save the adapter again. If tokens were added to the base before the "
            "training, merge it where that was done, and save the whole model."
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # they are separated below
            adapted = PeftModel.from_pretrained(base, checkpoint.name, revision=checkpoint.revision)
            # PEFT skips weights that it does not find, or finds no place for; only a second loading reports them.
            found = adapted.load_adapter(checkpoint.name, adapted.active_adapter, revision=checkpoint.revision)
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        # torch adds a line for each weight that does not fit.
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2]).rstrip(".")
        raise ValueError(f"The weights of adapter {checkpoint.name!r} cannot be read: {reason}. {another}") from error
    unfit = sorted([*found.missing_keys, *found.unexpected_keys])
    if unfit:
        raise ValueError(
            f"The weights of adapter {checkpoint.name!r} do not fit its base model, and would be applied in part: "
            f"{_first(unfit, 2)}. {another}"
        )
    _separate_adapted_ends(adapted.get_base_model())
    merged = adapted.merge_and_unload(safe_merge=True)
    # Another model than its base: metrics and data must not be recorded under the base's name.
    merged.name_or_path = merged.config.name_or_path = checkpoint.name
    return merged


def _separate_adapted_ends(model: PreTrainedModel) -> None:
    """Give the head a weight of its own where an adapter changes one of two tied ends: merging would change both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings, head = (end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends)
    if (embeddings, head) != ends and embeddings.weight is head.weight:
        head.weight = torch.nn.Parameter(head.weight.clone())
        model.config.tie_word_embeddings = False


def _first(names: list[str], count: int) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
