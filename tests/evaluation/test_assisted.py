"""Counting real assisted decoding: the counts are right, and nothing is left behind."""

import copy
import threading

import pytest
import torch
from transformers import TextIteratorStreamer, pipeline

from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.assisted import count_acceptance, fixed_draft_length, observe_rounds
from hf_draftkd.evaluation.timing import single_text_config
from tests.tiny import tiny_llama, tiny_pair, tiny_prompts, tiny_tokenizer

NEW_TOKENS = 16
GREEDY = DecodingSetting()


def generate(target, draft, prompt, setting=GREEDY, **options):
    config = single_text_config(target, setting, NEW_TOKENS)
    return target.generate(
        prompt, attention_mask=torch.ones_like(prompt), generation_config=config, assistant_model=draft, **options
    )[0, prompt.shape[1] :].tolist()


def greedy_reference(target, draft, prompt, gamma, eos=1):
    """Drafts and acceptances of greedy speculative decoding, from the definition: plain forward passes, no cache.

    Returns (tokens, [(drafted, accepted, added), ...]).
    """
    text, steps = prompt[0].tolist(), []
    start = len(text)

    def likeliest(model, ids):
        return int(model(torch.tensor([ids])).logits[0, -1].argmax())

    while len(text) - start < NEW_TOKENS and (len(text) == start or text[-1] != eos):
        room = NEW_TOKENS - (len(text) - start)
        drafted = []
        while len(drafted) < min(gamma, room - 1) and (not drafted or drafted[-1] != eos):
            drafted.append(likeliest(draft, text + drafted))
        added = []
        for token in [*drafted, None]:
            added.append(likeliest(target, text + added))
            if added[-1] != token or token == eos:
                break
        accepted = sum(a == b for a, b in zip(added, drafted, strict=False))
        steps.append((len(drafted), accepted, len(added)))
        text += added
    return text[start:], steps


@pytest.mark.parametrize("gamma", [1, 4])
@pytest.mark.parametrize("eos_scale", [0.0, 2.0])
def test_counts_equal_a_reference_written_from_the_definition(gamma, eos_scale):
    """An accepted end of sequence counted one short, or a draft shortened by the length limit counted in full."""
    draft, target = tiny_pair("llama", eos_scale=eos_scale)
    prompts = tiny_prompts(tiny_tokenizer(), 2)
    rounds = []
    with torch.no_grad():
        expected = [greedy_reference(target, draft, prompt, gamma) for prompt in prompts]
        with fixed_draft_length(draft, gamma), observe_rounds(target, lambda *numbers: rounds.append(numbers)):
            texts = [generate(target, draft, prompt) for prompt in prompts]
    assert texts == [text for text, _ in expected]
    assert any(text[-1] == 1 for text in texts) == (eos_scale > 0)
    assert rounds == [step for _, of_text in expected for step in of_text]


