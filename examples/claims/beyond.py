"""Beyond the three papers: which single step gives most for its time?

At equal steps from the same draft: -log α and the LK hybrid (arXiv 2602.23881) against KL, and AdaSPEC (arXiv
2510.19779), which learns only from the tokens that an already distilled draft is ahead on. `parallel_draft.py` compares
a parallel draft with an ordinary one at equal seconds.
"""

from functools import partial
from statistics import mean

from harness import Arm, Claim, main
from recipes import TUNED_DRAFT, WHITE_BOX, recipe
from verdicts import Arms, Claimed, Comparison, level

START, KL, LOG, HYBRID, ADASPEC = "before distillation", "KL", "−log α", "LK hybrid", "AdaSPEC"


class PerHour(Claim):
    """A claim that also says what its arms gain in an hour of one thread."""

    def table(self, arms: Arms) -> str:
        """What each arm gained over the draft it started from, for the seconds of its training."""
        if not arms.get(START):
            return ""
        lines = ["| step | seconds of training | gained, greedy | gained, T=1 | gained in an hour, greedy | T=1 |"]
        lines.append("|---|---|---|---|---|---|")
        for label, results in arms.items():
            if label == START or not results:
                continue
            seconds = mean(result["seconds"] for result in results)
            gains = [
                level(results, "test", setting, "block_efficiency").value
                - level(arms[START], "test", setting, "block_efficiency").value
                for setting in ("greedy", "T=1")
            ]
            cells = [f"{seconds:.0f}", *(f"{gain:+.2f}" for gain in gains)]
            cells += [f"{gain * 3600 / seconds:+.0f}" for gain in gains]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        return "\n".join(lines)


compared = partial(Comparison, metric="block_efficiency", gamma=5)

CLAIM = PerHour(
    name="Beyond",
    says="Losses on acceptance itself beat KL, most for small drafts; chosen tokens beat all tokens.",
    source="arXiv 2602.23881, 2510.19779",
    arms={
        START: Arm(TUNED_DRAFT, (), is_seeded=False),
        KL: Arm(WHITE_BOX),
        LOG: Arm(recipe("queries_negative_log_acceptance", divergence="negative_log_acceptance")),
        HYBRID: Arm(recipe("queries_lk_hybrid", divergence="lk_hybrid")),
        ADASPEC: Arm(recipe("queries_adaspec", token_selection="adaspec")),
    },
    comparisons=(
        compared("−log α against KL", LOG, KL, claimed=Claimed(0.038, 0.083)),
        compared("LK hybrid against KL", HYBRID, KL, claimed=Claimed(0.038, 0.083)),
        Comparison("AdaSPEC against KL on all tokens", ADASPEC, KL, claimed=Claimed(0.087)),
    ),
    notes="AdaSPEC's seconds are those of its own training; the reference that chooses its tokens took as long as KL.",
)

if __name__ == "__main__":
    main([CLAIM])
