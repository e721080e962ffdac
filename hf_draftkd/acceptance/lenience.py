"""Lossy speculative decoding: accept more drafted tokens than the target would.

A lossy verifier keeps a drafted token x ~ q with probability min(1, v(x)/q(x)) for a v that need not be the target's p,
and on a rejection draws the correction from the normalised max(0, p − q), as in lossless decoding.

- `linear`, `square`, `exponential`: v = p/ε, p/ε², p^ε with lenience ε in (0, 1]
  (DistillSpec, https://arxiv.org/abs/2310.08461). ε = 1 is lossless.
- `ensemble`: v = w·p + (1 − w)·q with weight w in (0, 1] (https://arxiv.org/abs/2604.07622): transformers'
  `assistant_ensemble_weight`. w = 1 is lossless.

Every form with v ≥ min(p, q) pays the same price at a single position: the residual only shrinks, so the output moves
from the target's, in total variation, by exactly what acceptance gains. Block efficiency is counted by real decoding:
after a lossy step the text is no longer one that the target wrote.
"""

from collections.abc import Callable

import torch

LENIENCE_FORMS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "linear": lambda p, q, lenience: p / lenience,
    "square": lambda p, q, lenience: p / lenience**2,
    "exponential": lambda p, q, lenience: p.pow(lenience),
    "ensemble": lambda p, q, lenience: lenience * p + (1 - lenience) * q,
}
"""Name → v from p, q and ε (or w)."""
