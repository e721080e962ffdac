"""Divergences from a target of which only a part was kept: its k likeliest tokens and the rest, or draws from it.

**Top-k and tail** (`SparseTarget`). All tokens outside the k kept ones are one bucket, for the draft as for the
target. Every divergence then compares k + 1 probabilities. Merging outcomes can only bring two distributions closer:
the divergences are lower bounds of the true ones, and the acceptance rate is an **upper bound**. With k = V nothing is
merged and everything equals the dense form.

**Draws** (`SampledTarget`). The frequencies of tokens drawn from p with replacement are an unbiased estimate of p
itself, so of whatever is linear in p: forward KL's gradient, and cross-entropy. Every other divergence bends p, and its
estimate would be biased; it is refused (Sparse Logit Sampling, https://arxiv.org/abs/2503.16870).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_draftkd.acceptance import token_acceptance_rate
from hf_draftkd.acceptance.tensors import at_least_float32
from hf_draftkd.losses.divergences import get_divergence
from hf_draftkd.losses.gradients import Divergence, Reused, Twin, softmax
from hf_draftkd.losses.vocabulary import listed_value_and_gradient
from hf_draftkd.utils.checks import in_range, whole_number


@dataclass(frozen=True)
class SparseTarget:
    """The target's k likeliest tokens at each position, and the probability of all others together.

    Args:
        token_ids: `[..., k]`, distinct within a position.
        logprobs: `[..., k]`, log p of these tokens, at the loss temperature.
        tail_logprob: `[...]`, log of the remaining probability; `-inf` where k = V.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    tail_logprob: torch.Tensor

    def __post_init__(self) -> None:
        """Refuse parts whose shapes do not fit."""
        shape = tuple(self.token_ids.shape)
        if self.logprobs.shape != self.token_ids.shape or tuple(self.tail_logprob.shape) != shape[:-1]:
            raise ValueError(
                f"A sparse target needs token_ids and logprobs [..., k] and tail_logprob [...], got {shape}, "
                f"{tuple(self.logprobs.shape)} and {tuple(self.tail_logprob.shape)}."
            )

    def __getitem__(self, index: Any) -> "SparseTarget":
        """Select positions."""
        return SparseTarget(self.token_ids[index], self.logprobs[index], self.tail_logprob[index])

    @classmethod
    def concatenate(cls, parts: Sequence["SparseTarget"]) -> "SparseTarget":
        """Join the positions of several targets that keep the same k, in order."""
        return cls(*(torch.cat(columns) for columns in zip(*(vars(part).values() for part in parts), strict=True)))


