"""Configs for a smaller model of the same architecture (fewer layers, or a share of the parameters), and model sizes.

Sizes are counted by building each candidate without memory (on torch's meta device), so the count is right for every
architecture, tied or not.
"""

import copy
from fractions import Fraction
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_draftkd.models.forward import unwrapped
from hf_draftkd.utils.checks import whole_number

# Depth costs a draft more time than width (https://arxiv.org/abs/2504.18583); 4 layers are the published shape.
_DEPTHS = (4, 3, 2, 5, 6)
_CLOSE_ENOUGH = 0.1
_WIDTH_OF_MLP = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
# What configs say of single layers: indices of one kind, how many come first, and the last one (counted in) of a kind.
_INDICES_OF_LAYERS = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "cross_attention_layers")
_LEADING_LAYERS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_LAST_INDEX = ("moe_layer_end_index",)
# Lists that may have as many entries as there are layers: [151645, 151643] are ids, in a model of two layers too.
_NOT_OF_LAYERS = ("_id", "_ids", "architectures", "keys_to_ignore_at_inference")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# A draft trained in float32 by AdamW: weights, gradients and two moments.
TRAINED_BYTES = 16
# bitsandbytes keeps a float32 scale for each 64 weights in 4 bits (without nested quantisation), for each row in 8.
_BLOCK = 64


