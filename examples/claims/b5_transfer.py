"""B5: does a distilled draft help where it was not distilled: in another domain, and with a larger sibling?

The other domain is documentation that the target continues; the sibling is a smaller target, half of the target's
layers distilled from it: a draft that learned only from the smaller one serves the larger. Everything is compared with
the tuned draft that training starts from. C3 asks the same of the other domain, and expects the opposite.
"""

from harness import Arm, Claim, main
from recipes import TUNED_DRAFT, WHITE_BOX, recipe
from verdicts import Claimed, Comparison

START, HERE, SIBLING = "the tuned draft", "distilled from the target", "distilled from the smaller sibling"

CLAIM = Claim(
    name="B5",
    says="A distilled draft transfers: to other tasks (1.93 → 2.21 and 1.78 → 2.02 times plain decoding) and to a "
    "larger target (+7 to 37%).",
    source="arXiv 2310.08461",
    arms={
        START: Arm(TUNED_DRAFT, (), is_seeded=False),
        HERE: Arm(WHITE_BOX),
        SIBLING: Arm(recipe("small_queries_forward_kl", text="queries_of_small")),
    },
    comparisons=(
        Comparison(
            "another domain: distilled against tuned",
            HERE,
            START,
            "block_efficiency",
            7,
            claimed=Claimed(0.13, 0.15),
            on="general",
        ),
        Comparison(
            "a larger sibling: distilled from the smaller against tuned",
            SIBLING,
            START,
            "block_efficiency",
            7,
            claimed=Claimed(0.07, 0.37),
        ),
        Comparison("its own target against the sibling", HERE, SIBLING, "block_efficiency", 7),
    ),
    notes="The paper's figures are speed-ups; here they are tokens per target call, which is what a draft of the same "
    "size changes.",
)

if __name__ == "__main__":
    main([CLAIM])
