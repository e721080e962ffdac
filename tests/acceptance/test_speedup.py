"""From block efficiency to time: against hand computation, closed forms and published numbers."""

import math

import pytest

from hf_draftkd.acceptance import (
    DraftLength,
    Latency,
    best_draft_length,
    break_even_acceptance_rate,
    expected_block_efficiency,
    mbsu,
    predicted_speedup,
)


def test_mbsu_of_the_papers_draft():
    """Llama 2 Chat Drafter: 1.64% of the target, block efficiency 2.3 at γ = 3 (arXiv 2403.00858)."""
    assert mbsu(2.3, 3, parameter_ratio=0.0164) == pytest.approx(2.3 / (0.0164 * 3 + 1))


def test_expected_block_efficiency():
    assert expected_block_efficiency(0.8, 4) == pytest.approx((1 - 0.8**5) / (1 - 0.8))
    assert expected_block_efficiency(0.0, 4) == 1
    assert expected_block_efficiency(1.0, 4) == 5
    nearly = 1 - 1e-15
    assert expected_block_efficiency(nearly, 4) == pytest.approx(5, rel=1e-12)  # the quotient would be 0/0


def test_predicted_speedup_by_hand():
    latency = Latency(0.050, 0.010, {6: 0.060})
    assert predicted_speedup(3.3, 5, latency) == pytest.approx(3.3 * 0.050 / (5 * 0.010 + 0.060))
    assert latency.relative_cost == pytest.approx(0.2)


def test_verification_is_interpolated_and_never_extrapolated():
    latency = Latency(1.0, 0.1, {2: 1.0, 6: 3.0, 17: 3.0})
    assert latency.verify(2) == 1.0
    assert latency.verify(3) == pytest.approx(1.5)
    assert latency.verify(10) == pytest.approx(3.0)
    with pytest.raises(ValueError, match=r"timed for 2 to 17 tokens.*nothing is known about 18.*from 1 to 16"):
        latency.verify(18)
    assert Latency(1.0, 0.1).verify(99) == 1.0


def test_best_draft_length():
    latency = Latency(1.0, 0.2, {n: 1 + 0.05 * n for n in range(2, 10)})
    efficiency = {gamma: expected_block_efficiency(0.7, gamma) for gamma in range(1, 9)}
    by_hand = {gamma: tau / (0.2 * gamma + 1 + 0.05 * (gamma + 1)) for gamma, tau in efficiency.items()}
    best = max(by_hand, key=by_hand.get)
    assert 1 < best < 8
    assert best_draft_length(efficiency, latency) == DraftLength(best, pytest.approx(by_hand[best]))


def test_best_draft_length_prefers_the_shorter_of_equals_and_tells_when_nothing_pays():
    latency = Latency(1.0, 1.0)
    length, speedup = best_draft_length({2: 1.5, 1: 1.0, 5: 3.0}, latency)
    assert (length, speedup) == (1, 0.5)


def test_break_even_of_the_published_null_result():
    """A draft 1.68x faster than its target at γ = 5 broke even at 0.832 (field.md, Soup)."""
    rate = break_even_acceptance_rate(Latency(1.68, 1.0), [5])
    assert rate == pytest.approx(0.832, abs=5e-4)
    assert expected_block_efficiency(rate, 5) == pytest.approx(1 + 5 / 1.68)


def test_break_even_takes_the_best_length():
    # Verifying two tokens at once is slow on this machine, so γ = 1 is not the cheapest way to break even.
    latency = Latency(1.0, 0.05, {2: 1.6, 3: 1.6, 4: 1.6, 5: 1.6})
    each = [break_even_acceptance_rate(latency, [gamma]) for gamma in range(1, 5)]
    assert break_even_acceptance_rate(latency, range(1, 5)) == min(each) < each[0]


def test_at_break_even_the_best_predicted_speedup_is_one():
    latency = Latency(0.031, 0.009, {n: 0.03 + 0.002 * n for n in range(2, 18)})
    rate = break_even_acceptance_rate(latency)
    efficiency = {gamma: expected_block_efficiency(rate, gamma) for gamma in range(1, 17)}
    assert best_draft_length(efficiency, latency).predicted_speedup == pytest.approx(1, rel=1e-12)


def test_break_even_at_the_edges():
    assert break_even_acceptance_rate(Latency(1.0, 1.5)) is None
    assert break_even_acceptance_rate(Latency(1.0, 1.0)) == pytest.approx(1.0)
    assert break_even_acceptance_rate(Latency(1.0, 0.1, {2: 0.9}), [1]) == 0.0


class TestErrors:
    def test_a_pass_of_another_length(self):
        """KeyError: 9 of a parallel draft that was timed up to 8, at the default lengths."""
        latency = Latency(1.0, 0.1, draft_pass_seconds=dict.fromkeys(range(1, 9), 0.2))
        assert break_even_acceptance_rate(latency, range(1, 9)) < 1
        with pytest.raises(ValueError, match=r"timed for \[1, 2, .*, 8\] tokens, so nothing is known about 9"):
            break_even_acceptance_rate(latency)

    @pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
    def test_times(self, seconds):
        with pytest.raises(ValueError, match="draft_step_seconds"):
            Latency(1.0, seconds)
        with pytest.raises(ValueError, match=r"verify_seconds\[3\]"):
            Latency(1.0, 1.0, {3: seconds})

    @pytest.mark.parametrize("efficiency", [0.9, 6.1, math.nan])
    def test_impossible_block_efficiency(self, efficiency):
        """4 accepted of 5 drafted, the bonus forgotten, gives numbers below 1; γ mixed up gives numbers above γ + 1."""
        with pytest.raises(ValueError, match=r"must lie in \[1, 6\]"):
            predicted_speedup(efficiency, 5, Latency(1.0, 0.1))
        with pytest.raises(ValueError, match=r"must lie in \[1, 6\]"):
            mbsu(efficiency, 5, parameter_ratio=0.1)

    def test_rates(self):
        with pytest.raises(ValueError, match="acceptance_rate"):
            expected_block_efficiency(1.1, 3)
        with pytest.raises(ValueError, match="parameter_ratio"):
            mbsu(2.0, 5, parameter_ratio=0.0)
        with pytest.raises(ValueError, match="block_efficiency is empty"):
            best_draft_length({}, Latency(1.0, 0.1))
        with pytest.raises(ValueError, match="draft_lengths is empty"):
            break_even_acceptance_rate(Latency(1.0, 0.1), [])
