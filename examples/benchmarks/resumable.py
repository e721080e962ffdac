"""Many runs, a few at a time, each with one thread; finished ones are kept in a file of JSON lines and not repeated."""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any


def done_so_far(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> result. A last line that a killed run left unfinished is passed over."""
    results = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        results[entry.pop("name")] = entry
    return results


def _quiet() -> None:
    import datasets
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _workers(jobs: int) -> Executor:
    if jobs == 0:
        # A thread, so that results come back in the same way.
        return ThreadPoolExecutor(1, initializer=_quiet)
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_quiet)


def run_all(
    work: Callable[[dict[str, Any]], dict[str, Any]], wanted: Mapping[str, dict[str, Any]], path: Path, *, jobs: int
) -> dict[str, dict[str, Any]]:
    """Run what is not in the file yet.

    Args:
        work: Takes a run's description and returns its result; defined at the top of a module.
        wanted: Name -> description.
        path: The file of JSON lines.
        jobs: Processes at a time; 0 does all in this one.

    Returns:
        Name -> result, of all that are wanted.

    Raises:
        SystemExit: Some failed. The others are in the file, and the next call tries again.
    """
    results = done_so_far(path)
    missing = [name for name in wanted if name not in results]
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    failed, began = [], time.monotonic()
    if path.is_file() and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as file:
            file.write("\n")
    if not missing:
        return {name: results[name] for name in wanted}
    with _workers(jobs) as pool, path.open("a") as file:
        futures = {pool.submit(work, wanted[name]): name for name in missing}
        for number, future in enumerate(as_completed(futures), 1):
            name = futures[future]
            if error := future.exception():
                failed.append(f"{name}: {error!r}")
            else:
                results[name] = future.result()
                file.write(json.dumps({"name": name} | results[name]) + "\n")
                file.flush()
            seconds = time.monotonic() - began
            print(f"{number} of {len(missing)} after {seconds:.0f} s: {name}", file=sys.stderr, flush=True)
    if failed:
        raise SystemExit("These runs failed; call again to repeat them:\n" + "\n".join(failed))
    return {name: results[name] for name in wanted}
