"""Parallel drafts: plain causal LMs that predict several tokens in one pass, from mask tokens (PARD, arXiv 2504.18583).

After the text so far come k − 1 mask tokens, and what the model says at the last of them is its distribution for the
token at depth k, given the text alone. At depth 1 there is no mask token: as an ordinary draft it stays what it was.
"""

from typing import Any, NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_draftkd.models.tokenizers import tokenizer_size

# Where an engine finds the mask token in the draft's config.json. vLLM (0.25.1, v1/spec_decode/llm_base_proposer.py:
# `_init_parallel_drafting_params`) takes `pard_token`, which AMD's own drafts have, else `ptd_token_id`, and reads
# neither unless its speculative_config says `"parallel_drafting": true`. How many tokens a draft was trained for it
# does not read. SGLang has no parallel drafting with a standalone draft (sgl-project/sglang#23171, open in April
# 2026): it uses the same weights one token at a time (`--speculative-algorithm STANDALONE`). TensorRT-LLM has
# `PARDDecodingConfig(mask_token_id=...)`.
MASK_TOKEN_KEYS = ("pard_token", "ptd_token_id")
# Ours: K. Drafts of AMD's do not have it, and were trained for 8 tokens.
PARALLEL_TOKENS_KEY, _USUAL_PARALLEL_TOKENS = "parallel_tokens", 8

# Tokens that a vocabulary holds in reserve: Llama 3's <|reserved_special_token_0|>, Gemma's <unused0>, Mistral's
# [control_8].
_RESERVED = ("reserved", "unused", "[control_")


class ParallelDraft(NamedTuple):
    """What a draft's config says of drafting in parallel."""

    mask_token_id: int
    num_tokens: int
    """K: tokens that it was trained to predict in one pass."""


def parallel_draft(config: PreTrainedConfig) -> ParallelDraft | None:
    """Read a draft's config; None for an ordinary draft."""
    token = next((value for key in MASK_TOKEN_KEYS if (value := getattr(config, key, None)) is not None), None)
    num_tokens = int(getattr(config, PARALLEL_TOKENS_KEY, _USUAL_PARALLEL_TOKENS))
    return None if token is None or num_tokens == 1 else ParallelDraft(int(token), num_tokens)


def store_parallel_draft(config: Any, mask_token_id: int, num_tokens: int) -> None:
    """Write into a draft's config what engines and `parallel_draft` read."""
    setattr(config, MASK_TOKEN_KEYS[0], mask_token_id)
    setattr(config, PARALLEL_TOKENS_KEY, num_tokens)


def choose_mask_token(draft: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """An id that no text holds: the one in the draft's config, else a row that pads the vocabulary, else a token that
    the vocabulary keeps in reserve, else its padding token; a `ValueError` if there is none.
    """
    known = parallel_draft(draft.config)
    if known is not None:
        return known.mask_token_id
    size = tokenizer_size(tokenizer)
    if size < draft.config.get_text_config().vocab_size:
        return size
    for token_id, token in sorted(tokenizer.added_tokens_decoder.items()):
        if any(name in token.content.lower() for name in _RESERVED):
            return token_id
    pad = tokenizer.pad_token_id
    if pad is not None and pad not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id):
        return pad
    raise ValueError(
        "A parallel draft needs a mask token, an id that no text holds, but the draft's vocabulary has no padded row, "
        "no reserved token, and no padding token of its own. Name a token that your texts never hold in the draft's "
        "config, such as a special token for another task: `draft.config.pard_token = 123`."
    )
