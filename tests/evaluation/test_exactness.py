"""The promise of this room: numbers computed from one pass are those that real decoding gives."""

from fractions import Fraction

import pytest
import torch

from hf_draftkd.acceptance import DRAFT_LENGTHS
from hf_draftkd.data.targets import ids_without_token
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.assisted import count_acceptance, fixed_draft_length
from hf_draftkd.evaluation.scoring import AS_TRANSFORMERS, EXACT, Text, score_texts
from hf_draftkd.evaluation.statistics import setting_result
from hf_draftkd.evaluation.timing import generate_texts, single_text_config
from hf_draftkd.models.pairing import align_vocabulary, shared_vocab_size
from tests.tiny import VOCAB_SIZE, tiny_pair, tiny_prompts, tiny_tokenizer

NEW_TOKENS = 20
PAIRS = {
    "llama": {},
    "qwen3": {"draft_vocab_size": VOCAB_SIZE + 4, "target_vocab_size": VOCAB_SIZE + 20, "real_vocab_size": VOCAB_SIZE},
    "gpt2": {},
    "gpt_neox": {},
}
SETTINGS = {
    "greedy": DecodingSetting(),
    "greedy with a penalty": DecodingSetting(repetition_penalty=1.3),
    "temperature 1": DecodingSetting(1.0),
    "temperature 0.7, top-k": DecodingSetting(0.7, top_k=20),
    "top-p with a penalty": DecodingSetting(1.0, top_p=0.9, repetition_penalty=1.2),
}


def aligned_pair(architecture, eos_scale=1.0, **options):
    draft, target = tiny_pair(architecture, eos_scale=eos_scale, **PAIRS[architecture], **options)
    tokenizer = tiny_tokenizer()
    align_vocabulary(draft, target, tokenizer)
    return draft, target, tokenizer


def write(target, tokenizer, prompts, setting, draft=None, seed=0):
    """Texts that `generate` writes, plainly or assisted."""
    config = single_text_config(target, setting, NEW_TOKENS, suppress_tokens=ids_without_token(target, tokenizer))
    texts = []
    for number, prompt in enumerate(prompts):
        torch.manual_seed(1000 * seed + number)
        output = target.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=config, assistant_model=draft
        )
        texts.append(Text(prompt[0].tolist(), output[0, prompt.shape[1] :].tolist()))
    return texts


def write_together(target, tokenizer, prompts, setting, copies=1, new_tokens=NEW_TOKENS):
    """The same, plainly and in one batch, which costs what one text costs."""
    config = single_text_config(target, setting, new_tokens, suppress_tokens=ids_without_token(target, tokenizer))
    rows = [prompt[0].tolist() for prompt in prompts] * copies
    written, _ = generate_texts(target, rows, config, seed=1)
    return [Text(*pair) for pair in zip(rows, written, strict=True)]


@pytest.mark.parametrize(
    ("setting", "eos_scale"),
    [("greedy", 0.0), ("greedy with a penalty", 2.0)],
    ids=["to the limit", "with a penalty and ending on their own"],
)
@pytest.mark.parametrize("architecture", PAIRS)
def test_greedy_block_efficiency_equals_the_counted_one_to_the_last_digit(architecture, setting, eos_scale):
    """Any slip by one position, token, call or padded row shows as a difference here."""
    setting = SETTINGS[setting]
    draft, target, tokenizer = aligned_pair(architecture, eos_scale, agreement=0.95)
    prompts = tiny_prompts(tokenizer, 3)
    texts = write(target, tokenizer, prompts, setting)
    lengths = {len(text.completion_ids) for text in texts}
    assert (lengths == {NEW_TOKENS}) if eos_scale == 0 else (min(lengths) < NEW_TOKENS)
    assert all(text.completion_ids[-1] == 1 for text in texts if len(text.completion_ids) < NEW_TOKENS)

    vocab_size = shared_vocab_size(draft, target, tokenizer)
    assert vocab_size == VOCAB_SIZE
    scored = score_texts(target, [draft], texts, setting, vocab_size=vocab_size, batch_size=2)
    assert scored.share_plausible == 1
    computed = setting_result(
        setting, EXACT, scored.drafts[0], range(len(texts)), num_assistant_tokens=5, parameter_ratio=1.0
    ).block_efficiency
    seen = set()
    for gamma in (1, 4):
        with fixed_draft_length(draft, gamma), count_acceptance(target) as counts:
            assert write(target, tokenizer, prompts, setting, draft) == texts, "assisted greedy text must equal plain"
        assert computed[gamma].value == counts.mean_acceptance_length
        seen.add(counts.mean_acceptance_length)
    assert 1 < min(seen) < max(seen) < 6, "acceptance must be neither nothing nor everything for this test to mean much"


