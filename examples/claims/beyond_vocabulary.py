"""Beyond: does a draft that proposes only the tokens its target writes most gain in memory-bound speed-up?

An eighth of the vocabulary, chosen by the target's answers to the training queries (VocabTrim). The draft is the same;
its head is sliced, which costs acceptance and saves reading the rest of the head. MBSU = τ / (cγ + 1) at γ = 5, with c
the parameters that a draft step reads ÷ the target's.
"""

from dataclasses import dataclass
from typing import Any

from harness import Arm, Claim, main
from lab import Lab
from recipes import STANDARD_RATE, TEMPERATURES, WHITE_BOX
from scoring import score_drafts
from verdicts import Arms, Claimed, Finding, bootstrap, columns, in_words, ratio_of_sums, verdict

from hf_draftkd import load_draft
from hf_draftkd.data.vocabulary import choose_draft_vocabulary

GAMMA, SHARE = 5, 8
WHOLE, LISTED = "whole", "listed"


@dataclass(frozen=True)
class Listed:
    """The distilled draft with its whole vocabulary and with the list."""

    name: str = "vocabulary_list"
    needs_data: bool = False
    predicted_seconds: float = 60.0

    def measure(self, lab: Lab, seed: int) -> dict[str, Any]:
        """Scores both ways, and the parameters that a step reads."""
        folder = str(lab.trained(WHITE_BOX, STANDARD_RATE, seed))
        draft, listed = (load_draft(folder, dtype="float32") for _ in range(2))
        size = draft.config.vocab_size // SHARE
        ids = choose_draft_vocabulary(lab.text("queries"), size, keep=[lab.tokenizer.eos_token_id])
        listed.generation_config.draft_vocabulary = ids
        tables = score_drafts(lab.target, [draft, listed], lab.asked("test"))
        saved = (draft.config.vocab_size - len(ids)) * draft.config.hidden_size
        read = {WHOLE: draft.num_parameters(), LISTED: draft.num_parameters() - saved}
        return {
            "scores": dict(zip((WHOLE, LISTED), tables, strict=True)),
            "relative_size": {name: count / lab.target.num_parameters() for name, count in read.items()},
            "ids": len(ids),
        }


class ListClaim(Claim):
    """A claim whose two arms lie in one cell."""

    def findings(self, arms: Arms) -> list[Finding]:
        """MBSU with the list against that without."""
        found = []
        for results in arms.values():
            whole, listed = (results[0]["relative_size"][name] * GAMMA + 1 for name in (WHOLE, LISTED))
            for setting in TEMPERATURES:
                both = [columns(results, on, setting, "block_efficiency", GAMMA) for on in (LISTED, WHOLE)]
                change = bootstrap(
                    both,
                    lambda ours, theirs, saved=whole / listed: ratio_of_sums(ours) / ratio_of_sums(theirs) * saved - 1,
                )
                says = f"MBSU with {results[0]['ids']} ids against all"
                found.append(
                    Finding(says, "+14% to +19%", in_words(change, percent=True), verdict(change, SPAN), setting)
                )
        return found


SPAN = Claimed(0.14, 0.19)
CLAIM = ListClaim(
    name="Vocabulary",
    says="A smaller draft vocabulary, chosen from text of the target, gains 14 to 19% of MBSU.",
    source="arXiv 2506.22694",
    arms={"list": Arm(Listed(), ())},
)

if __name__ == "__main__":
    main([CLAIM])
