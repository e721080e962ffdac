"""Beyond the three papers: which single step gives most for its time?

At equal steps from the same draft: -log α and the LK hybrid (arXiv 2602.23881) against KL; AdaSPEC (arXiv 2510.19779),
which learns only from the tokens that an already distilled draft is ahead on; PARD (arXiv 2504.18583), whose draft
predicts eight tokens in one pass. What counts is the memory-bound speed-up at the best of the draft lengths 3, 5 and
7: τ / (cγ + 1) drafting one by one, τ / (c + 1) in one pass, with c the draft's parameters ÷ the target's. The seconds
that decoding takes are measured by `parallel_draft.py`.
"""

from collections.abc import Sequence
from functools import partial
from statistics import mean
from typing import Any

import numpy as np
from harness import Arm, Claim, main
from recipes import TEMPERATURES, TUNED_DRAFT, WHITE_BOX, recipe
from scoring import GAMMAS
from verdicts import (
    Arms,
    Claimed,
    Comparison,
    Finding,
    bootstrap,
    columns,
    common_seeds,
    in_words,
    ratio_of_sums,
    verdict,
)

START, KL, LOG, HYBRID, ADASPEC = "before distillation", "KL", "−log α", "LK hybrid", "AdaSPEC"
PARALLEL = "PARD"
compared = partial(Comparison, metric="block_efficiency", gamma=5)


def cost(label: str, results: Sequence[Any], gamma: int) -> float:
    """What a block costs, in target steps."""
    return results[0]["relative_size"] * (1 if label == PARALLEL else gamma) + 1


def speed(label: str, results: Sequence[Any], setting: str) -> tuple[float, int]:
    """The best memory-bound speed-up, and the draft length that gives it."""
    metric = "parallel_efficiency" if label == PARALLEL else "block_efficiency"
    found = {
        gamma: float(ratio_of_sums(columns(results, "test", setting, metric, gamma).sum((1, 2))))
        / cost(label, results, gamma)
        for gamma in GAMMAS
    }
    best = max(found, key=found.__getitem__)
    return found[best], best


class PerHour(Claim):
    """A claim that also says what its arms gain in an hour of one thread."""

    def findings(self, arms: Arms) -> list[Finding]:
        """The comparisons of losses, and of drafting in one pass with drafting one by one."""
        found = super().findings(arms)
        if arms.get(PARALLEL) and arms.get(KL):
            ours, theirs = common_seeds(arms[PARALLEL], arms[KL])
            for setting in TEMPERATURES:
                gammas = speed(PARALLEL, ours, setting)[1], speed(KL, theirs, setting)[1]
                saved = cost(KL, theirs, gammas[1]) / cost(PARALLEL, ours, gammas[0])
                tables = [
                    columns(ours, "test", setting, "parallel_efficiency", gammas[0]),
                    columns(theirs, "test", setting, "block_efficiency", gammas[1]),
                ]

                def statistic(one: np.ndarray, other: np.ndarray, saved: float = saved) -> np.ndarray:
                    return ratio_of_sums(one) / ratio_of_sums(other) * saved - 1

                gain, claimed = bootstrap(tables, statistic), Claimed(0.78)
                says = "PARD in one pass against KL one by one, memory-bound speed-up"
                found.append(Finding(says, "+78%", in_words(gain, percent=True), verdict(gain, claimed), setting))
        return found

    def table(self, arms: Arms) -> str:
        """What each arm gained over the draft it started from, for the seconds of its training."""
        if not arms.get(START):
            return ""
        heads = ["step", "seconds of training"]
        heads += [f"{name}, {setting}" for setting in TEMPERATURES for name in ("MBSU (γ)", "gained in an hour")]
        lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        for label, results in arms.items():
            seconds = mean(result["seconds"] for result in results)
            cells = [label, f"{seconds:.0f}"]
            for setting in TEMPERATURES:
                now, gamma = speed(label, results, setting)
                gain = now - speed(START, arms[START], setting)[0]
                cells += [f"{now:.2f} ({gamma})", f"{gain * 3600 / seconds:+.0f}" if seconds else ""]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


CLAIM = PerHour(
    name="Beyond",
    says="Losses on acceptance itself beat KL, most for small drafts; chosen tokens beat all tokens; a draft that "
    "predicts several tokens in one pass is 1.78 times as fast as the same draft one by one.",
    source="arXiv 2602.23881, 2510.19779, 2504.18583",
    arms={
        START: Arm(TUNED_DRAFT, (), is_seeded=False),
        KL: Arm(WHITE_BOX),
        LOG: Arm(recipe("queries_negative_log_acceptance", divergence="negative_log_acceptance")),
        HYBRID: Arm(recipe("queries_lk_hybrid", divergence="lk_hybrid")),
        ADASPEC: Arm(recipe("queries_adaspec", token_selection="adaspec")),
        PARALLEL: Arm(recipe("queries_parallel", parallel_tokens=8)),
    },
    comparisons=(
        compared("−log α against KL", LOG, KL, claimed=Claimed(0.038, 0.083)),
        compared("LK hybrid against KL", HYBRID, KL, claimed=Claimed(0.038, 0.083)),
        Comparison("AdaSPEC against KL on all tokens", ADASPEC, KL, claimed=Claimed(0.087)),
    ),
    notes="AdaSPEC's seconds are those of its own training; the reference that chooses its tokens took as long as KL. "
    "PARD's acceptance and τ in the first table are those of drafting one by one.",
)

if __name__ == "__main__":
    main([CLAIM])
