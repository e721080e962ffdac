"""Lossy speculative decoding: accept more than the target would, and know how far its output moves.

A lossy verifier keeps a drafted token x ~ q with probability min(1, v(x)/q(x)) for a v that need not be the target's p:

- `linear`, `square`, `exponential`: v = f(p, ε) with f = p/ε, p/ε², p^ε and lenience ε in (0, 1]
  (DistillSpec, https://arxiv.org/abs/2310.08461). ε = 1 is lossless.
- `ensemble`: v = w·p + (1 − w)·q with weight w in (0, 1] (https://arxiv.org/abs/2604.07622): transformers'
  `assistant_ensemble_weight`. w = 1 is lossless.

On a rejection the target's correction is drawn from the normalised max(0, p − q), as in lossless decoding. So one
drafted position outputs π = min(q, v) + (1 − Σ min(q, v))·norm(max(0, p − q)), and both Σ min(q, v) and TV(π, p)
follow from one pass over text, without decoding. Block efficiency does not: after a lossy step the text is no longer
one the target wrote. It is counted by real decoding instead, which transformers offers for `ensemble`.

Every form with v ≥ min(p, q) pays the same price at a single position: the residual only shrinks, so the output moves
by exactly what acceptance gains, TV(π, p) = Σ min(q, v) − Σ min(q, p). The forms differ in how lenience moves along
that line.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from hf_draftkd.acceptance.tensors import check_same_shape
from hf_draftkd.utils.checks import one_of

LENIENCE_FORMS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "linear": lambda p, q, lenience: p / lenience,
    "square": lambda p, q, lenience: p / lenience**2,
    "exponential": lambda p, q, lenience: p.pow(lenience),
    "ensemble": lambda p, q, lenience: lenience * p + (1 - lenience) * q,
}
"""Name → v from p, q and ε (or w)."""


class LenientRates(NamedTuple):
    """What lenience gains and costs at each position."""

    acceptance_rate: torch.Tensor
    """`[...]`: chance that a drafted token is accepted, Σ min(q, v)."""
    total_variation: torch.Tensor
    """`[...]`: total variation between the next token so decoded and the target's own, TV(π, p)."""


def lenient_rates(q: torch.Tensor, p: torch.Tensor, form: str, lenience: float) -> LenientRates:
    """Return expected acceptance of one drafted token, and how far the output there moves from the target's.

    Args:
        q: Draft probabilities `[..., V]`. Not logits: a curve has many points, and softmax is passed once.
        p: Target probabilities `[..., V]`.
        form: A key of `LENIENCE_FORMS`.
        lenience: ε, or the weight w of `ensemble`; in (0, 1], 1 is lossless.

    Returns:
        Acceptance rate and total variation, each `[...]`, in [0, 1].

    Raises:
        ValueError: If the shapes differ, lenience is out of range or there is no such form.
    """
    check_same_shape(q, p)
    one_of("form of lenience", form, LENIENCE_FORMS)
    if not 0 < lenience <= 1:
        raise ValueError(f"Lenience must lie in (0, 1], 1 being lossless, got {lenience!r}.")
    kept = torch.minimum(q, LENIENCE_FORMS[form](p, q, lenience))
    # As 1 - rejected, so that a draft that is its own target is kept exactly.
    rejected = (q - kept).sum(-1)
    residual = (p - q).clamp(min=0)
    # Where p = q nothing is ever rejected, and the residual is empty.
    residual = residual / residual.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    output = kept + rejected[..., None] * residual
    return LenientRates(1 - rejected, 0.5 * (output - p).abs().sum(-1))
