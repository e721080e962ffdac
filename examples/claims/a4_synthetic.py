"""A4: how good is text to queries that the target wrote itself, and does it want a smaller learning rate?

Historical queries and synthetic ones (Magpie: the target continues an opened user's turn), answered by the target, with
equal completion tokens and steps. Each at its best rate, and each at the full rate and at a fifth of it.
"""

from harness import RATES, Arm, Claim, main
from recipes import WHITE_BOX, recipe
from verdicts import Claimed, Comparison

HISTORICAL, SYNTHETIC = "historical queries", "synthetic queries"
FULL, FIFTH = ", full rate", ", a fifth of it"
FROM_NOTHING = recipe("synthetic_forward_kl", text="synthetic")

CLAIM = Claim(
    name="A4",
    says="Synthetic data reaches 80 to 93% of historical queries, and wants a smaller learning rate.",
    source="arXiv 2503.07807",
    arms={
        HISTORICAL: Arm(WHITE_BOX),
        SYNTHETIC: Arm(FROM_NOTHING),
        HISTORICAL + FULL: Arm(WHITE_BOX, RATES[:1]),
        HISTORICAL + FIFTH: Arm(WHITE_BOX, RATES[-1:]),
        SYNTHETIC + FULL: Arm(FROM_NOTHING, RATES[:1]),
        SYNTHETIC + FIFTH: Arm(FROM_NOTHING, RATES[-1:]),
    },
    comparisons=(
        Comparison("synthetic against historical", SYNTHETIC, HISTORICAL, claimed=Claimed(0.07, 0.20), falls=True),
        Comparison("synthetic: a fifth of the rate against the full one", SYNTHETIC + FIFTH, SYNTHETIC + FULL),
        Comparison("historical: a fifth of the rate against the full one", HISTORICAL + FIFTH, HISTORICAL + FULL),
    ),
    notes="Among the verdicts, historical text at a fifth of the rate is the control: only where synthetic text gains "
    "and it does not is it the synthetic text that wants a smaller rate.",
)

if __name__ == "__main__":
    main([CLAIM])
