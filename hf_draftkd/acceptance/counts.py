"""Counts of real decoding, and intervals for ratios: sums first, ratios last."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any

import torch

from hf_draftkd.utils.checks import whole_number

# Resampled texts held at once; bounds the memory of a bootstrap over many texts.
_MAX_RESAMPLED = 2**22


@dataclass
class AcceptanceCounts:
    """What speculative decoding did, under vLLM's names. Add two of them with `+`.

    Args:
        num_spec_steps: Target calls that verified a draft (blocks).
        num_draft_tokens: Tokens the draft proposed.
        num_accepted_draft_tokens: Proposed tokens the target accepted.
        num_tokens: Tokens those calls added to the output, the target's own included. Where no text ends inside a
            block this is `num_accepted_draft_tokens + num_spec_steps`.
        acceptance_histogram: At index k, the number of calls in which exactly k drafted tokens were accepted.
    """

    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    num_tokens: int = 0
    acceptance_histogram: list[int] = field(default_factory=list)

    def record(self, num_draft_tokens: int, num_accepted_draft_tokens: int, num_tokens: int | None = None) -> None:
        """Count one target call.

        Args:
            num_draft_tokens: Tokens proposed to it.
            num_accepted_draft_tokens: Of these, how many it accepted.
            num_tokens: Tokens added to the output. None: the accepted ones and one of the target's own.

        Raises:
            ValueError: If the counts contradict each other.
        """
        if num_tokens is None:
            num_tokens = num_accepted_draft_tokens + 1
        accepted = num_accepted_draft_tokens
        if not 0 <= accepted <= num_draft_tokens or not accepted <= num_tokens <= accepted + 1:
            raise ValueError(
                f"A call adds the tokens that it accepts and at most one more, got {num_draft_tokens} drafted, "
                f"{accepted} accepted and {num_tokens} added tokens."
            )
        self.num_spec_steps += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_draft_tokens += num_accepted_draft_tokens
        self.num_tokens += num_tokens
        missing = num_accepted_draft_tokens + 1 - len(self.acceptance_histogram)
        self.acceptance_histogram.extend([0] * missing)
        self.acceptance_histogram[num_accepted_draft_tokens] += 1

    def __add__(self, other: "AcceptanceCounts") -> "AcceptanceCounts":
        """Return the counts of both together."""
        if not isinstance(other, AcceptanceCounts):
            return NotImplemented
        histograms = zip_longest(self.acceptance_histogram, other.acceptance_histogram, fillvalue=0)
        return AcceptanceCounts(
            num_spec_steps=self.num_spec_steps + other.num_spec_steps,
            num_draft_tokens=self.num_draft_tokens + other.num_draft_tokens,
            num_accepted_draft_tokens=self.num_accepted_draft_tokens + other.num_accepted_draft_tokens,
            num_tokens=self.num_tokens + other.num_tokens,
            acceptance_histogram=[mine + theirs for mine, theirs in histograms],
        )

    def __radd__(self, other: object) -> "AcceptanceCounts":
        """Let `sum(counts)` work, which starts from 0."""
        return self + AcceptanceCounts() if other == 0 else NotImplemented

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per target call, the target's own included; NaN without calls.

        vLLM computes 1 + accepted ÷ calls, which counts a token more wherever the end of a text cuts a block off.
        """
        return self.num_tokens / self.num_spec_steps if self.num_spec_steps else float("nan")

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted ÷ drafted tokens; NaN where nothing was drafted."""
        return self.num_accepted_draft_tokens / self.num_draft_tokens if self.num_draft_tokens else float("nan")

    @property
    def acceptance_by_position(self) -> list[float]:
        """At index k − 1, the share of calls whose k-th drafted token was accepted (vLLM's acceptance per position)."""
        return [
            sum(self.acceptance_histogram[k:]) / self.num_spec_steps for k in range(1, len(self.acceptance_histogram))
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return counts and ratios as a JSON-ready dict; a ratio of nothing is absent."""
        counts = asdict(self)
        if self.num_spec_steps:
            counts["mean_acceptance_length"] = self.mean_acceptance_length
        if self.num_draft_tokens:
            counts["draft_acceptance_rate"] = self.draft_acceptance_rate
        return counts


@dataclass(frozen=True)
class Estimate:
    """A metric and its interval. `low` and `high` are None where a single text gives no interval."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, float]:
        """Return `{"value": ..., "low": ..., "high": ...}`; an unknown bound is absent."""
        return {name: number for name, number in asdict(self).items() if number is not None}


Column = Sequence[float] | torch.Tensor


def bootstrap_ratio(
    numerators: Column, denominators: Column, *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Return Σ numerators ÷ Σ denominators with a percentile bootstrap interval over texts.

    Args:
        numerators: One per text, `[B]`, e.g. tokens.
        denominators: One per text, `[B]`, e.g. target calls. A text whose denominator is 0 is left out.
        confidence: Coverage of the interval.
        num_resamples: Bootstrap resamples.
        seed: Equal seeds give equal intervals.

    Returns:
        The ratio and its interval; no interval for a single text.

    Raises:
        ValueError: If the columns differ in length, hold NaN or infinity, or no text is left.
    """
    return _bootstrap(_ratio, (numerators, denominators), confidence, num_resamples, seed)


def bootstrap_paired_ratio_difference(
    numerators: Column, denominators: Column, baseline_numerators: Column, baseline_denominators: Column
) -> Estimate:
    """Return the ratio minus the baseline's ratio on the same texts, with a paired 95% bootstrap interval.

    Each resample draws texts once for both, so what makes a text hard for both cancels out.

    Args:
        numerators: One per text, `[B]`.
        denominators: One per text, `[B]`.
        baseline_numerators: The baseline's, for the same texts in the same order, `[B]`.
        baseline_denominators: As above.

    Raises:
        ValueError: As in `bootstrap_ratio`.
    """
    columns = (numerators, denominators, baseline_numerators, baseline_denominators)
    return _bootstrap(lambda sums: _ratio(sums[:2]) - _ratio(sums[2:]), columns)


def bootstrap_paired_ratio_quotient(
    numerators: Column, denominators: Column, baseline_numerators: Column, baseline_denominators: Column
) -> Estimate:
    """Return the ratio divided by the baseline's ratio on the same texts, with a paired 95% bootstrap interval.

    The measured speed-up: tokens and seconds of assisted decoding, then tokens and seconds of plain decoding.
    Arguments and errors as in `bootstrap_paired_ratio_difference`.
    """
    columns = (numerators, denominators, baseline_numerators, baseline_denominators)
    return _bootstrap(lambda sums: _ratio(sums[:2]) / _ratio(sums[2:]), columns)


def _ratio(sums: torch.Tensor) -> torch.Tensor:
    return sums[0] / sums[1]


def _bootstrap(
    statistic: Callable[[torch.Tensor], torch.Tensor],
    columns: Sequence[Column],
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Return the statistic of the columns' sums `[C]`, and its percentile interval over resampled texts."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence!r}.")
    whole_number("num_resamples", num_resamples)
    rows = [torch.as_tensor(column, dtype=torch.float64, device="cpu").flatten() for column in columns]
    lengths = [len(row) for row in rows]
    if len(set(lengths)) > 1:
        raise ValueError(f"Numerators and denominators must belong to the same texts, got {lengths} of them.")
    texts = torch.stack(rows)
    if not texts.isfinite().all():
        raise ValueError("Numerators and denominators must be finite; they hold NaN or infinity.")
    # Denominators stand at the odd places.
    texts = texts[:, (texts[1::2] > 0).all(dim=0)]
    num_texts = texts.shape[1]
    if num_texts == 0:
        raise ValueError("There is no text with a positive denominator, so there is nothing to estimate.")
    value = float(statistic(texts.sum(dim=1)))
    if num_texts == 1:
        return Estimate(value)
    generator = torch.Generator().manual_seed(seed)
    resampled = []
    at_once = max(1, _MAX_RESAMPLED // num_texts)
    for start in range(0, num_resamples, at_once):
        count = min(at_once, num_resamples - start)
        drawn = torch.randint(num_texts, (count, num_texts), generator=generator)
        resampled.append(statistic(torch.stack([row[drawn].sum(dim=1) for row in texts])))
    tail = (1 - confidence) / 2
    low, high = torch.cat(resampled).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(value, low, high)
