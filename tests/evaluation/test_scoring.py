"""One pass over written text: the distributions are decoding's own, and the sums are what they say."""

import math

import pytest
import torch

from hf_draftkd.acceptance import DRAFT_LENGTHS
from hf_draftkd.decoding.processors import logits_processors, process_logits, transformers_draft_processors
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation import scoring
from hf_draftkd.evaluation.scoring import EXACT, Text, TokenScores, score_texts, sum_texts, token_scores
from hf_draftkd.evaluation.timing import single_text_config
from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_pair, tiny_prompts, tiny_tokenizer

SETTINGS = [
    DecodingSetting(),
    DecodingSetting(repetition_penalty=1.3),
    DecodingSetting(1.0),
    DecodingSetting(0.6, top_k=12),
    DecodingSetting(1.5, top_p=0.8, repetition_penalty=1.2),
]
RULE = "rejection_sampling"


@pytest.fixture
def texts():
    """Random ids are text enough where only the arithmetic is looked at."""
    generator = torch.Generator().manual_seed(3)

    def ids(length):
        return torch.randint(6, VOCAB_SIZE, (length,), generator=generator).tolist()

    return [Text(ids(prompt), ids(completion)) for prompt, completion in ((1, 9), (12, 3), (5, 20), (7, 1), (2, 6))]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_processed_logits_are_those_of_generate(setting):
    """Penalties that see the token they judge, or the padding; warpers in another order than `generate`'s."""
    target = tiny_llama()
    target.generation_config.suppress_tokens = [40, 41]
    prompt = tiny_prompts(tiny_tokenizer(), 3)[2]
    config = single_text_config(target, setting, 20, return_dict_in_generate=True, output_scores=True)
    output = target.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    expected = torch.cat(output.scores)
    ids, start = output.sequences, prompt.shape[1]
    count = ids.shape[1] - start
    with torch.no_grad():
        raw = target(input_ids=ids).logits[0, start - 1 : -1]
    # As score_texts calls it: every row sees its whole text, and how much of it counts.
    found = process_logits(
        raw, ids.expand(count, -1), torch.arange(start, start + count), logits_processors(setting, target)
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found.isinf() == expected.isinf()).all()


@pytest.mark.parametrize(
    ("setting", "is_doubled"),
    [
        (DecodingSetting(), False),
        (DecodingSetting(1.0, top_k=5), False),
        (DecodingSetting(0.7), True),
        (DecodingSetting(1.0, top_p=0.9), True),
    ],
    ids=str,
)
def test_transformers_own_draft_warping_is_known_where_it_differs(setting, is_doubled):
    assert (transformers_draft_processors(setting) is not None) == is_doubled


def test_two_tokens_by_hand_with_the_text_cut_off():
    """With p = (0.5, 0.5), q = (0.8, 0.2), text 0 1 1: a = 1, 0.4, 0.4; α = 0.7 everywhere.

    γ = 1: a block starts at 0, accepts token 0 for certain, and ends with token 1 as the bonus; the next block starts
    at 2 and is cut off: 2 calls. γ = 2: from 0, token 1 is accepted (0.4) and token 2 is the bonus: 1 call; or it is
    corrected (0.6) and a second call starts at 2: 1.6 calls.
    """
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.8, 0.2]).log()
    tokens = torch.tensor([[0, 1, 1]])
    scores = token_scores(q.expand(1, 3, 2), p.expand(1, 3, 2), tokens, is_greedy=False)
    sums = sum_texts(scores, torch.ones(1, 3, dtype=torch.bool))
    assert sums.acceptance.item() == pytest.approx(2.1)
    assert sums.num_tokens.item() == 3
    assert sums.accepted[0].tolist() == pytest.approx([1, 0.4, 0.4])
    assert sums.target_calls[0, 0].item() == pytest.approx(2)
    assert sums.target_calls[0, 1].item() == pytest.approx(1.6)


