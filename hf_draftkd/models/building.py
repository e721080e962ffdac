"""Make a new draft for a target: some of its own layers, or its architecture at a share of the size.

    draft = build_draft(target, num_layers=2)       # first and last layer, embeddings, norm and head: copied
    draft = build_draft(target, layers=[0, 7, 15])  # these layers instead
    draft = build_draft(target, share=0.0164)       # 1.64% of the target's parameters, random weights
    draft = build_draft(target, config=my_config)   # any architecture with the target's vocabulary, random weights

Copied layers are a starting point that already speaks the target's language and need little training; a small random
model must be pretrained first (https://arxiv.org/abs/2403.00858), and can be much narrower, hence faster.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_draftkd.models.loading import require_loaded
from hf_draftkd.models.pairing import align_vocabulary
from hf_draftkd.models.resolve import check_config
from hf_draftkd.models.sizing import check_share, cut_layers, evenly_spread, plain_copy, sized_config, spread_layers
from hf_draftkd.utils.checks import whole_number

# Whether a layer leaves its keys to later ones follows from which of those are there.
_FREE_TO_DIFFER = ("training", "store_full_length_kv")


def build_draft(
    target_model: PreTrainedModel,
    *,
    num_layers: int | None = None,
    layers: list[int] | None = None,
    config: PreTrainedConfig | None = None,
    share: float | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Make a new draft with the target's vocabulary and special ids. The target is not changed.

    Exactly one of `num_layers`, `layers`, `config` and `share` says how.

    Args:
        target_model: The target, in plain (not quantised) weights where layers of it are copied.
        num_layers: Copy this many of the target's layers, evenly spread, first and last included.
        layers: Copy these layers, by ascending index; negative indices count from the end. Embeddings, final norm and
            head are copied too, bit for bit.
        config: Config of the new model, with the target's `vocab_size`.
        share: Size of the new model as a fraction of the target's parameters, embeddings counted: the config of the
            target's own architecture that comes closest, few layers preferred (see `sized_config`).
        tokenizer: With it, ids that the target pads are suppressed in the draft's generation config.
        dtype: Type of the draft's weights. Default: the target's.
        seed: Decides the random weights; the global random state is left alone.

    Returns:
        The draft, in eval mode, on the target's device, every parameter trainable. Its generation config has the
        target's bos, eos and pad ids and none of its sampling defaults.

    Raises:
        ValueError: No way or several were named, a value is out of range, or the target cannot be copied from.
    """
    require_loaded(target_model)
    ways: dict[str, Any] = {"num_layers": num_layers, "layers": layers, "config": config, "share": share}
    named = [name for name, value in ways.items() if value is not None]
    if len(named) != 1:
        raise ValueError(
            f"Say how the draft is to be made by exactly one of {', '.join(f'`{name}`' for name in ways)}, got "
            f"{' and '.join(named) or 'none of them'}."
        )
    check_plan(target_model.config, **ways)
    given, chosen = target_model.config, None
    if share is not None:
        new_config = sized_config(target_model, share)
    elif config is not None:
        new_config = plain_copy(config)
    else:
        _check_copyable(target_model)
        if num_layers is not None:
            chosen = spread_layers(given, num_layers)
        else:
            chosen = _checked_layers(layers or [], given.num_hidden_layers)
        _check_sources(given, chosen)
        new_config = cut_layers(given, chosen)

    draft = _new_model(new_config, target_model, dtype, seed)
    if chosen is not None:
        _copy_weights(draft, target_model, chosen)
    draft.generation_config = GenerationConfig()
    _check_runs(draft)
    return align_vocabulary(draft, target_model, tokenizer)


def check_plan(
    target_config: PreTrainedConfig,
    *,
    num_layers: int | None = None,
    layers: list[int] | None = None,
    config: PreTrainedConfig | None = None,
    share: float | None = None,
) -> None:
    """Raise a `ValueError` for what of `build_draft`'s arguments is known to be wrong before the target is loaded."""
    text = target_config.get_text_config()
    if num_layers is not None:
        evenly_spread(num_layers, text.num_hidden_layers)
    if layers is not None:
        _checked_layers(layers, text.num_hidden_layers)
    if share is not None:
        check_share(share)
    if config is not None:
        check_config(config, "config")
        given = config.get_text_config().vocab_size
        if given != text.vocab_size:
            raise ValueError(
                f"`config` has vocab_size={given} and the target {text.vocab_size}: a draft needs the target's "
                f"tokenizer and so its vocabulary. Set `config.vocab_size = {text.vocab_size}`."
            )


def _new_model(
    config: PreTrainedConfig, target_model: PreTrainedModel, dtype: torch.dtype | None, seed: int
) -> PreTrainedModel:
    dtype = target_model.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be a floating `torch.dtype` such as torch.bfloat16, got {dtype!r}.")
    same_architecture = type(config) is type(target_model.config)
    options = {"attn_implementation": target_model.config._attn_implementation} if same_architecture else {}
    # Drawn on the CPU whatever the target's device, so that a seed means one model.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draft = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    return draft.to(target_model.device).eval()


def _copy_weights(draft: PreTrainedModel, target_model: PreTrainedModel, layers: list[int]) -> None:
    """Copy the chosen layers and everything that is not a layer, bit for bit."""
    depth = target_model.config.num_hidden_layers
    stacks = _layer_stacks(target_model, depth)
    _check_same_kinds(draft, target_model, stacks, layers)
    theirs = target_model.state_dict()
    copied = {}
    for name, own in draft.state_dict().items():
        stack = next((stack for stack in stacks if name.startswith(stack)), None)
        if stack is None:
            copied[name] = _of_layers(theirs.get(name), own.shape, layers, depth)
        else:
            index, _, rest = name.removeprefix(stack).partition(".")
            copied[name] = theirs.get(f"{stack}{layers[int(index)]}.{rest}")
        if getattr(copied[name], "shape", None) != own.shape:
            raise _unfit(target_model, layers, f"{name} has no counterpart in the target")
    draft.load_state_dict(copied)


