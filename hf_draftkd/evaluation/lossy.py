"""The curve of lossy decoding over texts: how many more drafts are kept, and how far the output then moves."""

import torch

from hf_draftkd.acceptance import LENIENCE_FORMS, lenient_rates

LENIENCE = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1)


def lossy_values(draft_logits: torch.Tensor, target_logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """`acceptance FORM ε` and `distance FORM ε` for every form and lenience of the curve, each `[N]`.

    Args:
        draft_logits: Processed, `[N, V]`.
        target_logits: Processed, `[N, V]`.
    """
    q, p = draft_logits.softmax(-1), target_logits.softmax(-1)
    values = {}
    for form in LENIENCE_FORMS:
        for lenience in LENIENCE:
            rates = lenient_rates(q, p, form, lenience)
            values[f"acceptance {form} {lenience}"] = rates.acceptance_rate
            values[f"distance {form} {lenience}"] = rates.total_variation
    return values
