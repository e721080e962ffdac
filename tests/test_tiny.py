"""The tiny models must be what other tests take them for, or those tests would pass for the wrong reason."""

import pytest
import torch

from tests.tiny import ARCHITECTURES, TEXT, tiny_pair, tiny_prompts, tiny_tokenizer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pair_agrees_in_part_and_assisted_decoding_works(architecture):
    """A pair with acceptance 0 or 1 would let a broken acceptance count through."""
    draft, target = tiny_pair(architecture)
    agreed = total = 0
    for prompt in tiny_prompts(tiny_tokenizer()):
        plain = target.generate(prompt, max_new_tokens=24, do_sample=False)
        assisted = target.generate(prompt, max_new_tokens=24, do_sample=False, assistant_model=draft)
        assert torch.equal(plain, assisted)
        written = plain[:, prompt.shape[1] :]
        with torch.no_grad():
            guesses = draft(plain).logits[:, prompt.shape[1] - 1 : -1].argmax(-1)
        agreed += (guesses == written).sum().item()
        total += written.numel()
    assert 0.2 < agreed / total < 0.9


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_agreement_is_the_same_model_and_seeds_decide_everything(architecture):
    draft, target = tiny_pair(architecture, agreement=1.0)
    again, _ = tiny_pair(architecture, agreement=1.0)
    other, _ = tiny_pair(architecture, agreement=1.0, seed=1)
    prompt = tiny_prompts(tiny_tokenizer(), 1)[0]
    with torch.no_grad():
        logits = [model(prompt).logits for model in (draft, target, again, other)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert not torch.allclose(logits[0], logits[3])


def test_eos_comes_up_inside_generated_text():
    tokenizer = tiny_tokenizer()
    for architecture in ARCHITECTURES:
        _, target = tiny_pair(architecture, eos_scale=2.0)
        lengths = []
        for prompt in tiny_prompts(tokenizer, 8):
            written = target.generate(prompt, max_new_tokens=48, do_sample=False)[0, prompt.shape[1] :].tolist()
            lengths.append(len(written) if written[-1] == tokenizer.eos_token_id else None)
        assert any(length is not None and 1 < length < 48 for length in lengths), (architecture, lengths)


def test_tokenizer_round_trip_special_ids_and_mask():
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == 300
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    for text in [*TEXT, "Ünïcode, 中文 and\ttabs"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    chat = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, mask in zip(chat["input_ids"], chat["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "Hello</s>"
    opened = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat["input_ids"][: len(opened)] == opened
    assert tiny_tokenizer(pad_is_eos=True).pad_token_id == 1
    assert len(tiny_tokenizer(pad_is_eos=True)) == 300
