"""The divergences again, with gradients written by hand: the fast twins that the chunked pass calls.

Autograd would walk over the vocabulary once for every operation of the plain form; written out, most gradients are one
expression in p and q. At one position, in the draft's logits z, with log q = z − log Σ exp z:

| divergence | value | gradient, row by row |
|---|---|---|
| `forward_kl` | Σ p (log p − log q) | q − p |
| `reverse_kl` | Σ q (log q − log p) | q (log q − log p − value) |
| `generalized_jsd` | β KL(p‖m) + (1 − β) KL(q‖m), m = βp + (1 − β)q | (1 − β) q (log q − log m − KL(q‖m)) |
| `total_variation` | ½ Σ abs(p − q) = 1 − α | q (Σ q w − w), with w = 1 where q < p, ½ where q = p, else 0 |
| `negative_log_acceptance` | −log α | that of total variation ÷ α |
| `lk_hybrid` | λ KL(p‖q) + (1 − λ) TV, λ = exp(−η α) constant | λ (q − p) + (1 − λ) · that of total variation |
| `tvd_plus_plus`, full | −Σ q a, advantage a = (1{p > q} − μ)/σ constant | −q (a − Σ q a) |
| `tvd_plus_plus`, sampled | −a(x) log q(x), x drawn from q | a(x) (q − 1{x}) |
| `cross_entropy` | −log q(x), x the text's token | q − 1{x} |

For a sparse target (`sparse.py`) the same holds over k + 1 buckets, and the tail's gradient is shared in proportion
to q; for draws with frequencies f, forward KL's gradient is q − f. Every twin is tested against its plain form in
`divergences.py` by value and by gradient.

All functions work on one chunk: `draft_logits` and `target_logits` `[n, V]`, float32 or float64, **both of which they
may overwrite**. Below, z are the draft's logits and y the target's; log q = z − log_z_q and log p = y − log_z_p.

What costs time is memory: a pass over `[n, V]` outside the cache, or one into fresh pages. So every intermediate result
lies in z, y or a piece of `Reused` memory, and a product is written out and summed, which on a CPU is quicker than a
batched inner product.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from hf_draftkd.acceptance.tensors import draw
from hf_draftkd.losses.divergences import DIVERGENCES, LOG_FLOOR, negative_log_acceptance, reward_moments
from hf_draftkd.losses.divergences import cross_entropy as plain_cross_entropy

# Below this, Σ min(p, q) in float32 has lost the digits that the logarithm needs.
_SMALLEST_ACCEPTANCE = 1e-30

Divergence = str | Callable[..., torch.Tensor]


class Reused:
    """Named pieces of memory, kept from chunk to chunk, each as large as the largest tensor asked for under its name.

    Fresh memory of tens of megabytes comes from the system page by page, which takes a CPU longer than the softmax
    that is written into it.
    """

    def __init__(self) -> None:
        self._pieces: dict[str, torch.Tensor] = {}

    def take(self, name: str, like: torch.Tensor, rows: int | None = None, columns: int | None = None) -> torch.Tensor:
        """Return an uninitialised tensor in the memory `name`; what was taken under that name before is overwritten.

        It is `[rows, columns]`, or of the shape of `like`, which decides type and device.
        """
        rows = like.shape[0] if rows is None else rows
        columns = like.shape[1] if columns is None else columns
        piece = self._pieces.get(name)
        if piece is None or piece.numel() < rows * columns or piece.dtype != like.dtype or piece.device != like.device:
            piece = self._pieces[name] = like.new_empty(rows * columns)
        return piece[: rows * columns].view(rows, columns)


class Twin(NamedTuple):
    """One chunk's result, all without autograd history."""

    values: torch.Tensor
    """`[n]`: the divergence at each position."""
    gradient: torch.Tensor | None
    """`[n, V]`: d value / d draft logits; None if it was not asked for."""
    acceptance: torch.Tensor | None
    """`[n]`: α = 1 − ½ Σ |p − q|; None if it was not asked for."""


class Rewards(NamedTuple):
    """What TVD++ with batch statistics must know before its first chunk."""

    mean: torch.Tensor
    std: torch.Tensor
    tokens: torch.Tensor | None
    """`[N]`: the tokens drawn from q in the whole batch; None for the full expectation."""

    def at(self, rows: slice) -> "Rewards":
        """The same for some of the positions."""
        return self._replace(tokens=None if self.tokens is None else self.tokens[rows])


