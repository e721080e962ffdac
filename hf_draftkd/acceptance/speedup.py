"""From tokens per target call to time: what a draft is worth on a given machine.

τ is block efficiency (tokens per target call, bonus token included), γ the draft length, α the acceptance rate of one
token. Times are seconds, measured on the machine in question.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from hf_draftkd.acceptance.blocks import DRAFT_LENGTHS
from hf_draftkd.utils.checks import in_range, whole_number


@dataclass(frozen=True)
class Latency:
    """Measured step times of a target and a draft, in seconds.

    Args:
        target_step_seconds: One forward pass of the target over one new token.
        draft_step_seconds: One forward pass of the draft over one new token.
        verify_seconds: One forward pass of the target over n new tokens, by n. Verifying a draft of γ tokens reads
            n = γ + 1. Between measured n it is interpolated linearly; outside them it is refused. Empty: a pass takes
            `target_step_seconds` at any n, which is the memory-bound idealisation.
        draft_pass_seconds: For a parallel draft: the one pass in which it drafts γ tokens, by γ. Empty: γ steps.

    Raises:
        ValueError: If a time is not a positive finite number.
    """

    target_step_seconds: float
    draft_step_seconds: float
    verify_seconds: Mapping[int, float] = field(default_factory=dict)
    draft_pass_seconds: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse times that are not possible."""
        for name, times in vars(self).items():
            for length, seconds in times.items() if isinstance(times, Mapping) else [("", times)]:
                in_range(f"{name}[{length}]" if length else name, seconds, 0, open_low=True)

    @property
    def relative_cost(self) -> float:
        """Draft step time ÷ target step time."""
        return self.draft_step_seconds / self.target_step_seconds

    def verify(self, num_tokens: int) -> float:
        """Return the seconds of one target pass over `num_tokens` new tokens (γ + 1), measured or interpolated.

        Raises:
            ValueError: If it lies outside what was measured.
        """
        if not self.verify_seconds:
            return self.target_step_seconds
        lengths = sorted(self.verify_seconds)
        if not lengths[0] <= num_tokens <= lengths[-1]:
            raise ValueError(
                f"Verification was timed for {lengths[0]} to {lengths[-1]} tokens, so nothing is known about "
                f"{num_tokens}. Time that length too, or ask for draft lengths from {lengths[0] - 1} to "
                f"{lengths[-1] - 1}."
            )
        above = lengths[bisect_left(lengths, num_tokens)]
        below = max((length for length in lengths if length < num_tokens), default=above)
        share = 1.0 if above == num_tokens else (num_tokens - below) / (above - below)
        return (1 - share) * self.verify_seconds[below] + share * self.verify_seconds[above]

    def block_seconds(self, num_assistant_tokens: int) -> float:
        """Return the seconds of one block: γ = `num_assistant_tokens` draft steps, or the one pass of a parallel draft,
        and verification of γ + 1 tokens.

        Raises:
            ValueError: If the pass was not timed at γ, or as in `verify`.
        """
        whole_number("num_assistant_tokens", num_assistant_tokens)
        drafting = num_assistant_tokens * self.draft_step_seconds
        if self.draft_pass_seconds:
            if num_assistant_tokens not in self.draft_pass_seconds:
                raise ValueError(
                    f"The draft's pass was timed for {sorted(self.draft_pass_seconds)} tokens, so nothing is known "
                    f"about {num_assistant_tokens}. Time that length too, or ask for these draft lengths."
                )
            drafting = self.draft_pass_seconds[num_assistant_tokens]
        return drafting + self.verify(num_assistant_tokens + 1)


class DraftLength(NamedTuple):
    """A draft length and the speed-up it is predicted to give."""

    num_assistant_tokens: int
    predicted_speedup: float


def mbsu(block_efficiency: float, num_assistant_tokens: int, *, parameter_ratio: float) -> float:
    """Return the memory-bound speed-up τ/(cγ + 1): the speed-up if time were proportional to parameters read.

    `parameter_ratio` is c, draft parameters ÷ target parameters. A `ValueError` if an argument is out of its range.
    Source: Direct Alignment of Draft Model for Speculative Decoding, https://arxiv.org/abs/2403.00858.
    """
    _check_efficiency(block_efficiency, num_assistant_tokens)
    in_range("parameter_ratio", parameter_ratio, 0, open_low=True)
    return block_efficiency / (parameter_ratio * num_assistant_tokens + 1)


