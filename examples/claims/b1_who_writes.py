"""B1 and B2: who should write the text that a draft learns from, and which divergence should it be?

{given answers, the draft, the target, draft and target in turns} × {forward KL, reverse KL, JSD, total variation}, from
a draft that was tuned on the task first, and sequence-level KD (cross-entropy on the target's text). Each cell at the
better of two rates.
"""

from functools import partial

from harness import RATES, Arm, Claim, main
from recipes import BLACK_BOX, TUNED_DRAFT, WHITE_BOX, Recipe, recipe
from verdicts import Claimed, Comparison

TEXTS = {
    "given answers": ("fixed", {"text": "fixed", "epochs": 6}),  # one answer a query, where the target gives two
    "the target's text": ("queries", {}),
    "the draft's text": ("own_text", {"lmbda": 1.0}),
    "both in turns": ("both", {"lmbda": 0.5}),
}
DIVERGENCES = {"FKL": "forward_kl", "RKL": "reverse_kl", "JSD": "generalized_jsd", "TVD": "total_variation"}
START, SEQUENCE_KD = "the tuned draft", "the target's text, SeqKD"


def cell(text: str, divergence: str) -> Recipe:
    """The recipe of one cell of the grid."""
    name, fields = TEXTS[text]
    if (name, divergence) == ("queries", "forward_kl"):
        return WHITE_BOX
    # What is the default anyway is left out, so that other claims find the same recipe.
    options = {} if divergence == "forward_kl" else {"divergence": divergence}
    return recipe(f"{name}_{divergence}", **fields, **options)


compared = partial(Comparison, metric="block_efficiency", gamma=7, relative=False)  # the paper's measure

CLAIM = Claim(
    name="B1/B2",
    says="Model-written text beats given answers for every loss; total variation is rarely best; SeqKD is behind.",
    source="arXiv 2310.08461",
    arms={
        START: Arm(TUNED_DRAFT, (), is_seeded=False),
        SEQUENCE_KD: Arm(BLACK_BOX, RATES[::2]),
    }
    | {
        f"{text}, {label}": Arm(cell(text, divergence), RATES[::2])
        for text in TEXTS
        for label, divergence in DIVERGENCES.items()
    },
    comparisons=(
        *(
            compared(f"{label}: {text} against given answers", f"{text}, {label}", f"given answers, {label}")
            for text in list(TEXTS)[1:]
            for label in DIVERGENCES
        ),
        compared("forward KL against SeqKD, the target's text", "the target's text, FKL", SEQUENCE_KD),
        *(
            compared(f"{label} against TVD, {text}", f"{text}, {label}", f"{text}, TVD")
            for text in list(TEXTS)[1:]
            for label in list(DIVERGENCES)[:3]
        ),
        compared(
            "the draft's text, FKL, against the tuned draft (the paper's best, greedy)",
            "the draft's text, FKL",
            START,
            claimed=Claimed(0.61),
        ),
        compared(
            "the target's text, RKL, against the tuned draft (the paper's best, T=1)",
            "the target's text, RKL",
            START,
            claimed=Claimed(0.49),
        ),
    ),
    notes="The demo pair's target was tuned on answers of the same kind as the given ones, so that they are nearly its "
    "own text. SmolLM2 was not.",
)

if __name__ == "__main__":
    main([CLAIM])
