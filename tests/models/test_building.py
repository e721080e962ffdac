"""New drafts: layers of the target copied bit for bit, or its architecture at a share of the size."""

from itertools import pairwise

import pytest
import torch
from torch.nn import Parameter
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Phi3Config,
    Qwen3MoeConfig,
    T5Config,
)

from examples.benchmarks.tiny_architectures import LAYERS, VOCAB_SIZE, tiny_config, tiny_model
from hf_draftkd.models.building import build_draft
from hf_draftkd.models.sizing import count_parameters, cut_layers, evenly_spread, sized_config
from tests.tiny import ARCHITECTURES, tiny_gpt2, tiny_llama, tiny_prompts, tiny_qwen3, tiny_tokenizer

PROMPT = tiny_prompts(tiny_tokenizer(), 2)[1]


def _same_weights(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def _works_as_a_draft(draft, target, tmp_path):
    """With cache and without, saved and loaded again, it drafts and changes nothing."""
    cached, uncached = (draft.generate(PROMPT, max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, uncached)
    draft.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert _same_weights(draft, reloaded)
    plain = target.generate(PROMPT, max_new_tokens=8, do_sample=False)
    assert torch.equal(target.generate(PROMPT, max_new_tokens=8, do_sample=False, assistant_model=reloaded), plain)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_layers_are_the_target(architecture, tmp_path):
    target = ARCHITECTURES[architecture](num_layers=3)
    draft = build_draft(target, num_layers=3)
    with torch.no_grad():
        torch.testing.assert_close(draft(PROMPT).logits, target(PROMPT).logits, rtol=0, atol=0)
    _works_as_a_draft(draft, target, tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_chosen_layers_are_copied_and_compute_what_they_did(architecture, tmp_path):
    """Layers in the wrong order, or a head left random, would pass a test of shapes.

    The reference is the target itself with its other layers taken out by hand.
    """
    target = ARCHITECTURES[architecture](num_layers=5)
    draft = build_draft(target, layers=[0, 2, -1])
    assert draft.config.num_hidden_layers == 3

    base = target.base_model
    name = "h" if architecture == "gpt2" else "layers"
    all_layers = getattr(base, name)
    setattr(base, name, torch.nn.ModuleList([all_layers[i] for i in (0, 2, 4)]))
    target.config.num_hidden_layers = 3
    assert _same_weights(draft, target)
    with torch.no_grad():
        torch.testing.assert_close(draft(PROMPT).logits, target(PROMPT, use_cache=False).logits, rtol=0, atol=0)
    setattr(base, name, all_layers)
    target.config.num_hidden_layers = 5
    _works_as_a_draft(draft, target, tmp_path)


def test_a_copy_is_a_copy():
    """Shared storage would train the target along with the draft."""
    target = tiny_llama().requires_grad_(False)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    draft = build_draft(target, layers=[0])
    assert all(p.requires_grad for p in draft.parameters())
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    assert not any(p.requires_grad for p in target.parameters())


def test_per_layer_lists_are_cut_with_the_layers(tmp_path):
    """A list of layer types left at full length makes the cache and the masks those of other layers."""
    target = tiny_qwen3(
        num_layers=4,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=2,
        layer_types=["full_attention", "full_attention", "sliding_attention", "sliding_attention"],
    )
    # As many ends of sequence as layers: ids are no layers.
    target.generation_config.eos_token_id = target.config.eos_token_id = [1, 4, 5, 6]
    assert cut_layers(target.config, [1, 3]).eos_token_id == [1, 4, 5, 6]
    draft = build_draft(target, layers=[1, 3])
    assert draft.config.layer_types == ["full_attention", "sliding_attention"]
    assert draft.config.max_window_layers == 1
    assert draft.config.eos_token_id == [1, 4, 5, 6]
    assert draft.generation_config.eos_token_id == [1, 4, 5, 6]
    _works_as_a_draft(draft, target, tmp_path)


def test_gemma3_keeps_its_layer_types(tmp_path):
    config = Gemma3TextConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    target = Gemma3ForCausalLM(config).eval()
    draft = build_draft(target, layers=[1, 2])
    assert draft.config.layer_types == ["full_attention", "sliding_attention"]
    _works_as_a_draft(draft, target, tmp_path)


def test_layers_of_another_kind_are_refused_rather_than_left_random(tmp_path):
    """Layers may alternate by position: dense and mixture of experts, global and local attention."""
    sizes = {"vocab_size": 300, "hidden_size": 16, "bos_token_id": 0, "eos_token_id": 1}
    experts = Qwen3MoeConfig(
        intermediate_size=32,
        moe_intermediate_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        mlp_only_layers=[0, 3],
        **sizes,
    )
    target = AutoModelForCausalLM.from_config(experts).eval()
    draft = build_draft(target, layers=[0, 1, 3])
    assert draft.config.mlp_only_layers == [0, 2]
    assert torch.equal(draft.model.layers[1].mlp.gate.weight, target.model.layers[1].mlp.gate.weight)
    target.config.mlp_only_layers, target.config.decoder_sparse_step = [], 2  # experts in every second layer only
    with pytest.raises(ValueError, match="in layer 1, Qwen3MoeSparseMoeBlock would become Qwen3MoeMLP"):
        build_draft(target, layers=[1, 2])

    neo = GPTNeoConfig(num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], **sizes)
    target = AutoModelForCausalLM.from_config(neo).eval()
    draft = build_draft(target, layers=[1])
    assert draft.config.attention_layers == ["local"]
    _works_as_a_draft(draft, target, tmp_path)


def test_generation_config_has_the_special_ids_and_nothing_of_the_targets_sampling():
    target = tiny_llama(vocab_size=320, real_vocab_size=300)
    target.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.1)
    target.generation_config.eos_token_id = [1, 5]
    draft = build_draft(target, num_layers=1, tokenizer=tiny_tokenizer())
    own = draft.generation_config
    assert (own.bos_token_id, own.eos_token_id, own.pad_token_id) == (0, [1, 5], 2)
    assert own.suppress_tokens == list(range(300, 320))
    assert not own.do_sample
    assert (own.temperature, own.top_p, own.repetition_penalty) == (None, None, None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("share", [0.1, 0.4])
def test_share_of_the_target(architecture, share, tmp_path):
    target = ARCHITECTURES[architecture](num_layers=6, hidden_size=64)
    draft = build_draft(target, share=share)
    assert abs(draft.num_parameters() / target.num_parameters() / share - 1) < 0.25
    assert draft.config.num_hidden_layers <= 6
    assert draft.config.tie_word_embeddings == target.config.tie_word_embeddings
    assert draft.config.model_type == target.config.model_type
    _works_as_a_draft(draft, target, tmp_path)


def test_the_published_shape():
    """Llama 2 Chat Drafter 115M (arXiv 2403.00858): 4 layers, hidden 1024, MLP 2816, 8 heads under the 7B model."""
    with torch.device("meta"):
        target = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32000,
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=32,
            )
        )
    config = sized_config(target, 0.0164)
    shape = (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads)
    assert shape == (4, 1024, 2816, 8)
    assert count_parameters(config) == 2 * 32000 * 1024 + 4 * (4 * 1024**2 + 3 * 1024 * 2816 + 2 * 1024) + 1024


