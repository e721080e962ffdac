"""Does memory stay flat as prompts grow? Prompts stream in from disk, shards stream out.

    python examples/benchmarks/generation_memory.py --prompts 1000 100000

Each number of prompts runs in a process of its own, with a target of a few thousand weights (the question is about the
prompts). Printed are the peak of anonymous memory, which only this process holds, and the peak of all resident memory,
which also counts pages of memory-mapped files that the system may take back at any time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def resident(kind: str) -> float:
    """Megabytes of this process: `RssAnon` or `VmRSS`, from Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {kind}: this benchmark needs Linux.")


def run(num_prompts: int, folder: Path) -> None:
    """Answer so many prompts in this process, and print its peaks."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from hf_draftkd import generate_alignment_data
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
    source = folder / "prompts.jsonl"
    with source.open("w") as file:
        for number in range(num_prompts):
            text = f"Prompt {number}: which function of the standard library sorts a list of {number} numbers?"
            file.write(json.dumps({"prompt": text}) + "\n")

    peaks = {"RssAnon": 0.0, "VmRSS": 0.0}
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.05):
            for kind in peaks:
                peaks[kind] = max(peaks[kind], resident(kind))

    before, start = resident("RssAnon"), time.perf_counter()
    thread = threading.Thread(target=watch)
    thread.start()
    data = generate_alignment_data(
        target, tokenizer, source, max_new_tokens=2, batch_size=64, output_dir=folder / "out", shard_size=256
    )
    finished.set()
    thread.join()
    seconds = time.perf_counter() - start
    figures = [f"{number:,.0f}" for number in (num_prompts, len(data), seconds, before, *peaks.values())]
    print(f"| {' | '.join(figures)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        run(options.prompts[0], Path(options.folder))
        return
    print("| prompts | rows | seconds | anonymous MB before | anonymous MB at most | resident MB at most |")
    print("|---|---|---|---|---|---|", flush=True)
    for number in options.prompts:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--prompts", str(number), "--folder", folder]
            subprocess.run(command, check=True, env={**os.environ, "HF_DATASETS_CACHE": f"{folder}/cache"})


if __name__ == "__main__":
    main()
