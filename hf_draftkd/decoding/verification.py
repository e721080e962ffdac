"""Which drafted tokens stay, and the token that follows them: pure functions on tensors.

They take the ids `drafted` [A, γ], the target's `scores` [A, γ + 1, V] and the draft's probabilities `q` [A, γ, V]; p
is the target's distribution, after the same processing as q. Every function returns a verdict [A, γ + 2]: in each row
the tokens that come next, of which the first n + 1 count (n accepted ones and one of the target's own), and in the last
column n. One transfer brings it to the host.
"""

import torch
from torch import Tensor

from hf_draftkd.acceptance import LENIENCE_FORMS
from hf_draftkd.acceptance.tensors import draw


def verify(drafted: Tensor, q: Tensor | None, scores: Tensor, *, is_greedy: bool, lenience: float, form: str) -> Tensor:
    """The verdict as a call of `generate` asks for it; `q` is None where nothing was drafted or nothing looks at it."""
    if not is_greedy:
        return verify_sampled(drafted, scores, scores[:, :0] if q is None else q, lenience=lenience, form=form)
    if q is not None and lenience < 1:
        return verify_greedy_ensemble(drafted, scores, q, lenience)
    return verify_greedy(drafted, scores)


def verify_greedy(drafted: Tensor, scores: Tensor) -> Tensor:
    """Accept drafted tokens as long as each is the target's likeliest."""
    return _matched(drafted, scores.argmax(-1))


def verify_greedy_ensemble(drafted: Tensor, scores: Tensor, q: Tensor, weight: float) -> Tensor:
    """The same with the likeliest token of w·p + (1 − w)·q, w in (0, 1]: transformers' lossy greedy form.

    The token after γ accepted ones is the target's.
    """
    p = scores.softmax(-1, dtype=torch.float32)
    p[:, :-1].mul_(weight).add_(q, alpha=1 - weight)
    return _matched(drafted, p.argmax(-1))


def verify_sampled(
    drafted: Tensor, scores: Tensor, q: Tensor, *, lenience: float = 1.0, form: str = "exponential"
) -> Tensor:
    """Rejection sampling: the output has exactly the target's distribution (arXiv 2211.17192, algorithm 1).

    x ~ q is kept with probability min(1, p(x)/q(x)); on the first rejection the correction is drawn from the
    normalised max(0, p − q), and after γ acceptances one more token from p. With `lenience` (ε, or the weight of form
    "ensemble"; in (0, 1]) below 1 the first step takes f(p(x))/q(x), and the output moves away from the target's
    (arXiv 2310.08461); the form f is a key of `LENIENCE_FORMS`.
    """
    p = scores.softmax(-1)
    if drafted.shape[1] == 0:
        return torch.cat([draw(p[:, 0]), drafted.new_zeros(len(drafted), 1)], dim=1)
    p_drafted = p[:, :-1].gather(-1, drafted[..., None])[..., 0]
    q_drafted = q.gather(-1, drafted[..., None])[..., 0]
    if lenience < 1:
        p_drafted = LENIENCE_FORMS[form](p_drafted, q_drafted, lenience)
    accepted = torch.rand_like(q_drafted) * q_drafted < p_drafted  # rand < p/q, without dividing by a q of 0
    num_accepted = accepted.long().cumprod(1).sum(1, keepdim=True)

    rows = torch.arange(len(drafted), device=drafted.device)
    n = num_accepted[:, 0]
    # Behind the last drafted token there is nothing to subtract: q = 0, and the residual is p.
    p_next, q_next = p[rows, n], q[rows, n.clamp(max=q.shape[1] - 1)]
    residual = (p_next - q_next * (num_accepted < drafted.shape[1])).clamp_(min=0)
    # Where p = q nothing is rejected but by rounding, and the residual is empty.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_next)
    own = draw(residual)
    tokens = torch.nn.functional.pad(drafted, (0, 1)).scatter_(1, num_accepted, own)
    return torch.cat([tokens, num_accepted], dim=1)


def _matched(drafted: Tensor, chosen: Tensor) -> Tensor:
    num_accepted = (drafted == chosen[:, :-1]).long().cumprod(1).sum(1, keepdim=True)
    return torch.cat([chosen, num_accepted], dim=1)
