"""B4: how much faster is decoding with the distilled draft than with the draft that was tuned on the task only?

Measured with `SpeculativeDecoding` at γ = 7 and batch 1, in turns with plain decoding, greedily and at temperature 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from decoding import Way, decode, decoded
from harness import Arm, Claim, main
from lab import Lab
from recipes import STANDARD_RATE, TEMPERATURES, TUNED, WHITE_BOX
from verdicts import Arms, Claimed, Finding, bootstrap, in_words, ratio_of_sums, verdict

from hf_draftkd import SpeculativeDecoding, load_draft

GAMMA = 7
PLAIN, WITH_TUNED, WITH_DISTILLED = "plain", "tuned draft", "distilled draft"


@dataclass(frozen=True)
class Speed:
    """Seconds of each way on the same queries."""

    name: str = "speed_gamma7"
    needs_data: bool = False
    predicted_seconds: float = 400.0

    def measure(self, lab: Lab, seed: int) -> dict[str, Any]:
        """Tokens, calls and seconds by query, at both temperatures."""
        distilled = load_draft(str(lab.trained(WHITE_BOX, STANDARD_RATE, seed)), dtype="float32")
        ways = {PLAIN: Way(lab.target)} | {
            name: Way(lab.target, SpeculativeDecoding(draft, GAMMA))
            for name, draft in ((WITH_TUNED, lab.draft(TUNED)), (WITH_DISTILLED, distilled))
        }
        return {"decoded": {setting: decode(lab, ways, value, seed) for setting, value in TEMPERATURES.items()}}


class SpeedClaim(Claim):
    """A claim about seconds."""

    def findings(self, arms: Arms) -> list[Finding]:
        """The speed with the distilled draft against that with the tuned one, and against plain decoding."""
        found = []
        for results in arms.values():
            for says, theirs, claimed in (
                ("the tuned draft", WITH_TUNED, Claimed(0.10, 0.45)),
                ("plain decoding", PLAIN, Claimed()),
            ):
                for setting in TEMPERATURES:
                    both = [decoded(results, setting, way, "tokens", "seconds") for way in (WITH_DISTILLED, theirs)]
                    gain = bootstrap(both, lambda ours, other: ratio_of_sums(ours) / ratio_of_sums(other) - 1)
                    paper = "+10% to +45%" if theirs == WITH_TUNED else "faster"
                    says_all = f"tokens a second with the distilled draft against {says}"
                    found.append(
                        Finding(says_all, paper, in_words(gain, percent=True), verdict(gain, claimed), setting)
                    )
        return found

    def table(self, arms: Mapping[str, Any]) -> str:
        """Tokens a second and tokens per target call."""
        lines = ["| decoding | temperature | tokens a second | tokens per target call |", "|---|---|---|---|"]
        for results in arms.values():
            for setting in TEMPERATURES:
                for way in (PLAIN, WITH_TUNED, WITH_DISTILLED):
                    speed, calls = (
                        bootstrap([decoded(results, setting, way, "tokens", under)], ratio_of_sums)
                        for under in ("seconds", "calls")
                    )
                    lines.append(
                        f"| {way} | {setting} | {speed.value:.0f} [{speed.low:.0f}, {speed.high:.0f}] | "
                        f"{calls.value:.2f} [{calls.low:.2f}, {calls.high:.2f}] |"
                    )
        return "\n".join(lines)


CLAIM = SpeedClaim(
    name="B4",
    says="Decoding with the distilled draft is 10 to 45% faster than with the tuned draft, at γ = 7 and batch 1.",
    source="arXiv 2310.08461",
    arms={"decoding": Arm(Speed(), ())},
    notes="Ways take turns on each query, so that other work on the machine slows all of them alike.",
)

if __name__ == "__main__":
    main([CLAIM])