def _layer_stacks(model: PreTrainedModel, depth: int) -> list[str]:
    """Prefixes such as "model.layers." of the module lists that hold one module per layer."""
    stacks: list[str] = []
    for name, module in model.named_modules():
        is_inside = any(name.startswith(stack) for stack in stacks)  # a layer's experts may be as many
        if isinstance(module, nn.ModuleList) and len(module) == depth and not is_inside:
            stacks.append(name + ".")
    if not stacks:
        raise ValueError(
            f"No list of {depth} layers was found in this {model.config.model_type!r} target, so layers cannot be "
            "copied. Use `share` or `config`."
        )
    return stacks


def _of_layers(table: Tensor | None, shape: torch.Size, layers: list[int], depth: int) -> Tensor | None:
    """The part of a table that belongs to these layers, where one dimension is made of equal pieces, one per layer."""
    if table is None or table.shape == shape or table.ndim != len(shape):
        return table
    unlike = [d for d in range(table.ndim) if table.shape[d] != shape[d]]
    if len(unlike) != 1 or table.shape[unlike[0]] * len(layers) != shape[unlike[0]] * depth:
        return table
    pieces = table.unflatten(unlike[0], (depth, -1))
    chosen = torch.tensor(layers, device=table.device)
    return pieces.index_select(unlike[0], chosen).flatten(unlike[0], unlike[0] + 1)


def _check_same_kinds(
    draft: PreTrainedModel, target_model: PreTrainedModel, stacks: list[str], layers: list[int]
) -> None:
    """Refuse layers that would compute something else at their new place, though their weights fit.

    What a layer is follows from the config and its index: local or global attention, with or without positions, dense
    or experts. Modules keep it in attributes, which must be equal before and after.
    """
    for stack in stacks:
        for new, old in enumerate(layers):
            theirs = dict(target_model.get_submodule(f"{stack}{old}").named_modules())
            for name, module in draft.get_submodule(f"{stack}{new}").named_modules():
                other = theirs.get(name)
                if type(other) is not type(module):
                    kinds = f"{type(other).__name__} would become {type(module).__name__}"
                    raise _unfit(target_model, layers, f"in layer {old}, {kinds}")
                for key, value in vars(module).items():
                    before = vars(other).get(key)
                    if not _is_equal_setting(key, before, value) and (before, value) != (old, new):
                        reason = f"layer {old} has {key}={before!r}, which would become {value!r}"
                        raise _unfit(target_model, layers, reason)


def _is_equal_setting(key: str, before: Any, value: Any) -> bool:
    if key.startswith("_") or key in _FREE_TO_DIFFER or not isinstance(value, bool | int | float | str | None):
        return True
    if isinstance(before, float) and isinstance(value, float):
        return math.isclose(before, value)
    return before == value


def _unfit(target_model: PreTrainedModel, layers: list[int], reason: str) -> ValueError:
    return ValueError(
        f"Layers {layers} of this {target_model.config.model_type!r} target cannot be put into a shorter model: "
        f"{reason}, since what a layer is depends on its position. Choose layers whose kinds follow each other as the "
        "first ones do, or use `share` or `config`."
    )


def _check_sources(config: PreTrainedConfig, layers: list[int]) -> None:
    """Refuse layers that read the keys and values of a layer that is left out."""
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    first_shared = config.num_hidden_layers - shared
    for layer in layers:
        if layer < first_shared:
            continue
        source = max(i for i in range(first_shared) if config.layer_types[i] == config.layer_types[layer])
        if source not in layers:
            raise ValueError(
                f"Layer {layer} of this {config.model_type!r} target reads the keys and values of layer {source}, "
                f"which is not among {layers}. Add it, or take layers before {first_shared}, which have their own."
            )


@torch.no_grad()
def _check_runs(draft: PreTrainedModel) -> None:
    """Refuse a model that fails on its first tokens: layers without any attention, for one, cannot decode."""
    if draft.device.type == "meta":
        return
    ids = torch.tensor([[0, 1, 2]], device=draft.device) % draft.config.vocab_size
    try:
        draft.generate(ids, max_new_tokens=2, do_sample=False)
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"This {draft.config.model_type!r} draft cannot decode: {str(error).rstrip('.')}. Choose other layers, or "
            "use `share` or `config`."
        ) from error


def _checked_layers(layers: list[int], depth: int) -> list[int]:
    chosen = [whole_number("layers", layer, -depth, depth - 1) % depth for layer in layers]
    if not chosen or chosen != sorted(set(chosen)):
        raise ValueError(
            f"`layers` must name at least one layer, each once and in ascending order, got {layers}. For a few "
            "layers evenly spread give `num_layers`."
        )
    return chosen


def _check_copyable(target_model: PreTrainedModel) -> None:
    reason = None
    if getattr(target_model.config, "quantization_config", None) is not None:
        reason = (
            "is quantised, and packed weights are no start for training. Load it without quantisation (where its files "
            "are quantised, take those that they were made from)"
        )
    elif getattr(target_model, "peft_config", None):
        reason = "carries a PEFT adapter. Merge it first: `target.merge_and_unload()`"
    elif any(p.is_meta for p in target_model.parameters()):
        reason = "is partly offloaded, so its layers cannot be copied. Load it with `device_map='cpu'`"
    if reason is not None:
        raise ValueError(f"The target {reason}, or make a draft of random weights with `share` or `config`.")
