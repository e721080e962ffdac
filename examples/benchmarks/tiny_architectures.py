"""A tiny model of every causal LM class in the installed transformers, made from its config class alone.

Whatever sizes a config class has are set by name; what it derives from them, such as the kinds of its layers, it
derives itself. Weights are random and large enough for peaked distributions.
"""

import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

LAYERS = 4
VOCAB_SIZE = 300

# Name of a size -> its tiny value, for every name under which architectures have it.
_SIZES = {
    32: ("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim", "embedding_size", "attention_hidden_size"),
    48: (
        "intermediate_size",
        "n_inner",
        "ffn_dim",
        "decoder_ffn_dim",
        "encoder_ffn_dim",
        "ffn_hidden_size",
        "dim_ff",
        "dff",
        "d_inner",
        "intermediate_size_mlp",
        "dense_intermediate_size",
        "prefix_dense_intermediate_size",
        "shared_intermediate_size",
    ),
    16: (
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "shared_experts_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "expert_ffn_hidden_size",
        "router_hidden_size",
    ),
    4: (
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "attention_heads",
        "decoder_attention_heads",
        "encoder_attention_heads",
        "num_decoder_attention_heads",
        "swa_num_attention_heads",
        "num_experts",
        "n_routed_experts",
        "num_local_experts",
        "moe_num_experts",
        "index_n_heads",
        "linear_num_value_heads",
        "linear_num_heads",
        "o_groups",
        "query_pre_attn_scalar",
        "laurel_rank",
        "zero_expert_num",
        "rotary_dim",
        "num_query_groups",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
    ),
    1: ("topk_group",),
    2: (
        "num_key_value_heads",
        "num_kv_heads",
        "swa_num_key_value_heads",
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_k",
        "moe_topk",
        "n_group",
        "num_expert_group",
        "linear_num_key_heads",
    ),
    8: (
        "head_dim",
        "swa_head_dim",
        "global_head_dim",
        "dim_head",
        "d_head",
        "kv_channels",
        "v_head_dim",
        "qk_head_dim",
        "q_lora_rank",
        "kv_lora_rank",
        "o_lora_rank",
        "linear_head_dim",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "index_head_dim",
        "hidden_size_per_layer_input",
        "sliding_window",
        "sliding_window_size",
        "local_attention",
        "window_size",
        "attention_chunk_size",
        "hc_lowrank",
        "d_rel",
        "rel_extent",
        "gated_norm_rank",
    ),
    256: (
        "max_position_embeddings",
        "n_positions",
        "n_ctx",
        "max_seq_len",
        "model_max_length",
        "context_length",
        "max_target_positions",
        "index_topk",
    ),
    VOCAB_SIZE: ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"),
}
_DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    "num_blocks",
)
_SIZE_OF = {name: size for size, names in _SIZES.items() for name in names} | dict.fromkeys(_DEPTHS, LAYERS)

# What cannot be told from names.
_SPECIAL: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "global_head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "bert": {"is_decoder": True},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4},
    "minicpm3": {"dim_model_base": 32},  # or logits are eight times as large, and every draft is right
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "opt": {"word_embed_proj_dim": 32},
    "phi3": {"original_max_position_embeddings": 256},
    "deepseek_v2": {"first_k_dense_replace": 1, "num_experts_per_tok": 2, "n_routed_experts": 4},
    "deepseek_v3": {"first_k_dense_replace": 1},
}


def architectures() -> list[str]:
    """The model types of text-only causal LMs, encoder-decoders and whole multimodal models left out.

    A config that cannot be made without arguments is named on standard error and left out.
    """
    found = []
    for config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        try:
            config = config_class()
        except Exception as error:  # a config's validators raise whatever they like
            print(f"left out: {config_class.__name__}: {type(error).__name__}", file=sys.stderr)
            continue
        if config.get_text_config(decoder=True) is config and not config.is_encoder_decoder:
            found.append(config.model_type)
    return sorted(set(found))


def tiny_config(
    model_type: str, vocab_size: int = VOCAB_SIZE, special_ids: tuple[int, int, int] = (0, 1, 2)
) -> PreTrainedConfig:
    """A config of that type with tiny sizes and these ids of bos, eos and pad; everything else is as its class says."""
    config_class = next(c for c in MODEL_FOR_CAUSAL_LM_MAPPING if c.model_type == model_type)
    default = config_class()
    named = {alias: real for alias, real in config_class.attribute_map.items() if hasattr(default, real)}
    values: dict[str, Any] = {}
    for name in vars(default):
        if name in _SIZE_OF and name not in named and vars(default)[name] is not None:
            values[name] = vocab_size if _SIZE_OF[name] == VOCAB_SIZE else _SIZE_OF[name]
    if "qk_rope_head_dim" in values:  # from which these follow
        values.pop("head_dim", None)
        values.pop("qk_head_dim", None)
    if "kv_lora_rank" in values:  # keys of as many heads as queries
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), special_ids, strict=True))
    dropout = [n for n in vars(default) if n.endswith(("dropout", "pdrop", "dropout_prob")) and getattr(default, n)]
    return config_class(**values | dict.fromkeys(dropout, 0.0) | _SPECIAL.get(model_type, {}))


def tiny_model(
    model_type: str, seed: int = 0, vocab_size: int = VOCAB_SIZE, special_ids: tuple[int, int, int] = (0, 1, 2)
) -> PreTrainedModel:
    """A tiny model in eval mode, with every weight drawn from `seed`; greedy texts of such a model vary."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(model_type, vocab_size, special_ids))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            head = model.get_output_embeddings()
            if head is not None:
                head.weight.mul_(2)
    return model.eval()
