"""The training objective: temperature, mixing, token weights, masking, normalising, a chunk of positions at a time.

`distillation_loss` is what the trainer calls. It takes the draft as logits or as hidden states with their head, the
target in whichever form is at hand, and labels; it returns one scalar to call `backward()` on, and numbers per token
to log.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from hf_draftkd.acceptance.tensors import check_same_shape
from hf_draftkd.losses.chunked import (
    Unprojected,
    blocks_within,
    chunked_loss,
    chunks_of,
    logits_of,
    positions_of,
    prepared,
)
from hf_draftkd.losses.divergences import check_divergence
from hf_draftkd.losses.gradients import (
    Divergence,
    Reused,
    Rewards,
    Twin,
    collect_rewards,
    cross_entropy,
    finish_rewards,
)
from hf_draftkd.losses.sparse import (
    SampledTarget,
    SparseTarget,
    check_sampled,
    merge_for_gradient,
    sparse_value_and_gradient,
    target_buckets,
)
from hf_draftkd.losses.vocabulary import head_cut_to_list, listed_value_and_gradient, masked
from hf_draftkd.utils.checks import in_range

Target = torch.Tensor | Unprojected | SparseTarget | SampledTarget


class DistillationLoss(NamedTuple):
    """The objective's value, and what to log beside it: add the sums up over steps and processes, divide last."""

    loss: torch.Tensor
    """Scalar; call `backward()` on it."""
    num_tokens: int
    """Completion tokens of this batch on this process."""
    token_losses: torch.Tensor
    """`[N]`, without gradient: each completion token's mixed loss, before token weights."""
    acceptance: torch.Tensor | None
    """`[N]`, without gradient: α of each completion token at the loss temperature; from a sparse target an upper bound.
    None if it was not asked for, or the target gives none."""


def distillation_loss(
    draft: torch.Tensor | Unprojected,
    target: Target | None,
    tokens: torch.Tensor,
    *,
    divergence: Divergence = "forward_kl",
    options: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.0,
    token_weights: torch.Tensor | None = None,
    num_items: torch.Tensor | float | None = None,
    vocabulary: torch.Tensor | None = None,
    with_acceptance: bool = False,
) -> DistillationLoss:
    """Return Σ weight · [(1 − w) · divergence + w · cross-entropy] ÷ number of completion tokens, from N of them.

    Draft and target are compared over one vocabulary: cut padded rows off first (`LinearHead.first`). No factor of
    temperature² is applied.

    Args:
        draft: Logits `[N, V]`, or `Unprojected` hidden states `[N, H]` with their head: then no `[tokens, vocabulary]`
            tensor exists beyond a chunk.
        target: The same for the target, or its `SparseTarget` or `SampledTarget`; `None` with
            `divergence="cross_entropy"`.
        tokens: `[N]`, the token that each position's logits predict, the next one.
        divergence: A key of `DIVERGENCES`, or a function `f(draft_logits [n, V], target_logits [n, V], **options) ->
            [n]` without state across positions; its gradient is then taken by autograd, a chunk at a time.
        options: The divergence's options, e.g. `{"beta": 0.5}`.
        temperature: Divides both models' logits in the divergence. Cross-entropy always stands at temperature 1. A
            sparse or sampled target must have been made at this temperature.
        cross_entropy_weight: w in [0, 1].
        token_weights: `[N]`, each token's weight. They scale the sum, not the divisor.
        num_items: Completion tokens of the whole accumulation window on all processes. None: those of this batch.
        vocabulary: `[n]` ids that the draft may propose: q is masked to them and renormalised, p is not, and what is
            infinite whatever the draft says is left out (see `vocabulary.py`). None for all. From hidden states, and a
            target that is not dense, only these logits are computed.
        with_acceptance: Whether to return acceptance rates, which costs little more.

    Returns:
        The loss, and what to log. A batch without completion tokens gives a finite 0 with its gradient path.

    Raises:
        ValueError: If arguments are out of range, do not fit each other, or a target is missing.
    """
    options = dict(options or {})
    _check_settings(divergence, options, temperature, cross_entropy_weight, target)
    if vocabulary is not None and isinstance(draft, Unprojected) and not isinstance(target, torch.Tensor | Unprojected):
        kept = 0 if target is None else target.token_ids.shape[-1]
        draft, vocabulary, column = head_cut_to_list(draft, vocabulary, kept)
        tokens = column[tokens]
        target = None if target is None else replace(target, token_ids=column[target.token_ids])
    signal: Any = prepared(target) if isinstance(target, torch.Tensor | Unprojected) else target
    weights = _position_weights(tokens, token_weights, num_items, positions_of(draft))
    outside = None if vocabulary is None else _outside(vocabulary, draft)
    rewards = None
    if divergence == "tvd_plus_plus" and options.get("statistics", "batch") == "batch":
        rewards = _batch_rewards(draft, signal, temperature, options, outside)

    memory = Reused()

    def score_chunk(rows: slice, logits: torch.Tensor, gradient: bool) -> Twin:
        """Score one chunk block by block; the gradient takes the logits' place."""
        dense = None
        if isinstance(signal, torch.Tensor | Unprojected):
            dense = _target_logits(signal, rows, logits, temperature, memory)
        twins = []
        for block in blocks_within(logits):
            here = slice(rows.start + block.start, rows.start + block.stop)
            twin = score_block(here, logits[block], None if dense is None else dense[block], gradient)
            if twin.gradient is not None and twin.gradient.data_ptr() != logits[block].data_ptr():
                logits[block].copy_(twin.gradient)
            twins.append(twin)
        rates = [twin.acceptance for twin in twins if twin.acceptance is not None]
        return Twin(
            torch.cat([twin.values for twin in twins]),
            logits if gradient else None,
            torch.cat(rates) if rates else None,
        )

    def score_block(rows: slice, logits: torch.Tensor, dense: torch.Tensor | None, gradient: bool) -> Twin:
        on_text = None
        masked(logits, outside)
        if signal is None or cross_entropy_weight > 0:
            # Before the logits are tempered and overwritten.
            on_text = cross_entropy(logits, tokens[rows], gradient, memory)
            if outside is not None:
                on_text = _left_out(on_text, outside[tokens[rows]])
            if signal is None:
                return on_text
        if temperature != 1:
            logits.div_(temperature)
        here = options if rewards is None else options | {"rewards": rewards.at(rows)}
        how: dict[str, Any] = {"options": here, "gradient": gradient, "acceptance": with_acceptance, "memory": memory}
        if dense is not None:
            twin = listed_value_and_gradient(divergence, logits, dense, outside, **how)
        else:
            twin = sparse_value_and_gradient(divergence, logits, signal[rows], outside, **how)
        if temperature != 1 and twin.gradient is not None:
            twin.gradient.div_(temperature)
        return twin if on_text is None else _mix(twin, on_text, cross_entropy_weight)

    loss, values, acceptance = chunked_loss(draft, score_chunk, weights)
    return DistillationLoss(loss, tokens.numel(), values, acceptance)


