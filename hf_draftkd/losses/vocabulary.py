"""A draft that may propose only some tokens: q is masked to the list and renormalised, p stays as it is.

Σ over the vocabulary then has terms in which q is 0 whatever the draft's logits are. In total variation, −log α,
reverse KL, JSD and TVD++ they are finite and simply stand there. In forward KL (and cross-entropy on a token outside
the list) they are infinite, and say nothing to the draft: they are left out, so that forward KL is Σ over the list of
p (log p − log q) = P (KL(p' ‖ q) + log P), where P is the list's share of p and p' is p renormalised over it. It may be
negative, down to −1/e. Its gradient in the list's logits is P (q − p').
"""

from collections.abc import Mapping
from typing import Any

import torch

from hf_draftkd.losses.divergences import LOG_FLOOR
from hf_draftkd.losses.gradients import Divergence, Twin, value_and_gradient
from hf_draftkd.losses.memory import Reused
from hf_draftkd.losses.sparse import (
    SampledTarget,
    SparseTarget,
    merge_for_gradient,
    sparse_value_and_gradient,
    target_buckets,
)

_NEVER = 100 * LOG_FLOOR
"""The logit of a token outside the list: its probability is exactly 0, and its logarithm finite."""


def masked(logits: torch.Tensor, outside: torch.Tensor | None) -> torch.Tensor:
    """Write over the logits `[n, V]` of tokens outside the list (bool `[V]` or `[n, V]`; None: there is no list)."""
    return logits if outside is None else logits.masked_fill_(outside, _NEVER)


def listed_value_and_gradient(
    divergence: Divergence,
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor,
    outside: torch.Tensor,
    *,
    options: Mapping[str, Any],
    gradient: bool = True,
    acceptance: bool = False,
    memory: Reused,
) -> Twin:
    """`value_and_gradient` of a draft that proposes only the tokens of a list; the gradient is 0 outside it.

    Arguments as there, but for the draft's logits, which come masked; the target's do not. `outside` (bool `[V]` or
    `[n, V]`) are the tokens that are not on the list. A function as divergence is given the masked logits.
    """
    wanted: dict[str, Any] = {"gradient": gradient, "acceptance": acceptance, "memory": memory}
    if divergence == "forward_kl" or (divergence == "generalized_jsd" and options.get("beta") == 0):
        twin = _forward_kl(draft_logits, target_logits, outside, **wanted)
    elif divergence == "lk_hybrid":
        wanted["acceptance"] = True
        kl = _forward_kl(draft_logits.clone(), target_logits.clone(), outside, **wanted | {"memory": Reused()})
        tv = value_and_gradient("total_variation", draft_logits, target_logits, **wanted)
        assert tv.acceptance is not None
        share = (-options.get("eta", 3.0) * tv.acceptance).exp()
        slope = None
        if kl.gradient is not None and tv.gradient is not None:
            slope = torch.lerp(tv.gradient, kl.gradient, share.unsqueeze(-1))
        twin = Twin(torch.lerp(tv.values, kl.values, share), slope, tv.acceptance)
    else:
        twin = value_and_gradient(divergence, draft_logits, target_logits, options=options, **wanted)
    return twin._replace(gradient=None if twin.gradient is None else twin.gradient.masked_fill_(outside, 0.0))


def _forward_kl(
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor,
    outside: torch.Tensor,
    *,
    gradient: bool,
    acceptance: bool,
    memory: Reused,
) -> Twin:
    rate = None
    if acceptance:
        difference = draft_logits.softmax(dim=-1).sub_(target_logits.softmax(dim=-1))
        rate = (1 - 0.5 * difference.abs_().sum(dim=-1)).clamp(min=0.0)
    log_z = target_logits.logsumexp(dim=-1)
    log_share = masked(target_logits, outside).logsumexp(dim=-1) - log_z
    twin = value_and_gradient("forward_kl", draft_logits, target_logits, gradient=gradient, memory=memory)
    share = log_share.exp()
    # Where p has nothing on the list both factors vanish together.
    values = share * (twin.values + log_share.clamp(min=LOG_FLOOR))
    slope = None if twin.gradient is None else twin.gradient.mul_(share.unsqueeze(-1))
    return Twin(values, slope, rate)


def listed_sparse_value_and_gradient(
    divergence: Divergence,
    draft_logits: torch.Tensor,
    target: SparseTarget | SampledTarget,
    outside: torch.Tensor,
    **wanted: Any,
) -> Twin:
    """The same from a target of which a part was kept; `outside` is `[V]`, `wanted` what `listed_value_and_gradient`
    takes.

    Top-k and tail: the tail is one token, on the list if the list has any token in it; so values are bounds as without
    a list. Draws: those outside the list are left out of forward KL's sum, and its gradient stays unbiased.
    """
    listed = ~outside[target.token_ids]
    if isinstance(target, SampledTarget):
        counts = target.counts * listed
        share = counts.sum(dim=-1).to(draft_logits) / target.counts.sum(dim=-1).clamp(min=1)
        kept = SampledTarget(target.token_ids, counts, target.logprobs)
        twin = sparse_value_and_gradient(divergence, draft_logits, kept, **wanted)
        values = share * twin.values if target.logprobs is not None else share * twin.values + torch.xlogy(share, share)
        return Twin(values, None if twin.gradient is None else twin.gradient.mul_(share.unsqueeze(-1)), None)
    vocab_size = len(outside)
    buckets, carry_back = merge_for_gradient(draft_logits, target.token_ids, wanted["memory"])
    against = target_buckets(target, vocab_size).to(buckets, copy=True)
    if buckets.shape[-1] > listed.shape[-1]:
        in_tail = listed.sum(dim=-1, keepdim=True) < (~outside).sum()
        listed = torch.cat([listed, in_tail], dim=-1)
    twin = listed_value_and_gradient(divergence, buckets, against, ~listed, **wanted)
    return twin._replace(gradient=None if twin.gradient is None else carry_back(twin.gradient))
