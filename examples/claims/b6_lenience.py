"""B6: what does lossy decoding buy in time, and cost in the task?

Drafted tokens are accepted with more than the target would: in DistillSpec's forms (linear p/ε, square p/ε²,
exponential p^ε) and with the ensemble weight of transformers, at several strengths. Real decoding with
`SpeculativeDecoding` at γ = 7 and temperature 1, all ways in turns on each query; quality is exact: whether an answer
is a JSON call of the right function.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from decoding import Way, decode, decoded
from harness import Arm, Claim, main
from lab import Lab
from recipes import STANDARD_RATE, WHITE_BOX
from verdicts import Arms, Estimate, Finding, bootstrap, in_words, ratio_of_sums, verdict

from hf_draftkd import SpeculativeDecoding, load_draft
from hf_draftkd.acceptance import LENIENCE_FORMS

GAMMA, SETTING = 7, "T=1"
STRENGTHS = (0.7, 0.4, 0.1)
TARGET, DRAFT, LOSSLESS = "target alone", "draft alone", "lossless"
WAYS = [TARGET, DRAFT, LOSSLESS, *(f"{form} {strength:g}" for form in LENIENCE_FORMS for strength in STRENGTHS)]
ENOUGH = 0.3  # share of right functions below which there is too little quality to lose
TOLERATED = -0.05  # share of right functions that may be lost before a form costs too much


@dataclass(frozen=True)
class Lenience:
    """Every way of decoding on the same queries."""

    name: str = "lenience"
    needs_data: bool = False
    predicted_seconds: float = 900.0

    def measure(self, lab: Lab, seed: int) -> dict[str, Any]:
        """Tokens, calls, seconds and what is right, by query."""
        draft = load_draft(str(lab.trained(WHITE_BOX, STANDARD_RATE, seed)), dtype="float32")
        ways = {TARGET: Way(lab.target), DRAFT: Way(draft)}
        ways[LOSSLESS] = Way(lab.target, SpeculativeDecoding(draft, GAMMA))
        for form in LENIENCE_FORMS:
            for strength in STRENGTHS:
                lossy = SpeculativeDecoding(draft, GAMMA, lenience=strength, lenience_form=form)
                ways[f"{form} {strength:g}"] = Way(lab.target, lossy)
        return {"decoded": {SETTING: decode(lab, ways, 1.0, seed, judge=True)}}


def gain(results: Any, way: str) -> Estimate:
    """Tokens a second against lossless decoding, as a share more."""
    both = [decoded(results, SETTING, each, "tokens", "seconds") for each in (way, LOSSLESS)]
    return bootstrap(both, lambda ours, theirs: ratio_of_sums(ours) / ratio_of_sums(theirs) - 1)


def lost(results: Any, way: str, column: str) -> Estimate:
    """Share of answers that are `right` or `valid`, minus that of lossless decoding."""
    both = [decoded(results, SETTING, each, column, None) for each in (way, LOSSLESS)]
    return bootstrap(both, lambda ours, theirs: ratio_of_sums(ours) - ratio_of_sums(theirs))


def share_of(results: Any, way: str, column: str) -> float:
    """Share of answers that are `right` or `valid`."""
    return float(np.divide(*decoded(results, SETTING, way, column, None).sum((1, 2))))


class LenienceClaim(Claim):
    """A claim about seconds and quality."""

    def findings(self, arms: Arms) -> list[Finding]:
        """For each form, the fastest strength whose loss of right functions is surely tolerable."""
        found = []
        for results in arms.values():
            share = share_of(results, LOSSLESS, "right")
            for form in LENIENCE_FORMS:
                ways = [f"{form} {strength:g}" for strength in STRENGTHS]
                kept = [way for way in ways if lost(results, way, "right").low > TOLERATED]
                says = f"{form}: faster than lossless, right functions within {-TOLERATED:.0%} of it"
                paper = "useful" if form == "exponential" else "less useful"
                if share < ENOUGH:
                    found.append(Finding(says, paper, "", f"not comparable (right in {share:.0%} of the answers)"))
                    continue
                if not kept:
                    found.append(Finding(says, paper, "no strength keeps the task", "refuted"))
                    continue
                best = max(kept, key=lambda way: gain(results, way).value)
                here = f"{best}: {in_words(gain(results, best), percent=True)} tokens a second"
                found.append(Finding(says, paper, here, verdict(gain(results, best))))
        return found

    def table(self, arms: Mapping[str, Any]) -> str:
        """One row a way."""
        lines = ["| decoding | tokens per target call | tokens a second, against lossless | right function | minus "
                 "lossless | JSON call |", "|---|---|---|---|---|---|"]  # fmt: skip
        for results in arms.values():
            for way in WAYS:
                calls = bootstrap([decoded(results, SETTING, way, "tokens", "calls")], ratio_of_sums)
                right, valid = (share_of(results, way, column) for column in ("right", "valid"))
                against = ["", ""] if way == LOSSLESS else [
                    in_words(gain(results, way), percent=True), in_words(lost(results, way, "right"), percent=False)
                ]  # fmt: skip
                tau = "" if way in (TARGET, DRAFT) else f"{calls.value:.2f} [{calls.low:.2f}, {calls.high:.2f}]"
                lines.append(f"| {way} | {tau} | {against[0]} | {right:.2f} | {against[1]} | {valid:.2f} |")
        return "\n".join(lines)


CLAIM = LenienceClaim(
    name="B6",
    says="Lossy decoding trades quality for speed; of the three forms the exponential one is useful.",
    source="arXiv 2310.08461",
    arms={"decoding": Arm(Lenience(), ())},
)

if __name__ == "__main__":
    main([CLAIM])
