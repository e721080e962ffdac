"""C2: what does each stage of making a draft from nothing bring?

Random weights, pretraining on plain text (the stock draft), tuning on given answers, and distillation after each, at
the better of two rates. What tuning brings is told from drafts that are tuned for as many steps as others are
distilled; the one that distillation goes on from had half as many.
"""

from functools import partial

from harness import RATES, Arm, Claim, main
from recipes import RANDOM, STOCK, STOCK_DRAFT, TUNED_DRAFT, WHITE_BOX, recipe
from verdicts import Comparison

compared = partial(Comparison, metric="block_efficiency", gamma=3, relative=False)  # the paper's measure

CLAIM = Claim(
    name="C2",
    says="Pretraining, then distillation: each stage adds to the draft.",
    source="arXiv 2403.00858",
    arms={
        "pretrained": Arm(STOCK_DRAFT, (), is_seeded=False),
        "pretrained, tuned": Arm(TUNED_DRAFT, (), is_seeded=False),
        "pretrained, tuned for as long": Arm(
            recipe("stock_given_answers", start=STOCK, text="fixed", epochs=6, divergence="cross_entropy"), RATES[::2]
        ),
        "random, distilled": Arm(recipe("random_forward_kl", start=RANDOM), RATES[::2]),
        "pretrained, distilled": Arm(recipe("stock_forward_kl", start=STOCK), RATES[::2]),
        "pretrained, tuned, distilled": Arm(WHITE_BOX, RATES[::2]),
    },
    comparisons=(
        compared("distillation, after pretraining", "pretrained, distilled", "pretrained"),
        compared("pretraining, before distillation", "pretrained, distilled", "random, distilled"),
        compared("tuning on given answers, after pretraining", "pretrained, tuned for as long", "pretrained"),
        compared("distillation, after tuning", "pretrained, tuned, distilled", "pretrained, tuned"),
        compared("tuning, before distillation", "pretrained, tuned, distilled", "pretrained, distilled"),
    ),
)

if __name__ == "__main__":
    main([CLAIM])
