"""Models, tokenizer and rows of any size, made in code: what the speed and memory benchmarks train on.

Weights and tokens are random. Speed does not depend on their values, and every contender gets the same ones.
"""

from dataclasses import dataclass

import torch
from datasets import Dataset, Features
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, END = 0, 1


@dataclass(frozen=True)
class Sizes:
    """What is trained on.

    Attributes:
        vocab_size: Tokens of the vocabulary.
        batch_size: Rows a step.
        prompt_tokens: Tokens of every prompt.
        completion_tokens: Tokens of every completion.
        draft_layers: Layers of the draft.
        draft_width: Its width.
        target_layers: Layers of the target.
        target_width: Its width.
    """

    vocab_size: int = 131_072
    batch_size: int = 4
    prompt_tokens: int = 256
    completion_tokens: int = 256
    draft_layers: int = 1
    draft_width: int = 256
    target_layers: int = 4
    target_width: int = 512

    @property
    def step_tokens(self) -> int:
        """Completion tokens of a step."""
        return self.batch_size * self.completion_tokens


def tokenizer_of(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, `w2 w3 ...`, whose ids are their numbers."""
    words = {"<pad>": PAD, "<end>": END, **{f"w{number}": number for number in range(2, vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left", model_max_length=2**20
    )


def model_of(vocab_size: int, layers: int, width: int, context: int, seed: int) -> LlamaForCausalLM:
    """A Llama with its own head, in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Logits with a standard deviation of 3, and an end of text that is hardly ever drawn: completions are whole.
        model.lm_head.weight.mul_(3 / (config.initializer_range * width**0.5))[END] = 0
    return model


def pair_of(sizes: Sizes) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """Draft and target."""
    context = sizes.prompt_tokens + sizes.completion_tokens
    draft = model_of(sizes.vocab_size, sizes.draft_layers, sizes.draft_width, context, seed=1)
    target = model_of(sizes.vocab_size, sizes.target_layers, sizes.target_width, context, seed=2)
    return draft, target.eval()


def rows_of(sizes: Sizes, num_rows: int, seed: int = 0) -> Dataset:
    """Rows of random words: `prompt` as text, `prompt_ids` and `completion_ids`."""
    generator = torch.Generator().manual_seed(seed)
    length = sizes.prompt_tokens + sizes.completion_tokens
    ids = torch.randint(2, sizes.vocab_size, (num_rows, length), generator=generator)
    prompts, completions = ids[:, : sizes.prompt_tokens].tolist(), ids[:, sizes.prompt_tokens :].tolist()
    texts = [" ".join(f"w{token}" for token in prompt) for prompt in prompts]
    return Dataset.from_dict({"prompt": texts, "prompt_ids": prompts, "completion_ids": completions})


def with_cached_distributions(rows: Dataset, vocab_size: int, top_k: int, seed: int = 0) -> Dataset:
    """Add the columns that `cache_target_distributions(top_k=...)` adds, filled with random distributions.

    So that no target is ever loaded where memory is measured.
    """
    from hf_draftkd.data.kept_distributions import CacheOptions

    generator = torch.Generator().manual_seed(seed)
    cached = CacheOptions().features(vocab_size)
    columns: dict[str, list] = {name: [] for name in cached}
    for completion in rows["completion_ids"]:
        # One more logit than tokens kept represents the tail, and is the least likely.
        logits = torch.randn(len(completion), top_k + 1, generator=generator) * 3
        logprobs = logits.log_softmax(dim=-1).sort(dim=-1, descending=True).values
        # Distinct by construction: one token from each of top_k equal stretches of the vocabulary.
        stretch = vocab_size // top_k
        ids = torch.arange(top_k) * stretch + torch.randint(stretch, (len(completion), top_k), generator=generator)
        columns["completion_logprobs"].append(logprobs[:, 0].tolist())
        columns["target_token_ids"].append(ids.tolist())
        columns["target_logprobs"].append(logprobs[:, :-1].tolist())
        columns["target_tail_logprob"].append(logprobs[:, -1].tolist())
        columns["target_temperature"].append(1.0)
        columns["target_vocab_size"].append(vocab_size)
    features = Features({**rows.features, **cached})
    return Dataset.from_dict({**rows.to_dict(), **columns}, features=features)
