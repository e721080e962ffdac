"""Step 5: tokens per target call, exactly, on GSM8K's test split and on Spec-Bench by task, greedy and at T = 1.

python examples/smollm2/measure.py --work_dir WORK [--data_dir PROMPTS] [--drafts distilled parallel]

The target answers the questions once; then every draft is measured on these texts, with its list and without. What
Spec-Bench's users call mean accepted tokens is block efficiency here: the token that the target adds is counted.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, concatenate_datasets, disable_progress_bars
from journey import read_prompts, write_result
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import TrlParser

from hf_draftkd import evaluate_draft, generate_alignment_data, load_draft, load_target, load_tokenizer
from hf_draftkd.data.vocabulary import vocabulary_coverage
from hf_draftkd.evaluation.spec_bench import MT_BENCH
from hf_draftkd.hub.public_names import public_report


@dataclass
class Options:
    """How much to measure on; the stored results were made with the defaults."""

    work_dir: str = field(default="smollm2", metadata={"help": "Folder of the whole journey: weights, data, results."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of prompt files; by default the Hub's."})
    drafts: list[str] = field(default_factory=lambda: ["distilled"], metadata={"help": "Folders of drafts."})
    sets: list[str] = field(default_factory=lambda: ["gsm8k_test", "spec_bench"], metadata={"help": "What to ask."})
    gsm8k: int = field(default=150, metadata={"help": "Questions of GSM8K's test split."})
    per_task: int = field(default=5, metadata={"help": "Questions of each task of Spec-Bench, which has 80 of each."})
    max_new_tokens: int = field(default=160, metadata={"help": "Longest answer, in tokens."})
    batch_size: int = field(default=32, metadata={"help": "Texts decoded or scored together."})
    dtype: str = field(default="bfloat16", metadata={"help": "bfloat16, or float32 for older CPUs."})


def by_task(rows: Dataset, count: int) -> Dataset:
    """So many questions of each task, evenly spread: MT-Bench's lie by category."""
    rows = rows.map(lambda row: {"category": "mt_bench" if row["category"] in MT_BENCH else row["category"]})
    parts = []
    for task in dict.fromkeys(rows["category"]):
        found = [n for n, name in enumerate(rows["category"]) if name == task]
        taken = min(count, len(found))
        parts.append(rows.select([found[place * len(found) // taken] for place in range(taken)]))
    return concatenate_datasets(parts)


def texts(
    name: str, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Options, folder: Path
) -> Dataset:
    """The target's answers, greedy and at temperature 1; a killed run goes on at its last shard."""
    rows = read_prompts(name, options.data_dir)
    rows = by_task(rows, options.per_task) if name == "spec_bench" else rows.select(range(options.gsm8k))
    rows.to_json(folder.parent / f"{name}.jsonl")  # what `examples/engines.py --prompts` takes
    return generate_alignment_data(
        target,
        tokenizer,
        rows,
        temperatures=[0.0, 1.0],
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        shard_size=options.batch_size,
        output_dir=str(folder),
        source=name,
    )


def main() -> None:
    (options,) = TrlParser(Options).parse_args_and_config()
    disable_progress_bars()
    work = Path(options.work_dir)
    target, tokenizer = load_target(str(work / "target"), dtype=options.dtype), load_tokenizer(str(work / "target"))
    for name in options.sets:
        rows = texts(name, target, tokenizer, options, work / "data" / name)
        for draft in options.drafts:
            listed = GenerationConfig.from_pretrained(work / draft).draft_vocabulary
            share = vocabulary_coverage(rows, listed)
            print(f"{name}: {len(listed)} tokens on the list of {draft} are {share:.2%} of the answers")
            write_result(work, f"{draft}-{name}-coverage", {"tokens": len(listed), "coverage": share})
            if (work / "results" / f"{draft}-{name}.json").exists():
                continue
            report = evaluate_draft(
                load_draft(str(work / draft), dtype=options.dtype),
                target,
                tokenizer,
                dataset=rows,
                measure_speed=False,
                draft_vocabulary_sizes=[len(listed)],
                batch_size=16,
                source=name,
            )
            for setting in report.settings:
                print(name, draft, setting.decoding.temperature, setting.acceptance_rate, setting.block_efficiency[5])
            write_result(work, f"{draft}-{name}", {"report": public_report(report).to_dict()})


if __name__ == "__main__":
    main()
