"""Counts add up, ratios come last, and intervals cover what they should."""

import json
import math

import pytest
import torch

from hf_draftkd.acceptance import (
    AcceptanceCounts,
    Estimate,
    bootstrap_paired_ratio_difference,
    bootstrap_paired_ratio_quotient,
    bootstrap_ratio,
)


def counted(*steps: tuple[int, ...]) -> AcceptanceCounts:
    counts = AcceptanceCounts()
    for step in steps:
        counts.record(*step)
    return counts


def test_recorded_calls():
    counts = counted((5, 5), (5, 0), (3, 2, 2))
    assert counts == AcceptanceCounts(3, 13, 7, 6 + 1 + 2, [1, 0, 1, 0, 0, 1])
    assert counts.mean_acceptance_length == 9 / 3
    assert counts.draft_acceptance_rate == 7 / 13


def test_adding_is_counting_together():
    """Averaging two mean lengths is the ratio-of-averages fault; adding counts is not."""
    first, second = counted((5, 5), (5, 1)), counted((2, 0))
    assert first + second == counted((5, 5), (5, 1), (2, 0))
    assert (first + second).mean_acceptance_length == 9 / 3
    assert first == counted((5, 5), (5, 1)), "adding must not change its operands"


def test_dict_is_json_and_leaves_out_what_was_not_measured():
    assert json.loads(json.dumps(counted((4, 2)).to_dict())) == {
        "num_spec_steps": 1,
        "num_draft_tokens": 4,
        "num_accepted_draft_tokens": 2,
        "num_tokens": 3,
        "acceptance_histogram": [0, 0, 1],
        "mean_acceptance_length": 3.0,
        "draft_acceptance_rate": 0.5,
    }
    empty = AcceptanceCounts()
    assert math.isnan(empty.mean_acceptance_length)
    assert "mean_acceptance_length" not in empty.to_dict()
    assert "draft_acceptance_rate" not in counted((0, 0)).to_dict()


@pytest.mark.parametrize("step", [(3, 4), (3, -1), (3, 2, 4), (3, 2, 1)])
def test_contradictions_are_refused(step):
    with pytest.raises(ValueError, match="tokens"):
        counted(step)


def test_adding_something_else_is_a_type_error():
    with pytest.raises(TypeError):
        AcceptanceCounts() + 3


def test_ratio_of_sums_and_not_mean_of_ratios():
    assert bootstrap_ratio([10, 1], [1, 1]).value == 11 / 2
    assert bootstrap_ratio([10, 9], [1, 9]).value == 19 / 10


def test_interval_matches_the_normal_approximation():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, 100, (400,), generator=generator).double()
    calls = tokens / (2 + 0.5 * torch.rand(400, generator=generator, dtype=torch.float64))
    estimate = bootstrap_ratio(tokens, calls)
    residuals = tokens - estimate.value * calls
    error = residuals.std().item() / calls.mean().item() / 400**0.5
    assert estimate.low == pytest.approx(estimate.value - 1.96 * error, abs=0.15 * error)
    assert estimate.high == pytest.approx(estimate.value + 1.96 * error, abs=0.15 * error)
    wide = bootstrap_ratio(tokens, calls, confidence=0.99)
    assert wide.low < estimate.low < estimate.high < wide.high


def test_intervals_are_reproducible_and_leave_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    columns = torch.rand(2, 30, generator=torch.Generator().manual_seed(2))
    assert bootstrap_ratio(*columns) == bootstrap_ratio(*columns)
    assert torch.equal(torch.get_rng_state(), before)


def test_many_texts_are_resampled_in_slices(monkeypatch):
    """The slices bound memory; they must not change the number of resamples or repeat the same draws."""
    monkeypatch.setattr("hf_draftkd.acceptance.counts._MAX_RESAMPLED", 64)
    columns = torch.rand(2, 50, generator=torch.Generator().manual_seed(3))
    sliced = bootstrap_ratio(*columns)
    monkeypatch.undo()
    whole = bootstrap_ratio(*columns)
    assert sliced == whole


def test_pairing_removes_what_texts_share():
    """Two drafts on the same texts differ by a little everywhere: unpaired intervals would overlap."""
    generator = torch.Generator().manual_seed(4)
    hardness = 1 + 4 * torch.rand(60, generator=generator)
    calls = torch.full((60,), 10.0)
    ours, stock = 10 * hardness + 1, 10 * hardness
    difference = bootstrap_paired_ratio_difference(ours, calls, stock, calls)
    assert difference.value == pytest.approx(0.1)
    assert difference.low == pytest.approx(0.1)
    assert difference.high == pytest.approx(0.1)
    alone, other = bootstrap_ratio(ours, calls), bootstrap_ratio(stock, calls)
    assert alone.low < other.high


def test_speedup_is_a_quotient_of_rates():
    tokens, seconds, plain_seconds = [100, 50, 80], [1.0, 0.4, 0.9], [2.0, 0.8, 1.8]
    speedup = bootstrap_paired_ratio_quotient(tokens, seconds, tokens, plain_seconds)
    assert speedup == Estimate(pytest.approx(2.0), pytest.approx(2.0), pytest.approx(2.0))


def test_a_single_text_has_no_interval():
    estimate = bootstrap_ratio([7], [2])
    assert estimate == Estimate(3.5)
    assert None not in vars(bootstrap_ratio([7, 8], [2, 2])).values()


def test_empty_texts_are_left_out():
    """A text that ended at once has no tokens and no calls: 0/0 in a resample, and no information."""
    assert bootstrap_ratio([7, 0, 8], [2, 0, 3]) == bootstrap_ratio([7, 8], [2, 3])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([1, 2], [1]), r"same texts, got \[2, 1\]"),
        (([1, math.nan], [1, 1]), "NaN"),
        (([], []), "no text"),
        (([1], [0]), "no text"),
    ],
)
def test_bad_columns(columns, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_ratio(*columns)
