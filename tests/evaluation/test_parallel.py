"""What is said of a parallel draft from one pass over a text is what drafting in one pass does."""

import math
from io import StringIO
from itertools import product

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from tqdm import tqdm

from hf_draftkd import SpeculativeDecoding, evaluate_draft
from hf_draftkd.acceptance import acceptance_by_position, expected_target_calls
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation import scoring
from hf_draftkd.evaluation.recommendation import PARALLEL, recommend, recommend_overall
from hf_draftkd.evaluation.report import ParallelResult, SpeculationReport
from hf_draftkd.evaluation.scoring import EXACT, Text, in_one_pass, score_texts
from hf_draftkd.evaluation.statistics import parallel_result
from hf_draftkd.evaluation.tables import ReportTable
from hf_draftkd.models.draft_length import store_draft_settings
from hf_draftkd.models.parallel import store_parallel_draft
from tests.evaluation.samples import assisted, latency, setting
from tests.evaluation.test_exactness import NEW_TOKENS, aligned_pair, write_together
from tests.tiny import VOCAB_SIZE, tiny_gpt2, tiny_prompts

MASK = 2


def parallel_pair(architecture, num_tokens=5, **options):
    draft, target, tokenizer = aligned_pair(architecture, agreement=0.95, **options)
    store_parallel_draft(draft.config, MASK, num_tokens)
    return draft, target, tokenizer


@pytest.mark.parametrize("gamma", [1, 2])
def test_blocks_equal_enumeration_of_every_outcome(gamma):
    """Each token is accepted or not at each depth, independently; decoding looks at one depth a token."""
    length = 6
    rates = torch.rand(1, length, 3, dtype=torch.float64)
    chosen, blocks, kept = rates[0, :, :gamma], 0.0, [0.0] * gamma
    for outcome in product([False, True], repeat=length * gamma):
        accepts = torch.tensor(outcome).view(length, gamma)
        weight = math.prod(torch.where(accepts, chosen, 1 - chosen).flatten().tolist())
        position = 0
        while position < length:
            blocks += weight
            for depth in range(gamma):
                if position == length:
                    break
                position += 1
                if not accepts[position - 1, depth]:
                    break
                kept[depth] += weight
            else:
                position += 1  # the bonus token
    assert expected_target_calls(rates, (gamma,)).item() == pytest.approx(blocks, rel=1e-9)
    assert acceptance_by_position(rates, gamma)[0].tolist() == pytest.approx(kept, rel=1e-9)


def test_a_draft_that_is_as_good_at_every_depth_is_an_ordinary_one():
    rates = torch.rand(2, 7, dtype=torch.float64)
    assert expected_target_calls(rates[..., None].expand(-1, -1, 5), (1, 3, 5)).equal(
        expected_target_calls(rates, (1, 3, 5))
    )


def test_a_depth_that_was_not_predicted_is_refused():
    with pytest.raises(ValueError, match="3 depths, but 4"):
        expected_target_calls(torch.rand(1, 5, 3), (1, 4))


@pytest.mark.parametrize(
    ("architecture", "penalty"), [("llama", 1.0), ("qwen3", 1.0), ("gpt2", 1.3), ("gpt_neox", 1.3)]
)
def test_greedy_block_efficiency_equals_counting_to_the_last_digit(architecture, penalty, monkeypatch):
    """In slices of a few positions, whose blocks begin in the slice before."""
    monkeypatch.setattr(scoring, "_LOGITS_AT_ONCE", 2 * 2 * 300 * 5)
    draft, target, tokenizer = parallel_pair(architecture)
    decoding = DecodingSetting(repetition_penalty=penalty)
    texts = write_together(target, tokenizer, tiny_prompts(tokenizer, 3), decoding)
    found = score_texts(target, [draft], texts, decoding, vocab_size=300, batch_size=2)
    sums = found.drafts[0][in_one_pass(EXACT)]
    for gamma in (1, 4):
        counting = SpeculativeDecoding(draft, gamma)
        for text in texts:
            options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "repetition_penalty": penalty}
            prompt = torch.tensor([text.prompt_ids])
            target.generate(prompt, custom_generate=counting, suppress_tokens=list(range(300, 320)), **options)
        computed = float(sums.num_tokens.sum() / sums.target_calls[:, gamma - 1].sum())
        assert computed == counting.counts.mean_acceptance_length
    assert sums.acceptance[:, 0].equal(found.drafts[0][EXACT].acceptance)


