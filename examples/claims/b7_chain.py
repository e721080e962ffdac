"""B7: a chain of three sizes. A smaller target is distilled from the large one, then a draft from the smaller target.

    large ──► half of its layers, distilled: small ──► draft, distilled from small
      └─────► draft, distilled from large

A draft changes no answer, so quality belongs to the target and latency to the way; what the smaller target alone gains
stands beside what the chain gains. Greedy, γ = 5, all ways in turns on each query.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from b5_transfer import CLAIM as TRANSFER
from b5_transfer import SIBLING
from decoding import Way, decode, decoded
from harness import Arm, Claim, main
from lab import Lab
from recipes import STANDARD_RATE, WHITE_BOX, Recipe
from verdicts import Arms, Claimed, Estimate, Finding, bootstrap, in_words, ratio_of_sums, verdict

from hf_draftkd import SpeculativeDecoding, load_draft

GAMMA, SETTING = 5, "greedy"
LARGE, SMALL = "large", "small"
LARGE_DRAFTED, SMALL_DRAFTED = "large, its draft", "small, its draft"
WAYS = (LARGE, LARGE_DRAFTED, SMALL, SMALL_DRAFTED)


@dataclass(frozen=True)
class Chain:
    """Both targets, with and without a draft distilled from each."""

    name: str = "chain"
    needs_data: bool = False
    predicted_seconds: float = 500.0

    def measure(self, lab: Lab, seed: int) -> dict[str, Any]:
        """Tokens, calls, seconds and what is right, by query."""
        of_small = TRANSFER.arms[SIBLING].what
        assert isinstance(of_small, Recipe)
        drafts = [
            load_draft(str(lab.trained(recipe, STANDARD_RATE, seed)), dtype="float32")
            for recipe in (WHITE_BOX, of_small)
        ]
        ways = {}
        for names, target, draft in zip((WAYS[:2], WAYS[2:]), (lab.target, lab.small), drafts, strict=True):
            ways[names[0]] = Way(target)
            ways[names[1]] = Way(target, SpeculativeDecoding(draft, GAMMA))
        sizes = {name: way.model.num_parameters() for name, way in ways.items()}
        return {"decoded": {SETTING: decode(lab, ways, 0.0, seed, judge=True)}, "target_parameters": sizes}


def times_faster(results: Any, way: str, other: str = LARGE) -> Estimate:
    """Seconds an answer of another way, divided by those of this one."""
    both = [decoded(results, SETTING, each, "seconds", None) for each in (other, way)]
    return bootstrap(both, lambda slow, fast: ratio_of_sums(slow) / ratio_of_sums(fast))


def quality(results: Any, way: str) -> Estimate:
    """Share of answers with the right function, minus the large target's."""
    both = [decoded(results, SETTING, each, "right", None) for each in (way, LARGE)]
    return bootstrap(both, lambda ours, theirs: ratio_of_sums(ours) - ratio_of_sums(theirs))


class ChainClaim(Claim):
    """A claim about seconds and quality."""

    def findings(self, arms: Arms) -> list[Finding]:
        """Latency of the chain, its share that is the smaller target, and what it costs."""
        found = []
        for results in arms.values():
            for says, way, other, claimed in (
                ("the chain against the large target alone", SMALL_DRAFTED, LARGE, Claimed(5.4, 9.7)),
                ("of it, the smaller target without a draft", SMALL, LARGE, Claimed()),
                ("of it, the draft behind the smaller target", SMALL_DRAFTED, SMALL, Claimed()),
                ("the large target with its own draft", LARGE_DRAFTED, LARGE, Claimed()),
            ):
                faster = times_faster(results, way, other)
                above = Estimate(faster.value - 1, faster.low - 1, faster.high - 1, faster.seeds, faster.prompts)
                here = f"{faster.value:.2f} times [{faster.low:.2f}, {faster.high:.2f}]"
                paper = "6.4 to 10.7 times" if claimed.smallest else "faster"
                found.append(Finding(f"latency of an answer: {says}", paper, here, verdict(above, claimed)))
            change = quality(results, SMALL)
            kept = "refuted" if change.high < 0 else "reproduced" if change.low > -0.05 else "undecided"
            enough = verdict(change)
            found.append(
                Finding(
                    "right functions of the smaller target, minus the large one's",
                    "as good",
                    in_words(change, percent=False),
                    enough if enough.startswith("undecided (") else kept,
                )
            )
        return found

    def table(self, arms: Mapping[str, Any]) -> str:
        """One row a way."""
        lines = ["| way | target's parameters | seconds an answer | times faster than large | tokens per target call | "
                 "right function | JSON call |", "|---|---|---|---|---|---|---|"]  # fmt: skip
        for results in arms.values():
            for way in WAYS:
                seconds = bootstrap([decoded(results, SETTING, way, "seconds", None)], ratio_of_sums)
                calls, right, valid = (
                    float(np.divide(*decoded(results, SETTING, way, over, under).sum((1, 2))))
                    for over, under in (("tokens", "calls"), ("right", None), ("valid", None))
                )
                faster = times_faster(results, way)
                lines.append(
                    f"| {way} | {results[0]['target_parameters'][way]:,} | {seconds.value:.3f} "
                    f"[{seconds.low:.3f}, {seconds.high:.3f}] | {faster.value:.2f} [{faster.low:.2f}, "
                    f"{faster.high:.2f}] | {calls:.2f} | {right:.2f} | {valid:.2f} |"
                )
        return "\n".join(lines)


CLAIM = ChainClaim(
    name="B7",
    says="A chain of targets and drafts answers 6 to 11 times as fast as the large target at equal quality; much of "
    "it is the smaller target.",
    source="arXiv 2310.08461",
    arms={"decoding": Arm(Chain(), ())},
    notes="The smaller target is as good where it surely loses fewer than 0.05 of the right functions. The paper's "
    "chain spans five sizes of T5, from XXL down; here are two targets and a draft.",
)

if __name__ == "__main__":
    main([CLAIM])