def test_a_large_share_takes_more_layers():
    target = tiny_llama(num_layers=12, hidden_size=64)
    config = sized_config(target, 0.8)
    assert config.num_hidden_layers > 6
    assert abs(count_parameters(config) / target.num_parameters() / 0.8 - 1) < 0.1


def test_share_keeps_grouped_heads():
    target = tiny_llama(num_layers=8, hidden_size=128, num_attention_heads=16, num_key_value_heads=4, head_dim=8)
    draft = build_draft(target, share=0.2)
    assert draft.config.num_attention_heads == 4 * draft.config.num_key_value_heads


def test_share_keeps_heads_that_have_a_factor_for_each_dimension():
    """Halved heads: `Attempting to broadcast a dimension of length 8`."""
    factors = {name: [1.0] * 16 for name in ("short_factor", "long_factor")}
    config = Phi3Config(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, **factors},
        original_max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    draft = build_draft(AutoModelForCausalLM.from_config(config), share=0.05)
    assert draft.config.hidden_size // draft.config.num_attention_heads == 32


def test_random_weights_depend_on_the_seed_alone():
    target = tiny_llama()
    torch.manual_seed(1)
    first = build_draft(target, share=0.5)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert _same_weights(build_draft(target, share=0.5), first)
    assert not _same_weights(build_draft(target, share=0.5, seed=1), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_dtype_is_the_targets_unless_given():
    target = tiny_llama().to(torch.bfloat16)
    assert build_draft(target, num_layers=1).dtype == torch.bfloat16
    assert build_draft(target, share=0.5, dtype=torch.float32).dtype == torch.float32


def test_a_given_config_of_another_architecture(tmp_path):
    target = tiny_llama()
    draft = build_draft(target, config=tiny_gpt2(hidden_size=8, num_layers=1).config)
    assert draft.config.model_type == "gpt2"
    _works_as_a_draft(draft, target, tmp_path)


def test_of_a_given_config_only_the_architecture_is_taken(tmp_path):
    """Random weights went by the name of the model whose config it was, and were quantised when they were loaded."""
    tiny_llama().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    draft = build_draft(tiny_llama(), config=config)
    assert draft.name_or_path == draft.config.name_or_path == ""
    assert not hasattr(draft.config, "quantization_config")


def test_evenly_spread_has_both_ends_and_no_layer_twice():
    for depth in range(1, 40):
        for count in range(1, depth + 1):
            layers = evenly_spread(count, depth)
            assert len(set(layers)) == count
            assert layers == sorted(layers)
            assert layers[0] == 0
            assert count == 1 or layers[-1] == depth - 1
            gaps = [b - a for a, b in pairwise(layers)]
            assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "exactly one of .* got none of them"),
        ({"layers": [0], "share": 0.5}, "got layers and share"),
        ({"layers": [0], "num_layers": 1}, "got num_layers and layers"),
        ({"num_layers": 3}, "whole number from 1 to 2, got 3"),
        ({"num_layers": 0}, "got 0"),
        ({"num_layers": True}, "got True"),
        ({"layers": [2]}, "-2 to 1, got 2"),
        ({"layers": []}, "at least one layer"),
        ({"layers": [1, 0]}, "ascending order"),
        ({"layers": [1, -1]}, "each once"),
        ({"share": 0.0}, "between 0 and 1"),
        ({"share": 1.64}, "between 0 and 1"),
        ({"share": float("nan")}, "between 0 and 1"),
        ({"share": 0.001}, "embeddings of its 300 tokens alone take 4,800"),
        ({"share": 0.99, "num_layers": 1}, "got num_layers and share"),
        ({"config": tiny_llama(vocab_size=310).config}, "vocab_size=310 and the target 300"),
        ({"config": T5Config(vocab_size=300)}, "encoder-decoder"),
        ({"share": 0.5, "dtype": torch.int8}, "floating"),
    ],
)
def test_bad_requests_are_explained(request_, message):
    with pytest.raises(ValueError, match=message):
        build_draft(tiny_llama(), **request_)


