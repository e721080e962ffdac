"""Forms of lenience, at their ends and in between; `tests/decoding` draws from the verifier that uses them."""

from itertools import pairwise

import pytest
import torch

from hf_draftkd.acceptance import LENIENCE_FORMS


@pytest.fixture
def distributions():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((6, 5), generator=generator, dtype=torch.float64).mul(2).softmax(-1) for _ in range(2)]


@pytest.mark.parametrize("form", LENIENCE_FORMS)
def test_from_lossless_to_accepting_everything(distributions, form):
    """A form that is turned round: more lenience must accept more, from the target's own rate up to all."""
    p, q = distributions
    rates = [torch.minimum(q, LENIENCE_FORMS[form](p, q, lenience)).sum(-1) for lenience in (1.0, 0.9, 0.5, 1e-9)]
    torch.testing.assert_close(rates[0], torch.minimum(p, q).sum(-1))
    assert all((less <= more + 1e-12).all() for less, more in pairwise(rates))
    torch.testing.assert_close(rates[-1], torch.ones_like(rates[-1]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", LENIENCE_FORMS)
def test_the_output_moves_by_exactly_what_acceptance_gains(distributions, form):
    """The identity the module states, for the output π = kept + rejected · norm(max(0, p − q))."""
    p, q = distributions
    kept = torch.minimum(q, LENIENCE_FORMS[form](p, q, 0.4))
    residual = (p - q).clamp(min=0)
    output = kept + (1 - kept.sum(-1, keepdim=True)) * residual / residual.sum(-1, keepdim=True)
    gain = kept.sum(-1) - torch.minimum(p, q).sum(-1)
    torch.testing.assert_close(0.5 * (output - p).abs().sum(-1), gain)
    assert (gain > 0.01).any()
