"""What a target of some size takes while its draft is trained: the table of guides/big_targets.md.

    python examples/memory_by_size.py

Weights only, from configs: nothing is loaded. Activations and the rest of a program come on top.
"""

from transformers import LlamaConfig

from hf_draftkd.models.sizing import TRAINED_BYTES, count_parameters, weight_bytes

# Hidden size, MLP, layers, heads, key-value heads, vocabulary.
SHAPES = {
    "Llama 3.2 1B": (2048, 8192, 16, 32, 8, 128_256),
    "Llama 3.2 3B": (3072, 8192, 28, 24, 8, 128_256),
    "Llama 3.1 8B": (4096, 14_336, 32, 32, 8, 128_256),
    "Llama 3.1 70B": (8192, 28_672, 80, 64, 8, 128_256),
    "Llama 3.1 405B": (16_384, 53_248, 126, 128, 8, 128_256),
}
DRAFTS = (0.1, 0.5, 1.0, 3.0)  # billions of parameters
GB = 10**9


def config_of(name: str) -> LlamaConfig:
    hidden, mlp, layers, heads, key_value_heads, vocabulary = SHAPES[name]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=name.startswith("Llama 3.2"),
    )


def main() -> None:
    print("| target of the shape of | parameters | bf16 | 8 bits | 4 bits |\n|---|---|---|---|---|")
    for name in SHAPES:
        config = config_of(name)
        sizes = [f"{weight_bytes(config, bits) / GB:.1f} GB" for bits in (16, 8, 4)]
        print(f"| {name} | {count_parameters(config) / GB:.2f} B | {' | '.join(sizes)} |")
    print("\n| draft | weights, gradients and AdamW's moments, float32 |\n|---|---|")
    for size in DRAFTS:
        print(f"| {size} B | {size * TRAINED_BYTES:.1f} GB |")
    # An id and a log-probability for each, and those of the written token and of all others together.
    kept = 64 * (4 + 2) + 2 + 2
    print(f"\nA cache of the 64 likeliest of 128,256 tokens takes {kept} bytes a token in memory.")


if __name__ == "__main__":
    main()
