"""A5: does more data help, and is it the data or the steps that come with it?

Twice the queries each time, once with three epochs over whatever there is, once with equal steps: there, fewer queries
are only seen more often. One rate for all.
"""

from itertools import pairwise

from harness import Arm, Claim, main
from recipes import STANDARD_RATE, WHITE_BOX, recipe
from verdicts import Comparison

MULTIPLES = (0.25, 0.5, 1, 2)


def arms() -> dict[str, Arm]:
    """Each number of queries, with its epochs fixed and with its steps fixed."""
    found = {}
    for times in MULTIPLES:
        for way, epochs in (("epochs", 3.0), ("steps", 3 / times)):
            what = recipe(f"queries_x{times:g}_forward_kl_{way}", prompts=times, epochs=epochs)
            found[f"{times:g} × the queries, {way} fixed"] = Arm(WHITE_BOX if times == 1 else what, (STANDARD_RATE,))
    return found


CLAIM = Claim(
    name="A5",
    says="More data helps in every domain.",
    source="arXiv 2503.07807",
    arms=arms(),
    comparisons=tuple(
        Comparison(
            f"{more:g} × against {less:g} × the queries, {way} fixed",
            f"{more:g} × the queries, {way} fixed",
            f"{less:g} × the queries, {way} fixed",
        )
        for way in ("epochs", "steps")
        for less, more in pairwise(MULTIPLES)
    ),
)

if __name__ == "__main__":
    main([CLAIM])
