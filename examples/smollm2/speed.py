"""Step 6: does it pay here? Real decoding of GSM8K's test questions, plainly and with the draft in every way, in turns.

python examples/smollm2/speed.py --work_dir WORK --threads 2     # on a machine where nothing else runs

The exact numbers are step 5's; this measures times: of single steps, and of decoding with intervals over prompts.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from journey import bytes_read, write_result
from trl import TrlParser

from hf_draftkd import evaluate_draft, load_draft, load_target, load_tokenizer
from hf_draftkd.hub.public_names import public_report


@dataclass
class Options:
    """What to time."""

    work_dir: str = field(default="smollm2", metadata={"help": "Folder of the whole journey: weights, data, results."})
    draft: str = field(default="distilled", metadata={"help": "Folder in --work_dir of the draft."})
    dtype: str = field(default="bfloat16", metadata={"help": "bfloat16, or float32 for older CPUs."})
    prompts: int = field(default=24, metadata={"help": "Questions that are decoded in every way."})
    threads: int = field(default=2, metadata={"help": "Threads; two that share their cores are slower than one."})


def main() -> None:
    (options,) = TrlParser(Options).parse_args_and_config()
    torch.set_num_threads(options.threads)
    work = Path(options.work_dir)
    target = load_target(str(work / "target"), dtype=options.dtype)
    draft = load_draft(str(work / options.draft), dtype=options.dtype)
    rows = load_dataset("parquet", data_files=str(work / "data" / "gsm8k_test" / "data" / "*"), split="train")
    report = evaluate_draft(
        draft,
        target,
        load_tokenizer(str(work / "target")),
        dataset=rows.select(range(2 * options.prompts)),  # each prompt has a greedy and a sampled answer
        num_speed_prompts=options.prompts,
        batch_size=16,
        source="gsm8k_test",
    )
    for setting in report.settings:
        for way, found in (("assistant_model=", setting.assisted), ("SpeculativeDecoding", setting.speculative)):
            if found is not None:
                print(setting.decoding.temperature, way, found.num_assistant_tokens, found.speedup)
    share = bytes_read(draft, len(draft.generation_config.draft_vocabulary)) / bytes_read(target)
    write_result(
        work,
        f"speed-{options.draft}-{options.dtype}",
        {"share_of_bytes": share, "report": public_report(report).to_dict()},
    )


if __name__ == "__main__":
    main()