@torch.no_grad()
def test_rates_at_every_depth_are_those_of_separate_passes():
    draft, target, tokenizer = parallel_pair("llama", 3)
    decoding = DecodingSetting(0.8)
    texts = write_together(target, tokenizer, tiny_prompts(tokenizer, 2), decoding)
    (sums,) = score_texts(target, [draft], texts, decoding, vocab_size=300).drafts
    (first_depth,) = score_texts(target, [draft], texts, decoding, vocab_size=300, parallel=False).drafts
    assert sums.keys() - first_depth.keys() == {in_one_pass("rejection_sampling")}
    found = sums[in_one_pass("rejection_sampling")]
    for number, text in enumerate(texts):
        ids, first = torch.tensor([*text.prompt_ids, *text.completion_ids]), len(text.prompt_ids)
        p = (target(ids[None]).logits[0].double() / 0.8).softmax(-1)
        accepted = torch.zeros(1, len(text.completion_ids), 3, dtype=torch.float64)
        alpha = torch.zeros(3, dtype=torch.float64)
        for place in range(len(text.completion_ids)):
            for depth in range(min(3, place + 1)):
                base = first + place - depth
                seen = torch.cat([ids[:base], torch.full((depth,), MASK)])
                q = (draft(seen[None]).logits[0, -1].double() / 0.8).softmax(-1)
                token, there = ids[first + place], p[first + place - 1]
                accepted[0, place, depth] = min(1.0, float(q[token] / there[token]))
                alpha[depth] += torch.minimum(q, there).sum()
        torch.testing.assert_close(found.acceptance[number], alpha, atol=1e-4, rtol=1e-4)
        expected = expected_target_calls(accepted, (1, 2, 3))[0]
        torch.testing.assert_close(found.target_calls[number], expected, atol=1e-4, rtol=1e-4)


def test_the_report_knows_both_ways_and_its_check_agrees(monkeypatch):
    """Its bars go all the way: that of the check stood still while texts were written, minutes on a real model."""
    monkeypatch.setattr("hf_draftkd.evaluation.self_check._SAMPLED_TEXTS", 2)  # greedy numbers are looked at
    bars = []

    def bar(*of, **how):
        bars.append(tqdm(*of, **{**how, "file": StringIO()}))
        return bars[-1]

    monkeypatch.setattr("transformers.utils.logging.tqdm", bar)
    draft, target, tokenizer = parallel_pair("llama", num_layers=1)
    prompts = [tokenizer.decode(prompt[0], skip_special_tokens=True) for prompt in tiny_prompts(tokenizer, 3)]
    options = {"max_new_tokens": 8, "num_speed_prompts": 2, "verify": 1, "temperatures": [0.0, 1.0]}
    report = evaluate_draft(draft, target, tokenizer, prompts, **options)
    check = 1 * 2 * (1 + 3 * 3)  # prompts and settings, once plainly and in three ways with three draft lengths
    assert [each.n for each in bars] == [each.total for each in bars]
    assert [each.total for each in bars if each.desc == "Checking against real decoding"] == [check]
    assert SpeculationReport.from_json(report.to_json()).to_json() == report.to_json()
    for each in report.settings:
        assert len(each.parallel.acceptance_by_depth) == 5
        assert each.parallel.acceptance_by_depth[0].value == pytest.approx(each.acceptance_rate.value)
        assert each.parallel.block_efficiency[1].value == pytest.approx(each.block_efficiency[1].value)
        assert set(each.parallel.block_efficiency) == {1, 2, 3, 4, 5}
        assert each.parallel.speculative.speedup.value > 0
        assert each.parallel.speculative.predicted_speedup > 0
    assert set(report.latency.parallel_draft_seconds) == {1, 2, 3, 4, 5}
    assert PARALLEL in report.recommendation.reason
    checked = [each for each in report.self_check.comparisons if each.way == PARALLEL and each.decoding.is_greedy]
    assert len(checked) == 3
    assert all(each.agree for each in checked)
    console = Console(width=200, record=True, file=StringIO())
    console.print(ReportTable(report))
    shown = console.export_text()
    assert "in one pass, γ=5" in shown
    assert "in parallel, at γ" in shown


