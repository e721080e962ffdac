"""Alignment data for a draft, in all three situations of https://arxiv.org/abs/2503.07807, from the demo target.

    python examples/alignment_data.py --output_dir alignment_data

- queries: there are prompts of users, and the target answers them (greedily and sampled), with its distributions kept;
- curated: there is only domain text, here the docstrings of a few modules of the standard library, cut into openings;
- synthetic: there is nothing, and the target writes the queries itself before it answers them.

It also shows that a killed run loses nothing: one is killed with `kill -9` in the middle of its shards and started
again, and its rows are compared with those of an undisturbed run.
"""

import argparse
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from datasets import Dataset, load_dataset

import hf_draftkd
from hf_draftkd import generate_alignment_data, load_target
from hf_draftkd.cli.main import dispatch
from hf_draftkd.data.curation import curate_prompts
from hf_draftkd.data.synthesis import synthesize_prompts
from hf_draftkd.hub.dataset_card import write_card
from hf_draftkd.models.demo import demo_path
from hf_draftkd.models.loading import load_tokenizer

MODULES = "bisect calendar collections csv functools heapq itertools json pathlib random shutil statistics string"


def docstrings() -> Dataset:
    """Domain text without queries: what the standard library says of its functions."""
    rows = []
    for name in MODULES.split():
        module = __import__(name)
        for member_name, member in inspect.getmembers(module, callable):
            text = inspect.getdoc(member)
            if text and not member_name.startswith("_"):
                rows.append({"text": f"{name}.{member_name}: {text}", "domain": "python"})
    return Dataset.from_list(rows)


def show(title: str, rows: Dataset, seconds: float) -> None:
    """One row of each kind, and the numbers."""
    tokens = sum(len(ids) for ids in rows["completion_ids"])
    stopped = sum(reason == "stop" for reason in rows["finish_reason"])
    print(f"\n== {title}: {len(rows)} rows, {tokens} tokens, {stopped} ended on their own")
    print(f"   {seconds:.1f} s: {len(rows) / seconds:.1f} rows/s, {tokens / seconds:.0f} tokens/s")
    row = rows[0]
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    answer = row["completion"] if isinstance(row["completion"], str) else row["completion"][0]["content"]
    for name, text in (("prompt", prompt), ("completion", answer)):
        quoted = json.dumps(text, ensure_ascii=False)
        print(f"   {name}: {quoted[:100]}{'...' if len(quoted) > 100 else ''}")
    print(f"   {len(row['prompt_ids'])} tokens read, {len(row['completion_ids'])} written, {row['ids_source']}")


def killed_and_resumed(folder: Path, options: list[str], shards_before: int) -> int | None:
    """Start `draftkd generate`, kill it once it has so many shards, start it again.

    Returns:
        The shards that it had when it was killed; None where it had ended before.
    """
    command = [sys.executable, "-m", "hf_draftkd", "generate", *options, "--output_dir", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(hf_draftkd.__file__).parents[1])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(folder.glob("data/train-*"))) < shards_before:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(list(folder.glob("data/train-*"))) if process.returncode == -signal.SIGKILL else None
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("alignment_data"))
    parser.add_argument("--prompts", type=int, default=32, help="prompts of each kind")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--query_tokens", type=int, default=192, help="of the target's queries, at most")
    options = parser.parse_args()
    if options.output_dir.is_dir() and any(options.output_dir.iterdir()):
        parser.error(f"{options.output_dir} is not empty: rows that are there would be read, and reading be timed.")
    # float32: few CPUs compute in bfloat16, and emulating it takes several times as long.
    target, tokenizer = load_target(demo_path("target"), dtype="float32"), load_tokenizer(demo_path("target"))
    batch_size = min(16, options.prompts)
    settings = {"max_new_tokens": options.max_new_tokens, "batch_size": batch_size, "seed": 0}
    runs = []

    start = time.perf_counter()
    folder = options.output_dir / "queries"
    rows = generate_alignment_data(
        target,
        tokenizer,
        load_dataset("json", data_files=demo_path("train.jsonl"), split=f"train[:{options.prompts}]"),
        temperatures=(0.0, 1.0),
        output_dir=folder,
        cache_distributions={"top_k": 64},
        **settings,
    )
    write_card(folder, rows)
    show("queries", rows, seconds := time.perf_counter() - start)
    runs.append(("queries", rows, seconds))
    tokens = sum(len(ids) for ids in rows["completion_ids"])
    stored = sum(path.stat().st_size for path in folder.glob("data/*.parquet"))
    print(f"   on disk, with the 64 likeliest tokens at each place: {stored / tokens:.0f} bytes a token")

    start = time.perf_counter()
    prompts, counts = curate_prompts(docstrings(), tokenizer, opening_tokens=32, limit=options.prompts)
    rows = generate_alignment_data(
        target,
        tokenizer,
        prompts,
        scenario="curated",
        prompt_counts=counts,
        output_dir=options.output_dir / "curated",
        **settings,
    )
    show(f"curated {counts}", rows, seconds := time.perf_counter() - start)
    runs.append(("curated", rows, seconds))

    start = time.perf_counter()
    prompts, counts = synthesize_prompts(
        target, tokenizer, options.prompts, max_new_tokens=options.query_tokens, batch_size=batch_size
    )
    rows = generate_alignment_data(
        target,
        tokenizer,
        prompts,
        scenario="synthetic",
        prompt_counts=counts,
        output_dir=options.output_dir / "synthetic",
        **settings,
    )
    show(f"synthetic {counts}", rows, seconds := time.perf_counter() - start)
    runs.append(("synthetic", rows, seconds))

    command = ["--target_model", demo_path("target"), "--dataset", demo_path("train.jsonl")]
    command += ["--max_prompts", str(options.prompts), "--temperatures", "0", "1", "--dtype", "float32"]
    command += ["--max_new_tokens", str(options.max_new_tokens), "--batch_size", "8", "--shard_size", "8"]
    before = killed_and_resumed(options.output_dir / "killed", command, shards_before=2)
    dispatch(["generate", *command, "--output_dir", str(options.output_dir / "undisturbed")])
    killed, undisturbed = (
        load_dataset(str(options.output_dir / name), split="train") for name in ("killed", "undisturbed")
    )
    equal = killed.to_list() == undisturbed.to_list()
    how = "ended before it could be killed" if before is None else f"killed with {before} shards done, resumed"
    print(f"\n== {how}: {len(killed)} rows, equal to the undisturbed run: {equal}")
    if not equal:
        raise SystemExit(1)

    print("\n| scenario | rows | completion tokens | seconds | rows/s | tokens/s |\n|---|---|---|---|---|---|")
    for name, rows, seconds in runs:
        tokens = sum(len(ids) for ids in rows["completion_ids"])
        print(
            f"| {name} | {len(rows)} | {tokens} | {seconds:.1f} | {len(rows) / seconds:.1f} | {tokens / seconds:.0f} |"
        )


if __name__ == "__main__":
    main()