def _check_settings(
    divergence: Divergence, options: dict[str, Any], temperature: float, weight: float, target: Target | None
) -> None:
    in_range("temperature", temperature, 0, open_low=True)
    in_range("cross_entropy_weight", weight, 0, 1)
    if not isinstance(divergence, str):
        if target is None:
            raise ValueError("A divergence compares two distributions, but target is None.")
        return
    check_divergence(divergence, options)
    if divergence == "cross_entropy":
        if target is not None:
            raise ValueError(
                "divergence='cross_entropy' learns from text alone, so its target must be None; to add cross-entropy "
                "to another divergence, set cross_entropy_weight."
            )
        if temperature != 1:
            raise ValueError(f"Cross-entropy always stands at temperature 1, got temperature={temperature!r}.")
    elif target is None:
        raise ValueError(
            f"divergence={divergence!r} compares the draft with the target's distribution, but target is None. Give "
            "the target's logits or its cached distribution, or choose divergence='cross_entropy'."
        )
    if isinstance(target, SampledTarget):
        check_sampled(divergence)


def _position_weights(
    tokens: torch.Tensor,
    token_weights: torch.Tensor | None,
    num_items: torch.Tensor | float | None,
    like: torch.Tensor,
) -> torch.Tensor:
    """Return what each completion token's loss is multiplied by, `[N]`: its weight ÷ the number of tokens."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if token_weights is None:
        weights = torch.ones(tokens.shape, dtype=dtype, device=like.device)
    else:
        weights = token_weights.detach().to(like.device, dtype)
    if num_items is None:
        return weights / max(tokens.numel(), 1)
    return weights / (num_items.to(like.device) if isinstance(num_items, torch.Tensor) else num_items)


def _target_logits(
    signal: torch.Tensor | Unprojected, rows: slice, logits: torch.Tensor, temperature: float, memory: Reused
) -> torch.Tensor:
    target_logits = logits_of(signal, rows, memory).to(logits)
    check_same_shape(logits, target_logits)
    return target_logits if temperature == 1 else target_logits.div_(temperature)


def _batch_rewards(
    draft: torch.Tensor | Unprojected,
    signal: Any,
    temperature: float,
    options: dict[str, Any],
    outside: torch.Tensor | None,
) -> Rewards:
    """Return the batch statistics of TVD++, from a pass before the first chunk is scored."""
    collected = []
    source, memory, target_memory = prepared(draft), Reused(), Reused()
    with torch.no_grad(), torch.autocast(positions_of(draft).device.type, enabled=False):
        for rows in chunks_of(draft):
            logits = logits_of(source, rows, memory)
            vocab_size = logits.shape[-1]
            if temperature != 1:
                logits.div_(temperature)
            masked(logits, outside)
            if isinstance(signal, SparseTarget):
                logits, _ = merge_for_gradient(logits, signal.token_ids[rows], memory)
                against = target_buckets(signal[rows], vocab_size).to(logits)
            else:
                against = _target_logits(signal, rows, logits, temperature, target_memory)
            collected.append(collect_rewards(logits, against, options.get("estimator", "sampled")))
    if not collected:
        collected.append((positions_of(draft).new_zeros(0, dtype=torch.float32), None))
    return finish_rewards(collected, options.get("eps", 1e-6))


def _outside(vocabulary: torch.Tensor, draft: torch.Tensor | Unprojected) -> torch.Tensor:
    """Bool `[V]`: the tokens that are not on the list."""
    vocab_size = draft.head.weight.shape[0] if isinstance(draft, Unprojected) else draft.shape[-1]
    outside = torch.ones(vocab_size, dtype=torch.bool, device=positions_of(draft).device)
    outside[vocabulary] = False
    return outside


def _left_out(twin: Twin, outside: torch.Tensor) -> Twin:
    """The same with 0 at the positions `[n]` whose token the draft cannot propose."""
    slope = twin.gradient
    if slope is not None:
        slope.masked_fill_(outside.unsqueeze(-1), 0.0)
    return Twin(twin.values.masked_fill(outside, 0.0), slope, twin.acceptance)


def _mix(distance: Twin, on_text: Twin, weight: float) -> Twin:
    """Return (1 − w) · divergence + w · cross-entropy."""
    values = (1 - weight) * distance.values + weight * on_text.values
    slope = distance.gradient
    if slope is not None and on_text.gradient is not None:
        slope.mul_(1 - weight).add_(on_text.gradient, alpha=weight)
    return Twin(values, slope, distance.acceptance)
