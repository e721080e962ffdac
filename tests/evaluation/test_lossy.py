"""The curve of lossy decoding."""

import torch

from hf_draftkd.acceptance import LENIENCE_FORMS, lenient_rates
from hf_draftkd.evaluation.lossy import LENIENCE, lossy_values


def test_every_point_of_the_curve_has_its_values():
    """Draft and target swapped, or a value under another point's name."""
    draft, target = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = lossy_values(draft, target)
    assert len(values) == 2 * len(LENIENCE_FORMS) * len(LENIENCE)
    for form in LENIENCE_FORMS:
        for lenience in LENIENCE:
            rates = lenient_rates(draft.softmax(-1), target.softmax(-1), form, lenience)
            assert torch.equal(values[f"acceptance {form} {lenience}"], rates.acceptance_rate)
            assert torch.equal(values[f"distance {form} {lenience}"], rates.total_variation)
