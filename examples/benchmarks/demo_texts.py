"""What the target of the demo pair writes, kept on disk, and how good a draft is on its test queries."""

import functools
import json
import time
from pathlib import Path
from typing import Any

from datasets import Dataset

GAMMA = 5
# Sampling setting -> its name in tables.
TEMPERATURES = {0.0: "greedy", 1.0: "T=1"}


def write_texts(folder: Path, *, train: int, held_out: int, max_new_tokens: int) -> dict[str, Any]:
    """Let the target answer the demo queries greedily and at temperature 1, unless it has.

    Args:
        folder: Where the rows are, one folder per split.
        train: Training prompts.
        held_out: Prompts of the dev and of the test queries each.
        max_new_tokens: Longest answer.

    Returns:
        `seconds`: split -> how long writing took; `threads`: on how many.
    """
    import torch

    from hf_draftkd import generate_alignment_data, load_target
    from hf_draftkd.data.prompts import load_prompts
    from hf_draftkd.models.demo import demo_path
    from hf_draftkd.models.loading import load_tokenizer

    wanted = {"train": train, "held_out": held_out, "max_new_tokens": max_new_tokens}
    record = folder / "texts.json"
    if record.is_file():
        found = json.loads(record.read_text())
        if found["wanted"] != wanted:
            raise SystemExit(f"{folder} holds texts of other sizes, {found['wanted']}: give another --output_dir.")
        return found
    target, tokenizer = load_target(demo_path("target"), dtype="float32"), load_tokenizer(demo_path("target"))
    seconds = {}
    for split, count in (("train", train), ("dev", held_out), ("test", held_out)):
        began = time.perf_counter()
        rows = generate_alignment_data(
            target,
            tokenizer,
            load_prompts(demo_path(f"{split}.jsonl"), limit=count),
            max_new_tokens=max_new_tokens,
            temperatures=tuple(TEMPERATURES),
            batch_size=32,
        )
        seconds[split] = round(time.perf_counter() - began, 1)
        rows.to_parquet(str(folder / f"{split}.parquet"))
    result = {"wanted": wanted, "seconds": seconds, "threads": torch.get_num_threads()}
    unfinished = record.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result))
    unfinished.replace(record)
    return result


@functools.cache
def texts(folder: Path, split: str) -> Dataset:
    """The rows of a split."""
    return Dataset.from_parquet(str(folder / f"{split}.parquet"), cache_dir=str(folder / ".cache"))


@functools.cache
def the_target() -> Any:
    """The target, loaded once a process."""
    from hf_draftkd import load_target
    from hf_draftkd.models.demo import demo_path

    return load_target(demo_path("target"), dtype="float32")


def metrics(draft: Any, folder: Path, split: str = "test") -> dict[str, dict[str, list[float]]]:
    """Exact target calls of the draft on the target's texts.

    Returns:
        Setting -> `tokens` and `calls` of each text at γ = 5, in the order of the prompts: their sums' ratio is block
        efficiency.
    """
    from hf_draftkd.decoding.setting import DecodingSetting
    from hf_draftkd.evaluation.scoring import score_texts

    rows, result = texts(folder, split), {}
    was_training = draft.training
    draft.eval()
    for temperature, name in TEMPERATURES.items():
        chosen = rows.filter(lambda row, wanted=temperature: row["temperature"] == wanted)
        pairs = list(zip(chosen["prompt_ids"], chosen["completion_ids"], strict=True))
        (scored,) = score_texts(
            the_target(),
            [draft],
            pairs,
            DecodingSetting(temperature=temperature),
            vocab_size=draft.config.vocab_size,
            verification=["rejection_sampling" if temperature else "exact_match"],
        ).drafts
        sums = next(iter(scored.values()))
        calls = sums.target_calls[:, GAMMA - 1].tolist()
        result[name] = {"tokens": sums.num_tokens.tolist(), "calls": [round(each, 5) for each in calls]}
    draft.train(was_training)
    return result


def pooled(results: list[dict[str, dict[str, list[float]]]], setting: str) -> tuple[list[float], list[float]]:
    """Tokens and calls by prompt, added up over the seeds."""
    columns = [[result[setting][key] for result in results] for key in ("tokens", "calls")]
    tokens, calls = ([sum(values) for values in zip(*column, strict=True)] for column in columns)
    return tokens, calls


def ratio(result: dict[str, dict[str, list[float]]], setting: str) -> float:
    """Block efficiency of one run."""
    return sum(result[setting]["tokens"]) / sum(result[setting]["calls"])