@dataclass(frozen=True)
class SampledTarget:
    """Tokens drawn from the target at each position, with replacement.

    Args:
        token_ids: `[..., m]`; a place that is not used holds any valid id and count 0.
        counts: `[..., m]`, how often each was drawn.
        logprobs: `[..., m]`, log p of these tokens, where known. It takes no part in the gradient: with it the value
            of forward KL is unbiased, without it the frequencies stand in for p and the value is a little too high.
    """

    token_ids: torch.Tensor
    counts: torch.Tensor
    logprobs: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse parts whose shapes do not fit."""
        shapes = {tuple(part.shape) for part in (self.token_ids, self.counts, self.logprobs) if part is not None}
        if len(shapes) > 1:
            raise ValueError(f"A sampled target's parts must all have shape [..., m], got {sorted(shapes)}.")

    def __getitem__(self, index: Any) -> "SampledTarget":
        """Select positions."""
        logprobs = None if self.logprobs is None else self.logprobs[index]
        return SampledTarget(self.token_ids[index], self.counts[index], logprobs)


def top_k_target(logits: torch.Tensor, k: int, temperature: float = 1.0) -> SparseTarget:
    """Keep the k likeliest tokens of the target, of logits `[..., V]` over the shared vocabulary, and the rest's
    probability.

    At a loss temperature, since the tail cannot be re-tempered later. A `ValueError` if it or k is out of range.
    """
    whole_number("k", k, 1, logits.shape[-1])
    in_range("temperature", temperature, 0, open_low=True)
    logits = at_least_float32(logits)
    logits = logits if temperature == 1 else logits / temperature
    kept, token_ids = logits.topk(k, dim=-1)
    total = logits.logsumexp(dim=-1)
    # Summing what is left, not 1 − Σ kept: a tail of 1e-9 would drown in the rounding of the difference.
    tail = logits.scatter(-1, token_ids, -torch.inf).logsumexp(dim=-1)
    return SparseTarget(token_ids, kept - total.unsqueeze(-1), tail - total)


def sample_target(
    logits: torch.Tensor, num_draws: int, temperature: float = 1.0, generator: torch.Generator | None = None
) -> SampledTarget:
    """Draw N tokens from the target, of logits `[..., V]` over the shared vocabulary, with replacement, and count them.

    Returns:
        Distinct tokens with their counts and log-probabilities at the loss temperature, as many places as the richest
        position needs.

    Raises:
        ValueError: If the number of draws or the temperature is out of range.
    """
    whole_number("num_draws", num_draws)
    in_range("temperature", temperature, 0, open_low=True)
    logprobs = (at_least_float32(logits) / temperature).log_softmax(dim=-1)
    rows = logprobs.exp().reshape(-1, logits.shape[-1])
    drawn = rows.multinomial(num_draws, replacement=True, generator=generator).sort(dim=-1).values
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = first.cumsum(dim=-1) - 1
    width = int(place.max()) + 1 if place.numel() else 0
    token_ids = drawn.new_zeros(drawn.shape[0], width).scatter_(-1, place, drawn)
    counts = torch.zeros_like(token_ids).scatter_add_(-1, place, torch.ones_like(drawn))
    shape = (*logits.shape[:-1], width)
    token_ids, counts = token_ids.reshape(shape), counts.reshape(shape)
    return SampledTarget(token_ids, counts, logprobs.gather(-1, token_ids))


def sparse_divergence(
    draft_logits: torch.Tensor,
    target: SparseTarget | SampledTarget,
    divergence: Divergence = "forward_kl",
    **options: Any,
) -> torch.Tensor:
    """A divergence (a key of `DIVERGENCES`, or a function like them) between the draft and a target of which a part was
    kept.

    The draft's logits `[..., V]` are divided by the loss temperature already.

    Returns:
        Values `[...]`. For draws, forward KL's gradient is unbiased.

    Raises:
        ValueError: If the divergence cannot be estimated from draws.
    """
    if isinstance(target, SampledTarget):
        check_sampled(divergence)
        log_q = at_least_float32(draft_logits).log_softmax(dim=-1).gather(-1, target.token_ids)
        return _expected_gap(_frequencies(target.counts, target, log_q.dtype), target, log_q)
    function = get_divergence(divergence) if isinstance(divergence, str) else divergence
    return function(_merge(draft_logits, target.token_ids), target_buckets(target, draft_logits.shape[-1]), **options)


def acceptance_upper_bound(draft_logits: torch.Tensor, target: SparseTarget) -> torch.Tensor:
    """Σ min(p, q) over k + 1 buckets, `[...]`: at least the acceptance rate α, and equal to it for k = V.

    From draft logits `[..., V]` and the target's top-k and tail.
    """
    vocab_size = draft_logits.shape[-1]
    return token_acceptance_rate(_merge(draft_logits, target.token_ids), target_buckets(target, vocab_size))


def check_sampled(divergence: Divergence) -> None:
    """Refuse every divergence (name or function) that draws cannot estimate without bias, with a `ValueError`."""
    if divergence not in ("forward_kl", "cross_entropy"):
        name = divergence if isinstance(divergence, str) else getattr(divergence, "__name__", repr(divergence))
        raise ValueError(
            f"{name!r} cannot be learned from tokens drawn from the target: their frequencies are unbiased for what is "
            "linear in p, that is forward_kl and cross_entropy, and biased for all else. Use one of these two, or "
            "cache the target's top-k with its tail."
        )


@torch.no_grad()
def sparse_value_and_gradient(
    divergence: Divergence,
    draft_logits: torch.Tensor,
    target: SparseTarget | SampledTarget,
    outside: torch.Tensor | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    gradient: bool = True,
    acceptance: bool = False,
    memory: Reused | None = None,
) -> Twin:
    """A divergence from a sparse target and its gradient, for one chunk: the fast twin of `sparse_divergence`.

    Arguments and result as in `vocabulary.listed_value_and_gradient`, `outside` being `[V]`; the acceptance rate is an
    upper bound, and None for draws. Of a list of tokens the tail is one, on the list if the list has any token in it;
    draws outside the list are left out of forward KL's sum, and its gradient stays unbiased.
    """
    memory = memory or Reused()
    if isinstance(target, SampledTarget):
        check_sampled(divergence)
        q, log_z = softmax(draft_logits, memory.take("q", draft_logits))
        counts = target.counts if outside is None else target.counts * ~outside[target.token_ids]
        share = _frequencies(counts, target, q.dtype)
        values = _expected_gap(share, target, draft_logits.gather(-1, target.token_ids) - log_z.unsqueeze(-1))
        if not gradient:
            return Twin(values, None, None)
        slope = q if outside is None else q.mul_(share.sum(dim=-1, keepdim=True))
        return Twin(values, slope.scatter_add_(-1, target.token_ids, -share), None)
    buckets, carry_back = merge_for_gradient(draft_logits, target.token_ids, memory)
    kept = target_buckets(target, draft_logits.shape[-1]).to(buckets.dtype, copy=True)  # it is overwritten
    if outside is not None:
        unlisted = outside[target.token_ids]
        if buckets.shape[-1] > unlisted.shape[-1]:
            listed_in_tail = (~outside).sum() - (~unlisted).sum(dim=-1, keepdim=True)
            unlisted = torch.cat([unlisted, listed_in_tail == 0], dim=-1)
        outside = unlisted
    twin = listed_value_and_gradient(
        divergence, buckets, kept, outside, options=options, gradient=gradient, acceptance=acceptance, memory=memory
    )
    return twin._replace(gradient=None if twin.gradient is None else carry_back(twin.gradient))


def merge_for_gradient(
    draft_logits: torch.Tensor, token_ids: torch.Tensor, memory: Reused | None = None
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Merge all tokens but the kept ones `[n, k]` into one logit; the fast twin of `_merge`, with its way back.

    The draft's logits `[n, V]` are overwritten. The other tokens' share, which lies in `memory`, is needed until the
    gradient is carried back.

    Returns:
        Bucket logits `[n, k + 1]` (`[n, V]` where k = V), and a function from a gradient in them to one in the draft
        logits, which takes their place.
    """
    kept = draft_logits.gather(-1, token_ids)
    if token_ids.shape[-1] == draft_logits.shape[-1]:
        return kept, lambda slope: draft_logits.scatter_(-1, token_ids, slope)
    rest = draft_logits.scatter_(-1, token_ids, -torch.inf)
    share, tail = softmax(rest, (memory or Reused()).take("share", rest))

    def carry_back(slope: torch.Tensor) -> torch.Tensor:
        return torch.mul(share, slope[..., -1:], out=rest).scatter_(-1, token_ids, slope[..., :-1])

    return torch.cat([kept, tail.unsqueeze(-1)], dim=-1), carry_back


