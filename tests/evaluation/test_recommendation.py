"""Verdicts from known numbers: is it worth it, and with which draft length."""

import pytest

from hf_draftkd.acceptance import Estimate
from hf_draftkd.evaluation.recommendation import (
    ASSISTANT_MODEL,
    SPECULATIVE,
    overall_draft_lengths,
    recommend,
    recommend_overall,
)
from hf_draftkd.evaluation.report import GenerateOverhead
from tests.evaluation.samples import LENGTHS, assisted, latency, setting


def test_a_cheap_good_draft_is_worth_it():
    """With step times 10 and 1 ms and verification in 11 ms: best γ by trying all, the definition of the speed-up."""
    found = recommend(setting(0.7), latency())
    speedups = {length: sum(0.7**power for power in range(length + 1)) * 10 / (length * 1 + 11) for length in LENGTHS}
    best = max(speedups, key=speedups.get)
    assert found.worth_it
    assert found.num_assistant_tokens == best
    assert found.predicted_speedup == pytest.approx(speedups[best])
    assert found.break_even_acceptance_rate < 0.7
    assert found.reason.startswith("Worth it for greedy")


def test_a_slow_draft_is_not_worth_it_and_the_sentence_says_why():
    found = recommend(setting(0.7), latency(draft=9e-3))
    assert not found.worth_it
    assert found.predicted_speedup < 1
    assert "Not worth it" in found.reason
    assert "90% of a target step" in found.reason
    assert f"{found.break_even_acceptance_rate:.2f} would be needed" in found.reason


def test_where_nothing_could_ever_pay_no_break_even_is_named():
    found = recommend(setting(1.0), latency(draft=11e-3))
    assert not found.worth_it
    assert found.break_even_acceptance_rate is None
    assert "no acceptance rate would make up for that" in found.reason


def test_the_overhead_of_generate_counts():
    """A draft that pays in forward passes alone, and not once `generate`'s own time is added to every draft step."""
    overhead = GenerateOverhead(plain_step_seconds=0.0, draft_step_seconds=8e-3, block_seconds=2e-3)
    assert recommend(setting(0.7), latency()).worth_it
    assert not recommend(setting(0.7), latency(overhead=overhead)).worth_it


@pytest.mark.parametrize(("speedup", "worth_it"), [(1.4, True), (0.9, False)])
def test_what_was_measured_overrules_what_was_predicted(speedup, worth_it):
    found = recommend(setting(0.7, assisted=assisted(speedup)), latency())
    assert found.worth_it == worth_it
    assert f"with 4 draft tokens: {speedup:.2f} times" in found.reason


@pytest.mark.parametrize(("low", "high", "open_question"), [(0.98, 1.3, True), (1.02, 1.3, False), (0.8, 0.97, False)])
def test_an_interval_around_one_is_said_to_decide_nothing(low, high, open_question):
    timed = assisted(1.1)
    timed.speedup = Estimate(1.1, low, high)
    found = recommend(setting(0.7, assisted=timed), latency())
    assert ("A gain and a loss both lie within this interval" in found.reason) == open_question


def test_a_measured_loss_is_not_put_down_to_the_prediction():
    """Catches "even the best draft length is predicted to reach 1.85 times", given as the reason against."""
    reason = recommend(setting(0.7, assisted=assisted(0.9)), latency()).reason
    assert reason.startswith("Not worth it for greedy: 1.85 times the plain speed was predicted")
    assert "real decoding did not gain" in reason
    assert "break even" not in reason


def test_a_measured_gain_is_not_put_down_to_the_prediction():
    """Catches "Worth it: 1 draft token a step is predicted to decode 0.93 times as fast"."""
    reason = recommend(setting(0.7, assisted=assisted(1.1)), latency(draft=9e-3)).reason
    assert reason.startswith("Worth it for greedy: real decoding gained, though 0.")
    assert "are predicted to decode" not in reason


def test_short_texts_do_not_need_less_than_is_accepted():
    """Catches "0.90 are accepted, and 0.33 would be needed to break even" against a draft, where texts end at once."""
    short = setting(0.9)
    short.block_efficiency = dict.fromkeys(LENGTHS, Estimate(1.0))
    found = recommend(short, latency())
    assert not found.worth_it
    assert found.break_even_acceptance_rate < 0.9
    assert "would do in long texts whose tokens all have the same chance" in found.reason
    assert "would be needed" not in found.reason