def test_an_accepted_end_of_sequence_is_an_accepted_token():
    """`update_candidate_strategy` reports one match less than was accepted when the text ends inside a draft."""
    target = tiny_llama(eos_scale=2.0)
    draft = copy.deepcopy(target)
    prompt = tiny_prompts(tiny_tokenizer(), 1)[0]
    with fixed_draft_length(draft, 5), count_acceptance(target) as counts:
        length = len(generate(target, draft, prompt))
    assert length < NEW_TOKENS, "the text must end on its own for this test to mean anything"
    assert counts.num_accepted_draft_tokens == counts.num_draft_tokens
    assert counts.num_spec_steps == -(-length // 6)
    assert counts.mean_acceptance_length == length / counts.num_spec_steps


def test_results_are_unchanged_and_nothing_stays_patched(pair):
    """Counting that changes what is decoded, or that outlives its block."""
    draft, target = pair
    prompt = tiny_prompts(tiny_tokenizer(), 1)[0]
    before = dict(target.__dict__)
    alone = generate(target, draft, prompt)
    with count_acceptance(target) as counts:
        assert generate(target, draft, prompt) == alone
    assert counts.num_spec_steps > 0
    assert target.__dict__ == before
    after = counts.num_spec_steps
    generate(target, draft, prompt)
    assert counts.num_spec_steps == after


def test_an_exception_restores_the_target(pair):
    """A failing generate call that leaves the listener on the model for good."""
    draft, target = pair
    before = dict(target.__dict__)
    prompts = tiny_prompts(tiny_tokenizer(), 1)[0].repeat(2, 1)
    with pytest.raises(ValueError, match="batch_size = 1"), count_acceptance(target) as counts:
        target.generate(prompts, assistant_model=draft, max_new_tokens=4)
    assert target.__dict__ == before
    assert counts.num_spec_steps == 0


def test_what_was_patched_before_is_put_back(pair):
    """Someone else's instance attribute deleted instead of restored."""
    draft, target = pair
    calls = []
    build = target._get_candidate_generator

    def theirs(*args, **kwargs):
        calls.append(1)
        return build(*args, **kwargs)

    target._get_candidate_generator = theirs
    with count_acceptance(target) as counts:
        generate(target, draft, tiny_prompts(tiny_tokenizer(), 1)[0])
    assert target.__dict__["_get_candidate_generator"] is theirs
    assert len(calls) == 1
    assert counts.num_spec_steps > 0


def test_nested_use_on_one_target_is_refused(pair):
    """Two listeners on one model, each counting the other's tokens again."""
    draft, target = pair
    with (
        count_acceptance(target) as outer,
        pytest.raises(ValueError, match="cannot be nested"),
        count_acceptance(target),
    ):
        pass
    with count_acceptance(target) as counts:  # the refusal must not have broken the target
        generate(target, draft, tiny_prompts(tiny_tokenizer(), 1)[0])
    assert outer.num_spec_steps == 0
    assert counts.num_spec_steps > 0


def test_something_without_assisted_generation_is_refused():
    with pytest.raises(ValueError, match="must be a transformers model"), count_acceptance(torch.nn.Linear(2, 2)):
        pass


def test_two_targets_in_parallel_threads_keep_their_own_counts():
    """Counters shared between models through a class attribute or a global."""
    pairs = [tiny_pair("llama", seed=0), tiny_pair("gpt2", seed=7)]
    prompt = tiny_prompts(tiny_tokenizer(), 1)[0]
    alone = []
    for draft, target in pairs:
        with count_acceptance(target) as counts:
            generate(target, draft, prompt)
        alone.append(counts.num_spec_steps)

    found = [0, 0]

    def run(index):
        draft, target = pairs[index]
        with count_acceptance(target) as counts:
            generate(target, draft, prompt)
        found[index] = counts.num_spec_steps

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_several_calls_add_up_and_plain_calls_add_nothing(pair):
    draft, target = pair
    first, second = tiny_prompts(tiny_tokenizer(), 2)
    single = []
    for prompt in (first, second):
        with count_acceptance(target) as counts:
            generate(target, draft, prompt)
        single.append(counts)
    with count_acceptance(target) as counts:
        generate(target, draft, first)
        generate(target, None, first)
        generate(target, draft, second)
    for name in ("num_spec_steps", "num_draft_tokens", "num_accepted_draft_tokens"):
        assert getattr(counts, name) == sum(getattr(part, name) for part in single)


def test_a_pipeline_is_counted(pair):
    """`pipeline(assistant_model=...)` calls `generate` on the same object, with its own arguments."""
    draft, target = pair
    pipe = pipeline("text-generation", model=target, tokenizer=tiny_tokenizer(), assistant_model=draft)
    with count_acceptance(target) as counts:
        pipe("A draft model", max_new_tokens=12, do_sample=False)
    assert 0 < counts.num_spec_steps <= 12


def test_streaming_from_a_thread_is_counted(pair):
    draft, target = pair
    tokenizer = tiny_tokenizer()
    prompt = tiny_prompts(tokenizer, 1)[0]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    with count_acceptance(target) as counts:
        thread = threading.Thread(target=generate, args=(target, draft, prompt), kwargs={"streamer": streamer})
        thread.start()
        streamed = "".join(streamer)
        thread.join()
    with count_acceptance(target) as direct:
        text = generate(target, draft, prompt)
    assert streamed == tokenizer.decode(text)
    assert counts.num_spec_steps == direct.num_spec_steps


def test_prompt_lookup_is_counted(pair):
    """A generator without a draft model: its candidates come from the prompt, and there may be none."""
    _, target = pair
    prompt = tiny_prompts(tiny_tokenizer(), 1)[0].repeat(1, 3)
    config = single_text_config(target, GREEDY, NEW_TOKENS, prompt_lookup_num_tokens=4)
    rounds = []
    with observe_rounds(target, lambda *numbers: rounds.append(numbers)):
        output = target.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    assert sum(new for _, _, new in rounds) == output.shape[1] - prompt.shape[1]
    assert all(new <= accepted + 1 for _, accepted, new in rounds)
    assert {drafted for drafted, _, _ in rounds} <= set(range(5))


@pytest.mark.parametrize("setting", [GREEDY, DecodingSetting(1.0)], ids=["greedy", "sampled"])
def test_a_draft_with_another_tokenizer_is_counted(setting):
    """The other-tokenizer generators propose target ids after a detour through text."""
    # Vocabularies that overlap in part: transformers fails where the draft's is a mere subset.
    target_tokenizer, draft_tokenizer = (
        tiny_tokenizer(300),
        tiny_tokenizer(280, text=["any other words, and whatever else there is"] * 3),
    )
    draft, target = tiny_llama(3, 280), tiny_llama(0, 300)
    prompt = tiny_prompts(target_tokenizer, 1)[0]
    rounds = []
    with fixed_draft_length(draft, 3), observe_rounds(target, lambda *numbers: rounds.append(numbers)):
        text = generate(target, draft, prompt, setting, tokenizer=target_tokenizer, assistant_tokenizer=draft_tokenizer)
    assert sum(new for _, _, new in rounds) == len(text)
    for drafted, accepted, new in rounds:
        assert 0 <= accepted <= drafted
        assert accepted <= new <= accepted + 1


# peft 0.21 asks transformers 5.23 for an attribute under its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_peft_wrapped_target_is_counted(pair):
    """`PeftModel.generate` runs on the model inside, where the listener must sit."""
    from peft import LoraConfig, get_peft_model

    draft, target = pair
    wrapped = get_peft_model(target, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with count_acceptance(wrapped) as counts:
        wrapped.generate(input_ids=tiny_prompts(tiny_tokenizer(), 1)[0], assistant_model=draft, max_new_tokens=6)
    assert counts.num_spec_steps > 0


def test_fixed_draft_length_puts_the_drafts_settings_back(pair):
    """A measurement that changes how the draft decodes afterwards, also when it fails."""
    draft, _ = pair
    before = draft.generation_config.to_dict()

    def fail():
        assert draft.generation_config.num_assistant_tokens == 3
        assert draft.generation_config.assistant_confidence_threshold == 0
        assert draft.generation_config.num_assistant_tokens_schedule == "constant"
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), fixed_draft_length(draft, 3):
        fail()
    assert draft.generation_config.to_dict() == before


@pytest.mark.parametrize("gamma", [0, -1, 1.5])
def test_an_impossible_draft_length_is_refused(pair, gamma):
    with pytest.raises(ValueError, match="num_assistant_tokens"), fixed_draft_length(pair[0], gamma):
        pass
