"""Lossy speculative decoding: accept more than the target would, and know how far its output moves.

DistillSpec (https://arxiv.org/abs/2310.08461) accepts a drafted token x ~ q with probability min(1, f(p(x), ε)/q(x)),
ε in (0, 1], with one of three lenience functions; only the acceptance test changes, a rejected token is still replaced
by a draw from the residual max(0, p − q), normalised. At ε = 1 every f is p, and decoding is lossless again.

Block efficiency of a lossy decoder does *not* follow from a text that the target wrote, since its output is no longer
the target's. What follows from such a text, at each position, is the two figures below.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from hf_draftkd.acceptance._checks import at_least_float32, check_same_shape, unknown_name

LENIENCE_FUNCTIONS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "f_lin": lambda log_p, epsilon: log_p - math.log(epsilon),
    "f_sq": lambda log_p, epsilon: log_p - 2 * math.log(epsilon),
    "f_exp": lambda log_p, epsilon: epsilon * log_p,
}
"""Name → log f(p, ε) from log p: f_lin = p/ε, f_sq = p/ε², f_exp = p^ε."""


class LenientRates(NamedTuple):
    """What lenience gains and costs at each position."""

    acceptance_rate: torch.Tensor
    """`[...]`: chance that a drafted token is accepted, Σ min(q, f(p, ε))."""
    total_variation: torch.Tensor
    """`[...]`: total variation between the next token so decoded and the target's own."""


def lenient_rates(
    draft_logits: torch.Tensor, target_logits: torch.Tensor, epsilon: float, *, function: str = "f_exp"
) -> LenientRates:
    """Return expected acceptance of one token, and how far its distribution moves from the target's.

    Args:
        draft_logits: Processed draft logits `[..., V]`.
        target_logits: Processed target logits `[..., V]`.
        epsilon: ε in (0, 1]; 1 is lossless, smaller accepts more.
        function: A key of `LENIENCE_FUNCTIONS`.

    Returns:
        Acceptance rate and total variation, each `[...]`, in [0, 1].

    Raises:
        ValueError: If the shapes differ, ε is out of range or there is no such function.
    """
    check_same_shape(draft_logits, target_logits)
    if function not in LENIENCE_FUNCTIONS:
        raise unknown_name("lenience function", function, LENIENCE_FUNCTIONS)
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon must lie in (0, 1], 1 being lossless, got {epsilon!r}.")
    q = at_least_float32(draft_logits).softmax(dim=-1)
    log_p = at_least_float32(target_logits).log_softmax(dim=-1)
    p = log_p.exp()
    # q is at most 1, so f may be cut there before it overflows.
    kept = torch.minimum(q, LENIENCE_FUNCTIONS[function](log_p, epsilon).clamp(max=0.0).exp())
    acceptance_rate = kept.sum(dim=-1).clamp(max=1.0)
    residual = (p - q).clamp(min=0.0)
    # Equal models have no residual, and nothing is rejected either.
    residual = residual / residual.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    output = kept + (1 - acceptance_rate).unsqueeze(-1) * residual
    return LenientRates(acceptance_rate, 0.5 * (output - p).abs().sum(dim=-1))
