"""Lossy decoding at one position, against the definition and against simulation."""

import pytest
import torch

from hf_draftkd.evaluation.lossy import FORMS, LENIENCE, lossy_step, lossy_values


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lenience", [1.0, 0.6, 0.2])
def test_the_definition(distributions, form, lenience):
    p, q = distributions
    acceptance, distance = lossy_step(p, q, form, lenience)
    for row in range(len(p)):
        expected = reference(p[row].tolist(), q[row].tolist(), form, lenience)
        assert (acceptance[row].item(), distance[row].item()) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_lenience_one_is_lossless(distributions, form):
    p, q = distributions
    acceptance, distance = lossy_step(p, q, form, 1.0)
    torch.testing.assert_close(acceptance, torch.minimum(p, q).sum(-1))
    torch.testing.assert_close(distance, torch.zeros_like(distance), atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_more_lenience_is_more_acceptance_at_exactly_that_price(distributions, form):
    """TV(π, p) = gain in acceptance: the identity the module states."""
    p, q = distributions
    lossless = torch.minimum(p, q).sum(-1)
    before = lossless
    for lenience in LENIENCE[1:]:
        acceptance, distance = lossy_step(p, q, form, lenience)
        assert (acceptance >= before - 1e-12).all()
        torch.testing.assert_close(distance, acceptance - lossless)
        before = acceptance


def test_ensemble_in_closed_form(distributions):
    """With v = wp + (1 − w)q acceptance is 1 − w·TV, the output is v itself."""
    p, q = distributions
    variation = 0.5 * (p - q).abs().sum(-1)
    acceptance, distance = lossy_step(p, q, "ensemble", 0.3)
    torch.testing.assert_close(acceptance, 1 - 0.3 * variation)
    torch.testing.assert_close(distance, 0.7 * variation)


@pytest.mark.parametrize("form", FORMS)
def test_a_draft_that_is_its_own_target_loses_nothing(distributions, form):
    p, _ = distributions
    acceptance, distance = lossy_step(p, p.clone(), form, 0.4)
    assert (acceptance == 1).all()
    torch.testing.assert_close(distance, torch.zeros_like(distance), atol=1e-12, rtol=0)


def test_values_are_named_for_every_point_of_the_curve():
    values = lossy_values(torch.randn(3, 4), torch.randn(3, 4))
    assert len(values) == 2 * len(FORMS) * len(LENIENCE)
    assert all(value.shape == (3,) for value in values.values())
