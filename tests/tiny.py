"""Tiny deterministic models and a matching real tokenizer, built in code: what every test stands on.

    tokenizer = tiny_tokenizer()                      # a real PreTrainedTokenizerFast: byte-level BPE, chat template
    target = tiny_llama(seed=0)                       # also tiny_qwen3, tiny_gpt2, tiny_gpt_neox
    draft, target = tiny_pair("llama")                # agrees in part: acceptance is neither 0 nor 1
    draft, target = tiny_pair("qwen3", draft_vocab_size=304, target_vocab_size=320)  # padded differently

Nothing is downloaded, and nothing random is left unseeded. The weights are scaled so that distributions are peaked (as
a trained model's are) but greedy texts differ from prompt to prompt; `eos_scale` makes the end of sequence come up
inside generated text.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
VOCAB_SIZE = 300

# What the assistant says lies between the generation markers, its end-of-sequence included: TRL reads the mask there.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "A draft model guesses the next tokens and the target model checks them in one pass.",
    "When the target agrees with the draft, several tokens are accepted at once.",
    'Call the function {"name": "sorted", "arguments": {"iterable": [3, 1, 2], "reverse": true}}.',
    "def add(left: int, right: int) -> int:\n    return left + right\n",
    "What is the capital of France? The capital of France is Paris.",
    "Numbers: 0 1 2 3 4 5 6 7 8 9 10 11 12; there is nothing more to say about them here.",
]


@lru_cache
def _tokenizer_json(vocab_size: int, specials: tuple[str, ...], text: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"The built-in text gives {tokenizer.get_vocab_size()} tokens, not {vocab_size}.")
    return tokenizer.to_str()


def tiny_tokenizer(
    vocab_size: int = VOCAB_SIZE, *, pad_is_eos: bool = False, text: list[str] | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with exactly `vocab_size` tokens (262 or more), trained on a few lines of text.

    Ids: `<s>` 0, `</s>` 1, `<pad>` 2, then the roles' tokens. With `pad_is_eos` there is still a token `<pad>` at 2, so
    that every other id stays the same, but padding is done with `</s>`. Another `text` gives other merges: a
    tokenizer of the same size and other contents.
    """
    json = _tokenizer_json(vocab_size, (BOS, EOS, PAD, *ROLES), tuple(text or TEXT))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS if pad_is_eos else PAD,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def _finish(model: PreTrainedModel, seed: int, real_vocab_size: int, eos_scale: float) -> PreTrainedModel:
    """Draw every matrix from `seed`, zero the padded rows, and hand the model back in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = {id(embeddings.weight), id(head.weight)}
    # A tied head likes the token just read; larger layers drown that, or every text would be one token repeated.
    layer_gain = 4.0 if len(tables) == 1 else 1.5
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                continue
            # Rows of a table meet a normalised hidden state of width h: logits get a standard deviation of about 3.
            fan_in = parameter.shape[-1]
            gain = 3.0 if id(parameter) in tables else layer_gain
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain / fan_in**0.5)
        head.weight[model.config.eos_token_id] *= eos_scale
        for table in (embeddings, head):
            table.weight[real_vocab_size:] = 0
    return model.eval()


def _special_ids() -> dict[str, int]:
    return {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


# Config, and what each architecture's small models have; all in the names that every config understands.
_KINDS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True, "head_dim": 8}),
    # Learned positions, no dropout.
    "gpt2": (GPT2Config, {"tie_word_embeddings": True, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    # Parallel residual, `embed_in` and `embed_out`.
    "gpt_neox": (GPTNeoXConfig, {"tie_word_embeddings": False}),
}


def tiny_model(
    architecture: str,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
    *,
    num_layers: int = 2,
    hidden_size: int = 16,
    real_vocab_size: int | None = None,
    eos_scale: float = 1.0,
    **options: Any,
) -> Any:
    """A causal LM of one of four architectures, its embedding and head tied (Qwen3, GPT-2) or separate.

    Args:
        architecture: A key of `ARCHITECTURES`.
        seed: Decides every weight.
        vocab_size: Rows of the embedding and of the head.
        num_layers: Decoder layers.
        hidden_size: Width; a multiple of 8.
        real_vocab_size: Rows from here on are zero, as padding is. Default: none are.
        eos_scale: Factor on the head's end-of-sequence row; 2 makes it come up in most texts.
        options: Any other field of the architecture's config.
    """
    config_class, own = _KINDS[architecture]
    heads = hidden_size // 8
    common = {"hidden_size": hidden_size, "num_hidden_layers": num_layers, "num_attention_heads": heads}
    if architecture != "gpt2":
        common["intermediate_size"] = 2 * hidden_size
    if architecture in ("llama", "qwen3"):
        common["num_key_value_heads"] = heads
    config = config_class(
        **{"vocab_size": vocab_size, "max_position_embeddings": 256, **_special_ids(), **common, **own, **options}
    )
    model = AutoModelForCausalLM.from_config(config)
    return _finish(model, seed, real_vocab_size or vocab_size, eos_scale)


ARCHITECTURES: dict[str, Callable[..., Any]] = {name: partial(tiny_model, name) for name in _KINDS}
tiny_llama, tiny_qwen3, tiny_gpt2, tiny_gpt_neox = ARCHITECTURES.values()


def save_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """Write a `tiny_llama` as llama.cpp's converter does, without its tokenizer."""
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        values = weight
        if "q_proj" in name or "k_proj" in name:  # GGUF pairs neighbouring rows where transformers pairs halves
            heads = config.num_attention_heads
            halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
            values = halves.transpose(1, 2).reshape(weight.shape)
        stem = name.removesuffix(".weight")
        writer.add_tensor(names.get_name(stem) + ".weight", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny_pair(
    architecture: str = "llama",
    *,
    agreement: float = 0.9,
    seed: int = 0,
    draft_vocab_size: int = VOCAB_SIZE,
    target_vocab_size: int = VOCAB_SIZE,
    real_vocab_size: int | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A draft and a target of one architecture that agree in part.

    Args:
        architecture: A key of `ARCHITECTURES`.
        agreement: The draft's weights are `agreement` times the target's plus `1 - agreement` times others: 1 is a
            draft that is its own target, 0 one that has nothing to do with it.
        seed: Decides every weight of both.
        draft_vocab_size: Rows of the draft's embedding and head.
        target_vocab_size: The same of the target. Different sizes are padding.
        real_vocab_size: Rows from here on are padding, and zero; the smaller of the two sizes by default.
        options: Passed to both models.

    Returns:
        Draft and target, in this order, both in eval mode.
    """
    build = ARCHITECTURES[architecture]
    real = real_vocab_size or min(draft_vocab_size, target_vocab_size)
    target = build(seed, target_vocab_size, real_vocab_size=real, **options)
    draft = build(seed + 1000, draft_vocab_size, real_vocab_size=real, **options)
    theirs = dict(target.named_parameters())
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            # Same name, same shape, except that the vocabularies may be padded differently.
            wanted = theirs[name]
            rows = min(len(parameter), len(wanted))
            parameter[:rows] = agreement * wanted[:rows] + (1 - agreement) * parameter[:rows]
    return draft, target


def tiny_prompts(tokenizer: PreTrainedTokenizerFast, count: int = 4) -> list[torch.Tensor]:
    """`count` prompts [1, T] of different lengths, bos first."""
    texts = [f"{TEXT[i % len(TEXT)][: 12 + 5 * i]} {i}" for i in range(count)]
    return [tokenizer(BOS + text, return_tensors="pt").input_ids for text in texts]
