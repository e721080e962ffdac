"""The pair's tokenizer: byte-level BPE over the standard library, with the marks of a conversation."""

from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 4096
DOCUMENT_END, PAD, SYSTEM, USER, ASSISTANT, TURN_END = (
    "<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
)  # fmt: skip
SPECIAL_TOKENS = (DOCUMENT_END, PAD, SYSTEM, USER, ASSISTANT, TURN_END)

# A user turn opens with `<|user|>` and nothing else, so a model that is given this one token writes a query. The
# generation marks cover the answer and the token that ends it, which is what TRL's `assistant_only_loss` asks for.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- elif message['role'] in ('system', 'user') -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- else -%}"
    "{{- raise_exception('The roles are system, user and assistant; got ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(documents: Iterable[str], vocabulary_size: int = VOCABULARY_SIZE) -> PreTrainedTokenizerFast:
    """Train the tokenizer. Every digit is its own token, so that numbers never seen can be copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=DOCUMENT_END,
        eos_token=TURN_END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """All documents as one stream of token ids [N], each ended by `<|endoftext|>`."""
    separator = tokenizer.convert_tokens_to_ids(DOCUMENT_END)
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.array([*ids, separator], dtype=np.uint16) for ids in encoded])
