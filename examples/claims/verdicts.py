"""From stored results to verdicts, by rules that are the same for every claim.

A comparison takes two arms on the same prompts. Prompts and seeds are resampled together for both arms (2,000 times,
95% percentile interval), counts are added up and divided once. `RULES` says what follows from the interval.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RULES = """\
- The interval lies above 0 in the claimed direction, and reaches the smallest effect that the paper reports:
  **reproduced**; "larger" is added where it lies wholly beyond the paper's own range.
- It lies below 0: **refuted**.
- It lies wholly below the smallest effect that the paper reports: **refuted** as well, whether there is a smaller
  effect (above 0) or none that can be told from zero (0 lies within).
- Otherwise, where it contains 0: **undecided**. So is whatever has fewer than three seeds or 150 prompts.
- Where this pair does not meet what the claim supposes, as its script says: **not comparable**, with the reason."""
MIN_SEEDS, MIN_PROMPTS = 3, 150
_RESAMPLES = 2000

Result = Mapping[str, Any]
Arms = Mapping[str, Sequence[Result]]  # label -> the results of an arm, one for each seed


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval, and what it rests on."""

    value: float
    low: float
    high: float
    seeds: int
    prompts: int


@dataclass(frozen=True)
class Claimed:
    """The effect a paper reports: at least `smallest`, at most `largest`, in the unit of the comparison."""

    smallest: float = 0.0
    largest: float | None = None


@dataclass(frozen=True)
class Comparison:
    """One arm against another.

    Attributes:
        says: The claim in a few words.
        ours, theirs: Labels of arms.
        metric: `acceptance` (mean acceptance rate of the tokens), `block_efficiency` (tokens per target call), or
            `parallel_efficiency` (the same, of a parallel draft that drafts in one pass).
        gamma: Draft length of block efficiency.
        relative: Whether the effect is ours ÷ theirs − 1 instead of ours − theirs.
        claimed: The effect in the paper; its sign is that of ours − theirs, and negative where `falls`.
        falls: Whether the paper says that ours is lower.
        on: Which evaluation text.
    """

    says: str
    ours: str
    theirs: str
    metric: str = "acceptance"
    gamma: int = 5
    relative: bool = True
    claimed: Claimed = Claimed()
    falls: bool = False
    on: str = "test"


@dataclass(frozen=True)
class Finding:
    """What came of a claim, at one temperature where it was tried at several: `setting`."""

    says: str
    paper: str
    here: str
    verdict: str
    setting: str = ""


def columns(results: Sequence[Result], on: str, setting: str, metric: str, gamma: int) -> np.ndarray:
    """`[2, seeds, prompts]`: what is added up and divided, numerators first."""
    tables = [result["scores"][on][setting] for result in results]
    tokens = [table["tokens"] for table in tables]
    if metric == "acceptance":
        return np.array([[table["acceptance"] for table in tables], tokens], dtype=float)
    calls = "parallel_calls" if metric == "parallel_efficiency" else "calls"
    return np.array([tokens, [table[calls][str(gamma)] for table in tables]], dtype=float)


def ratio_of_sums(sums: np.ndarray) -> np.ndarray:
    """Numerators ÷ denominators, `[2, ...]` → `[...]`."""
    return sums[0] / sums[1]


def bootstrap(arms: Sequence[np.ndarray], statistic: Callable[..., np.ndarray], seed: int = 0) -> Estimate:
    """A statistic of the arms' sums with its interval over prompts and seeds, which all arms share.

    Args:
        arms: `[C, seeds, prompts]` each. An arm of one seed (a draft that was not trained) stands beside each seed of
            the others.
        statistic: From the sums of each arm, `[C, ...]`, to values `[...]`.
        seed: Of the resampling.
    """
    num_seeds = max(arm.shape[1] for arm in arms)
    if len({arm.shape[1] for arm in arms} - {1}) > 1 or len({arm.shape[2] for arm in arms}) > 1:
        raise ValueError(f"Arms must share seeds and prompts, got the shapes {[arm.shape[1:] for arm in arms]}.")
    whole = [np.repeat(arm, num_seeds, axis=1) if arm.shape[1] == 1 else arm for arm in arms]
    num_prompts = whole[0].shape[2]
    generator = np.random.default_rng(seed)
    of_prompts, of_seeds = (
        generator.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES).astype(float)
        for count in (num_prompts, num_seeds)
    )
    drawn = [np.einsum("rk,ckp,rp->cr", of_seeds, arm, of_prompts, optimize=True) for arm in whole]
    # Where nothing was accepted there is nothing to divide by: an interval of inf or nan decides nothing.
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.percentile(statistic(*drawn), [2.5, 97.5])
        value = statistic(*(arm.sum((1, 2)) for arm in whole))
    return Estimate(float(value), float(low), float(high), num_seeds, num_prompts)


