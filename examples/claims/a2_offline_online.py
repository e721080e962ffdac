"""A2: does offline distillation beat online distillation, and if so, by its text or by its training?

Offline learns from what the target wrote before; online from what the draft writes at each step (`lmbda=1`), with the
target's distributions on it. The paper trained offline for three epochs at 2e-5 and online for one pass at 1e-6, so it
compared two recipes. Here three comparisons, each arm at its best rate: the paper's (three epochs against one pass),
one pass over the same prompts for both, and as many steps for both.
"""

from harness import Arm, Claim, main
from recipes import WHITE_BOX, recipe
from verdicts import Claimed, Comparison

OFFLINE, OFFLINE_ONCE = "offline, 3 epochs", "offline, 1 epoch"
ONLINE, ONLINE_ONCE = "online, 3 passes", "online, 1 pass"
SPAN = Claimed(0.11, 0.25)

CLAIM = Claim(
    name="A2",
    says="Offline distillation beats online distillation by 11 to 25%.",
    source="arXiv 2503.07807",
    arms={
        OFFLINE: Arm(WHITE_BOX),
        OFFLINE_ONCE: Arm(recipe("queries_forward_kl_once", epochs=1)),
        ONLINE_ONCE: Arm(recipe("own_text_forward_kl_once", epochs=1, lmbda=1.0)),
        ONLINE: Arm(recipe("own_text_forward_kl", lmbda=1.0)),
    },
    comparisons=(
        Comparison("as in the paper: 3 epochs offline, 1 pass online", OFFLINE, ONLINE_ONCE, claimed=SPAN),
        Comparison("one pass each", OFFLINE_ONCE, ONLINE_ONCE, claimed=SPAN),
        Comparison("as many steps each", OFFLINE, ONLINE, claimed=SPAN),
    ),
)

if __name__ == "__main__":
    main([CLAIM])
