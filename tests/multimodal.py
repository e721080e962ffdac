"""Tiny multimodal models, built from configs: a causal LM with a vision or audio tower beside it."""

from typing import Any
from unittest import mock

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
GEMMA3N = {
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
    "sliding_window": 8,
    "vocab_size_per_layer_input": 300,
}
GEMMA4 = {
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
    "sliding_window": 8,
    "vocab_size_per_layer_input": 300,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}

# Class name -> (values of the text config, values of the vision config, others of the whole).
MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Gemma3": ({"sliding_window": 8}, VISION, {"image_token_index": 299, "mm_tokens_per_image": 4}),
    "Gemma3n": (GEMMA3N, {}, {}),
    "Gemma4": (GEMMA4, {}, {}),
    "Idefics3": ({"model_type": "llama"}, VISION, {"image_token_id": 299, "scale_factor": 2}),
    "Llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", **VISION}, {"image_token_index": 299}),
    "Mistral3": ({"model_type": "mistral"}, {"model_type": "pixtral", **VISION}, {"image_token_index": 299}),
    "PaliGemma": ({"model_type": "gemma"}, {"model_type": "siglip_vision_model", **VISION}, {"image_token_index": 299}),
    "Qwen2VL": ({"rope_parameters": SECTIONS}, {"embed_dim": 16, "depth": 1, "num_heads": 2}, {}),
    "Qwen2_5_VL": ({"rope_parameters": SECTIONS}, QWEN_VISION, {}),
    "Qwen3VL": ({"rope_parameters": SECTIONS}, QWEN_VISION, {"image_token_id": 299}),
    "Qwen3VLMoe": ({"rope_parameters": SECTIONS, **EXPERTS}, QWEN_VISION, {"image_token_id": 299}),
    "SmolVLM": ({"model_type": "llama"}, VISION, {"image_token_id": 299, "scale_factor": 2}),
}


def tiny_multimodal(name: str, *, tied: bool = False, tied_text: bool | None = None, seed: int = 0) -> PreTrainedModel:
    """A model of the class `name` + "ForConditionalGeneration".

    Args:
        name: A key of `MULTIMODAL`.
        tied: What the config of the whole says about embedding and head.
        tied_text: What its text config says. Default: the same.
        seed: Decides the weights.
    """
    text, vision, others = MULTIMODAL[name]
    model_class = getattr(transformers, f"{name}ForConditionalGeneration")
    config = model_class.config_class(
        text_config={**TEXT, **text, "tie_word_embeddings": tied if tied_text is None else tied_text},
        **({"vision_config": vision} if vision else {}),
        tie_word_embeddings=tied,
        **others,
    )
    with torch.random.fork_rng(devices=[]), mock.patch.object(transformers.AutoModel, "from_config", _without_timm):
        torch.manual_seed(seed)
        return model_class(config).eval()


_from_config = transformers.AutoModel.from_config


def _without_timm(config: PreTrainedConfig, **options: Any) -> torch.nn.Module:
    """Gemma 3n's vision tower comes from timm, which the tests do without; text never reaches it."""
    if config.model_type in ("gemma3n_vision", "gemma3n_audio"):
        return torch.nn.Identity()
    return _from_config(config, **options)