def target_buckets(target: SparseTarget, vocab_size: int) -> torch.Tensor:
    """Return the target's k + 1 log-probabilities `[..., k + 1]`, the tail last (`[..., V]` where k = V)."""
    logprobs = at_least_float32(target.logprobs)
    if target.token_ids.shape[-1] == vocab_size:
        return logprobs
    return torch.cat([logprobs, target.tail_logprob.to(logprobs.dtype).unsqueeze(-1)], dim=-1)


def _merge(draft_logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return the draft's bucket logits `[..., k + 1]` (`[..., V]` where k = V): the plain form, for autograd."""
    logits = at_least_float32(draft_logits)
    kept = logits.gather(-1, token_ids)
    if token_ids.shape[-1] == logits.shape[-1]:
        return kept
    tail = logits.scatter(-1, token_ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([kept, tail], dim=-1)


def _frequencies(counts: torch.Tensor, target: SampledTarget, dtype: torch.dtype) -> torch.Tensor:
    """Return what counts, of all draws or some, are of all draws of the target."""
    return counts.to(dtype) / target.counts.sum(dim=-1, keepdim=True).to(dtype).clamp(min=1)


def _expected_gap(share: torch.Tensor, target: SampledTarget, log_q: torch.Tensor) -> torch.Tensor:
    """Return Σ frequency · (log p − log q); where log p is not known the frequency stands in for p."""
    log_p = share.log() if target.logprobs is None else target.logprobs.to(log_q.dtype)
    return (share * torch.where(share > 0, log_p - log_q, 0.0)).sum(dim=-1)
