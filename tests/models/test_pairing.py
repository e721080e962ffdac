"""Pairs whose vocabularies are padded differently must end up on transformers' plain, fast path."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, pipeline

from hf_draftkd.models.pairing import align_vocabulary, context_length, shared_vocab_size
from hf_draftkd.models.parallel import parallel_draft, store_parallel_draft
from tests.tiny import ARCHITECTURES, tiny_llama, tiny_pair, tiny_prompts, tiny_qwen3, tiny_tokenizer

TOKENS = 300
# (rows of the draft, rows of the target): smaller, larger and exact against the other and the tokenizer.
SIZES = [(304, 320), (320, 304), (300, 320), (320, 300), (310, 310)]


def _padded_pair(architecture, draft_rows, target_rows, **options):
    return tiny_pair(
        architecture,
        draft_vocab_size=draft_rows,
        target_vocab_size=target_rows,
        real_vocab_size=TOKENS,
        **options,
    )


def _logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("draft_rows", "target_rows"), SIZES)
def test_padded_pair_generates_like_the_target_alone(architecture, draft_rows, target_rows, tmp_path):
    """Unequal sizes are taken for unequal tokenizers by transformers; and saving must lose nothing of the repair."""
    tokenizer = tiny_tokenizer()
    draft, target = _padded_pair(architecture, draft_rows, target_rows)
    prompts = tiny_prompts(tokenizer, 2)
    before = _logits(draft, prompts[1])[..., :TOKENS]
    if draft_rows != target_rows:
        with pytest.raises(ValueError, match="different tokenizers"):
            target.generate(prompts[0], max_new_tokens=2, assistant_model=draft)
    weights = {name: value.clone() for name, value in target.state_dict().items()}

    assert align_vocabulary(draft, target, tokenizer) is draft
    draft.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for model in (draft, reloaded):
        assert model.config.vocab_size == target_rows
        assert model.get_input_embeddings().weight.shape[0] == target_rows
        assert model.get_output_embeddings().weight.shape[0] == target_rows
        logits = _logits(model, prompts[1])
        torch.testing.assert_close(logits[..., :TOKENS], before, rtol=0, atol=0)
        assert not logits[..., TOKENS:].any()
        assert model.generation_config.suppress_tokens == (list(range(TOKENS, target_rows)) or None)
        for prompt in prompts:
            plain = target.generate(prompt, max_new_tokens=8, do_sample=False)
            assisted = target.generate(prompt, max_new_tokens=8, do_sample=False, assistant_model=model)
            assert torch.equal(plain, assisted)
    assert all(torch.equal(value, weights[name]) for name, value in target.state_dict().items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pipeline_takes_an_aligned_draft(architecture):
    """The pipeline compares special ids in the configs as well, and asks for a second tokenizer where they differ."""
    tokenizer = tiny_tokenizer()
    draft, target = _padded_pair(architecture, 304, 320)
    draft.config.pad_token_id = 0
    align_vocabulary(draft, target, tokenizer)
    settings = {"max_new_tokens": 12, "max_length": None, "do_sample": False}
    alone = pipeline("text-generation", model=target, tokenizer=tokenizer)
    assisted = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=draft)
    assert assisted("The quick", **settings) == alone("The quick", **settings)


def test_tied_and_untied_weights_stay_so():
    tokenizer = tiny_tokenizer()
    for tied in (True, False):
        draft = tiny_qwen3(vocab_size=304, real_vocab_size=TOKENS, tie_word_embeddings=tied)
        align_vocabulary(draft, tiny_qwen3(vocab_size=320), tokenizer)
        same = draft.get_input_embeddings().weight is draft.get_output_embeddings().weight
        assert same is tied


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "top_k": 0}], ids=["greedy", "sampled"])
def test_assisted_decoding_honours_the_suppressed_ids(sampling):
    """A zero row has logit 0: where every real token is below that, the draft would propose nothing but padding."""
    tokenizer = tiny_tokenizer()
    draft, target = _padded_pair("llama", 304, 320)
    align_vocabulary(draft, target, tokenizer)
    head, verify = draft.lm_head.forward, target.forward
    drafted = []

    def below_zero(hidden):
        return head(hidden) - 50 * (torch.arange(320) < TOKENS)

    def spy(*args, **kwargs):
        # The first verified token of a block is the target's own; the rest are the draft's.
        drafted.append(kwargs["input_ids"][0, (1 if drafted else prompt.shape[1]) :])
        return verify(*args, **kwargs)

    draft.lm_head.forward, target.forward = below_zero, spy
    prompt = tiny_prompts(tokenizer, 1)[0]
    target.generate(prompt, max_new_tokens=12, assistant_model=draft, **sampling)
    assert len(torch.cat(drafted)) > 0
    assert (torch.cat(drafted) < TOKENS).all()

    drafted.clear()
    draft.generation_config.suppress_tokens = None
    target.generate(prompt, max_new_tokens=12, assistant_model=draft, **sampling)
    assert (torch.cat(drafted) >= TOKENS).any()


def test_twice_is_once():
    tokenizer = tiny_tokenizer()
    draft, target = _padded_pair("gpt_neox", 304, 320)
    align_vocabulary(draft, target, tokenizer)
    first = (
        {k: v.clone() for k, v in draft.state_dict().items()},
        draft.config.to_dict(),
        draft.generation_config.to_dict(),
    )
    for again in (tokenizer, None):
        align_vocabulary(draft, target, again)
        assert draft.config.to_dict() == first[1]
        assert draft.generation_config.to_dict() == first[2]
        assert all(torch.equal(value, first[0][name]) for name, value in draft.state_dict().items())


def test_special_ids_come_from_the_target_each_from_its_counterpart():
    """A chat target's generation config lists several ends of sequence, its config one."""
    draft, target = tiny_pair("llama")
    target.config.eos_token_id, target.config.pad_token_id = 4, None
    target.generation_config.eos_token_id, target.generation_config.pad_token_id = [4, 1], 5
    target.generation_config.temperature = 0.6
    draft.generation_config.suppress_tokens = [7]
    draft.generation_config.num_assistant_tokens = 3
    align_vocabulary(draft, target)
    assert (draft.config.eos_token_id, draft.config.pad_token_id) == (4, None)
    assert (draft.generation_config.eos_token_id, draft.generation_config.pad_token_id) == ([4, 1], 5)
    assert draft.generation_config.eos_token_id is not target.generation_config.eos_token_id
    # What the user set stays, what only concerns the target's sampling does not come over.
    assert draft.generation_config.suppress_tokens == [7]
    assert draft.generation_config.num_assistant_tokens == 3
    assert draft.generation_config.temperature is None


