"""The draft length that pays best is found, and a draft that does not pay is left alone."""

import pickle
import random

import pytest

from hf_draftkd.decoding.auto_length import AutoLength


def simulate(alpha: float, draft_seconds: float, *, rounds: int = 3000, num_texts: int = 1) -> tuple[AutoLength, float]:
    """Tokens per second relative to plain decoding: a target call takes 1 second and 0.02 more a drafted token."""
    random.seed(0)
    length = AutoLength()
    tokens, seconds = 0, 0.0
    for _ in range(rounds):
        gamma = length.choose(num_texts)
        took = (1 + gamma * (draft_seconds + 0.02)) * random.uniform(0.97, 1.03)
        accepted = []
        for _ in range(num_texts):
            n = 0
            while n < gamma and random.random() < alpha:
                n += 1
            accepted.append(n)
        length.record(num_texts, gamma, accepted, took)
        tokens, seconds = tokens + sum(accepted) + num_texts, seconds + took
    return length, tokens / seconds / num_texts


def best_rate(alpha: float, draft_seconds: float) -> float:
    return max((1 - alpha ** (gamma + 1)) / (1 - alpha) / (1 + gamma * (draft_seconds + 0.02)) for gamma in range(17))


@pytest.mark.parametrize(("alpha", "draft_seconds"), [(0.5, 0.1), (0.8, 0.1), (0.9, 0.05), (0.7, 0.3)])
def test_nearly_the_best_rate_is_reached(alpha: float, draft_seconds: float) -> None:
    _, rate = simulate(alpha, draft_seconds)
    assert rate > 0.95 * best_rate(alpha, draft_seconds)


@pytest.mark.parametrize(("alpha", "draft_seconds"), [(0.1, 0.5), (0.0, 0.1), (0.5, 0.9)])
def test_a_draft_that_does_not_pay_costs_less_than_three_percent(alpha: float, draft_seconds: float) -> None:
    _, rate = simulate(alpha, draft_seconds)
    assert rate > 0.97


def test_a_draft_that_begins_to_pay_is_taken_up_again() -> None:
    length, _ = simulate(0.0, 0.2, rounds=400)
    assert length.choose(1) == 0
    drafted = 0
    for _ in range(3000):
        gamma = length.choose(1)
        length.record(1, gamma, [gamma], 1 + 0.22 * gamma)
        drafted += gamma > 0
    assert drafted > 1500


def test_batch_sizes_are_learned_apart() -> None:
    length = AutoLength()
    for _ in range(200):
        for num_texts, slope in ((1, 0.1), (16, 2.0)):
            gamma = length.choose(num_texts)
            length.record(num_texts, gamma, [gamma * 3 // 4] * num_texts, 1 + slope * gamma)
    assert length._line(1)(4) == pytest.approx(1.4, rel=0.01)
    assert length._best((16).bit_length()) == 0 < length._best((1).bit_length())


def test_what_was_learned_is_pickled() -> None:
    """An AttributeError of a local function, for a SpeculativeDecoding that was given to another process."""
    length, _ = simulate(0.8, 0.1, rounds=40)
    again = pickle.loads(pickle.dumps(length))
    assert [again.choose(1) for _ in range(70)] == [length.choose(1) for _ in range(70)]
    assert again.choose(8) == length.choose(8)