@pytest.mark.parametrize("measured", [0.7, 1.4])
def test_another_draft_lengths_loss_does_not_decide(measured):
    """Catches a draft condemned at its best length because a user had it timed at one that is far too long."""
    timed = setting(0.7, assisted=assisted(measured, num_assistant_tokens=16))
    timed.recommendation = recommend(timed, latency())
    for found in (timed.recommendation, recommend_overall([timed], latency())):
        assert found.worth_it
        assert found.num_assistant_tokens == 4
        assert f"with 16 draft tokens: {measured:.2f} times" in found.reason
    slow = setting(0.7, assisted=assisted(measured, num_assistant_tokens=16))
    assert recommend(slow, latency(draft=9e-3)).worth_it == (measured > 1)


@pytest.mark.parametrize(("bounds", "is_sure"), [((1.2, 1.6), True), ((0.9, 1.6), False), ((None, None), False)])
def test_the_overall_verdict_says_what_is_not_decided(bounds, is_sure):
    """Catches a bare "Worth it" over several settings, where an interval holds 1 or there is none."""
    settings = [setting(0.7, temperature, assisted=assisted(1.4)) for temperature in (0.0, 1.0)]
    settings[1].assisted.speedup = Estimate(1.4, *bounds)
    for entry in settings:
        entry.recommendation = recommend(entry, latency())
    found = recommend_overall(settings, latency())
    assert found.worth_it
    assert ("More prompts would be needed to be sure for temperature 1." in found.reason) != is_sure
    assert ("more prompts would decide" in settings[1].recommendation.reason) != is_sure


def test_the_setting_that_gains_least_decides():
    """One draft length is stored for all settings: it must not ruin the weaker one."""
    settings = [setting(0.95), setting(0.2, 1.0)]
    times = latency(draft=2e-3)
    for entry in settings:
        entry.recommendation = recommend(entry, times)
    assert settings[0].recommendation.worth_it
    assert not settings[1].recommendation.worth_it
    overall = recommend_overall(settings, times)
    assert overall.num_assistant_tokens == overall_draft_lengths(settings, times)["assistant_model="]
    assert overall.num_assistant_tokens < settings[0].recommendation.num_assistant_tokens
    assert not overall.worth_it
    assert overall.reason.startswith("Worth it for greedy, not for temperature 1.")


def test_other_engines_rules_do_not_decide_for_transformers():
    settings = [setting(0.8, 1.0), setting(0.1, 1.0)]
    settings[1].verification = "greedy_draft"
    for entry in settings:
        entry.recommendation = recommend(entry, latency())
    overall = recommend_overall(settings, latency())
    assert overall.worth_it
    assert overall.num_assistant_tokens == settings[0].recommendation.num_assistant_tokens


def test_without_block_efficiency_nothing_is_recommended():
    bare = setting(0.7)
    bare.block_efficiency = None
    assert recommend(bare, latency()) is None
    assert recommend_overall([bare], latency()) is None


def test_the_better_way_is_named():
    """A verdict over `assistant_model=` alone, where `SpeculativeDecoding` is the faster way."""
    times = latency(overhead=GenerateOverhead(plain_step_seconds=0.0, draft_step_seconds=3e-3, block_seconds=4e-3))
    times.speculative_overhead = GenerateOverhead(plain_step_seconds=0.0, draft_step_seconds=1e-4, block_seconds=1e-4)
    predicted = recommend(setting(0.7), times)
    assert predicted.way == SPECULATIVE
    settings = [setting(0.7, temperature, assisted=assisted(0.9), speculative=assisted(1.4)) for temperature in (0, 1)]
    for entry in settings:
        entry.recommendation = recommend(entry, times)
    found = recommend_overall(settings, times)
    assert (found.way, found.worth_it) == (SPECULATIVE, True)
    assert "in transformers on this machine" in found.reason
    assert (
        "1.40 times (1.30 to 1.50) by SpeculativeDecoding, 0.90 times (0.80 to 1.00) by assistant_model="
        in found.reason
    )
    # What was measured overrules what was predicted, here as well.
    settings[0].assisted = settings[1].assisted = assisted(1.6)
    assert recommend_overall(settings, times).way == ASSISTANT_MODEL


def test_a_rule_of_another_engine_names_no_way():
    entry = setting(0.7, 1.0)
    entry.verification = "greedy_draft"
    assert recommend(entry, latency()).way is None
