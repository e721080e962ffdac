"""C1: is TVD++ better than total variation and than KL?

From a draft that already agrees somewhat (tuned for a quarter of the usual steps), since total variation has no
gradient where draft and target hardly overlap, with a rate that falls to 0, the better of two. The paper leaves open
how advantages are normalised, so TVD++ comes in four readings:

- full expectation: the policy gradient over the whole vocabulary, mean and deviation over the batch. Its gradient is
  exactly total variation's, divided by the deviation;
- sampled: one token a position, drawn from the draft; the closest to the paper, and this package's default;
- per position: sampled, with the mean and deviation of each position alone;
- unweighted: the reading of a third-party trainer. Rewards are normalised over the vocabulary of each position, and
  every token's log q is pushed by its advantage, without the weight q of a policy gradient.
"""

from dataclasses import replace

from harness import RATES, Arm, Claim, main
from recipes import BRIEFLY, BRIEFLY_TUNED_DRAFT, recipe
from verdicts import Arms, Comparison, Finding, level

KLD, TVD, START = "KLD", "TVD", "the briefly tuned draft"
LOSSES = {
    KLD: recipe("brief_forward_kl", start=BRIEFLY),
    TVD: recipe("brief_total_variation", start=BRIEFLY, divergence="total_variation"),
}
READINGS = {
    "TVD++, sampled": recipe("brief_tvd_plus_plus", start=BRIEFLY, divergence="tvd_plus_plus"),
    "TVD++, full expectation": recipe(
        "brief_tvd_plus_plus_full", start=BRIEFLY, divergence="tvd_plus_plus", tvd_estimator="full"
    ),
    "TVD++, per position": recipe(
        "brief_tvd_plus_plus_token", start=BRIEFLY, divergence="tvd_plus_plus", tvd_statistics="token"
    ),
    "TVD++, unweighted": recipe("brief_unweighted_rewards", start=BRIEFLY, loss="unweighted_rewards"),
}

AGREES = (0.4, 0.7)  # acceptance at temperature 1 of a draft that agrees somewhat


class FromAgreement(Claim):
    """A claim about drafts that agree with their target somewhat before they are trained."""

    def findings(self, arms: Arms) -> list[Finding]:
        """The comparisons, unless the start is another than they suppose."""
        if not arms.get(START):
            return []
        start = level(arms[START], "test", "T=1", "acceptance").value
        found = super().findings(arms)
        if AGREES[0] <= start <= AGREES[1]:
            return found
        reason = f"not comparable (acceptance before training {start:.2f}, not {AGREES[0]} to {AGREES[1]})"
        return [replace(row, verdict=reason) for row in found]


CLAIM = FromAgreement(
    name="C1",
    says="TVD++ gives more tokens per target call than TVD and than KLD.",
    source="arXiv 2403.00858",
    arms={START: Arm(BRIEFLY_TUNED_DRAFT, (), is_seeded=False)}
    | {label: Arm(what, RATES[::2]) for label, what in (LOSSES | READINGS).items()},
    comparisons=tuple(
        Comparison(f"{label} against {other}", label, other, "block_efficiency", 3, relative=False)
        for label in READINGS
        for other in (TVD, KLD)
    ),
)

if __name__ == "__main__":
    main([CLAIM])
