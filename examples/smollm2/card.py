"""Step 7: the card of the draft, from what was measured and what was done.

python examples/smollm2/card.py --work_dir WORK [--draft distilled]

Writes `README.md` into the draft's folder, from the report of `speed.py` where there is one, else of `measure.py`.
`draftkd push --model WORK/distilled --repo_id NAME` publishes the folder.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from trl import TrlParser

from hf_draftkd import DraftModelCard
from hf_draftkd.hub.provenance import Provenance


@dataclass
class Options:
    """Which draft."""

    work_dir: str = field(default="smollm2", metadata={"help": "Folder of the whole journey: weights, data, results."})
    draft: str = field(default="distilled", metadata={"help": "Folder in --work_dir of the draft."})


def main() -> None:
    (options,) = TrlParser(Options).parse_args_and_config()
    work = Path(options.work_dir)
    speeds = [f"speed-{options.draft}-{dtype}" for dtype in ("bfloat16", "float32")]
    names = [*speeds, f"{options.draft}-gsm8k_test"]
    measured = [path for name in names if (path := work / "results" / f"{name}.json").exists()]
    if not measured:
        raise SystemExit(f"{options.draft} was not measured yet: run measure.py or speed.py first.")
    made = Provenance.load(work / options.draft)
    card = DraftModelCard.from_report(
        json.loads(measured[0].read_text(encoding="utf-8"))["report"],
        provenance=None if made is None else made.public(),
        name="SmolLM2-135M-Instruct-draft-gsm8k",
        license="apache-2.0",
        language="en",
    )
    print(card.save(work / options.draft / "README.md"))


if __name__ == "__main__":
    main()
