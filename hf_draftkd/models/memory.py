"""How many bytes the weights of a model take, known from its config alone; nothing is loaded."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

# A draft trained in float32 by AdamW: weights, gradients and two moments.
TRAINED_BYTES = 16
# bitsandbytes keeps a float32 scale for each 64 weights in 4 bits (without nested quantisation), for each row in 8.
_BLOCK = 64


def weight_bytes(config: PreTrainedConfig, bits: int = 16) -> int:
    """Bytes of the weights of the causal LM that a config describes.

    Args:
        config: Of a causal LM; it is built on torch's meta device.
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