@pytest.mark.parametrize(
    ("architecture", "setting"),
    [
        ("llama", "temperature 1"),
        ("llama", "temperature 0.7, top-k"),
        ("qwen3", "top-p with a penalty"),
    ],
)
def test_sampled_block_efficiency_agrees_with_the_counted_one(architecture, setting):
    """Sampled decoding counted over fresh texts, against one pass over other texts of the same target.

    transformers warps the draft twice (see `transformers_draft_processors`); where that matters its own number counts.
    """
    setting = SETTINGS[setting]
    draft, target, tokenizer = aligned_pair(architecture, num_layers=1)
    prompts = tiny_prompts(tokenizer, 7)
    # Many plain texts, and fewer that are decoded one by one.
    texts = write_together(target, tokenizer, prompts, setting, copies=18)
    scored = score_texts(target, [draft], texts, setting, vocab_size=VOCAB_SIZE)
    assert scored.share_plausible == 1
    sums = scored.drafts[0]
    assert (AS_TRANSFORMERS in sums) == (setting.temperature != 1 or setting.top_p != 1)
    sums = sums.get(AS_TRANSFORMERS, sums["rejection_sampling"])
    gamma = 3
    tokens, calls = sums.num_tokens, sums.target_calls[:, DRAFT_LENGTHS.index(gamma)]
    computed = float(tokens.sum() / calls.sum())

    per_text = []
    with fixed_draft_length(draft, gamma):
        for seed in range(8, 11):
            for prompt in prompts:
                with count_acceptance(target) as counts:
                    write(target, tokenizer, [prompt], setting, draft, seed=seed)
                per_text.append((counts.num_tokens, counts.num_spec_steps))
    counted_tokens, counted_calls = torch.tensor(per_text, dtype=torch.float64).unbind(1)
    counted = float(counted_tokens.sum() / counted_calls.sum())
    # Standard error of a ratio of sums, for both sides (delta method).
    variance = sum(
        float(((n - ratio * d) ** 2).sum() / d.sum() ** 2)
        for n, d, ratio in ((tokens, calls, computed), (counted_tokens, counted_calls, counted))
    )
    assert abs(computed - counted) < 3 * variance**0.5
    assert variance**0.5 < 0.12, "the interval must be narrow for this test to mean anything"
    assert 1.2 < computed < 3.8


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("architecture", PAIRS)
def test_a_draft_that_is_its_own_target_is_perfect(architecture, setting):
    """A repetition penalty, a filter or a temperature applied to one model only: peers measured 0.86 here."""
    setting = SETTINGS[setting]
    _, target, tokenizer = aligned_pair(architecture, eos_scale=1.5)
    texts = write_together(target, tokenizer, tiny_prompts(tokenizer, 3), setting)
    rules = ("rejection_sampling", "greedy_draft", "exact_match")
    scored = score_texts(target, [target], texts, setting, vocab_size=VOCAB_SIZE, verification=rules, batch_size=2)
    sums = scored.drafts[0][EXACT if setting.is_greedy else "rejection_sampling"]
    assert sums.acceptance.sum() / sums.num_tokens.sum() == 1
    for index, gamma in enumerate(DRAFT_LENGTHS):
        for row, text in enumerate(texts):
            tokens = len(text.completion_ids)
            calls = -(-tokens // (gamma + 1))
            assert Fraction(float(sums.target_calls[row, index])) == calls, (tokens, gamma)