def test_a_name_in_place_of_the_target_is_refused():
    """Catches `'str' object has no attribute 'config'`: the trainer takes names, so people give them here too."""
    with pytest.raises(ValueError, match="'org/target' is a name: load the model"):
        build_draft("org/target", num_layers=1)


def test_targets_that_cannot_be_copied_are_refused_with_the_remedy():
    quantised = tiny_llama()
    quantised.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ValueError, match="Load it without quantisation"):
        build_draft(quantised, num_layers=1)
    assert not hasattr(build_draft(quantised, share=0.5).config, "quantization_config")
    with torch.device("meta"):
        offloaded = LlamaForCausalLM(tiny_llama().config)
    with pytest.raises(ValueError, match="offloaded"):
        build_draft(offloaded, num_layers=1)
    experts = MixtralConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    with pytest.raises(ValueError, match="mixture of experts"):
        build_draft(AutoModelForCausalLM.from_config(experts), share=0.5)


# What layers may depend on: place among layers, tables of all layers, keys of earlier layers, nested module lists.
@pytest.mark.parametrize(
    "model_type",
    [
        "deepseek_v3",
        "ernie4_5_moe",
        "gemma2",
        "gemma3n_text",
        "gemma4_text",
        "gpt_neo",
        "gpt_oss",
        "granite_swa",
        "laguna",
        "lfm2",
        "llama4_text",
        "minicpm3",
        "opt",
        "smollm3",
    ],
)
def test_architectures_that_describe_their_layers_one_by_one(model_type, tmp_path):
    """Reference: the target itself with its other layers, and their part of every table, taken out by hand."""
    target = tiny_model(model_type)
    whole = build_draft(target, num_layers=LAYERS)
    with torch.no_grad():
        assert torch.equal(whole(PROMPT).logits, target(PROMPT).logits)
    chosen = [0, 1, 3] if model_type != "lfm2" else [1, 2]
    draft = build_draft(target, layers=chosen)
    assert draft.config.num_hidden_layers == len(chosen)

    decoder = target.model if model_type == "llama4_text" else target.get_decoder()
    name = "h" if model_type == "gpt_neo" else "layers"
    setattr(decoder, name, torch.nn.ModuleList([getattr(decoder, name)[i] for i in chosen]))
    with torch.no_grad():
        if model_type.startswith(("gemma3n", "gemma4")):
            table, projection = decoder.embed_tokens_per_layer, decoder.per_layer_model_projection
            table.weight = Parameter(table.weight.view(VOCAB_SIZE, LAYERS, 8)[:, chosen].reshape(VOCAB_SIZE, -1))
            projection.weight = Parameter(projection.weight.view(LAYERS, 8, 32)[chosen].reshape(-1, 32))
        for key in ("layer_types", "attention_layers"):
            if key in vars(target.config):
                setattr(target.config, key, [getattr(target.config, key)[i] for i in chosen])
        target.config.num_hidden_layers = len(chosen)
        decoder.first_kv_shared_layer_idx = 2
        assert torch.equal(draft(PROMPT).logits, target(PROMPT, use_cache=False).logits)
    cached, uncached = (draft.generate(PROMPT, max_new_tokens=10, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, uncached)
    draft.save_pretrained(tmp_path)
    assert _same_weights(draft, AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("model_type", "layers", "reason"),
    [
        ("lfm2", [0], "cannot decode"),  # convolutions alone
        ("gemma3n_text", [1, 2], "reads the keys and values of layer 0"),
        ("gemma4_text", [0], "'sliding_attention', which would become 'full_attention'"),  # the last must be full
        ("diffllama", [1, 2], "lambda_init"),
    ],
)
def test_layers_that_cannot_run_or_would_compute_something_else(model_type, layers, reason):
    with pytest.raises(ValueError, match=reason):
        build_draft(tiny_model(model_type), layers=layers)


def test_few_layers_of_a_model_that_shares_keys_have_keys_of_their_own():
    draft = build_draft(tiny_model("gemma3n_text"), num_layers=2)
    assert draft.config.num_kv_shared_layers == 0
    assert draft.config.layer_types == ["sliding_attention", "full_attention"]


def test_a_share_of_a_model_whose_layers_differ_in_size():
    target = tiny_model("gemma4_text")
    draft = build_draft(target, share=0.3)
    assert draft.num_parameters() < target.num_parameters()
    assert draft.generate(PROMPT, max_new_tokens=4).shape[1] > PROMPT.shape[1]


def test_opt_with_a_narrower_embedding(tmp_path):
    """OPT-350M: the embedding is half as wide as the layers, with projections between."""
    config = tiny_config("opt")
    config.word_embed_proj_dim = 16
    target = AutoModelForCausalLM.from_config(config).eval()
    draft = build_draft(target, layers=[0, 3])
    assert torch.equal(draft.model.decoder.project_in.weight, target.model.decoder.project_in.weight)
    assert torch.equal(draft.model.decoder.layers[1].fc1.weight, target.model.decoder.layers[3].fc1.weight)
    _works_as_a_draft(draft, target, tmp_path)
    assert build_draft(target, share=0.5).config.word_embed_proj_dim == 16
