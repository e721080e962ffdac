"""Does it pay to draft in one pass? Drafts that went on from the same one for as long, judged together on one text.

    python examples/smollm2/compare.py --work_dir WORK --groups ordinary parallel --seeds 0 1 2

Each draft is the folder GROUP-SEED in --work_dir, as `train.py --output GROUP-SEED --seed SEED` leaves it. The target
reads its answers once for all of them. Printed are means over seeds with the lowest and highest, of drafts with their
list.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from journey import write_result
from report import compared, read
from trl import TrlParser

from hf_draftkd import evaluate_draft, load_draft, load_target, load_tokenizer
from hf_draftkd.hub.public_names import public_report


@dataclass
class Options:
    """What to compare."""

    work_dir: str = field(default="smollm2", metadata={"help": "Folder of the whole journey: weights, data, results."})
    groups: list[str] = field(default_factory=lambda: ["ordinary", "parallel"], metadata={"help": "Ways of training."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of each group; some may be absent."})
    questions: int = field(default=50, metadata={"help": "Of the questions that `measure.py` had answered."})
    dtype: str = field(default="bfloat16", metadata={"help": "bfloat16, or float32 for older CPUs."})
    output: str = field(default="compared", metadata={"help": "Name of the result; an old one is printed again."})


def main() -> None:
    (options,) = TrlParser(Options).parse_args_and_config()
    work = Path(options.work_dir)
    names = [f"{group}-{seed}" for group in options.groups for seed in options.seeds]
    names = [name for name in names if (work / "results" / f"{name}.json").exists()]
    if read(work / "results", options.output) is None:
        rows = load_dataset("parquet", data_files=str(work / "data" / "gsm8k_test" / "data" / "*"), split="train")
        drafts = [load_draft(str(work / name), dtype=options.dtype) for name in names]
        size = len(drafts[0].generation_config.draft_vocabulary)
        report = evaluate_draft(
            drafts,
            load_target(str(work / "target"), dtype=options.dtype),
            load_tokenizer(str(work / "target")),
            dataset=rows.select(range(2 * options.questions)),  # each question has a greedy and a sampled answer
            measure_speed=False,
            draft_vocabulary_sizes=[size],
            batch_size=16,
            source="gsm8k_test",
        )
        if any(setting.block_efficiency is None for setting in report.settings):
            raise SystemExit("; ".join(report.warnings))
        write_result(work, options.output, {"report": public_report(report).to_dict()})
    print(compared(work / "results", options.output))


if __name__ == "__main__":
    main()
