"""The language model inside a multimodal checkpoint, as an ordinary causal LM.

    text = extract_text_model("org/vision-language")    # in `loading`; `text_model_of` takes a model in memory
    text.save_pretrained("text-only")

Gemma 3, Mistral 3, Llava, SmolVLM, Qwen3-VL and similar models are a causal LM with a vision or audio tower beside it.
Draft and target are compared on text alone, so the tower is left out. Whether what remains computes the same is not
taken on trust: both models read a probe, and their logits must be equal. Equal means bit for bit; in float32, which
tells a mistake from rounding, also up to rounding: PaliGemma counts positions from 1, the text model from 0.
"""

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from hf_draftkd.models.forward import evaluating
from hf_draftkd.models.tokenizers import SPECIAL_IDS, listed_ids

# Text models without a causal LM class, the model type that computes the same on text alone, and what its config must
# say besides.
_EQUAL_ON_TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
}
_PROBE_LENGTH = 24
_ROUNDING = 1e-5  # of the largest logit


def text_model_of(model: PreTrainedModel) -> PreTrainedModel:
    """What `extract_text_model` returns for a multimodal model in memory; the same errors."""
    name = repr(model.name_or_path or type(model).__name__)
    if not is_multimodal(model.config):
        raise ValueError(f"{name} is a text model already ({model.config.model_type!r}): use it as it is.")
    _check_plain(model, name)
    config = text_config(model.config, name)
    found = text_class(model.config)
    assert found is not None
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    config.tie_word_embeddings = tied
    config.architectures = [found.__name__]
    config._attn_implementation = decoder.config._attn_implementation

    with init_empty_weights(include_buffers=False):
        text = found(config)
    text.base_model.load_state_dict(decoder.state_dict(), strict=False, assign=True)
    text.get_output_embeddings().load_state_dict(head.state_dict(), assign=True)
    if tied:
        text.tie_weights()
    empty = [key for key, parameter in text.named_parameters() if parameter.is_meta]
    if empty:
        raise ValueError(f"The text model of {name} cannot stand alone: it has no weights for {empty[0]}.")
    _share_buffers(text.base_model, decoder)
    text.to(model.device)
    text.generation_config = copy.deepcopy(model.generation_config)
    text.name_or_path = text.config.name_or_path = model.name_or_path
    text.eval()
    _check_equal(text, model, name)
    return text


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether the language model is only a part of what this config describes."""
    towers = ("vision_config", "audio_config")
    return config.get_text_config(decoder=True) is not config or any(getattr(config, t, None) for t in towers)


def text_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The causal LM class of a multimodal config's text part; None where none of transformers computes the same."""
    text = config.get_text_config(decoder=True)
    if text is config:
        return None
    equal, _ = _EQUAL_ON_TEXT.get(text.model_type, (None, {}))
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[equal] if equal else type(text), None)
    return found[0] if isinstance(found, tuple) else found


def text_config(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """The config of a multimodal model's text part, for the class that `text_class` says, which it must have."""
    text, found = config.get_text_config(decoder=True), text_class(config)
    if found is None:
        raise ValueError(
            f"The text part of {name} ({text.model_type!r}) has no causal LM class in transformers that computes the "
            "same on text. Choose a text-only model of the same family."
        )
    if text.model_type not in _EQUAL_ON_TEXT:
        new = copy.deepcopy(text)
    else:
        values = {key: value for key, value in text.to_dict().items() if key != "model_type"}
        # Sections for time, height and width: on text all three positions are equal.
        values["rope_parameters"] = {k: v for k, v in text.rope_parameters.items() if not k.startswith("mrope")}
        new = found.config_class(**values, **_EQUAL_ON_TEXT[text.model_type][1])
    for key in (*SPECIAL_IDS, "dtype", "quantization_config"):
        value = getattr(config, key, None)
        # Gemma 3 lists its ends of sequence for the whole; what its text part names is the class's own.
        if value is not None and (key == "eos_token_id" or getattr(new, key, None) is None):
            setattr(new, key, value)
    # Where the head stands outside the text part, as it does in most, the whole says whether it is tied.
    new.tie_word_embeddings = getattr(config, "tie_word_embeddings", new.tie_word_embeddings)
    return new


def _check_plain(model: PreTrainedModel, name: str) -> None:
    instead = (
        "Extract and save the text model once, on the CPU in plain weights (`draftkd init --text_of MODEL`, or "
        "`extract_text_model(path).save_pretrained(directory)`), and load that as you like."
    )
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{name} is quantised, and its text model cannot be taken out of packed weights. {instead}")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise ValueError(f"{name} is spread over several devices. {instead}")


def _share_buffers(text: nn.Module, decoder: nn.Module) -> None:
    """Tables that are never saved, such as rotary frequencies: the decoder's may have another precision or device."""
    ours = dict(text.named_buffers())
    for name, buffer in decoder.named_buffers():
        if name in ours:
            owner, _, key = name.rpartition(".")
            setattr(text.get_submodule(owner), key, buffer)


@torch.no_grad()
def _check_equal(text: PreTrainedModel, whole: PreTrainedModel, name: str) -> None:
    numbers = [value for key, value in vars(whole.config).items() if key.endswith(("_id", "_index"))]
    special = {number for value in numbers for number in listed_ids(value)}  # Gemma 3 has two ends of sequence
    plain = [i for i in range(min(text.config.vocab_size, 1000)) if i not in special]
    ids = torch.tensor([[plain[7 * i % len(plain)] for i in range(_PROBE_LENGTH)]], device=whole.device)
    with evaluating(whole):
        wanted = whole(input_ids=ids, use_cache=False).logits
    got = text(input_ids=ids, use_cache=False).logits
    allowed = _ROUNDING * float(wanted.abs().max()) if text.dtype == torch.float32 else 0.0
    difference = float((got - wanted).abs().max())
    if not difference <= allowed:
        instead = "Choose a text-only model of the same family."
        if text.dtype != torch.float32:
            instead += f" Whether that is rounding only shows in float32 (here {text.dtype}): load it so."
        raise ValueError(
            f"The text model taken out of {name} is not equal to the whole: logits differ by up to {difference:.3g}. "
            + instead
        )
