"""Step 2: alignment data in all three situations of https://arxiv.org/abs/2503.07807, with cached distributions.

python examples/smollm2/answers.py --work_dir WORK [--data_dir PROMPTS]

- gsm8k: there are queries of the domain, and the target answers them greedily, as the draft will meet them;
- seeds: there are general instructions, answered greedily and at temperature 1, so that other text is not forgotten;
- synthetic: there is nothing, and the target writes the queries itself before it answers them.

The target runs in bfloat16, in which it is later served and measured (`--dtype` says otherwise). A killed run loses the
batch that it was at, and step 4 takes the shards that are finished: this may be stopped when there is enough, and other
sets written first (`--sets`).
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from journey import read_prompts
from trl import TrlParser

from hf_draftkd import generate_alignment_data, load_target, load_tokenizer


@dataclass
class Options:
    """Sizes of the data; those of the stored results are the defaults."""

    work_dir: str = field(default="smollm2", metadata={"help": "Folder of the whole journey: weights, data, results."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of prompt files; by default the Hub's."})
    sets: list[str] = field(default_factory=lambda: ["gsm8k", "seeds", "synthetic"], metadata={"help": "To write."})
    gsm8k: int = field(default=3000, metadata={"help": "Questions of GSM8K's training split."})
    first: int = field(default=0, metadata={"help": "The first; later ones go into a folder of their own."})
    seeds: int = field(default=48, metadata={"help": "General instructions."})
    synthetic: int = field(default=32, metadata={"help": "Queries that the target writes."})
    max_new_tokens: int = field(default=160, metadata={"help": "Longest answer, in tokens."})
    batch_size: int = field(default=64, metadata={"help": "Prompts decoded together."})
    dtype: str = field(default="bfloat16", metadata={"help": "bfloat16, or float32 for older CPUs."})


def main() -> None:
    (options,) = TrlParser(Options).parse_args_and_config()
    disable_progress_bars()
    work = Path(options.work_dir)
    target, tokenizer = load_target(str(work / "target"), dtype=options.dtype), load_tokenizer(str(work / "target"))
    common: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens,
        "batch_size": options.batch_size,
        "shard_size": 2 * options.batch_size,
        "cache_distributions": {"top_k": 64},
    }

    def run(name: str) -> dict[str, Any]:
        if name == "gsm8k":
            rows = read_prompts("gsm8k_train", options.data_dir)
            return {"prompts": rows.select(range(options.first, min(options.first + options.gsm8k, len(rows))))}
        if name == "seeds":
            return {"prompts": read_prompts("seeds", options.data_dir, options.seeds), "temperatures": [0.0, 1.0]}
        if name == "synthetic":
            return {"scenario": "synthetic", "num_prompts": options.synthetic, "script": "latin"}
        raise SystemExit(f"There is no set {name!r}: choose among gsm8k, seeds and synthetic.")

    for name in options.sets:
        start = time.perf_counter()
        folder = work / "data" / (f"{name}-from-{options.first}" if name == "gsm8k" and options.first else name)
        rows = generate_alignment_data(target, tokenizer, output_dir=str(folder), **run(name), **common)
        tokens = sum(len(ids) for ids in rows["completion_ids"])
        print(f"{name}: {len(rows)} rows, {tokens} tokens, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