def expected_block_efficiency(acceptance_rate: float, num_assistant_tokens: int) -> float:
    """Return τ in [1, γ + 1] if every token were accepted independently with the same α: (1 − α^(γ+1))/(1 − α).

    Source: Fast Inference from Transformers via Speculative Decoding, equation 1, https://arxiv.org/abs/2211.17192.

    Raises:
        ValueError: If α is outside [0, 1], or γ below 1.
    """
    whole_number("num_assistant_tokens", num_assistant_tokens)
    in_range("acceptance_rate", acceptance_rate, 0, 1)
    # The sum rather than the quotient: exact at α = 1 and without cancellation near it.
    return sum(acceptance_rate**accepted for accepted in range(num_assistant_tokens + 1))


def predicted_speedup(block_efficiency: float, num_assistant_tokens: int, latency: Latency) -> float:
    """Return the predicted speed-up over plain decoding, τ·t_target ÷ (γ·t_draft + t_verify(γ + 1)).

    A `ValueError` if τ is impossible at γ, or γ was not timed.
    """
    _check_efficiency(block_efficiency, num_assistant_tokens)
    return block_efficiency * latency.target_step_seconds / latency.block_seconds(num_assistant_tokens)


def best_draft_length(block_efficiency: Mapping[int, float], latency: Latency) -> DraftLength:
    """Return the draft length with the highest predicted speed-up, even if that is below 1; of equal ones the shortest.

    `block_efficiency` is τ by γ, as from `block_efficiency_by_length`.

    Raises:
        ValueError: If no draft length is given, or as in `predicted_speedup`.
    """
    if not block_efficiency:
        raise ValueError("block_efficiency is empty; give τ for at least one draft length.")
    speedups = {length: predicted_speedup(block_efficiency[length], length, latency) for length in block_efficiency}
    best = max(sorted(speedups), key=lambda length: speedups[length])
    return DraftLength(best, speedups[best])


def break_even_acceptance_rate(latency: Latency, draft_lengths: Iterable[int] = DRAFT_LENGTHS) -> float | None:
    """Return the acceptance rate α at which the best draft length neither gains nor loses time.

    τ is taken from `expected_block_efficiency`. On this machine a draft pays if its tokens are accepted more often: 0.0
    if a block costs no more than one plain step, None if no draft pays at any of `draft_lengths`, not even one whose
    tokens are all accepted.

    Raises:
        ValueError: If no draft length is given, or one that was not timed.
    """
    lengths = list(draft_lengths)
    if not lengths:
        raise ValueError("draft_lengths is empty; name at least one draft length.")
    costs = {length: latency.block_seconds(length) / latency.target_step_seconds for length in lengths}
    rates = [_solve_acceptance_rate(cost, length) for length, cost in costs.items()]
    # τ rises with α at every length, so the first length to break even decides.
    return min((rate for rate in rates if rate is not None), default=None)


def _solve_acceptance_rate(block_efficiency: float, num_assistant_tokens: int) -> float | None:
    """Return the α that gives this τ, by bisection; None where even α = 1 gives less."""
    if block_efficiency > num_assistant_tokens + 1:
        return None
    if block_efficiency <= 1:
        return 0.0
    low, high = 0.0, 1.0
    # After 60 halvings nothing is left to halve in float64.
    for _ in range(60):
        middle = (low + high) / 2
        if expected_block_efficiency(middle, num_assistant_tokens) < block_efficiency:
            low = middle
        else:
            high = middle
    return high


def _check_efficiency(block_efficiency: float, num_assistant_tokens: int) -> None:
    whole_number("num_assistant_tokens", num_assistant_tokens)
    # Sums of probabilities carry rounding.
    if not 1 - 1e-9 <= block_efficiency <= (num_assistant_tokens + 1) * (1 + 1e-9):
        raise ValueError(
            f"block_efficiency must lie in [1, {num_assistant_tokens + 1}] when {num_assistant_tokens} tokens are "
            f"drafted, got {block_efficiency!r}. It counts the target's own token of each call."
        )