@torch.no_grad()
def value_and_gradient(
    divergence: Divergence,
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor,
    *,
    options: Mapping[str, Any] | None = None,
    gradient: bool,
    acceptance: bool,
    memory: Reused,
) -> Twin:
    """Return a divergence and its gradient in the draft's logits, for one chunk.

    Args:
        divergence: A key of `DIVERGENCES` other than `cross_entropy`, or a function
            `f(draft_logits [n, V], target_logits [n, V], **options) -> [n]`, whose gradient is then taken by autograd.
        draft_logits: `[n, V]`, float32 or float64; overwritten.
        target_logits: `[n, V]`, same type; overwritten.
        options: The divergence's options, checked before. `tvd_plus_plus` also takes `rewards`, a `Rewards` of the
            whole batch at these n.
        gradient: Whether the gradient is wanted.
        acceptance: Whether the acceptance rate is wanted as well.
        memory: For intermediate results, to be used again by the next chunk.

    Returns:
        Values, gradient and acceptance rate. The gradient may lie in `draft_logits` or in `memory`.
    """
    options = options or {}
    twin = _TWINS.get(divergence) if isinstance(divergence, str) else None
    if twin is not None:
        return twin(draft_logits, target_logits, gradient, acceptance, memory, **options)
    function = DIVERGENCES[divergence] if isinstance(divergence, str) else divergence
    rate = None
    if acceptance:
        q, p = (_probs(z, memory.take(name, z)) for name, z in (("q", draft_logits), ("p", target_logits)))
        rate = _acceptance(q.sub_(p), p)
    values, slope = by_autograd(lambda z: function(z, target_logits, **options), draft_logits, gradient)
    return Twin(values, slope, rate)


def cross_entropy(draft_logits: torch.Tensor, tokens: torch.Tensor, gradient: bool, memory: Reused) -> Twin:
    """Return −log q(x) of `tokens` `[n]` and, if wanted, its gradient; the logits `[n, V]` are left as they are."""
    if not gradient:
        return Twin(plain_cross_entropy(draft_logits, tokens=tokens), None, None)
    q, log_z_q = softmax(draft_logits, memory.take("on text", draft_logits))
    picked = tokens.unsqueeze(-1)
    values = log_z_q - draft_logits.gather(-1, picked).squeeze(-1)
    return Twin(values, q.scatter_add_(-1, picked, -torch.ones_like(picked, dtype=q.dtype)), None)


