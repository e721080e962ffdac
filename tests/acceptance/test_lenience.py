"""Lossy acceptance by hand, at its ends, and against draws from the algorithm itself."""

from itertools import pairwise

import pytest
import torch

from hf_draftkd.acceptance import LENIENCE_FUNCTIONS, lenient_rates, token_acceptance_rate


def of(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def logits(*shape: int, seed: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("function", "epsilon", "f_of_p0"), [("f_lin", 0.8, 0.4 / 0.8), ("f_sq", 0.8, 0.4 / 0.64), ("f_exp", 0.5, 0.4**0.5)]
)
def test_two_tokens_by_hand(function, epsilon, f_of_p0):
    """Q = (0.9, 0.1), p = (0.4, 0.6): token 1 is always kept, token 0 with f(0.4)/0.9, and rejection gives token 1."""
    acceptance, distance = lenient_rates(of(0.9, 0.1), of(0.4, 0.6), epsilon, function=function)
    assert acceptance.item() == pytest.approx(0.1 + f_of_p0)
    assert distance.item() == pytest.approx(f_of_p0 - 0.4)


@pytest.mark.parametrize("function", LENIENCE_FUNCTIONS)
def test_epsilon_one_is_lossless(function):
    draft, target = logits(20, 9, seed=0), logits(20, 9, seed=1)
    acceptance, distance = lenient_rates(draft, target, 1.0, function=function)
    torch.testing.assert_close(acceptance, token_acceptance_rate(draft, target))
    torch.testing.assert_close(distance, torch.zeros(20, dtype=torch.float64))


@pytest.mark.parametrize("function", LENIENCE_FUNCTIONS)
def test_smaller_epsilon_accepts_more_and_moves_further(function):
    draft, target = logits(20, 9, seed=2), logits(20, 9, seed=3)
    rates = [lenient_rates(draft, target, epsilon, function=function) for epsilon in (1.0, 0.8, 0.5, 0.2, 1e-9)]
    for stricter, laxer in pairwise(rates):
        assert (laxer.acceptance_rate >= stricter.acceptance_rate - 1e-12).all()
        assert laxer.total_variation.mean() >= stricter.total_variation.mean()
    # In the limit everything is accepted and the output is the draft's.
    torch.testing.assert_close(rates[-1].acceptance_rate, torch.ones(20, dtype=torch.float64), atol=1e-6, rtol=0)
    own = 0.5 * (draft.softmax(-1) - target.softmax(-1)).abs().sum(-1)
    torch.testing.assert_close(rates[-1].total_variation, own, atol=1e-6, rtol=0)


@pytest.mark.parametrize("function", LENIENCE_FUNCTIONS)
def test_simulated(function):
    generator = torch.Generator().manual_seed(4)
    draft, target = logits(5, seed=5), logits(5, seed=6)
    q, p = draft.softmax(-1), target.softmax(-1)
    f = {"f_lin": p / 0.6, "f_sq": p / 0.36, "f_exp": p**0.6}[function]
    n = 200_000
    proposed = q.multinomial(n, replacement=True, generator=generator)
    kept = torch.rand(n, generator=generator, dtype=torch.float64) < f[proposed] / q[proposed]
    output = torch.where(kept, proposed, (p - q).clamp(min=0).multinomial(n, replacement=True, generator=generator))
    frequencies = output.bincount(minlength=5) / n
    rates = lenient_rates(draft, target, 0.6, function=function)
    assert kept.double().mean().item() == pytest.approx(rates.acceptance_rate.item(), abs=4e-3)
    assert 0.5 * (frequencies - p).abs().sum().item() == pytest.approx(rates.total_variation.item(), abs=6e-3)


def test_equal_models_and_filtered_tokens_are_finite():
    same = of(0.5, 0.5, 0.0)
    assert [rate.item() for rate in lenient_rates(same, same, 0.5)] == [1.0, 0.0]
    acceptance, distance = lenient_rates(of(1.0, 0.0), of(0.0, 1.0), 0.5)
    assert (acceptance.item(), distance.item()) == (0.0, 0.0), "the target's own token replaces what it would never say"


def test_errors():
    with pytest.raises(ValueError, match="Did you mean 'f_exp'"):
        lenient_rates(of(1.0), of(1.0), 0.5, function="exp")
    for epsilon in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="epsilon must lie in"):
            lenient_rates(of(1.0), of(1.0), epsilon)