def test_greedy_rules_by_hand():
    """Greedy text is verified exactly: the acceptance rate asks both argmaxes, a_t asks the draft about the text."""
    target = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    draft = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    scores = token_scores(draft, target, torch.tensor([2, 1]), is_greedy=True)
    assert scores.acceptance.tolist() == [1, 0]
    assert scores.accepted.tolist() == [1, 1]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_reference_one_position_at_a_time(setting, texts):
    """Slices, caches, right padding and the choice of positions, against one plain forward pass per position."""
    draft, target = tiny_pair("llama")
    result = score_texts(target, [draft], texts, setting, vocab_size=VOCAB_SIZE, batch_size=2)
    sums = result.drafts[0][EXACT if setting.is_greedy else RULE]
    for row, (prompt, completion) in enumerate(texts):
        acceptance, accepted = [], []
        for place, token in enumerate(completion):
            ids = torch.tensor([[*prompt, *completion[:place]]])
            with torch.no_grad():
                logits = [model(input_ids=ids).logits[:, -1].double() for model in (draft, target)]
            q, p = (_naive_distribution(row_logits[0], ids[0], setting) for row_logits in logits)
            acceptance.append(torch.minimum(p, q).sum().item())
            accepted.append(min(1.0, (q[token] / p[token]).item()) if p[token] > 0 else None)
        assert sums.num_tokens[row] == len(completion)
        assert sums.acceptance[row].item() == pytest.approx(sum(acceptance), abs=1e-4)
        for found, expected in zip(sums.accepted[row].tolist(), accepted, strict=True):
            if expected is not None:  # the target cannot have written it: reported as implausible, not scored
                assert found == pytest.approx(expected, abs=1e-4)


def _naive_distribution(logits, ids, setting):
    """Penalty, temperature, top-k, top-p from their definitions, in float64."""
    logits = logits.clone()
    for token in set(ids.tolist()):
        penalty = setting.repetition_penalty
        logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
    if setting.is_greedy:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()
    probabilities = (logits / setting.temperature).softmax(-1)
    ranked = probabilities.argsort(descending=True)
    if setting.top_k:
        probabilities[ranked[setting.top_k :]] = 0
    probabilities /= probabilities.sum()
    kept, mass = [], 0.0
    for token in ranked.tolist():
        kept.append(token)
        mass += probabilities[token].item()
        if mass >= setting.top_p:
            break
    nucleus = torch.zeros_like(probabilities)
    nucleus[kept] = probabilities[kept]
    return nucleus / nucleus.sum()


@pytest.mark.parametrize("setting", SETTINGS[1:], ids=str)
def test_order_batches_and_slices_do_not_matter(setting, texts, monkeypatch):
    """Results that depend on who shares a batch, or on where a slice of positions ends."""
    draft, target = tiny_pair("gpt2")
    whole = score_texts(target, [draft], texts, setting, vocab_size=VOCAB_SIZE, batch_size=5)
    monkeypatch.setattr(scoring, "_LOGITS_AT_ONCE", 3 * VOCAB_SIZE)
    pieces = score_texts(target, [draft], texts[::-1], setting, vocab_size=VOCAB_SIZE, batch_size=2)
    for name, sums in whole.drafts[0].items():
        other = pieces.drafts[0][name]
        for field in ("num_tokens", "acceptance", "target_calls"):
            torch.testing.assert_close(getattr(sums, field), getattr(other, field).flip(0), atol=1e-5, rtol=1e-5)
    assert whole.share_plausible == pieces.share_plausible


def test_a_slice_holds_no_more_logits_than_allowed(texts, monkeypatch):
    """Memory that grows with the length of a text times the vocabulary."""
    draft, target = tiny_pair("llama")
    allowed = 4 * VOCAB_SIZE
    monkeypatch.setattr(scoring, "_LOGITS_AT_ONCE", allowed)
    sizes = []
    target.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    score_texts(target, [draft], texts, SETTINGS[2], vocab_size=VOCAB_SIZE, batch_size=2)
    assert max(sizes) <= allowed


