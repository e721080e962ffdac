"""Counts of real decoding, and intervals for ratios: sums first, ratios last."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any

import torch

_NUM_RESAMPLES = 2000
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
        """Count one target call: tokens proposed, accepted, and added (None: the accepted and one of the target's own).

        A `ValueError` if they contradict each other.
        """
        accepted = num_accepted_draft_tokens
        if num_tokens is None:
            num_tokens = accepted + 1
        if not 0 <= accepted <= num_draft_tokens or not accepted <= num_tokens <= accepted + 1:
            raise ValueError(
                f"A call adds the tokens that it accepts and at most one more, got {num_draft_tokens} drafted, "
                f"{accepted} accepted and {num_tokens} added tokens."
            )
        self.num_spec_steps += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_draft_tokens += accepted
        self.num_tokens += num_tokens
        self.acceptance_histogram += [0] * (accepted + 1 - len(self.acceptance_histogram))
        self.acceptance_histogram[accepted] += 1

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

    def interval(self, shape: str) -> str:
        """Return the interval in words, such as `" [{:.2f}, {:.2f}]"` says them; nothing where there is none."""
        return "" if self.low is None or self.high is None else shape.format(self.low, self.high)

    def leaves_open(self, value: float) -> bool:
        """Return whether less and more than `value` are both possible; without an interval everything is."""
        return self.low is None or self.high is None or self.low <= value <= self.high

    def lies_apart(self, other: "Estimate") -> bool:
        """Return whether the intervals of two estimates do not meet; not where one of them has none."""
        ends = (self.low, self.high, other.low, other.high)
        return None not in ends and (self.low > other.high or other.low > self.high)  # type: ignore[operator]


Column = Sequence[float] | torch.Tensor


def bootstrap_ratio(numerators: Column, denominators: Column, *, confidence: float = 0.95) -> Estimate:
    """Return Σ numerators ÷ Σ denominators with a percentile bootstrap interval over texts, the same for equal texts.

    Args:
        numerators: One per text, `[B]`, e.g. tokens.
        denominators: One per text, `[B]`, e.g. target calls. A text whose denominator is 0 is left out.
        confidence: Coverage of the interval. There is none for a single text.

    Raises:
        ValueError: If the columns differ in length, hold NaN or infinity, or no text is left.
    """
    return _bootstrap(lambda sums: sums[0] / sums[1], (numerators, denominators), confidence)


def bootstrap_paired_ratio_difference(
    numerators: Column, denominators: Column, baseline_numerators: Column, baseline_denominators: Column
) -> Estimate:
    """Return the ratio minus the baseline's ratio on the same texts, `[B]` each, with a paired 95% bootstrap interval.

    Each resample draws texts once for both, so what makes a text hard for both cancels out. Errors as in
    `bootstrap_ratio`.
    """
    columns = (numerators, denominators, baseline_numerators, baseline_denominators)
    return _bootstrap(lambda sums: sums[0] / sums[1] - sums[2] / sums[3], columns)


def bootstrap_paired_ratio_quotient(
    numerators: Column, denominators: Column, baseline_numerators: Column, baseline_denominators: Column
) -> Estimate:
    """Return the ratio divided by the baseline's, as in `bootstrap_paired_ratio_difference`.

    The measured speed-up: tokens and seconds of assisted decoding, then tokens and seconds of plain decoding.
    """
    columns = (numerators, denominators, baseline_numerators, baseline_denominators)
    return _bootstrap(lambda sums: (sums[0] / sums[1]) / (sums[2] / sums[3]), columns)


def _bootstrap(
    statistic: Callable[[torch.Tensor], torch.Tensor], columns: Sequence[Column], confidence: float = 0.95
) -> Estimate:
    """Return the statistic of the columns' sums `[C]`, and its percentile interval over resampled texts."""
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
    generator = torch.Generator().manual_seed(0)
    resampled = []
    at_once = max(1, _MAX_RESAMPLED // num_texts)
    for start in range(0, _NUM_RESAMPLES, at_once):
        drawn = torch.randint(num_texts, (min(at_once, _NUM_RESAMPLES - start), num_texts), generator=generator)
        resampled.append(statistic(torch.stack([row[drawn].sum(dim=1) for row in texts])))
    tail = (1 - confidence) / 2
    low, high = torch.cat(resampled).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(value, low, high)
