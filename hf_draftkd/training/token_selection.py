"""Which completion tokens a draft learns from, and how much from each.

A selection is a function from what is known of a batch's completion tokens (`TokenMetrics`) to their weights. The
named ones stand in `TOKEN_SELECTIONS`; for any other, override `DraftDistillTrainer.token_weights`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_draftkd.acceptance.tensors import only_listed
from hf_draftkd.losses import DistillationLoss
from hf_draftkd.losses.chunked import scan

ADASPEC = "adaspec"
AFTER_FIRST_REJECTION = "after_first_rejection"
AFTER_FIRST_MISMATCH = "after_first_mismatch"
TOKEN_SELECTIONS = ("all", ADASPEC, AFTER_FIRST_REJECTION, AFTER_FIRST_MISMATCH)
"""The values of `DraftDistillConfig.token_selection`."""


class TokenMetrics(NamedTuple):
    """What is known of the N completion tokens of one batch on one process, without gradient, before the step.

    Tokens stand text by text, in reading order. A text of several turns has one completion for each of them.
    """

    tokens: Tensor
    """[N] int64: the token in the text."""
    likeliest: Tensor
    """[N] int64: the token that the draft finds likeliest there."""
    losses: Tensor
    """[N]: the draft's loss, of the same kind as it is trained on."""
    acceptance: Tensor | None
    """[N]: α at the loss temperature, how likely the target is to accept what the draft proposes there; from a cache
    of the k likeliest tokens an upper bound. None where only text or draws are known of the target."""
    reference_losses: Tensor | None
    """[N]: the same loss of the reference model; None without one."""
    completions: Tensor
    """[N] int64: which completion of the batch the token belongs to, counted from 0."""
    positions: Tensor
    """[N] int64: its place in that completion, counted from 0."""


def token_metrics(
    draft: Any,
    target: Any,
    reference: Any,
    tokens: Tensor,
    *,
    keep: Tensor,
    position_ids: Tensor | None,
    loss: Callable[[Tensor, Any, Tensor], DistillationLoss],
    vocabulary: Tensor | None,
) -> TokenMetrics:
    """Look at a batch's N completion tokens without gradient, a chunk at a time.

    Args:
        draft: Hidden states with their head, or logits, at the N positions that predict a completion token.
        target: What is known of the target there; None in black box.
        reference: As `draft`, of the reference model; None without one.
        tokens: [N].
        keep: [B, L] bool, where the N tokens are predicted.
        position_ids: [B, L], which start again with each text of a packed row; None where each row is a text.
        loss: (draft logits [n, V], target at these n, tokens [n]) -> loss.
        vocabulary: Ids that the draft may propose; None for all.
    """
    device = (draft if isinstance(draft, Tensor) else draft.hidden).device
    likeliest = torch.zeros_like(tokens)
    values, reference_values, rates = (torch.zeros(tokens.shape, device=device) for _ in range(3))
    has_rates = target is not None

    def look(rows: slice, logits: Tensor, against: Any, other: Tensor | None) -> None:
        nonlocal has_rates
        likeliest[rows] = only_listed(logits, vocabulary).argmax(-1)
        found = loss(logits, against, tokens[rows])
        values[rows] = found.token_losses.to(values)
        if found.acceptance is None:
            has_rates = False
        else:
            rates[rows] = found.acceptance.to(rates)
        if other is not None:
            reference_values[rows] = loss(other.to(logits), against, tokens[rows]).token_losses.to(values)

    scan((draft, target, reference), look)
    completions, positions = completion_places(keep, position_ids)
    return TokenMetrics(
        tokens=tokens,
        likeliest=likeliest,
        losses=values,
        acceptance=rates if has_rates else None,
        reference_losses=None if reference is None else reference_values,
        completions=completions,
        positions=positions,
    )