def evenly_spread(count: int, depth: int) -> list[int]:
    """`count` layer indices out of `depth`, first and last included (the first alone where one is wanted)."""
    if whole_number("num_layers", count, 1, depth) == 1:
        return [0]
    # Rounded half up in whole numbers: distinct and ascending because the step is at least 1.
    return [(2 * i * (depth - 1) + count - 1) // (2 * (count - 1)) for i in range(count)]


def spread_layers(config: PreTrainedConfig, count: int) -> list[int]:
    """The `count` layers to keep of this config's: evenly spread.

    Layers that read the keys and values of earlier ones (Gemma 3n and 4) cannot do without these, so they are left out
    where there are enough others.
    """
    depth = config.num_hidden_layers
    own_keys = depth - (getattr(config, "num_kv_shared_layers", None) or 0)
    return evenly_spread(count, own_keys if isinstance(count, int) and count <= own_keys else depth)


def cut_layers(config: PreTrainedConfig, layers: list[int]) -> PreTrainedConfig:
    """The same config with only these layers; what it says layer by layer is cut with them."""
    depth = config.num_hidden_layers
    kept = set(layers)
    values = plain_copy(config).to_dict()
    for name, value in values.items():
        if name in _INDICES_OF_LAYERS and value is not None:
            values[name] = [new for new, old in enumerate(layers) if old in value]
        elif name in _LEADING_LAYERS and isinstance(value, int):
            values[name] = sum(i < value for i in kept)
        elif name in _LAST_INDEX and isinstance(value, int):
            values[name] = sum(i <= value for i in kept) - 1
        elif name == "num_kv_shared_layers" and value:
            values[name] = sum(i >= depth - value for i in kept)
        elif name == "scale_depth":  # MiniCPM divides it by the root of the number of layers
            values[name] = value * (len(layers) / depth) ** 0.5
        elif name == "per_layer_config" and value:
            own = {int(index): overrides for index, overrides in value.items()}
            values[name] = {new: own[old] for new, old in enumerate(layers) if old in own}
        elif name == "attention_types" and hasattr(config, "attention_layers"):  # GPT-Neo: [[[kinds], repeats]]
            values[name] = [[[config.attention_layers[i]], 1] for i in layers]
        elif isinstance(value, list | tuple) and len(value) == depth and not name.endswith(_NOT_OF_LAYERS):
            values[name] = type(value)(value[i] for i in layers)
    values[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    try:
        new = type(config).from_dict(values)
        again = type(config).from_dict(new.to_dict())
    except Exception as error:
        raise ValueError(
            f"Layers {layers} cannot be taken out of a {config.model_type!r} config: {error} Choose others, or pass a "
            "`config`."
        ) from error
    if new.num_hidden_layers != len(layers) or again.to_dict() != new.to_dict():
        raise ValueError(f"A {config.model_type!r} config changes when it is saved and loaded. Pass a `config`.")
    return new


def sized_config(target_model: PreTrainedModel, share: float) -> PreTrainedConfig:
    """The config of the target's architecture whose parameter count comes closest to a share of the target's.

    The proportions of attention and MLP and everything that is not a size stay as in the target, and so does the head
    size where that leaves enough choice. Four layers are tried first, then fewer and more; the first depth that comes
    within a tenth of the size asked for is taken, else the closest of all. 1.64% of Llama 2 7B gives 4 layers, hidden
    size 1024, MLP 2816, 8 heads: the shape of the Llama 2 Chat Drafter (https://arxiv.org/abs/2403.00858).

    Args:
        target_model: The target; only its config and its size matter.
        share: Fraction of the target's parameters, embeddings counted, between 0 and 1.

    Raises:
        ValueError: The embeddings alone are larger.
    """
    base = _of_equal_layers(plain_copy(target_model.config))
    text = base.get_text_config()
    if getattr(text, "num_kv_shared_layers", None):
        text.num_kv_shared_layers = 0  # which layer has whose keys depends on the depth
    if is_mixture(base):
        raise ValueError(
            f"The target ({base.model_type!r}) is a mixture of experts, whose draft should be a dense model. Pass "
            f"the `config` of a dense model of the same family with vocab_size={text.vocab_size}."
        )
    budget = share * loaded_parameters(target_model)
    _check_embeddings_fit(text, budget, share)
    # Few layers, unless the size asked for is beyond them.
    depths = [n for n in _DEPTHS if n <= text.num_hidden_layers]
    if count_parameters(cut_layers(base, spread_layers(base, max(depths)))) < (1 - _CLOSE_ENOUGH) * budget:
        depths = list(range(max(depths), text.num_hidden_layers + 1))
    found: list[tuple[float, PreTrainedConfig]] = []
    # The likeliest shapes first.
    for steps in sorted({_steps_for_whole_groups(text, _head_dim(text)), 1}, reverse=True):
        for head_dim in _head_sizes(text):
            for layers in depths:
                candidate = cut_layers(base, spread_layers(base, layers))
                found.append(_closest_width(candidate, budget, steps * head_dim, head_dim))
                if found[-1][0] <= _CLOSE_ENOUGH:
                    return found[-1][1]
    return min(found, key=lambda each: each[0])[1]


def is_mixture(config: PreTrainedConfig) -> bool:
    """Whether a model is a mixture of experts, which reads only some of its parameters for a token."""
    return any((getattr(config.get_text_config(), name, None) or 0) > 1 for name in _EXPERTS)


def check_share(share: float) -> None:
    """Raise a `ValueError` for a share of the target's parameters that does not lie between 0 and 1."""
    if not isinstance(share, int | float) or not 0 < share < 1:
        raise ValueError(f"`share` must lie between 0 and 1 (0.0164 is 1.64% of the target), got {share!r}.")


def plain_copy(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy that describes a new model: no quantisation, no origin."""
    new = copy.deepcopy(config)
    if hasattr(new, "quantization_config"):
        del new.quantization_config
    new._name_or_path = ""
    return new


def count_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the causal LM this config describes, tied ones once; no memory is used."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def loaded_parameters(model: PreTrainedModel) -> int:
    """Parameters of a loaded model as a plain one: tied ones once, an adapter merged, and before it is quantised.

    Packed weights hold several numbers in one, and those of GPTQ or AWQ are no parameters of torch at all.
    """
    inner = unwrapped(model)
    if getattr(inner, "hf_quantizer", None) is None and getattr(inner, "peft_config", None) is None:
        return inner.num_parameters()
    with torch.device("meta"):
        return type(inner)(plain_copy(inner.config)).num_parameters()


def weight_bytes(config: PreTrainedConfig, bits: int = 16) -> int:
    """Bytes of the weights of the causal LM that a config describes.

    Args:
        config: The config of a causal LM, which is built on torch's meta device.
        bits: 32 or 16 for all weights. 8 or 4: linear layers as bitsandbytes stores them, all but the head, and
            everything else in 16 bits.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if bits > 8:
        return sum(weight.numel() for weight in model.parameters()) * bits // 8
    head = model.get_output_embeddings()
    quantised = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }
    others = sum(weight.numel() for weight in model.parameters() if id(weight) not in quantised)
    scales = sum(weight.numel() // _BLOCK if bits == 4 else weight.shape[0] for weight in quantised.values())
    return sum(weight.numel() for weight in quantised.values()) * bits // 8 + 4 * scales + 2 * others


def _of_equal_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same with the config's general sizes in every layer, where single layers have others (Gemma 4)."""
    values = config.to_dict()
    overrides = values.get("per_layer_config")
    if not overrides:
        return config
    # Not left out: without any, the class would make its own again.
    values["per_layer_config"] = {i: {name: values[name] for name in own} for i, own in overrides.items()}
    return type(config).from_dict(values)


def _steps_for_whole_groups(text: PreTrainedConfig, head_dim: int) -> int:
    """How many head sizes the width must grow by so that a key-value head serves as many heads as in the target."""
    heads_per_step = Fraction(text.num_attention_heads * head_dim, text.hidden_size)
    group = Fraction(text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    return next((n for n in range(1, text.num_attention_heads + 1) if (n * heads_per_step / group).denominator == 1), 1)


def _closest_width(config: PreTrainedConfig, budget: float, unit: int, head_dim: int) -> tuple[float, PreTrainedConfig]:
    """The width, in steps of `unit`, whose model comes closest to `budget`; returns (relative error, config)."""
    low, high = 1, max(1, config.get_text_config().hidden_size // unit)
    # Size grows with width: find the first width at or above the budget, then look at it and the one below.
    while low < high:
        middle = (low + high) // 2
        if count_parameters(_with_width(config, middle * unit, head_dim)) < budget:
            low = middle + 1
        else:
            high = middle
    configs = [_with_width(config, steps * unit, head_dim) for steps in (low, low - 1) if steps > 0]
    errors = [abs(count_parameters(c) - budget) / budget for c in configs]
    best = min(range(len(configs)), key=errors.__getitem__)
    return errors[best], configs[best]


def _with_width(config: PreTrainedConfig, width: int, head_dim: int) -> PreTrainedConfig:
    new = copy.deepcopy(config)
    text, old = new.get_text_config(), config.get_text_config()
    # Attention as wide, measured against the model, as in the target: Qwen3 and Gemma make it wider or narrower.
    attention_width = old.num_attention_heads * _head_dim(old) * width / old.hidden_size
    heads = max(1, round(attention_width / head_dim))
    values: dict[str, Any] = {"hidden_size": width, "num_attention_heads": heads}
    if getattr(old, "num_key_value_heads", None):
        wanted = max(1, round(heads * old.num_key_value_heads / old.num_attention_heads))
        values["num_key_value_heads"] = max(n for n in range(1, wanted + 1) if heads % n == 0)
    if vars(old).get("head_dim"):  # elsewhere it is computed from the other two
        values["head_dim"] = head_dim
    for name in _WIDTH_OF_MLP:
        mlp = getattr(old, name, None)
        if isinstance(mlp, int):
            # Round numbers for the hardware: to 256 where the target does, or the power of two it keeps to.
            step = min(256, mlp & -mlp)
            values[name] = max(step, -(-mlp * width // (old.hidden_size * step)) * step)
    if getattr(old, "word_embed_proj_dim", None) == old.hidden_size:  # OPT
        values["word_embed_proj_dim"] = width
    for name, value in values.items():
        setattr(text, name, value)
    return new


def _head_sizes(text: PreTrainedConfig) -> list[int]:
    """Halved heads only where whole ones leave the width too coarse a choice; rotary positions need an even size."""
    head_dim = _head_dim(text)
    rotary = getattr(text, "rope_parameters", None) or {}
    if any(isinstance(value, list) for value in rotary.values()):  # a factor for each dimension of a head (Phi 3)
        return [head_dim]
    return [n for n in (head_dim, head_dim // 2, head_dim // 4) if n >= 8 and n % 2 == 0] or [head_dim]


def _head_dim(text: PreTrainedConfig) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _check_embeddings_fit(text: PreTrainedConfig, budget: float, share: float) -> None:
    """Refuse a budget that is spent on the vocabulary before the first layer."""
    narrowest = min(_head_sizes(text))
    tied = getattr(text, "tie_word_embeddings", False)
    embeddings = text.vocab_size * narrowest * (1 if tied else 2)
    if embeddings > budget:
        hint = "" if tied else " with `tie_word_embeddings=True`, which halves that"
        raise ValueError(
            f"share={share} of the target is {budget:,.0f} parameters, and the embeddings of its {text.vocab_size:,} "
            f"tokens alone take {embeddings:,} at the narrowest width ({narrowest}). Ask for a larger share, or pass a "
            f"`config`{hint}."
        )


def larger_than_target(draft: PreTrainedModel, target: PreTrainedModel) -> str | None:
    """A warning where the draft has more parameters than its target, else None."""
    ratio = loaded_parameters(draft) / loaded_parameters(target)
    if ratio <= 1:
        return None
    return (
        f"The draft {draft.name_or_path!r} has {ratio:.3g} times the parameters of its target: are the two the "
        "wrong way round?"
    )