def by_autograd(
    function: Callable[[torch.Tensor], torch.Tensor], draft_logits: torch.Tensor, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return `function(draft_logits)` `[n]` and, if wanted, its gradient `[n, V]` by autograd."""
    with torch.set_grad_enabled(gradient):
        leaf = draft_logits.detach().requires_grad_(gradient)
        values = function(leaf)
        wanted, given = tuple(leaf.shape[:-1]), tuple(values.shape)
        if given != wanted:
            raise ValueError(
                f"A custom divergence (`token_loss`) must return one value for each position, {wanted}, got {given}. "
                "Reduce the last dimension, the vocabulary, and no other."
            )
        slope = torch.autograd.grad(values.sum(), leaf)[0] if gradient else None
    return values.detach(), slope


def _forward_kl(z: torch.Tensor, y: torch.Tensor, gradient: bool, acceptance: bool, memory: Reused) -> Twin:
    values, p, q = _kl_and_probs(z, y, memory.take("p", z), y)
    if not (gradient or acceptance):
        return Twin(values, None, None)
    difference = torch.sub(q, p, out=z)
    return Twin(values, difference if gradient else None, _acceptance(difference, p) if acceptance else None)


def _kl_and_probs(
    z: torch.Tensor, y: torch.Tensor, p_out: torch.Tensor, q_out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return KL(p‖q), p and q; overwrites y, which may be the place of q."""
    # Σ p (log p − log q) = Σ p (y − z) − log_z_p + log_z_q, since Σ p = 1: no logarithm of [n, V] is taken.
    p, log_z_p = softmax(y, p_out)
    products = y.sub_(z).mul_(p)
    expected_gap = products.sum(dim=-1)
    if not expected_gap.isfinite().all():
        # A filtered token of the target gives 0 · ∞. That is rare, so it is not looked for in advance.
        expected_gap = products.masked_fill_(p == 0, 0.0).sum(dim=-1)
    q, log_z_q = softmax(z, q_out)
    return expected_gap - log_z_p + log_z_q, p, q


def _reverse_kl(z: torch.Tensor, y: torch.Tensor, gradient: bool, acceptance: bool, memory: Reused) -> Twin:
    q, log_z_q = softmax(z, memory.take("q", z))
    p, log_z_p = softmax(y, memory.take("p", y))
    # As in `_kl_and_probs`: log q − log p = z − y + shift.
    gap = z.sub_(torch.maximum(y, (log_z_p + LOG_FLOOR).unsqueeze(-1), out=y))
    shift = log_z_p - log_z_q
    values = _dot(q, gap, y) + shift
    slope = gap.add_((shift - values).unsqueeze(-1)).mul_(q) if gradient else None
    return Twin(values, slope, _acceptance(p.sub_(q), p) if acceptance else None)


def _generalized_jsd(
    z: torch.Tensor, y: torch.Tensor, gradient: bool, acceptance: bool, memory: Reused, *, beta: float = 0.5
) -> Twin:
    if beta == 0:
        return _forward_kl(z, y, gradient, acceptance, memory)
    if beta == 1:
        return _reverse_kl(z, y, gradient, acceptance, memory)
    q, log_z_q = softmax(z, memory.take("q", z))
    p, log_z_p = softmax(y, memory.take("p", y))
    log_q = z.sub_(log_z_q.unsqueeze(-1))
    log_p = y.sub_(log_z_p.unsqueeze(-1)).clamp_(min=LOG_FLOOR)
    # Where both p and q are 0 in this format, m is 0 as well, and nothing that is multiplied by it counts.
    smallest = torch.finfo(q.dtype).tiny
    log_m = torch.lerp(q, p, beta, out=memory.take("m", z)).clamp_(min=smallest).log_()
    gap = log_q.sub_(log_m)
    kl_target = _dot(p, log_p.sub_(log_m), y)
    kl_draft = _dot(q, gap, y)
    values = beta * kl_target + (1 - beta) * kl_draft
    slope = gap.sub_(kl_draft.unsqueeze(-1)).mul_(q).mul_(1 - beta) if gradient else None
    return Twin(values, slope, _acceptance(p.sub_(q), p) if acceptance else None)


def _total_variation(z: torch.Tensor, y: torch.Tensor, gradient: bool, acceptance: bool, memory: Reused) -> Twin:
    q = _probs(z, memory.take("q", z))
    difference = torch.sub(q, _probs(y, z), out=y)  # p lies in z, which nothing reads any more
    values = 0.5 * _norm(difference, z)
    return Twin(values, _tv_gradient(q, difference, z) if gradient else None, _rate(values) if acceptance else None)


def _negative_log_acceptance(
    z: torch.Tensor, y: torch.Tensor, gradient: bool, acceptance: bool, memory: Reused
) -> Twin:
    q, p = _probs(z, memory.take("q", z)), _probs(y, memory.take("p", y))
    difference = memory.take("m", z)
    shared = torch.minimum(p, q, out=difference).sum(dim=-1)
    values = -shared.log()
    torch.sub(q, p, out=difference)
    rate = _acceptance(difference, p) if acceptance else None
    tiny = ~(shared > _SMALLEST_ACCEPTANCE)
    exact = None
    if tiny.any():
        values[tiny], exact = by_autograd(lambda row: negative_log_acceptance(row, y[tiny]), z[tiny], gradient)
    slope = _tv_gradient(q, difference, z).div_(shared.unsqueeze(-1)) if gradient else None
    if slope is not None and exact is not None:
        slope[tiny] = exact
    return Twin(values, slope, rate)


def _lk_hybrid(
    z: torch.Tensor, y: torch.Tensor, gradient: bool, acceptance: bool, memory: Reused, *, eta: float = 3.0
) -> Twin:
    kl, p, q = _kl_and_probs(z, y, memory.take("p", z), memory.take("q", z))
    difference = torch.sub(q, p, out=p)
    distance = 0.5 * _norm(difference, y)
    kl_share = (-eta * (1 - distance)).exp()
    slope = None
    if gradient:
        torch.mul(difference, kl_share.unsqueeze(-1), out=y)
        slope = _tv_gradient(q, difference, z).mul_((1 - kl_share).unsqueeze(-1)).add_(y)
    return Twin(kl_share * kl + (1 - kl_share) * distance, slope, _rate(distance) if acceptance else None)


def _tvd_plus_plus(
    z: torch.Tensor,
    y: torch.Tensor,
    gradient: bool,
    acceptance: bool,
    memory: Reused,
    *,
    estimator: str = "sampled",
    statistics: str = "batch",
    eps: float = 1e-6,
    rewards: Rewards | None = None,
) -> Twin:
    q, log_z_q = softmax(z, memory.take("q", z))
    p = _probs(y, memory.take("p", y))
    reward = torch.gt(p, q, out=memory.take("m", z))
    rate = _acceptance(p.sub_(q), p) if acceptance else None
    if statistics == "token":
        mean, std = reward_moments(_dot(q, reward, p).unsqueeze(-1), 1, eps)
        drawn = draw(q).squeeze(-1) if estimator == "sampled" else None
    else:
        mean, std, drawn = rewards or finish_rewards([collect_rewards(z, y, estimator)], eps)
    if drawn is None:
        weighted = reward.sub_(mean).div_(std).mul_(q)
        values = -weighted.sum(dim=-1)
        return Twin(values, weighted.add_(q.mul_(values.unsqueeze(-1))).neg_() if gradient else None, rate)
    picked = drawn.unsqueeze(-1)
    advantage = (reward.gather(-1, picked) - mean) / std
    log_q = z.gather(-1, picked).squeeze(-1) - log_z_q
    slope = q.mul_(advantage).scatter_add_(-1, picked, -advantage) if gradient else None
    return Twin(-advantage.squeeze(-1) * log_q, slope, rate)


def collect_rewards(
    draft_logits: torch.Tensor, target_logits: torch.Tensor, estimator: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One chunk's share of the batch statistics of TVD++: rewards `[n]` in [0, 1], and the tokens drawn from q `[n]`.

    Of logits `[n, V]`, which are left as they are. For the estimator `"full"` the reward is its expectation under q,
    and no token is drawn; for `"sampled"` it is that of one token.
    """
    q = draft_logits.softmax(dim=-1)
    reward = (target_logits.softmax(dim=-1) > q).to(q.dtype)
    if estimator == "full":
        return _dot(q, reward, reward), None
    drawn = draw(q).squeeze(-1)
    return reward.gather(-1, drawn.unsqueeze(-1)).squeeze(-1), drawn


def finish_rewards(chunks: list[tuple[torch.Tensor, torch.Tensor | None]], eps: float) -> Rewards:
    """Return mean and standard deviation over all chunks of `collect_rewards`, and the drawn tokens joined."""
    rewards = torch.cat([reward for reward, _ in chunks])
    drawn = [tokens for _, tokens in chunks if tokens is not None]
    mean, std = reward_moments(rewards.sum(), rewards.numel(), eps)
    return Rewards(mean, std, torch.cat(drawn) if drawn else None)


_TWINS: dict[str, Callable[..., Twin]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "generalized_jsd": _generalized_jsd,
    "total_variation": _total_variation,
    "negative_log_acceptance": _negative_log_acceptance,
    "lk_hybrid": _lk_hybrid,
    "tvd_plus_plus": _tvd_plus_plus,
}


def softmax(logits: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the probabilities `[n, V]`, in `out`, and the log-normaliser `[n]`: one exponential per element."""
    probs = _probs(logits, out)
    # The largest probability is at least 1/V, so its logarithm is exact to the last digits.
    return probs, logits.amax(dim=-1) - probs.amax(dim=-1).log()


def _probs(logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.softmax(logits, dim=-1, out=out)


def _dot(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return the row-wise inner product `[n]`; `out`, which may be one of the two, takes the products."""
    return torch.mul(a, b, out=out).sum(dim=-1)


def _norm(difference: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return Σ |difference| `[n]`; `out`, which may be the same, is overwritten."""
    return torch.abs(difference, out=out).sum(dim=-1)


def _acceptance(difference: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return _rate(0.5 * _norm(difference, out))


def _rate(distance: torch.Tensor) -> torch.Tensor:
    return (1 - distance).clamp(min=0.0)


def _tv_gradient(q: torch.Tensor, difference: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return total variation's gradient in `out`; overwrites `difference` = q − p.

    The textbook form ½ q (s − Σ q s), s = sign(q − p), loses all digits where q sits on one token: where −log α
    divides it by an α near 0. So w = (1 − s)/2 takes the place of s.
    """
    kept = difference.sign_().sub_(1).mul_(-0.5).mul_(q)
    return torch.mul(q, kept.sum(dim=-1, keepdim=True), out=out).sub_(kept)
