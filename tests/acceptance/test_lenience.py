"""Lossy acceptance at one position, from the definition, at its ends, and against draws from the algorithm itself."""

import pytest
import torch

from hf_draftkd.acceptance import LENIENCE_FORMS, lenient_rates


@pytest.fixture
def distributions():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn((6, 5), generator=generator, dtype=torch.float64).mul(2).softmax(-1) for _ in range(2))
    return p, q


def reference(p, q, form, lenience):
    """Token by token, from the definition."""
    accepted, output = 0.0, [0.0] * len(p)
    residual = [max(0.0, a - b) for a, b in zip(p, q, strict=True)]
    for token, (target, draft) in enumerate(zip(p, q, strict=True)):
        v = {
            "linear": target / lenience,
            "square": target / lenience**2,
            "exponential": target**lenience,
            "ensemble": lenience * target + (1 - lenience) * draft,
        }[form]
        kept = draft * min(1.0, v / draft)
        accepted += kept
        output[token] += kept
    for token in range(len(p)):
        output[token] += (1 - accepted) * residual[token] / sum(residual)
    return accepted, 0.5 * sum(abs(a - b) for a, b in zip(output, p, strict=True))


@pytest.mark.parametrize("form", LENIENCE_FORMS)
@pytest.mark.parametrize("lenience", [1.0, 0.6, 0.2])
def test_the_definition(distributions, form, lenience):
    p, q = distributions
    acceptance, distance = lenient_rates(q, p, form, lenience)
    for row in range(len(p)):
        expected = reference(p[row].tolist(), q[row].tolist(), form, lenience)
        assert (acceptance[row].item(), distance[row].item()) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("form", LENIENCE_FORMS)
def test_lenience_one_is_lossless(distributions, form):
    p, q = distributions
    acceptance, distance = lenient_rates(q, p, form, 1.0)
    torch.testing.assert_close(acceptance, torch.minimum(p, q).sum(-1))
    torch.testing.assert_close(distance, torch.zeros_like(distance), atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", LENIENCE_FORMS)
def test_more_lenience_is_more_acceptance_at_exactly_that_price(distributions, form):
    """TV(π, p) = gain in acceptance: the identity the module states."""
    p, q = distributions
    lossless = torch.minimum(p, q).sum(-1)
    before = lossless
    for lenience in (0.9, 0.5, 0.1):
        acceptance, distance = lenient_rates(q, p, form, lenience)
        assert (acceptance >= before - 1e-12).all()
        torch.testing.assert_close(distance, acceptance - lossless)
        before = acceptance


def test_ensemble_in_closed_form(distributions):
    """With v = wp + (1 − w)q acceptance is 1 − w·TV, the output is v itself."""
    p, q = distributions
    variation = 0.5 * (p - q).abs().sum(-1)
    acceptance, distance = lenient_rates(q, p, "ensemble", 0.3)
    torch.testing.assert_close(acceptance, 1 - 0.3 * variation)
    torch.testing.assert_close(distance, 0.7 * variation)


@pytest.mark.parametrize("form", LENIENCE_FORMS)
def test_a_draft_that_is_its_own_target_loses_nothing(distributions, form):
    p, _ = distributions
    acceptance, distance = lenient_rates(p.clone(), p, form, 0.4)
    assert (acceptance == 1).all()
    torch.testing.assert_close(distance, torch.zeros_like(distance), atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", LENIENCE_FORMS)
def test_in_the_limit_everything_is_accepted_and_the_output_is_the_drafts(distributions, form):
    p, q = distributions
    rates = lenient_rates(q, p, form, 1e-9)
    torch.testing.assert_close(rates.acceptance_rate, torch.ones_like(rates.acceptance_rate), atol=1e-6, rtol=0)
    own = 0.5 * (q - p).abs().sum(-1)
    torch.testing.assert_close(rates.total_variation, own, atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", LENIENCE_FORMS)
def test_simulated(distributions, form):
    p, q = (each[0] for each in distributions)
    v = {"linear": p / 0.6, "square": p / 0.36, "exponential": p**0.6, "ensemble": 0.6 * p + 0.4 * q}[form]
    generator, n = torch.Generator().manual_seed(4), 200_000
    proposed = q.multinomial(n, replacement=True, generator=generator)
    kept = torch.rand(n, generator=generator, dtype=torch.float64) < v[proposed] / q[proposed]
    output = torch.where(kept, proposed, (p - q).clamp(min=0).multinomial(n, replacement=True, generator=generator))
    frequencies = output.bincount(minlength=5) / n
    rates = lenient_rates(q, p, form, 0.6)
    assert kept.double().mean().item() == pytest.approx(rates.acceptance_rate.item(), abs=4e-3)
    assert 0.5 * (frequencies - p).abs().sum().item() == pytest.approx(rates.total_variation.item(), abs=6e-3)


def test_a_token_that_the_target_would_never_say_is_replaced():
    p, q = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    acceptance, distance = lenient_rates(q, p, "exponential", 0.5)
    assert (acceptance.item(), distance.item()) == (0.0, 0.0)


def test_errors():
    p = torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match="Did you mean 'exponential'"):
        lenient_rates(p, p, "exp", 0.5)
    for lenience in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="Lenience must lie in"):
            lenient_rates(p, p, "linear", lenience)
    with pytest.raises(ValueError, match="one vocabulary"):
        lenient_rates(p, torch.ones(3) / 3, "linear", 0.5)
