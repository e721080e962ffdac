"""Timing real decoding: what is compared, in which order, and what is said where texts differ."""

import pytest
import torch

from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation import latency, timing
from hf_draftkd.evaluation.latency import measure_latency
from hf_draftkd.evaluation.recommendation import ASSISTANT_MODEL, SPECULATIVE
from hf_draftkd.evaluation.timing import PLAIN, generate_text, single_text_config, time_decoding
from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_pair, tiny_prompts, tiny_tokenizer


@pytest.fixture
def prompts():
    return [prompt[0].tolist() for prompt in tiny_prompts(tiny_tokenizer(), 4)]


def test_every_way_is_timed_on_every_prompt_in_turns(pair, prompts, monkeypatch):
    """One way always first would always run on another's warm caches; a warm-up that is timed would count twice."""
    draft, target = pair
    order = []
    real = timing.generate_texts

    def record(model, prompts, config, **options):
        order.append(next((way for way in ("assistant_model", "custom_generate") if way in options), "plain"))
        return real(model, prompts, config, **options)

    monkeypatch.setattr(timing, "generate_texts", record)
    runs = time_decoding(target, draft, prompts, DecodingSetting(), max_new_tokens=8, num_assistant_tokens=3)
    assert list(runs) == [PLAIN, ASSISTANT_MODEL, SPECULATIVE]
    names = ["plain", "assistant_model", "custom_generate"]
    assert order[:3] == names  # the warm-up
    assert order[3:] == [*names, *names[1:], *names[:1], *names[2:], *names[:2], *names]
    assert runs[PLAIN].counts.num_tokens == 0
    for way in (ASSISTANT_MODEL, SPECULATIVE):
        run = runs[way]
        assert len(run.seconds) == len(prompts)
        assert run.counts.num_tokens == sum(run.tokens)
        assert run.tokens == runs[PLAIN].tokens
        assert run.num_identical == len(prompts)
    assert runs[ASSISTANT_MODEL].counts == runs[SPECULATIVE].counts


def test_batches_hold_the_texts_of_single_prompts(pair, prompts):
    """Padding in front counted as a token, or what is written behind a row's end."""
    draft, target = pair
    options = {"max_new_tokens": 8, "num_assistant_tokens": 3, "ways": [SPECULATIVE]}
    single = time_decoding(target, draft, prompts, DecodingSetting(), **options)
    runs = time_decoding(target, draft, prompts, DecodingSetting(), batch_size=2, **options)
    for way in (PLAIN, SPECULATIVE):
        assert runs[way].tokens == [sum(single[way].tokens[:2]), sum(single[way].tokens[2:])]
    # Near the limit a batch drafts as many tokens as its longest text has room for, so drafted tokens may differ.
    for name in ("num_spec_steps", "num_tokens", "acceptance_histogram"):
        assert getattr(runs[SPECULATIVE].counts, name) == getattr(single[SPECULATIVE].counts, name)
    assert runs[SPECULATIVE].num_identical == len(prompts)


def test_a_difference_is_reported_with_its_logit_gap(pair, prompts, monkeypatch):
    """Greedy text of a way of decoding that silently differs from plain text."""
    draft, target = pair
    real = timing.generate_texts
    setting = DecodingSetting(repetition_penalty=1.2)

    def tamper(model, group, config, **options):
        texts, seconds = real(model, group, config, **options)
        if "custom_generate" in options and group == [prompts[1]]:
            (tokens,) = texts
            texts = [[*tokens[:3], (tokens[3] + 1) % 300, *tokens[4:]]]
        return texts, seconds

    monkeypatch.setattr(timing, "generate_texts", tamper)
    runs = time_decoding(target, draft, prompts, setting, max_new_tokens=8, num_assistant_tokens=3)
    assert runs[ASSISTANT_MODEL].num_identical == len(prompts)
    assert runs[SPECULATIVE].num_identical == len(prompts) - 1
    (difference,) = runs[SPECULATIVE].differences
    assert (difference.prompt, difference.position) == (1, 3)
    assert difference.assisted_token == (difference.plain_token + 1) % 300
    config = single_text_config(target, setting, 8, return_dict_in_generate=True, output_scores=True)
    ids = torch.tensor([prompts[1]])
    scores = target.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config).scores[3][0]
    gap = scores[difference.plain_token] - scores[difference.assisted_token]
    assert difference.logit_gap == pytest.approx(gap.item(), abs=1e-4)
    assert difference.logit_gap > 0