def test_new_rows_are_trainable_like_the_old_and_the_random_state_is_untouched():
    draft, target = _padded_pair("llama", 304, 320)
    draft = draft.to(torch.bfloat16)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    align_vocabulary(draft, target, tiny_tokenizer())
    assert torch.equal(torch.rand(1), expected)
    assert {p.dtype for p in draft.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in draft.parameters())
    frozen, target = _padded_pair("llama", 304, 320)
    frozen.requires_grad_(False)
    align_vocabulary(frozen, target, tiny_tokenizer())
    assert not any(p.requires_grad for p in frozen.parameters())


def test_only_padding_may_be_cut_or_added():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="has 290 rows, but the tokenizer has 300 tokens"):
        align_vocabulary(tiny_llama(vocab_size=290), tiny_llama(vocab_size=320), tokenizer)
    with pytest.raises(ValueError, match="target has 290 rows, but the tokenizer has 300 tokens"):
        align_vocabulary(tiny_llama(vocab_size=320), tiny_llama(vocab_size=290), tokenizer)
    draft = tiny_llama(vocab_size=320)
    with pytest.raises(ValueError, match="Pass the tokenizer"):
        align_vocabulary(draft, tiny_llama(vocab_size=304))
    assert draft.config.vocab_size == 320
    # Without the tokenizer rows of zeros are known to be padding, and rows no model had before.
    align_vocabulary(tiny_llama(vocab_size=320, real_vocab_size=304), tiny_llama(vocab_size=304))
    grown = align_vocabulary(tiny_llama(vocab_size=304), tiny_llama(vocab_size=320))
    assert grown.generation_config.suppress_tokens == list(range(304, 320))


def test_the_mask_token_of_a_parallel_draft_is_not_cut():
    """An IndexError of the embedding once the texts were written: a padded row is what a mask token usually is."""
    draft, target = tiny_pair("llama", draft_vocab_size=304)
    store_parallel_draft(draft.config, 302, 4)
    with pytest.raises(ValueError, match=r"\(id 302\) is none of the target's 300 rows"):
        align_vocabulary(draft, target, tiny_tokenizer())
    draft.config.parallel_tokens = 1
    align_vocabulary(draft, target, tiny_tokenizer())
    assert parallel_draft(draft.config) is None


# PEFT reads an attribute that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_draft_with_an_adapter_is_not_resized():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_llama(vocab_size=304), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="PEFT adapter"):
        align_vocabulary(adapted, tiny_llama(vocab_size=320), tiny_tokenizer())
    align_vocabulary(adapted, tiny_llama(vocab_size=304), tiny_tokenizer())
    assert adapted.get_base_model().generation_config.suppress_tokens == [300, 301, 302, 303]


def test_shared_vocabulary_is_what_all_three_have():
    tokenizer = tiny_tokenizer()
    small, large = tiny_llama(vocab_size=304), tiny_llama(vocab_size=320)
    assert shared_vocab_size(small, large, tokenizer) == 300
    assert shared_vocab_size(large, small) == 304
    assert shared_vocab_size(tiny_llama(vocab_size=290), large, tokenizer) == 290


@pytest.mark.parametrize("sampling", [{"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "do_sample": False}])
def test_a_draft_whose_config_samples_without_do_sample_can_be_saved(pair, tokenizer, tmp_path, sampling):
    """Transformers refuses to save a changed config with idle settings: found at the first checkpoint."""
    draft, target = pair
    draft.generation_config = GenerationConfig(**sampling)
    target.generation_config.eos_token_id = [1, 5]
    align_vocabulary(draft, target, tokenizer).save_pretrained(tmp_path)
    stored = GenerationConfig.from_pretrained(tmp_path)
    assert (stored.temperature, stored.eos_token_id) == (None, [1, 5])
    draft.generation_config = GenerationConfig(do_sample=True, temperature=0.6)
    align_vocabulary(draft, target, tokenizer)
    assert draft.generation_config.temperature == 0.6


def test_the_context_is_what_the_config_says_whoever_is_asked():
    model = ARCHITECTURES["llama"]()
    assert context_length(model) == context_length(model.config) == model.config.max_position_embeddings


def test_a_config_that_names_no_limit_has_none():
    assert context_length(PretrainedConfig()) is None
