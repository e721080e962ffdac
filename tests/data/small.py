"""A target of a few thousand weights and its chat tokenizer, for the tests of this room."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if 'tool_calls' in message %}{{ message.tool_calls | tojson }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<s>", "<|end|>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]


def make_tokenizer(template: str | None = TEMPLATE, with_pad: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts `<s>` in front of every text, as Llama's tokenizer does."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=264, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["the cat sat on the mat"], trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    pad = {"pad_token": "<pad>"} if with_pad else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|end|>", **pad)
    tokenizer.chat_template = template
    return tokenizer


def make_target(vocab_size: int = 264, seed: int = 0, **config: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    values = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    # A wide initialisation gives the random target opinions: greedy texts differ and end tokens do turn up.
    values = {"max_position_embeddings": 128, "initializer_range": 0.5, **values, **special, **config}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **values)).eval()
    model.name_or_path = "tiny/target"
    return model