def test_sampled_texts_are_seeded_and_leave_the_random_state_alone(pair, prompts):
    draft, target = pair
    config = single_text_config(target, DecodingSetting(1.0), 12)
    state = torch.get_rng_state()
    first, _ = generate_text(target, prompts[0], config, seed=1)
    again, _ = generate_text(target, prompts[0], config, seed=1)
    other, _ = generate_text(target, prompts[0], config, seed=2)
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)
    runs = time_decoding(target, draft, prompts, DecodingSetting(1.0), max_new_tokens=8)
    assert runs[SPECULATIVE].num_identical is None
    assert runs[SPECULATIVE].differences == []


def test_an_end_token_that_has_no_row_pads_no_batch():
    """Chat models name end tokens beyond their embedding: a batch of prompts died of an IndexError."""
    draft, target = tiny_pair()
    target.generation_config.eos_token_id = [VOCAB_SIZE + 5]
    options = {"max_new_tokens": 3, "ways": [SPECULATIVE], "batch_size": 2}
    runs = time_decoding(target, draft, [[5, 6, 7], [8]], DecodingSetting(), **options)
    assert runs[SPECULATIVE].num_identical == 2


def test_pad_ids_inside_a_text_do_not_confuse_the_draft():
    """The draft takes pad ids in the text for padding unless pad is the end token: counts would be off."""
    draft, target = tiny_pair("llama")
    target.generation_config.eos_token_id = [1, 5]
    assert single_text_config(target, DecodingSetting(), 8).pad_token_id == 1
    target.generation_config.eos_token_id = None
    assert single_text_config(target, DecodingSetting(), 8).pad_token_id is None
    assert draft.generation_config.pad_token_id == 2


def test_latency_tells_a_large_model_from_a_small_one(prompts):
    """Target and draft swapped, or a cache that grows from pass to pass."""
    target, draft = tiny_llama(num_layers=8, hidden_size=64), tiny_llama(num_layers=1)
    found = measure_latency(target, draft, prompts[:2], max_new_tokens=16, draft_lengths=(1, 8), num_repeats=3)
    assert found.context_length > 8
    assert set(found.verify_seconds) == {2, 9}
    assert found.relative_cost == pytest.approx(found.draft_step_seconds / found.target_step_seconds)
    assert found.relative_cost < 0.6
    overhead = found.generate_overhead
    assert min(overhead.plain_step_seconds, overhead.draft_step_seconds, overhead.block_seconds) >= 0
    assert min(found.speculative_overhead.draft_step_seconds, found.speculative_overhead.block_seconds) >= 0


def test_a_pass_that_is_timed_leaves_the_cache_as_it_was(prompts):
    clock = latency._StepClock(tiny_llama(), prompts[0])
    with torch.inference_mode():
        for size in (1, 5, 1):
            assert clock.seconds(size) > 0
            assert clock.cache.get_seq_length() == len(prompts[0])


def test_the_models_get_their_own_draft_settings_back(pair, prompts):
    draft, target = pair
    before = draft.generation_config.to_dict()
    measure_latency(target, draft, prompts[:2], max_new_tokens=16, draft_lengths=(1, 8), num_repeats=1)
    time_decoding(target, draft, prompts[:2], DecodingSetting(), max_new_tokens=4)
    assert draft.generation_config.to_dict() == before


def test_no_logits_of_a_whole_context_are_computed(prompts):
    """Catches a head run on thousands of tokens to fill a cache: more memory than the model, once all was scored."""
    draft, target = tiny_pair("llama")
    rows = []
    for model in (draft, target):
        model.lm_head.register_forward_hook(lambda *given: rows.append(given[-1].shape[1]))
    long = prompts[-1] * 3
    assert len(long) > 17
    measure_latency(target, draft, [long], max_new_tokens=4, num_repeats=1)
    assert max(rows) == 17


def test_steps_are_timed_within_the_context(prompts):
    """Prompts and answers that fill the context: a pass of 17 tokens behind such a cache ran over GPT-2's positions."""
    longest = max(map(len, prompts))
    draft, target = tiny_pair("gpt2", max_position_embeddings=longest + 4)
    found = measure_latency(target, draft, prompts[-1:], max_new_tokens=4)
    assert found.context_length == longest + 4 - 17
    assert set(found.verify_seconds) == set(range(2, 18))
