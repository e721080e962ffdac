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

from hf_draftkd.acceptance import token_acceptance_rate
from hf_draftkd.losses.chunked import Unprojected
from hf_draftkd.losses.divergences import LOG_FLOOR
from hf_draftkd.losses.gradients import Divergence, Reused, Twin, value_and_gradient

_NEVER = 100 * LOG_FLOOR
"""The logit of a token outside the list: its probability is exactly 0, and its logarithm finite."""


def masked(logits: torch.Tensor, outside: torch.Tensor | None) -> torch.Tensor:
    """Write over the logits `[n, V]` of tokens outside the list (bool `[V]` or `[n, V]`; None: there is no list)."""
    return logits if outside is None else logits.masked_fill_(outside, _NEVER)


def listed_value_and_gradient(
    divergence: Divergence,
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor,
    outside: torch.Tensor | None,
    *,
    options: Mapping[str, Any],
    **wanted: Any,
) -> Twin:
    """`value_and_gradient` of a draft that proposes only the tokens of a list; the gradient is 0 outside it.

    Arguments as there (`wanted` are `gradient`, `acceptance` and `memory`), but for the draft's logits, which come
    masked; the target's do not. `outside` (bool `[V]` or `[n, V]`) are the tokens that are not on the list; None: there
    is no list. A function as divergence is given the masked logits.
    """
    if outside is None:
        return value_and_gradient(divergence, draft_logits, target_logits, options=options, **wanted)
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
    draft_logits: torch.Tensor, target_logits: torch.Tensor, outside: torch.Tensor, *, acceptance: bool, **wanted: Any
) -> Twin:
    rate = token_acceptance_rate(draft_logits, target_logits) if acceptance else None
    log_z = target_logits.logsumexp(dim=-1)
    log_share = masked(target_logits, outside).logsumexp(dim=-1) - log_z
    twin = value_and_gradient("forward_kl", draft_logits, target_logits, acceptance=False, **wanted)
    share = log_share.exp()
    # Where p has nothing on the list both factors vanish together.
    values = share * (twin.values + log_share.clamp(min=LOG_FLOOR))
    slope = None if twin.gradient is None else twin.gradient.mul_(share.unsqueeze(-1))
    return Twin(values, slope, rate)


def head_cut_to_list(
    draft: Unprojected, vocabulary: torch.Tensor, kept: int
) -> tuple[Unprojected, torch.Tensor, torch.Tensor]:
    """A head over the list alone, for a target that is known at `kept` tokens a position and by the rest together.

    No logit outside the list decides anything, so none is computed: with a list of a sixteenth of the vocabulary the
    head takes a sixteenth of its time. One more column stands for all tokens outside the list that the target keeps,
    and another one, to which no token is mapped, for those that it does not, so that its rest is never empty.

    Returns:
        The draft; the ids of the list `[n]` in it; and the column of each token `[V]`.
    """
    size, head = len(vocabulary), draft.head
    # As many columns as the target keeps tokens would say that it keeps all of them.
    more = 2 if size + 2 != kept else 3
    column = vocabulary.new_full((len(head.weight),), size)
    listed = torch.arange(size, device=column.device)
    column[vocabulary] = listed

    def cut(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows.index_select(0, vocabulary), rows.new_zeros(more, *rows.shape[1:])])

    bias = None if head.bias is None else cut(head.bias)
    return draft._replace(head=head._replace(weight=cut(head.weight), bias=bias)), listed, column
