"""A3: does learning from the target's distributions (white box) beat learning from its text alone (black box)?

The same text, the same steps, the same start; forward KL against cross-entropy, each at its best of three rates.
"""

from harness import Arm, Claim, main
from recipes import BLACK_BOX, WHITE_BOX
from verdicts import Claimed, Comparison

WHITE, BLACK = "white box", "black box"

CLAIM = Claim(
    name="A3",
    says="White-box distillation beats black-box distillation by 2 to 10%.",
    source="arXiv 2503.07807",
    arms={WHITE: Arm(WHITE_BOX), BLACK: Arm(BLACK_BOX)},
    comparisons=(Comparison("white box against black box", WHITE, BLACK, claimed=Claimed(0.02, 0.10)),),
)

if __name__ == "__main__":
    main([CLAIM])