def level(results: Sequence[Result], on: str, setting: str, metric: str, gamma: int = 5) -> Estimate:
    """An arm by itself."""
    return bootstrap([columns(results, on, setting, metric, gamma)], ratio_of_sums)


def common_seeds(*arms: Sequence[Result]) -> list[Sequence[Result]]:
    """The arms with as many seeds as all of them have; a draft that was not trained is the same for every seed."""
    fewest = min((len(results) for results in arms if results[0]["cell"]["what"]["epochs"]), default=1)
    return [results[:fewest] for results in arms]


def effect(comparison: Comparison, arms: Arms, setting: str) -> Estimate:
    """Ours against theirs."""
    chosen = common_seeds(arms[comparison.ours], arms[comparison.theirs])
    both = [columns(each, comparison.on, setting, comparison.metric, comparison.gamma) for each in chosen]
    if comparison.relative:
        return bootstrap(both, lambda ours, theirs: ratio_of_sums(ours) / ratio_of_sums(theirs) - 1)
    return bootstrap(both, lambda ours, theirs: ratio_of_sums(ours) - ratio_of_sums(theirs))


def verdict(found: Estimate, claimed: Claimed = Claimed(), *, falls: bool = False) -> str:
    """What follows from an interval, by `RULES`; `falls` turns the claimed direction round."""
    if found.seeds < MIN_SEEDS or found.prompts < MIN_PROMPTS:
        return f"undecided ({found.seeds} of {MIN_SEEDS} seeds, {found.prompts} prompts)"
    low, high = (-found.high, -found.low) if falls else (found.low, found.high)
    if low > 0:
        if high < claimed.smallest:
            return "refuted (a smaller effect)"
        return "reproduced, larger" if claimed.largest is not None and low > claimed.largest else "reproduced"
    if high < 0:
        return "refuted"
    return "refuted (no such effect)" if high < claimed.smallest else "undecided"


def in_words(found: Estimate, *, percent: bool, digits: int = 2) -> str:
    """`+3.1% [+2.0%, +4.2%]`, or the same in tokens."""
    shape = "{:+.1%}" if percent else f"{{:+.{digits}f}}"
    return "{} [{}, {}]".format(*(shape.format(each) for each in (found.value, found.low, found.high)))


def in_paper(comparison: Comparison) -> str:
    """What the paper reports, in the unit of the comparison."""
    smallest, largest = comparison.claimed.smallest, comparison.claimed.largest
    sign = "−" if comparison.falls else "+"
    if not smallest and largest is None:
        return "lower" if comparison.falls else "higher"
    shape = "{:.0%}" if comparison.relative else "{:.2f}"
    span = [shape.format(each) for each in (smallest, largest) if each is not None]
    return " to ".join(f"{sign}{each}" for each in dict.fromkeys(span))


def findings(comparisons: Sequence[Comparison], arms: Arms, settings: Sequence[str]) -> list[Finding]:
    """One for each comparison whose arms have results, at each temperature."""
    rows = []
    for comparison in comparisons:
        if not (arms.get(comparison.ours) and arms.get(comparison.theirs)):
            continue
        for setting in settings:
            found = effect(comparison, arms, setting)
            rows.append(
                Finding(
                    comparison.says,
                    in_paper(comparison),
                    in_words(found, percent=comparison.relative),
                    verdict(found, comparison.claimed, falls=comparison.falls),
                    setting,
                )
            )
    return rows