def completion_places(keep: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which completion each of N tokens belongs to [N], and its place there [N], both counted from 0.

    A completion is a run of tokens that are learned from. The last position of a row, or of a text inside a packed
    row (`position_ids` [B, L] start again at 0), predicts nothing, so runs never reach into the next text.
    """
    before = torch.zeros_like(keep)
    before[:, 1:] = keep[:, :-1]
    starts = keep & ~before
    if position_ids is not None:
        starts |= keep & (position_ids == 0)
    completions = starts.flatten().cumsum(0)[keep.flatten()] - 1
    first = starts[keep].nonzero().squeeze(-1)
    return completions, torch.arange(len(completions), device=keep.device) - first[completions]


def adaspec_weights(losses: Tensor, reference_losses: Tensor, share: float) -> Tensor:
    """[N] weights: 1 for the share of tokens, rounded up, whose loss exceeds the reference's most, 0 for the others.

    What a reference of the draft's size, a copy that was distilled before, has learned, the draft can learn; where both
    lag behind the target alike, its capacity would be spent in vain (AdaSPEC, https://arxiv.org/abs/2510.19779).
    """
    weights = torch.zeros_like(losses)
    # A share of 0.3 of 10 tokens is 3.0000000000000004 in floating point, and still 3 tokens.
    count = min(math.ceil(share * len(losses) - 1e-9), len(losses))
    weights[(losses - reference_losses).topk(count).indices] = 1
    return weights


def rejected_by(acceptance: Tensor, positions: Tensor, completions: Tensor) -> Tensor:
    """[N] how likely speculative decoding, started with a completion, has met a rejection by each of its tokens.

    That is 1 − Π_{s ≤ t} a_s over the completion's tokens s up to and with t, with a_t the `acceptance` [N] at each; a
    token's place is its position [N] in one of the completions [N].
    """
    if not len(acceptance):
        return torch.zeros_like(acceptance)
    # One row a completion: products that start again.
    rows = acceptance.new_ones(int(completions[-1]) + 1, int(positions.max()) + 1)
    rows[completions, positions] = acceptance
    return 1 - rows.cumprod(-1)[completions, positions]


def select_tokens(metrics: TokenMetrics, selection: str, share: float) -> Tensor:
    """The weights [N], in [0, 1], of one of `TOKEN_SELECTIONS`; `share` is for `adaspec`."""
    places = metrics.positions, metrics.completions
    if selection == ADASPEC:
        assert metrics.reference_losses is not None, "check_selection asks for a reference"
        return adaspec_weights(metrics.losses, metrics.reference_losses, share)
    if selection == AFTER_FIRST_REJECTION:
        assert metrics.acceptance is not None, "check_selection asks for distributions"
        return rejected_by(metrics.acceptance, *places)
    if selection == AFTER_FIRST_MISMATCH:
        return rejected_by((metrics.likeliest == metrics.tokens).to(metrics.losses), *places)
    return torch.ones_like(metrics.losses)


def check_selection(
    args: Any, *, has_reference: bool, custom_weights: bool, knows_distributions: bool, from_draws: bool
) -> None:
    """Make sure, before anything is loaded, that the tokens asked for can be chosen; else a `ValueError`.

    `custom_weights`: `token_weights` is overridden; `knows_distributions`: the loss reads the target's; `from_draws`:
    sampled tokens are all that is known of them.
    """
    selection = args.token_selection
    if custom_weights and args.parallel_tokens > 1:
        raise ValueError(
            "A custom `token_weights` weighs next tokens, but `parallel_tokens` learns each token at several depths. "
            "Leave one of them out."
        )
    if selection == ADASPEC:
        if not has_reference:
            raise ValueError(
                '`token_selection="adaspec"` compares the draft with a reference, but `reference_model` is None. '
                'Distil a copy of the draft with `token_selection="all"` first, and give it as `reference_model`.'
            )
        if args.divergence == "tvd_plus_plus":
            raise ValueError(
                '`token_selection="adaspec"` compares losses token by token, but the values of `tvd_plus_plus` have '
                'no meaning; only its gradient has one. Use `divergence="total_variation"`.'
            )
    elif has_reference and not custom_weights:
        raise ValueError(
            f'`reference_model` is read by `token_selection="adaspec"` or a custom `token_weights`, but '
            f'`token_selection={selection!r}`. Leave it out, or choose "adaspec".'
        )
    if selection == AFTER_FIRST_REJECTION and (from_draws or not knows_distributions):
        known = "tokens drawn from the target" if from_draws else "the target's text"
        raise ValueError(
            f'`token_selection="after_first_rejection"` needs the target\'s distributions to tell what it accepts, '
            f'but only {known} is known. On greedy text use "after_first_mismatch", which needs no more.'
        )


def check_token_weights(weights: Any, metrics: TokenMetrics) -> Tensor:
    """The weights, once it is clear that they are [N] and neither negative, infinite nor NaN; else a `ValueError`."""
    shape = tuple(metrics.losses.shape)
    if not isinstance(weights, Tensor) or tuple(weights.shape) != shape:
        given = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"`token_weights` must return one weight for each completion token, {shape}, got {given}.")
    # Losses that are NaN make such weights, and are reported with the batch they come from.
    if not ((weights >= 0) & weights.isfinite()).all() and metrics.losses.isfinite().all():
        raise ValueError("`token_weights` returned weights that are negative, infinite or NaN.")
    return weights.detach()