def test_a_list_of_tokens_groups_and_a_baseline_in_one_pass_too():
    """What is said of the list is what decoding in one pass with it counts."""
    draft, target, tokenizer = parallel_pair("llama", num_layers=1)
    baseline = parallel_pair("llama", 3, num_layers=1)[0]
    with torch.no_grad():
        baseline.lm_head.weight += 0.3 * torch.randn_like(baseline.lm_head.weight)
    store_draft_settings(draft, {"draft_vocabulary": list(range(3, 180))})
    prompts = [tokenizer.decode(prompt[0], skip_special_tokens=True) for prompt in tiny_prompts(tokenizer, 3)]
    rows = Dataset.from_dict({"prompt": prompts, "domain": ["a", "b", "b"]})
    options = {"max_new_tokens": 10, "num_speed_prompts": 3, "verify": 1, "temperatures": [0.0]}
    report = evaluate_draft(draft, target, tokenizer, rows, baseline=baseline, **options)
    (found,) = report.settings
    run = found.parallel.speculative
    assert run.mean_acceptance_length == found.of_list.parallel_block_efficiency[run.num_assistant_tokens].value
    assert found.of_list.parallel_block_efficiency[5].value < found.parallel.block_efficiency[5].value
    assert report.self_check.equal
    groups = [of[0].parallel.block_efficiency[3].value for of in report.groups.values()]
    assert min(groups) <= found.parallel.block_efficiency[3].value <= max(groups)
    difference = report.paired_difference[0].parallel_block_efficiency
    assert set(difference) == {1, 2, 3}
    theirs = report.baseline.settings[0].parallel.block_efficiency[3].value
    assert difference[3].value == pytest.approx(found.parallel.block_efficiency[3].value - theirs)
    assert difference[3].value > 0


def test_the_better_way_is_recommended_at_its_own_length():
    """A pass that costs what a step costs pays as long as deeper tokens are accepted at all."""
    each = setting(0.7)
    efficiency = {length: each.block_efficiency[length] for length in (1, 2, 3, 4, 5, 6)}
    each.parallel = ParallelResult(num_tokens=6, acceptance_by_depth=[], block_efficiency=efficiency)
    times = latency(draft=3e-3)
    times.parallel_draft_seconds = dict.fromkeys(efficiency, 4e-3)
    found = each.recommendation = recommend(each, times)
    assert found.way == PARALLEL
    assert found.num_assistant_tokens == 6
    assert recommend_overall([each], times).way == PARALLEL
    assert "a draft step takes" not in found.reason  # which nobody makes
    assert "; a draft pass takes 40% of a target step." in found.reason
    each.assisted = assisted(1.5)
    each.parallel.speculative = assisted(1.2, 6)
    times.speculative_overhead = None
    assert recommend(each, times).way == "assistant_model="
    times.parallel_draft_seconds = dict.fromkeys(efficiency, 30e-3)
    each.assisted = each.parallel.speculative = None
    assert recommend(each, times).way == "assistant_model="


def test_a_text_that_fills_the_draft_s_learned_positions():
    """An IndexError: mask tokens behind the end of the text were given positions of their own."""
    draft, target, _ = parallel_pair("gpt2")
    text = Text([5, 6, 7], list(range(8, 40)))
    length = sum(map(len, text))
    short = tiny_gpt2(max_position_embeddings=length)
    weights = draft.state_dict()
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:length]
    short.load_state_dict(weights)
    store_parallel_draft(short.config, MASK, 5)
    (one,), (other,) = (
        score_texts(target, [each], [text], DecodingSetting(1.0), vocab_size=VOCAB_SIZE).drafts
        for each in (draft, short)
    )
    name = in_one_pass("rejection_sampling")
    torch.testing.assert_close(one[name].target_calls, other[name].target_calls)


def test_a_window_that_holds_the_text_but_not_its_mask_tokens():
    """Catches a RuntimeError of the cache, which could not be cropped; and a text longer than the window, where mask
    tokens would look out of it.
    """
    window = {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}
    draft, target, tokenizer = parallel_pair("qwen3", sliding_window=200, **window)
    text, name = Text([5, 6, 7], list(range(8, 37))), in_one_pass("rejection_sampling")
    how = {"setting": DecodingSetting(1.0), "vocab_size": VOCAB_SIZE}
    calls = []
    for size in (200, 32):
        draft.config.sliding_window = size
        calls.append(score_texts(target, [draft], [text], **how).drafts[0][name].target_calls)
    torch.testing.assert_close(*calls)
    with pytest.raises(ValueError, match="context 32"):
        evaluate_draft(draft, target, tokenizer, ["The quick brown fox"], max_new_tokens=31)


def test_texts_shorter_than_the_depths():
    draft, target, _ = parallel_pair("llama")
    (sums,) = score_texts(target, [draft], [Text([5, 6, 7], [8, 9])], DecodingSetting(1.0), vocab_size=300).drafts
    of_depths = sums[in_one_pass("rejection_sampling")].acceptance[0]
    assert (of_depths <= torch.tensor([2, 1, 0, 0, 0])).all()
    assert len(parallel_result(sums[in_one_pass("rejection_sampling")], [0]).acceptance_by_depth) == 2
