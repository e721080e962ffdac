"""Lossy speculative decoding: how many more drafts are kept, and how far the output then moves from the target's.

A lossy verifier keeps a drafted token x with probability min(1, v(x)/q(x)) for a v that need not be the target's p:

- `linear`, `square`, `exponential`: v = f(p, ε) with f = p/ε, p/ε², p^ε and lenience ε in (0, 1]
  (DistillSpec, https://arxiv.org/abs/2310.08461). ε = 1 is lossless.
- `ensemble`: v = w·p + (1 − w)·q with weight w in (0, 1] (https://arxiv.org/abs/2604.07622): transformers'
  `assistant_ensemble_weight`. w = 1 is lossless.

On a rejection the target's correction is drawn from the normalised max(0, p − q), as in lossless decoding. So one
drafted position puts out π = min(q, v) + (1 − Σ min(q, v))·norm(max(0, p − q)), and both Σ min(q, v) and TV(π, p)
follow from one pass over text, without decoding. Block efficiency does not: after a lossy step the text is no longer
one the target wrote. It is counted by real decoding instead, which transformers offers for `ensemble`.

Every form with v ≥ min(p, q) pays the same price at a single position: the residual only shrinks, so the output moves
by exactly what acceptance gains, TV(π, p) = Σ min(q, v) − Σ min(q, p). The forms differ in how lenience moves along
that line.
"""

from collections.abc import Callable

import torch

LENIENCE = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1)
FORMS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "linear": lambda p, q, lenience: p / lenience,
    "square": lambda p, q, lenience: p / lenience**2,
    "exponential": lambda p, q, lenience: p.pow(lenience),
    "ensemble": lambda p, q, lenience: lenience * p + (1 - lenience) * q,
}


def lossy_step(p: torch.Tensor, q: torch.Tensor, form: str, lenience: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Acceptance of one drafted token, and how far what is put out there is from the target's distribution.

    Args:
        p: Target probabilities `[..., V]`.
        q: Draft probabilities `[..., V]`.
        form: A key of `FORMS`.
        lenience: ε, or the weight w of `ensemble`; in (0, 1], 1 is lossless.

    Returns:
        Acceptance Σ min(q, v) and total variation TV(π, p), each `[...]`.
    """
    kept = torch.minimum(q, FORMS[form](p, q, lenience))
    # As 1 - rejected, so that a draft that is its own target is kept exactly.
    rejected = (q - kept).sum(-1)
    residual = (p - q).clamp(min=0)
    # Where p = q nothing is ever rejected, and the residual is empty.
    residual = residual / residual.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    output = kept + rejected[..., None] * residual
    return 1 - rejected, 0.5 * (output - p).abs().sum(-1)


def lossy_values(draft_logits: torch.Tensor, target_logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """`acceptance FORM ε` and `distance FORM ε` for every form and lenience of the curve, each `[N]`.

    Args:
        draft_logits: Processed, `[N, V]`.
        target_logits: Processed, `[N, V]`.
    """
    p, q = target_logits.softmax(-1), draft_logits.softmax(-1)
    values = {}
    for form in FORMS:
        for lenience in LENIENCE:
            acceptance, distance = lossy_step(p, q, form, lenience)
            values[f"acceptance {form} {lenience}"] = acceptance
            values[f"distance {form} {lenience}"] = distance
    return values
