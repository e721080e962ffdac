"""Divergences from a target of which only a part was kept: its k likeliest tokens and the rest, or draws from it.

**Top-k and tail** (`SparseTarget`). All tokens outside the k kept ones are one bucket, for the draft as for the
target. Every divergence then compares k + 1 probabilities. Merging outcomes can only bring two distributions closer:
the divergences are lower bounds of the true ones, and the acceptance rate is an **upper bound**. With k = V nothing is
merged and everything equals the dense form.

**Draws** (`SampledTarget`). The frequencies of tokens drawn from p with replacement are an unbiased estimate of p
itself, so of whatever is linear in p: forward KL's gradient, and cross-entropy. Every other divergence bends p, and its
estimate would be biased; it is refused (Sparse Logit Sampling, https://arxiv.org/abs/2503.16870).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_draftkd.acceptance import token_acceptance_rate
from hf_draftkd.acceptance.tensors import at_least_float32
from hf_draftkd.losses.gradients import Divergence, Reused, Twin, softmax
from hf_draftkd.losses.vocabulary import listed_value_and_gradient
from hf_draftkd.utils.checks import whole_number


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
        counts: `[..., m]`, how often each was drawn. In the value of forward KL the frequencies stand in for p, which
            makes it a little too high; they take no other part in the gradient.
    """

    token_ids: torch.Tensor
    counts: torch.Tensor

    def __post_init__(self) -> None:
        """Refuse parts whose shapes do not fit."""
        if self.token_ids.shape != self.counts.shape:
            shapes = f"{tuple(self.token_ids.shape)} and {tuple(self.counts.shape)}"
            raise ValueError(f"A sampled target's parts must both have shape [..., m], got {shapes}.")

    def __getitem__(self, index: Any) -> "SampledTarget":
        """Select positions."""
        return SampledTarget(self.token_ids[index], self.counts[index])


def top_k_target(logits: torch.Tensor, k: int) -> SparseTarget:
    """Keep the k likeliest tokens of the target, of logits `[..., V]` over the shared vocabulary, and the rest's
    probability; a `ValueError` if k is out of range.

    The logits are divided by the loss temperature already: the tail cannot be re-tempered later.
    """
    whole_number("k", k, 1, logits.shape[-1])
    logits = at_least_float32(logits)
    kept, token_ids = logits.topk(k, dim=-1)
    total = logits.logsumexp(dim=-1)
    # Summing what is left, not 1 − Σ kept: a tail of 1e-9 would drown in the rounding of the difference.
    tail = logits.scatter(-1, token_ids, -torch.inf).logsumexp(dim=-1)
    return SparseTarget(token_ids, kept - total.unsqueeze(-1), tail - total)


def sample_target(logits: torch.Tensor, num_draws: int, generator: torch.Generator | None = None) -> SampledTarget:
    """Draw N tokens from the target, of tempered logits `[..., V]` over the shared vocabulary, with replacement.

    Returns distinct tokens with their counts, as many places as the richest position needs; a `ValueError` if the
    number of draws is out of range.
    """
    whole_number("num_draws", num_draws)
    rows = at_least_float32(logits).softmax(dim=-1).reshape(-1, logits.shape[-1])
    drawn = rows.multinomial(num_draws, replacement=True, generator=generator).sort(dim=-1).values
    # Sorted, equal draws stand side by side: each new token gets the next place, where its draws are counted.
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = first.cumsum(dim=-1) - 1
    width = int(place.max()) + 1 if place.numel() else 0
    token_ids = drawn.new_zeros(drawn.shape[0], width).scatter_(-1, place, drawn)
    counts = torch.zeros_like(token_ids).scatter_add_(-1, place, torch.ones_like(drawn))
    shape = (*logits.shape[:-1], width)
    return SampledTarget(token_ids.reshape(shape), counts.reshape(shape))


def acceptance_upper_bound(draft_logits: torch.Tensor, target: SparseTarget) -> torch.Tensor:
    """Σ min(p, q) over k + 1 buckets, `[...]`: at least the acceptance rate α, and equal to it for k = V.

    From draft logits `[..., V]` and the target's top-k and tail.
    """
    logits = at_least_float32(draft_logits)
    buckets = logits.gather(-1, target.token_ids)
    if target.token_ids.shape[-1] < logits.shape[-1]:
        tail = logits.scatter(-1, target.token_ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
        buckets = torch.cat([buckets, tail], dim=-1)
    return token_acceptance_rate(buckets, target_buckets(target, logits.shape[-1]))


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
    outside: torch.Tensor | None,
    *,
    memory: Reused,
    gradient: bool,
    **how: Any,
) -> Twin:
    """A divergence from a sparse target and its gradient, for one chunk.

    Arguments and result as in `vocabulary.listed_value_and_gradient`, `outside` being `[V]`; the acceptance rate is an
    upper bound, and None for draws. With a token list, the tail counts as one token, and as listed if it contains any
    listed token; draws outside the list are left out of forward KL's sum, and its gradient stays unbiased.
    """
    if isinstance(target, SampledTarget):
        check_sampled(divergence)
        q, log_z = softmax(draft_logits, memory.take("q", draft_logits))
        counts = target.counts if outside is None else target.counts * ~outside[target.token_ids]
        share = counts.to(q.dtype) / target.counts.sum(dim=-1, keepdim=True).to(q.dtype).clamp(min=1)
        log_q = draft_logits.gather(-1, target.token_ids) - log_z.unsqueeze(-1)
        # 0 · ∞ is 0: places that are not used, and draws that are left out.
        values = (share * torch.where(share > 0, share.log() - log_q, 0.0)).sum(dim=-1)
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
    twin = listed_value_and_gradient(divergence, buckets, kept, outside, memory=memory, gradient=gradient, **how)
    return twin._replace(gradient=None if twin.gradient is None else carry_back(twin.gradient))


def merge_for_gradient(
    draft_logits: torch.Tensor, token_ids: torch.Tensor, memory: Reused
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Merge all tokens but the kept ones `[n, k]` into one logit. Returns `[n, k + 1]` (`[n, V]` where k = V), and a
    function from a gradient in these to one in the draft logits `[n, V]`, which takes their place.

    The draft's logits are overwritten; the other tokens' share lies in `memory` until the gradient is carried back.
    """
    kept = draft_logits.gather(-1, token_ids)
    if token_ids.shape[-1] == draft_logits.shape[-1]:
        return kept, lambda slope: draft_logits.scatter_(-1, token_ids, slope)
    rest = draft_logits.scatter_(-1, token_ids, -torch.inf)
    share, tail = softmax(rest, memory.take("share", rest))

    def carry_back(slope: torch.Tensor) -> torch.Tensor:
        return torch.mul(share, slope[..., -1:], out=rest).scatter_(-1, token_ids, slope[..., :-1])

    return torch.cat([kept, tail.unsqueeze(-1)], dim=-1), carry_back


def target_buckets(target: SparseTarget, vocab_size: int) -> torch.Tensor:
    """Return the target's k + 1 log-probabilities `[..., k + 1]`, the tail last (`[..., V]` where k = V)."""
    logprobs = at_least_float32(target.logprobs)
    if target.token_ids.shape[-1] == vocab_size:
        return logprobs
    return torch.cat([logprobs, target.tail_logprob.to(logprobs.dtype).unsqueeze(-1)], dim=-1)