def test_a_uniform_draft_has_the_acceptance_of_its_target(texts):
    """α = Σ min(p, 1/V) for q uniform."""
    target = tiny_llama()
    draft = tiny_llama()
    torch.nn.init.zeros_(draft.lm_head.weight)
    sums = score_texts(target, [draft], texts, DecodingSetting(1.0), vocab_size=VOCAB_SIZE).drafts[0][RULE]
    for row, (prompt, completion) in enumerate(texts):
        with torch.no_grad():
            logits = target(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        p = logits.double().softmax(-1)
        expected = p.clamp(max=1 / VOCAB_SIZE).sum()
        assert sums.acceptance[row].item() == pytest.approx(expected.item(), abs=1e-5)


def test_padded_rows_are_left_out_of_both_distributions(texts):
    """A padded row with a large logit would take probability from every token that exists."""
    draft, target = tiny_pair("llama", draft_vocab_size=VOCAB_SIZE + 4, target_vocab_size=VOCAB_SIZE + 8)
    clean = score_texts(target, [draft], texts, DecodingSetting(1.0), vocab_size=VOCAB_SIZE).drafts[0][RULE]
    with torch.no_grad():
        for model in (draft, target):
            model.lm_head.weight[VOCAB_SIZE:] = 100 * torch.randn_like(model.lm_head.weight[VOCAB_SIZE:])
    dirty = score_texts(target, [draft], texts, DecodingSetting(1.0), vocab_size=VOCAB_SIZE).drafts[0][RULE]
    torch.testing.assert_close(clean.acceptance, dirty.acceptance)
    torch.testing.assert_close(clean.target_calls, dirty.target_calls)


def test_several_drafts_share_one_pass_of_the_target(texts):
    """A draft scored beside others must score what it scores alone; the target reads each text once."""
    draft, target = tiny_pair("llama")
    other = tiny_llama(seed=5)
    alone = [score_texts(target, [model], texts, SETTINGS[2], vocab_size=VOCAB_SIZE) for model in (draft, other)]
    calls = []
    target.register_forward_hook(lambda module, inputs, output: calls.append(1))
    both = score_texts(target, [draft, other], texts, SETTINGS[2], vocab_size=VOCAB_SIZE)
    for index in range(2):
        assert torch.equal(both.drafts[index][RULE].acceptance, alone[index].drafts[0][RULE].acceptance)
    # Five texts are one batch: a prompt of one token leaves nothing to skip, so one slice is one call.
    assert len(calls) == 1


def test_rules_differ_as_they_should():
    """`greedy_draft` and `exact_match` are the same draft; rejection sampling accepts at least as often on average."""
    draft, target = tiny_pair("llama", agreement=0.7)
    texts = [Text([0, 10, 20], torch.randint(6, VOCAB_SIZE, (30,)).tolist())]
    sums = score_texts(
        target,
        [draft],
        texts,
        DecodingSetting(1.0),
        vocab_size=VOCAB_SIZE,
        verification=(RULE, "greedy_draft", "exact_match"),
    ).drafts[0]
    assert sums["greedy_draft"].acceptance == sums["exact_match"].acceptance
    assert sums[RULE].acceptance > sums["greedy_draft"].acceptance


def test_a_draft_of_ten_tokens_is_given_the_temperature_alone():
    """llama.cpp's: the target's own filter stays with the target."""
    draft, target = tiny_pair("llama", agreement=0.7)
    texts = [Text([0, 10, 20], torch.randint(6, VOCAB_SIZE, (30,)).tolist())]
    rule, setting = "top_10_draft", DecodingSetting(0.7, top_k=3)
    scored = score_texts(target, [draft], texts, setting, vocab_size=VOCAB_SIZE, verification=(rule,))
    ids = torch.tensor([[*texts[0].prompt_ids, *texts[0].completion_ids]])
    with torch.inference_mode():
        p, q = (model(ids).logits[0, 2:-1].float() / 0.7 for model in (target, draft))
    p, q = (
        logits.masked_fill(logits < logits.topk(kept).values[:, -1:], -math.inf).softmax(-1)
        for logits, kept in ((p, 3), (q, 10))
    )
    expected = float(torch.minimum(p, q).sum())
    assert float(scored.drafts[0][rule].acceptance) == pytest.approx(expected, rel=1e-5)


def test_text_of_another_setting_is_noticed():
    """Random text is neither the likeliest nor within a top-k; only unfiltered sampling could have written it."""
    target = tiny_llama()
    random_text = [Text([0, 30], torch.randint(6, VOCAB_SIZE, (40,)).tolist())]
    assert score_texts(target, [target], random_text, SETTINGS[0], vocab_size=VOCAB_SIZE).share_plausible < 0.3
    assert score_texts(target, [target], random_text, SETTINGS[3], vocab_size=VOCAB_SIZE).share_plausible < 0.5
    assert score_texts(target, [target], random_text, SETTINGS[2], vocab_size=VOCAB_SIZE).share_plausible == 1


def test_broken_logits_stop_the_work(texts):
    draft, target = tiny_pair("llama")
    with torch.no_grad():
        draft.lm_head.weight[7] = math.nan
    with pytest.raises(FloatingPointError, match="draft's logits"):
        score_texts(target, [draft], texts, SETTINGS[2], vocab_size=VOCAB_SIZE)


def test_sums_refuse_a_mask_with_gaps():
    scores = TokenScores(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="padding before or between"):
        sum_texts(scores, torch.tensor([[True, False, True]]))


def test_target_calls_cover_the_reported_draft_lengths(texts):
    draft, target = tiny_pair("llama")
    sums = score_texts(target, [draft], texts, SETTINGS[2], vocab_size=VOCAB_SIZE).drafts[0][RULE]
    assert sums.target_calls.shape == (len(texts), len(DRAFT_LENGTHS))
    # A longer draft never needs more calls.
    assert (sums.target_calls.diff(dim=1) <= 1e-9).all()
