"""Does memory stay flat as prompts grow? Prompts stream in from disk, shards stream out.

    python examples/benchmarks/generation_memory.py --prompts 1000 100000

Each number of prompts runs in a separate process, with a target of a few thousand weights (the question is about the
prompts). Printed is anonymous memory, which only this process holds, in MB: before; the most that plain `load_dataset`
adds when it reads the same file, in a separate process; the most that reading and checking the prompts adds here; and
the most that answering adds on top. Resident memory also counts pages of memory-mapped files, which the system may take
back at any time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def resident(kind: str) -> float:
    """Megabytes of this process: `RssAnon` or `VmRSS`, from Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {kind}: this benchmark needs Linux.")


def run(num_prompts: int, folder: Path, alone: str) -> None:
    """Answer so many prompts in this process, and print its peaks."""
    source = folder / "prompts.jsonl"
    if not alone:
        read_alone(source)
        return
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from hf_draftkd import generate_alignment_data
    from hf_draftkd.data.prompts import load_prompts
    from hf_draftkd.models.demo import demo_path
    from hf_draftkd.models.loading import load_tokenizer

    logging.disable_progress_bar()
    tokenizer = load_tokenizer(demo_path("target"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=tokenizer.eos_token_id,
    )
    target = LlamaForCausalLM(config).eval()
    before, start = resident("RssAnon"), time.perf_counter()
    with watching() as reading:
        prompts = load_prompts(source)
    read = resident("RssAnon")
    with watching() as answering:
        data = generate_alignment_data(
            target, tokenizer, prompts, max_new_tokens=2, batch_size=64, output_dir=folder / "out", shard_size=256
        )
    seconds = time.perf_counter() - start
    added = [float(alone), reading["RssAnon"] - before, answering["RssAnon"] - read]
    numbers = [f"{number:,.0f}" for number in (num_prompts, len(data), seconds, before, *added, answering["VmRSS"])]
    print(f"| {' | '.join(numbers)} |")


@contextmanager
def watching() -> Iterator[dict[str, float]]:
    """The highest `RssAnon` and `VmRSS` until the block ends."""
    peaks = {kind: resident(kind) for kind in ("RssAnon", "VmRSS")}
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.02):
            for kind in peaks:
                peaks[kind] = max(peaks[kind], resident(kind))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        finished.set()
        thread.join()


def read_alone(source: Path) -> None:
    """What `load_dataset` itself adds at most when it reads the prompts."""
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    before = resident("RssAnon")
    with watching() as peaks:
        load_dataset("json", data_files=str(source), split="train")
    print(peaks["RssAnon"] - before)


def write_prompts(num_prompts: int, source: Path) -> None:
    with source.open("w") as file:
        for number in range(num_prompts):
            text = f"Prompt {number}: which function of the standard library sorts a list of {number} numbers?"
            file.write(json.dumps({"prompt": text}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--alone", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        run(options.prompts[0], Path(options.folder), options.alone)
        return
    print("| prompts | rows | seconds | MB before | `load_dataset` alone | reading | answering | resident at most |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for number in options.prompts:
        with tempfile.TemporaryDirectory() as folder:
            write_prompts(number, Path(folder, "prompts.jsonl"))
            command = [sys.executable, __file__, "--prompts", str(number), "--folder", folder]
            # A cache for each: what one has read, the other would find.
            caches = [{**os.environ, "HF_DATASETS_CACHE": f"{folder}/cache-{part}"} for part in ("alone", "ours")]
            alone = subprocess.run(command, check=True, env=caches[0], stdout=subprocess.PIPE, text=True).stdout
            subprocess.run([*command, "--alone", alone.strip()], check=True, env=caches[1])


if __name__ == "__main__":
    main()
