"""How far the draft's next-token distribution q is from the target's p, over the whole vocabulary.

The plain reference: each function is its definition, left to autograd; training calls the fast twins of `gradients.py`.
Each takes `(draft_logits [..., V], target_logits [..., V], **options)` and returns one value per position, `[...]`, in
nats unless it says otherwise. Masks, weights, temperature and means live in `objective.py`. Common to all:

- Gradients flow to the draft only; the target is detached.
- bf16 and float16 logits are computed in float32; float64 stays float64.
- Target logits may be `-inf`. Such a token counts as one of log-probability -10,000 where its logarithm is needed:
  reverse KL would be infinite and its gradient NaN; this way it is large, and pushes the draft off that token.
- Both models are compared over the shared vocabulary: cut padded rows off first. Shapes that differ, and options that
  are out of range, raise a `ValueError`.
- Equal models give 0.

Which to choose: `forward_kl` is the steady default. `total_variation` is one minus the acceptance rate itself, but its
gradient vanishes where the draft is far off. `negative_log_acceptance` and `lk_hybrid` repair that.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hf_draftkd.acceptance.tensors import at_least_float32, check_same_shape, draw
from hf_draftkd.utils.checks import in_range, one_of

LOG_FLOOR = -1e4
"""The log-probability that stands for an impossible token of the target."""


def forward_kl(draft_logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """KL(p‖q) = Σ p (log p − log q): the draft must cover all that the target may say.

    The classical distillation loss (Hinton et al., https://arxiv.org/abs/1503.02531); supervised KD and, with the
    draft's own text, ImitKD in DistillSpec (https://arxiv.org/abs/2310.08461). Its gradient in the logits is q − p.
    """
    log_q, log_p = _log_probs(draft_logits, target_logits)
    return _expectation(log_p.exp(), log_p - log_q)


def reverse_kl(draft_logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """KL(q‖p) = Σ q (log q − log p): the draft must not say what the target would not.

    Mode-seeking: a small draft settles on what it can match (MiniLLM, https://arxiv.org/abs/2306.08543).
    """
    log_q, log_p = _log_probs(draft_logits, target_logits)
    return _expectation(log_q.exp(), log_q - log_p)


def generalized_jsd(draft_logits: torch.Tensor, target_logits: torch.Tensor, *, beta: float = 0.5) -> torch.Tensor:
    """β KL(p‖m) + (1 − β) KL(q‖m) with m = βp + (1 − β)q; `beta` in [0, 1] is the target's weight in the mixture.

    Between the two KLs in character (GKD, https://arxiv.org/abs/2306.13649). Its scale vanishes toward β = 0 and
    β = 1: divided by β it tends to forward KL, divided by 1 − β to reverse KL. At exactly 0 and 1 it *is* the forward
    and the reverse KL, so the loss jumps there; a β of 0.01 trains about a hundred times more slowly than one of 0.
    """
    in_range("beta", beta, 0, 1)
    if beta == 0:
        return forward_kl(draft_logits, target_logits)
    if beta == 1:
        return reverse_kl(draft_logits, target_logits)
    log_q, log_p = _log_probs(draft_logits, target_logits)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _expectation(log_p.exp(), log_p - log_m) + (1 - beta) * _expectation(log_q.exp(), log_q - log_m)


def total_variation(draft_logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """½ Σ |p − q| = 1 − α: the chance that a drafted token is rejected, in [0, 1].

    The acceptance objective itself (f-Distill's TVD in DistillSpec, https://arxiv.org/abs/2310.08461). Its gradient
    is scaled by the draft's own probabilities and so all but vanishes for a draft that is far off: start elsewhere.
    """
    q, p = _probs(draft_logits, target_logits)
    return 0.5 * (p - q).abs().sum(dim=-1)


def negative_log_acceptance(draft_logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """−log α = −log Σ min(p, q): its gradient is total variation's, divided by α.

    So it does not fade where the draft is far off (LK losses, https://arxiv.org/abs/2602.23881). Computed in
    logarithms, so that an α too small for its type still has a value and a gradient.
    """
    log_q, log_p = _log_probs(draft_logits, target_logits)
    return -torch.minimum(log_p, log_q).logsumexp(dim=-1)


def lk_hybrid(draft_logits: torch.Tensor, target_logits: torch.Tensor, *, eta: float = 3.0) -> torch.Tensor:
    """λ KL(p‖q) + (1 − λ) TV with λ = exp(−η α), α held constant: KL while the draft is far, TV once it is near.

    `eta` ≥ 0 says how soon total variation takes over; 0 is forward KL. Source: LK losses,
    https://arxiv.org/abs/2602.23881.
    """
    in_range("eta", eta, 0)
    distance = total_variation(draft_logits, target_logits)
    kl_share = (-eta * (1 - distance.detach())).exp()
    return kl_share * forward_kl(draft_logits, target_logits) + (1 - kl_share) * distance


def tvd_plus_plus(
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor,
    *,
    estimator: str = "sampled",
    statistics: str = "batch",
    mask: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """A surrogate whose gradient is total variation's policy gradient with normalised rewards.

    ∇TV = E_{x~q}[∇log q(x) · (−r(x))] with reward r = 1{p > q}; TVD++ replaces r by the advantage (r − μ)/σ (Direct
    Alignment of Draft Model, https://arxiv.org/abs/2403.00858). **Its value has no meaning**: with the full expectation
    and batch statistics the values sum to 0. Log `total_variation` beside it.

    - `estimator="full"` takes the expectation over the vocabulary. With batch statistics its gradient is exactly
      total variation's ÷ σ. `estimator="sampled"` takes one token per position, drawn from q, as the paper does.
    - `statistics="batch"`: μ and σ over all positions of the call (or of `mask`); `"token"`: of E_{x~q} at each
      position alone.

    Args:
        draft_logits: `[..., V]`.
        target_logits: `[..., V]`.
        estimator: `"sampled"` or `"full"`.
        statistics: `"batch"` or `"token"`.
        mask: Bool `[...]`, the positions that count in batch statistics. None: all.
        tokens: Tokens already drawn from q, `[...]` (text the draft has just written). None: drawn here, from
            torch's global generator.
        eps: Least σ to divide by: where all rewards are equal (equal models), advantages are 0.
    """
    one_of("estimator of 'tvd_plus_plus'", estimator, ("sampled", "full"))
    one_of("statistics of 'tvd_plus_plus'", statistics, ("batch", "token"))
    in_range("eps", eps, 0, 1, open_low=True)
    if tokens is not None and estimator == "full":
        raise ValueError("tokens are only for estimator='sampled'; estimator='full' sums over the vocabulary.")
    q, p = _probs(draft_logits, target_logits)
    with torch.no_grad():
        reward = (p > q).to(q.dtype)
        expected = (q * reward).sum(dim=-1)
        drawn = None
        if estimator == "sampled":
            drawn = draw(q) if tokens is None else tokens.unsqueeze(-1)
            reward = reward.gather(-1, drawn)
        if statistics == "batch":
            counted = expected if drawn is None else reward.squeeze(-1)
            counted = counted.flatten() if mask is None else counted[mask.bool()]
            mean, std = reward_moments(counted.sum(), counted.numel(), eps)
        else:
            mean, std = reward_moments(expected.unsqueeze(-1), 1, eps)
        advantage = (reward - mean) / std
    if drawn is None:
        return -(q * advantage).sum(dim=-1)
    log_q = at_least_float32(draft_logits).log_softmax(dim=-1)
    return -(advantage * log_q.gather(-1, drawn)).squeeze(-1)


def cross_entropy(
    draft_logits: torch.Tensor, target_logits: torch.Tensor | None = None, *, tokens: torch.Tensor
) -> torch.Tensor:
    """−log q(x) on the target's text: black-box distillation, where its distributions are out of reach.

    Sequence-level KD (Kim & Rush, https://arxiv.org/abs/1606.07947), SeqKD in DistillSpec.

    Args:
        draft_logits: `[..., V]`.
        target_logits: Not used; accepted so that every divergence is called the same way.
        tokens: The text's tokens `[...]`, integers in [0, V).
    """
    log_q = at_least_float32(draft_logits).log_softmax(dim=-1)
    return -log_q.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


DIVERGENCES: dict[str, Callable[..., torch.Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "generalized_jsd": generalized_jsd,
    "total_variation": total_variation,
    "tvd_plus_plus": tvd_plus_plus,
    "negative_log_acceptance": negative_log_acceptance,
    "lk_hybrid": lk_hybrid,
    "cross_entropy": cross_entropy,
}
"""Name → function. All but `cross_entropy` need the target's distribution."""


def get_divergence(name: str) -> Callable[..., torch.Tensor]:
    """Return the divergence of that name; a `ValueError` suggests the nearest where there is none."""
    return DIVERGENCES[one_of("divergence", name, DIVERGENCES)]


def reads_target(divergence: str, cross_entropy_weight: float) -> bool:
    """Whether a loss of the two reads the target's distributions (white box), or only its text."""
    return divergence != "cross_entropy" and cross_entropy_weight < 1


def check_divergence(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Refuse a divergence, or an option of one, that does not exist or is out of range; before any long work.

    Args:
        name: A key of `DIVERGENCES`.
        options: Its options, e.g. `{"beta": 0.5}`.

    Raises:
        ValueError: Naming what is wrong and what is possible.
    """
    function = get_divergence(name)
    options = dict(options or {})
    known = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.name not in ("tokens", "mask")
    ]
    for option in options:
        if option not in known:
            if not known:
                raise ValueError(f"The divergence {name!r} takes no options, got {option!r}.")
            one_of(f"option of {name!r}", option, known)
    if name != "cross_entropy":
        # The functions check their own values: one place per rule.
        function(torch.zeros(1, 2), torch.zeros(1, 2), **options)


def reward_moments(total: torch.Tensor, count: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation (at least eps) of rewards that are 0 or 1, from their sum and number."""
    mean = (total / max(count, 1)).clamp(0.0, 1.0)
    return mean, (mean * (1 - mean)).sqrt().clamp(min=eps)


def _log_probs(draft_logits: torch.Tensor, target_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_same_shape(draft_logits, target_logits)
    log_q = at_least_float32(draft_logits).log_softmax(dim=-1)
    log_p = at_least_float32(target_logits.detach()).log_softmax(dim=-1)
    return log_q, log_p.clamp(min=LOG_FLOOR)


def _probs(draft_logits: torch.Tensor, target_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_same_shape(draft_logits, target_logits)
    return at_least_float32(draft_logits).softmax(dim=-1), at_least_float32(target_logits.detach()).softmax(dim=-1)


def _expectation(probs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return Σ probs · values, where 0 · ∞ is 0."""
    return (probs * torch.where(probs > 0, values, 0.0)).sum(dim=-1)
