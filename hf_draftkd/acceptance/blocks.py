"""Tokens per target call, exactly, for every draft length, from one pass over a text.

The input is always a_t, the probability that the text's token t was an accepted draft token
(`hf_draftkd.acceptance.accepted_given_output`). A block takes up to γ accepted tokens and ends with one token of the
target's own: the correction of the first rejected token, or the bonus token after γ acceptances. A block that the end
of the text cuts off ends there. The number of target calls is the number of blocks.

Inside a block, let c_j(t) be the probability that position t stands at offset j: offsets 0 … γ−1 are drafted, offset γ
is the bonus token. A drafted token is accepted with a_t (the next position stands at offset j + 1) or rejected (the
next position starts a block), and a block always starts after the bonus. So S_t = c_0(t), the probability that a block
starts at t, follows from one sweep over the text, and the expected number of target calls is Σ_t S_t.

A parallel draft predicts a token otherwise at each offset: its a_t is one number for each offset 0 … K−1, and the rest
is the same.
"""

from collections.abc import Iterator, Sequence

import torch

from hf_draftkd.acceptance.tensors import widest_float
from hf_draftkd.utils.checks import whole_number

DRAFT_LENGTHS: tuple[int, ...] = tuple(range(1, 17))
"""The draft lengths of a report, γ = 1 … 16."""


def expected_target_calls(
    accepted: torch.Tensor, draft_lengths: Sequence[int] = DRAFT_LENGTHS, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return how many target calls speculative decoding needs for each text, in expectation; one sweep for all γ.

    Args:
        accepted: a_t `[B, T]`, probabilities; of a parallel draft `[B, T, K]`, by the offset k of a token in its block.
        draft_lengths: G draft lengths γ, each ≥ 1; of a parallel draft K at most.
        mask: Bool `[B, T]`, True on the text's tokens; padding may only follow them. None: all are tokens.

    Returns:
        Expected calls `[B, G]`, float64 (float32 on MPS, which lacks float64); 0 for a text without tokens.

    Raises:
        ValueError: If shapes do not fit, a_t is not a probability, the mask has gaps, or a draft length is below 1.
    """
    accepted, mask = _check(accepted, draft_lengths, mask)
    calls = accepted.new_zeros(accepted.shape[0], len(draft_lengths))
    for t, offsets in enumerate(_sweep(accepted, draft_lengths)):
        calls += offsets[..., 0] * mask[:, t, None]
    return calls


def block_efficiency(accepted: torch.Tensor, num_assistant_tokens: int, mask: torch.Tensor | None = None) -> float:
    """Return τ, the expected tokens per target call over all texts, the target's own token included: 1 ≤ τ ≤ γ + 1.

    A ratio of sums: tokens of all texts ÷ expected calls of all texts. To put an interval beside it, bootstrap over
    texts with `bootstrap_ratio(num_tokens, expected_target_calls(...))`. a_t, γ and mask as in `expected_target_calls`.

    Raises:
        ValueError: As in `expected_target_calls`, and if there is no token at all.
    """
    return block_efficiency_by_length(accepted, (num_assistant_tokens,), mask)[num_assistant_tokens]


def block_efficiency_by_length(
    accepted: torch.Tensor, draft_lengths: Sequence[int] = DRAFT_LENGTHS, mask: torch.Tensor | None = None
) -> dict[int, float]:
    """Return block efficiency τ by draft length γ, in one sweep. Arguments and errors as in `block_efficiency`."""
    calls = expected_target_calls(accepted, draft_lengths, mask).sum(dim=0).tolist()
    num_tokens = accepted.shape[0] * accepted.shape[1] if mask is None else int(mask.sum())
    if num_tokens == 0:
        raise ValueError("Block efficiency needs at least one token, but every text is empty.")
    return {length: num_tokens / total for length, total in zip(draft_lengths, calls, strict=True)}


def acceptance_by_position(
    accepted: torch.Tensor, num_assistant_tokens: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return, for each text, in how many blocks the k-th drafted token is accepted, in expectation; one sweep.

    Added up over texts and divided by the target calls of all of them (`expected_target_calls`), this is vLLM's
    acceptance per position. Drafted tokens that would stand beyond the end of the text are not counted. Arguments and
    errors as in `block_efficiency`.

    Returns:
        Expected blocks `[B, γ]`, of the type of `expected_target_calls`.
    """
    lengths = (num_assistant_tokens,)
    accepted, mask = _check(accepted, lengths, mask)
    kept = accepted.new_zeros(accepted.shape[0], num_assistant_tokens)
    for t, offsets in enumerate(_sweep(accepted, lengths)):
        kept += offsets[:, 0, :-1] * mask[:, t, None] * _rates(accepted, t, num_assistant_tokens)
    return kept


def _sweep(accepted: torch.Tensor, draft_lengths: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yield c(t) `[B, G, max γ + 1]` for t = 0 … T−1: where in its block position t stands."""
    longest = max(draft_lengths)
    lengths = torch.tensor(draft_lengths, device=accepted.device)
    is_drafted = torch.arange(longest, device=accepted.device) < lengths.unsqueeze(1)
    offsets = accepted.new_zeros(accepted.shape[0], len(draft_lengths), longest + 1)
    offsets[..., 0] = 1.0
    for t in range(accepted.shape[1]):
        yield offsets
        following = torch.zeros_like(offsets)
        following[..., 1:] = offsets[..., :-1] * _rates(accepted, t, longest)[:, None] * is_drafted
        # What is not continued starts a block: after a rejection or a bonus token.
        following[..., 0] = 1.0 - following[..., 1:].sum(dim=-1)
        offsets = following


def _rates(accepted: torch.Tensor, t: int, longest: int) -> torch.Tensor:
    """a_t `[B, 1]`, or at each of the offsets that occur `[B, γ]`."""
    return accepted[:, t, None] if accepted.ndim == 2 else accepted[:, t, :longest]


def _check(
    accepted: torch.Tensor, draft_lengths: Sequence[int], mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if not draft_lengths:
        raise ValueError("draft_lengths is empty; name at least one draft length.")
    for length in draft_lengths:
        whole_number("num_assistant_tokens", length)
    if accepted.ndim not in (2, 3):
        raise ValueError(
            f"accepted must have shape [texts, tokens], got {tuple(accepted.shape)}. A single text is one row: "
            "accepted.unsqueeze(0)."
        )
    if accepted.ndim == 3 and accepted.shape[2] < max(draft_lengths):
        raise ValueError(f"accepted has {accepted.shape[2]} depths, but {max(draft_lengths)} tokens are to be drafted.")
    if mask is None:
        mask = torch.ones(accepted.shape[:2], dtype=torch.bool, device=accepted.device)
    elif mask.shape != accepted.shape[:2]:
        raise ValueError(f"mask {tuple(mask.shape)} must have the shape of accepted {tuple(accepted.shape)}.")
    mask = mask.bool()
    gaps = (mask[:, 1:] & ~mask[:, :-1]).any(dim=-1)
    if gaps.any():
        raise ValueError(
            f"Row {int(gaps.int().argmax())} of the mask has padding before or between tokens. A text must be one run "
            "of tokens from the left, padded on the right: blocks run over neighbouring positions."
        )
    accepted = accepted.detach().to(widest_float(accepted.device))
    accepted = accepted.masked_fill(~(mask if accepted.ndim == 2 else mask[..., None]), 0.0)
    if not ((accepted >= 0) & (accepted <= 1)).all():
        raise ValueError("accepted must hold probabilities in [0, 1]; it holds NaN or values outside.")
    return accepted, mask
