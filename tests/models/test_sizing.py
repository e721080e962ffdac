"""Bytes of weights from a config are those of the loaded model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_draftkd.models.sizing import loaded_parameters, sized_config, weight_bytes
from tests import tiny


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_those_of_the_loaded_model(bits, tied, tmp_path):
    """A tied head counted twice, or quantised; scales forgotten: gigabytes of a large target."""
    tiny.tiny_llama(hidden_size=64, tie_word_embeddings=tied).save_pretrained(tmp_path)
    options = {32: {"dtype": torch.float32}, 16: {"dtype": torch.bfloat16}}.get(bits) or {
        "dtype": torch.bfloat16,
        "quantization_config": BitsAndBytesConfig(**{f"load_in_{bits}bit": True}),
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    held = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    for weight in model.parameters():
        if bits == 4 and hasattr(weight, "quant_state"):
            held += weight.quant_state.absmax.numel() * weight.quant_state.absmax.element_size()
        elif bits == 8 and getattr(weight, "SCB", None) is not None:
            held += weight.SCB.numel() * weight.SCB.element_size()
    assert weight_bytes(model.config, bits) == held


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_or_adapted_model_has_the_parameters_of_the_plain_one(tied):
    """Weights of GPTQ and AWQ are no parameters: a 7B target counted as its embeddings, and MBSU and shares by that."""
    plain, quantised = (tiny.tiny_llama(num_layers=3, tie_word_embeddings=tied) for _ in range(2))
    for layer in quantised.model.layers:
        weight = layer.mlp.up_proj.weight
        del layer.mlp.up_proj.weight
        layer.mlp.up_proj.register_buffer("qweight", torch.zeros(weight.numel() // 8, dtype=torch.int32))
    quantised.hf_quantizer, quantised.config.quantization_config = object(), {"quant_method": "gptq", "bits": 4}
    assert quantised.num_parameters() < plain.num_parameters()
    assert loaded_parameters(quantised) == loaded_parameters(plain) == plain.num_parameters()
    adapted = get_peft_model(tiny.tiny_llama(num_layers=3, tie_word_embeddings=tied), LoraConfig(task_type="CAUSAL_LM"))
    assert loaded_parameters(adapted) == plain.num_parameters()
    assert sized_config(quantised, 0.5).to_dict() == sized_config(plain, 0.5).to_dict()
