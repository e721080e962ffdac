"""A1: how much acceptance does a draft lose when its target is tuned on a domain?

The same draft and prompts, the target before and after some steps of plain fine-tuning on a domain: function calling
(BFCL), maths (GSM8K), Chinese. The draft is one that was distilled for the target before. `--data_dir` names a
folder with public prompts as JSON lines: `gsm8k_train.jsonl` and `gsm8k_test.jsonl` (`question`, `answer`;
openai/gsm8k), `function_calls.jsonl` (`messages`, `functions`, `ground_truth`; BFCL v4, simple_python, multiple and
live_simple), `chinese_instructions.jsonl` (`prompt`, `answer`; carbonz0/alpaca-chinese-dataset).
"""

import json
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from harness import Arm, Claim, main
from lab import Lab
from recipes import STANDARD_RATE, TEMPERATURES, WHITE_BOX
from scoring import score_drafts
from verdicts import Arms, Claimed, Finding, bootstrap, columns, in_words, ratio_of_sums, verdict

from hf_draftkd import generate_alignment_data, load_draft, load_target
from hf_draftkd.data.rows import with_token_ids

SFT_RATE = 3e-4
BEFORE, AFTER = "before", "after"


def functions(row: dict[str, Any]) -> tuple[str, str]:
    """A query with its functions, and the call."""
    listed = "\n".join(json.dumps({key: each[key] for key in ("name", "description")}) for each in row["functions"])
    return f"Functions:\n{listed}\n{row['messages'][-1]['content']}", json.dumps(row["ground_truth"][0])


# Domain -> files to train on and to be tested on (one file: its last rows), and how a row is read.
DOMAINS = {
    "function calling": ("function_calls.jsonl", None, functions),
    "maths": ("gsm8k_train.jsonl", "gsm8k_test.jsonl", lambda row: (row["question"], row["answer"])),
    "Chinese": ("chinese_instructions.jsonl", None, lambda row: (row["prompt"], row["answer"])),
}
LONGEST = 400  # characters of a prompt; the demo target reads 1,024 tokens, and Chinese takes three a character


def conversations(lab: Lab, domain: str) -> tuple[Dataset, Dataset]:
    """Rows to tune the target on, and rows whose prompts both targets answer."""
    train, test, read = DOMAINS[domain]
    assert lab.data_dir is not None, "the harness leaves this claim out without it"
    longest = LONGEST // 4 if domain == "Chinese" else LONGEST
    files = []
    for name in filter(None, (train, test)):
        lines = (lab.data_dir / name).read_text(encoding="utf-8").split("\n")
        pairs = [read(json.loads(line)) for line in lines if line]
        files.append([pair for pair in pairs if len(pair[0]) <= longest])
    learned = files[0] if test else files[0][: -lab.sizes.test]
    return _messages(learned[: 4 * lab.sizes.tuning_prompts]), _messages(files[-1][-lab.sizes.test :])


def _messages(pairs: list[tuple[str, str]]) -> Dataset:
    prompts = [[{"role": "user", "content": prompt}] for prompt, _ in pairs]
    answers = [[{"role": "assistant", "content": answer}] for _, answer in pairs]
    return Dataset.from_dict({"prompt": prompts, "completion": answers})


@dataclass(frozen=True)
class Drift:
    """The acceptance of one draft, its target before and after tuning."""

    domain: str
    needs_data: bool = True
    predicted_seconds: float = 500.0

    @property
    def name(self) -> str:
        return f"drift_{self.domain.replace(' ', '_').lower()}"

    def measure(self, lab: Lab, seed: int) -> dict[str, Any]:
        """Scores of the draft on what each target says to the same prompts."""
        learned, held_out = conversations(lab, self.domain)
        draft = load_draft(str(lab.trained(WHITE_BOX, STANDARD_RATE, seed)), dtype="float32")
        tuned = self.tuned_target(lab, learned, seed)
        found = {}
        for name, target in ((BEFORE, lab.target), (AFTER, tuned)):
            whose = BEFORE if name == BEFORE else f"seed{seed}"  # seeds share what the target said before
            rows = generate_alignment_data(
                target,
                lab.tokenizer,
                held_out.select_columns("prompt"),
                max_new_tokens=lab.sizes.answer_tokens,
                temperatures=tuple(TEMPERATURES.values()),
                batch_size=32,
                output_dir=lab.folder / "drifted" / f"{self.name}_answers_{whose}",
            )
            (found[name],) = score_drafts(target, [draft], rows)
        return {"scores": found}

    def tuned_target(self, lab: Lab, rows: Dataset, seed: int) -> Any:
        """The target after some steps on the domain."""
        folder = lab.folder / "drifted" / f"{self.name}_seed{seed}"
        if not folder.exists():
            options = {"max_steps": lab.sizes.domain_steps, "divergence": "cross_entropy", "max_length": 512}
            start = load_target(str(lab.pair / "target"), dtype="float32").requires_grad_(True)
            lab.distil(start, with_token_ids(rows, lab.tokenizer), folder, rate=SFT_RATE, seed=seed, **options)
        return load_target(str(folder), dtype="float32")


CLAIMED = {"function calling": Claimed(0.04, 0.38), "maths": Claimed(0.04, 0.04), "Chinese": Claimed(0.28, 0.28)}


class DriftClaim(Claim):
    """A claim whose two arms lie in one cell: both targets' texts."""

    def findings(self, arms: Arms) -> list[Finding]:
        """The relative change of acceptance in each domain."""
        found = []
        for domain, results in arms.items():
            for setting in TEMPERATURES:
                both = [columns(results, on, setting, "acceptance", 5) for on in (AFTER, BEFORE)]
                change = bootstrap(both, lambda after, before: ratio_of_sums(after) / ratio_of_sums(before) - 1)
                claimed = CLAIMED[domain]
                span = " to ".join(dict.fromkeys(f"−{each:.0%}" for each in (claimed.smallest, claimed.largest or 0)))
                found.append(
                    Finding(
                        f"{domain}: acceptance after against before tuning",
                        span,
                        in_words(change, percent=True),
                        verdict(change, claimed, falls=True),
                        setting,
                    )
                )
        return found


CLAIM = DriftClaim(
    name="A1",
    says="Tuning the target on a domain lowers a generic draft's acceptance (Biology −38%, Chinese −28%, Coding −7%, "
    "Math −4%).",
    source="arXiv 2503.07807",
    arms={domain: Arm(Drift(domain), ()) for domain in DOMAINS},
    notes="The paper has no figure for function calling; its span over all domains stands there. The tables above hold "
    "the target's own texts of each state, so levels compare within a domain only.",
)

if __name__ == "__main__":
    main([CLAIM])
