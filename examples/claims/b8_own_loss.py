"""B8: does a draft's own loss on the task tell how often its target accepts it?

Drafts on their way: the stock draft learning given answers, the tuned one learning its target's answers. At each state
the loss on the right answers to the test queries stands beside the acceptance rate; what is judged is their rank
correlation (Spearman) over all states, -1 where a lower loss always means a higher acceptance.
"""

from typing import Any

import numpy as np
from harness import Arm, Claim, main
from recipes import STANDARD_RATE, STOCK, TEMPERATURES, recipe
from verdicts import Estimate, Finding, bootstrap, columns, in_words, verdict

SHARES = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
LITTLE = 0.5  # correlations nearer to 0 "say little"


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the first axis."""
    return values.argsort(0).argsort(0).astype(float)


def rank_correlation(acceptance: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Spearman's, of `[states, ...]` with `[states]`."""
    ours, theirs = ranks(acceptance), ranks(loss).reshape(-1, *[1] * (acceptance.ndim - 1))
    ours, theirs = ours - ours.mean(0), theirs - theirs.mean(0)
    return (ours * theirs).sum(0) / np.sqrt((ours**2).sum(0) * (theirs**2).sum(0))


class OwnLoss(Claim):
    """A claim about states of drafts instead of arms."""

    def findings(self, arms: dict[str, list[dict[str, Any]]]) -> list[Finding]:
        """The correlation at each temperature."""
        if not all(arms.get(label) for label in self.arms):
            return []
        found = []
        for setting in TEMPERATURES:
            by_state = [
                (columns([state], "test", setting, "acceptance", 5), state["own_loss"])
                for results in arms.values()
                for result in results
                for state in result["states"]
            ]
            losses = np.array([loss["nats"] / loss["tokens"] for _, loss in by_state])

            def statistic(*sums: np.ndarray, losses: np.ndarray = losses) -> np.ndarray:
                return rank_correlation(np.stack([each[0] / each[1] for each in sums]), losses)

            over_prompts = bootstrap([table for table, _ in by_state], statistic)
            seeds = min(len(results) for results in arms.values())
            estimate = Estimate(over_prompts.value, over_prompts.low, over_prompts.high, seeds, over_prompts.prompts)
            found.append(
                Finding(
                    f"rank correlation of own loss and acceptance over {len(by_state)} states",
                    "says little",
                    in_words(estimate, percent=False),
                    judged(estimate),
                    setting,
                )
            )
        return found

    def table(self, arms: dict[str, list[dict[str, Any]]]) -> str:
        """The states of the first seed."""
        lines = ["| draft, first seed | step | own loss, nats a token | acceptance, greedy | acceptance, T=1 |"]
        lines.append("|---|---|---|---|---|")
        for label, results in arms.items():
            for state in results[0]["states"] if results else ():
                tables = [state["scores"]["test"][setting] for setting in TEMPERATURES]
                rates = [f"{sum(table['acceptance']) / sum(table['tokens']):.3f}" for table in tables]
                loss = state["own_loss"]["nats"] / state["own_loss"]["tokens"]
                lines.append(f"| {label} | {state['step']} | {loss:.3f} | {' | '.join(rates)} |")
        return "\n".join(lines)


def judged(found: Estimate) -> str:
    """Little is said where the whole interval is nearer to 0 than `LITTLE`; much where it lies wholly beyond."""
    known = verdict(found)
    if known.startswith("undecided ("):
        return known
    if max(abs(found.low), abs(found.high)) < LITTLE:
        return "reproduced"
    beyond = found.low * found.high > 0 and min(abs(found.low), abs(found.high)) > LITTLE
    return "refuted" if beyond else "undecided"


CLAIM = OwnLoss(
    name="B8",
    says="A draft's own task performance says little about its acceptance.",
    source="arXiv 2310.08461",
    arms={
        "learning given answers": Arm(
            recipe(
                "stock_given_answers_states",
                start=STOCK,
                text="fixed",
                epochs=6,
                divergence="cross_entropy",
                keep_at=SHARES,
            ),
            (STANDARD_RATE,),
        ),
        "learning the target's answers": Arm(recipe("queries_forward_kl_states", keep_at=SHARES), (STANDARD_RATE,)),
    },
    notes="A loss says little where its correlation with acceptance is surely nearer to 0 than ±0.5. The interval is "
    "over prompts; states and their losses are as they are. Of a draft with a list, its own loss is that of right "
    "tokens on the list, among those listed.",
)

if __name__ == "__main__":
    main([CLAIM])
