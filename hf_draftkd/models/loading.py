"""Load a target (frozen, in eval mode) and a draft (trainable), with clear errors before any weight is read.

    target = load_target("org/target", dtype="bfloat16", device_map="auto")
    draft = load_draft("./draft")
    tokenizer = load_tokenizer("org/target")

Only safetensors are read, and code that comes with a model runs only when asked for.
"""

import difflib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_bitsandbytes_available

from hf_draftkd.models.checkpoints import (
    ADAPTER_CONFIG_NAME,
    TOKENIZER_FILES,
    Checkpoint,
    adapter_base,
    check_checkpoint,
    find_checkpoint,
)
from hf_draftkd.models.revisions import remember_revision

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def require_loaded(*models: Any) -> None:
    """Refuse a name or a path where a model is needed.

    Raises:
        ValueError: One of them is a name.
    """
    for model in models:
        if isinstance(model, str | Path):
            raise ValueError(
                f"{str(model)!r} is a name: load the model with `load_target`, or `load_draft`, and give that."
            )


def load_target(
    name_or_path: Any,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    quantization_config: Any = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load the big model: frozen, in eval mode.

    Args:
        name_or_path: Local directory, Hub id, or an object with `repo_id` and `revision`. A PEFT adapter is merged into
            its base model.
        revision: Branch, tag or commit on the Hub.
        dtype: Of the weights: "auto" (as saved), a name such as "bfloat16", or a `torch.dtype`.
        device_map: As in transformers; None loads onto the CPU.
        quantization_config: As in transformers, e.g. `BitsAndBytesConfig(load_in_4bit=True)`.
        attn_implementation: As in transformers, e.g. "sdpa".
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The model; no parameter requires a gradient.

    Raises:
        ValueError: There is no usable causal LM under this name (see `check_model`), or an option is wrong.
        ImportError: The quantisation asked for needs a package that is not installed.
    """
    model = _load(
        name_or_path,
        revision=revision,
        dtype=dtype,
        device_map=device_map,
        quantization_config=quantization_config,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    return model.requires_grad_(False).eval()


def load_draft(
    name_or_path: Any,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    quantization_config: Any = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load the small model, trainable. Arguments, result and errors as in `load_target`.

    The model is in eval mode, as transformers loads it; a trainer switches it. What `find_drafts` returns can be passed
    as it is. A draft that is a PEFT adapter comes back merged: a plain model, every weight of it trainable.
    """
    model = _load(
        name_or_path,
        revision=revision,
        dtype=dtype,
        device_map=device_map,
        quantization_config=quantization_config,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    for parameter in model.parameters():
        # Merging leaves a base frozen. Packed integer weights of a quantised draft cannot have gradients.
        parameter.requires_grad_(parameter.is_floating_point())
    return model


def load_tokenizer(
    name_or_path: Any, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer by local directory, Hub id, or an object with `repo_id` and `revision`.

    A PEFT adapter that has none of its own has that of its base model.

    Raises:
        ValueError: Nothing is there, no tokenizer is among the files, or they cannot be read.
    """
    checkpoint = find_checkpoint(name_or_path, revision)
    if checkpoint.is_adapter and not checkpoint.files & set(TOKENIZER_FILES):
        base, base_revision = adapter_base(checkpoint)
        return load_tokenizer(base, revision=base_revision, trust_remote_code=trust_remote_code)
    instead = "Save the target's there: `tokenizer.save_pretrained(directory)`; a draft shares its target's tokenizer."
    if not checkpoint.files & set(TOKENIZER_FILES):
        raise ValueError(f"{checkpoint.name!r} has no tokenizer ({TOKENIZER_FILES[0]} or the like). {instead}")
    try:
        return AutoTokenizer.from_pretrained(
            checkpoint.name, revision=checkpoint.revision, trust_remote_code=trust_remote_code
        )
    except ImportError:  # says which package is missing
        raise
    except Exception as error:  # the tokenizers' own parser raises bare `Exception`
        at_fault = _broken_json(checkpoint)
        reason = f"{at_fault} is not valid JSON" if at_fault else str(error)
        raise ValueError(
            f"The tokenizer of {checkpoint.name!r} cannot be read: {reason.rstrip('.')}. {instead}"
        ) from error


def _broken_json(checkpoint: Checkpoint) -> str | None:
    """The first of a local tokenizer's files that is not JSON: parsers say where they stumbled, not in which file."""
    for name in sorted(checkpoint.files & set(TOKENIZER_FILES)):
        path = Path(checkpoint.name).expanduser() / name
        if path.suffix == ".json" and path.is_file():
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                return f"{path} ({error})"
    return None


def _load(name_or_path: Any, *, revision: str | None, dtype: str | torch.dtype, **options: Any) -> PreTrainedModel:
    options["dtype"] = _check_dtype(dtype)
    _check_quantization(options["quantization_config"])
    checkpoint = find_checkpoint(name_or_path, revision)
    check_checkpoint(checkpoint, trust_remote_code=options["trust_remote_code"])
    return _load_found(checkpoint, options)


def _load_found(checkpoint: Checkpoint, options: dict[str, Any]) -> PreTrainedModel:
    load = _load_merged if checkpoint.is_adapter else _load_plain
    model = load(checkpoint, options)
    remember_revision(model, checkpoint.name, checkpoint.revision)
    return model


def _load_plain(checkpoint: Checkpoint, options: dict[str, Any]) -> PreTrainedModel:
    name = checkpoint.name
    given = {key: value for key, value in options.items() if value is not None}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            revision=checkpoint.revision,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **given,
        )
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:  # the last two: a broken index
        reason = f"no {error} in its index" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise ValueError(
            f"The weights of {name!r} cannot be read: {reason}. Download or save the model again."
        ) from error
    for key, stored, expected in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"The weights of {name!r} do not fit its config: {key} is {list(stored)} in the file and {list(expected)} "
            "by the config. Give back the config that was saved with them, or save the model again."
        )
    # transformers fills what a checkpoint lacks with random numbers and goes on.
    missing = sorted(set(info["missing_keys"]) & {key for key, _ in model.named_parameters()})
    if missing:
        raise ValueError(
            f"The weights of {name!r} are incomplete and would be filled with random numbers: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''} missing. Give a model that was saved whole, head included."
        )
    return model


def _load_merged(checkpoint: Checkpoint, options: dict[str, Any]) -> PreTrainedModel:
    if options["quantization_config"] is not None:
        raise ValueError(
            f"{checkpoint.name!r} is a PEFT adapter, and merging it into quantised weights would round it. Load it "
            "without `quantization_config`, save the merged model, and load that one quantised."
        )
    from peft import PeftModel

    base_checkpoint = find_checkpoint(*adapter_base(checkpoint))
    base = _load_found(base_checkpoint, options)
    another = (
        f"Was the adapter trained on {base_checkpoint.name!r}? Correct `base_model_name_or_path` in its "
        f"{ADAPTER_CONFIG_NAME}, or save the adapter again."
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            adapted = PeftModel.from_pretrained(base, checkpoint.name, revision=checkpoint.revision)
            # PEFT goes on without weights that it does not find, or finds no place for; only a second loading says so.
            found = adapted.load_adapter(checkpoint.name, adapted.active_adapter, revision=checkpoint.revision)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        # torch adds a line for each weight that does not fit.
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2]).rstrip(".")
        raise ValueError(f"The weights of adapter {checkpoint.name!r} cannot be read: {reason}. {another}") from error
    unfit = sorted([*found.missing_keys, *found.unexpected_keys])
    if unfit:
        raise ValueError(
            f"The weights of adapter {checkpoint.name!r} do not fit its base model, and would be applied in part: "
            f"{', '.join(unfit[:2])}{', ...' if len(unfit) > 2 else ''}. {another}"
        )
    merged = adapted.merge_and_unload(safe_merge=True)
    # Another model than its base: figures and data must not be recorded under the base's name.
    merged.name_or_path = merged.config.name_or_path = checkpoint.name
    return merged


def _check_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto" or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    if isinstance(dtype, str) and dtype in _DTYPES:
        return getattr(torch, dtype)
    near = difflib.get_close_matches(str(dtype), _DTYPES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"`dtype` must be 'auto', a floating `torch.dtype` or one of {_DTYPES}, got {dtype!r}.{hint}")


def _check_quantization(quantization_config: Any) -> None:
    if quantization_config is None:
        return
    if isinstance(quantization_config, dict):
        method = quantization_config.get("quant_method")
        asks_bitsandbytes = any(quantization_config.get(key) for key in ("load_in_4bit", "load_in_8bit"))
    else:
        method = getattr(quantization_config, "quant_method", None)
        asks_bitsandbytes = False
    method = getattr(method, "value", method)
    if (asks_bitsandbytes or method == "bitsandbytes") and not is_bitsandbytes_available():
        raise ImportError(
            "`quantization_config` asks for bitsandbytes, which is not installed: `pip install bitsandbytes`, or load "
            "without quantisation."
        )
