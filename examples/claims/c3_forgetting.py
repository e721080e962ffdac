"""C3: does a draft forget what lies outside its domain, and does one tenth of general text prevent it?

General text is documentation that the target continues. Steps are equal, so the mix sees a tenth fewer domain rows;
each at the better of two rates.
"""

from functools import partial

from harness import RATES, Arm, Claim, main
from recipes import TUNED_DRAFT, WHITE_BOX, recipe
from verdicts import Comparison

START, ALONE, MIXED = "before distillation", "distilled", "distilled, one tenth general text"
MIX = recipe("queries_forward_kl_mixed", general_share=True, also_on=("general",))


compared = partial(Comparison, metric="block_efficiency", gamma=3, relative=False)  # the paper's measure

CLAIM = Claim(
    name="C3",
    says="Outside its domain a fine-tuned draft falls behind its start; a tenth of general text is to prevent it.",
    source="arXiv 2403.00858; the effect of the mix has not been published",
    arms={START: Arm(TUNED_DRAFT, (), is_seeded=False), ALONE: Arm(WHITE_BOX, RATES[::2]), MIXED: Arm(MIX, RATES[::2])},
    comparisons=(
        compared("general text: distilled against before", ALONE, START, on="general", falls=True),
        compared("general text: distilled with the mix against before", MIXED, START, on="general", falls=True),
        compared("general text: with the mix against without", MIXED, ALONE, on="general"),
        compared("the domain: with the mix against without", MIXED, ALONE),
    ),
)

if __name__ == "__main__":
    main([CLAIM])
