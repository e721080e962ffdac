"""Each contender in a separate process, in turn: honest peaks of memory, and a busy machine is busy for all."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def resident_mb(kind: str = "VmRSS") -> float:
    """Megabytes of this process that are in memory: now (`VmRSS`), or at most so far (`VmHWM`)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {kind}: this benchmark needs Linux.")


def forget_peak() -> None:
    """`VmHWM` starts again from here."""
    Path("/proc/self/clear_refs").write_text("5")


def in_own_process(script: str, job: dict[str, Any], *, threads: int | None = None) -> dict[str, Any]:
    """Run `python script --job JSON` and return the JSON object it prints last.

    Args:
        script: Path of the calling script.
        job: What it shall do there.
        threads: Threads of the process; by default as many as torch takes.

    Raises:
        RuntimeError: It failed; the message ends with what it said.
    """
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, script, "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{job} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rounds(
    script: str, jobs: dict[str, dict[str, Any]], num_rounds: int, results_file: Path | None = None
) -> dict[str, list[dict[str, Any]]]:
    """The results of every job by name: all of them once, then all of them again.

    Args:
        script: Path of the calling script.
        jobs: Name -> what its process shall do.
        num_rounds: How often each runs.
        results_file: JSON lines, one written as soon as a job is done. What it holds of the same jobs already is taken
            from there: delete it when the code, the machine or its load has changed.
    """
    known = _read_results(results_file)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    for number in range(1, num_rounds + 1):
        for name, job in jobs.items():
            key = _key(script, job, number)
            if key not in known:
                print(f"round {number} of {num_rounds}: {name}", file=sys.stderr, flush=True)
                known[key] = in_own_process(script, job)
                if results_file is not None:
                    line = {"script": Path(script).name, "job": job, "round": number, "result": known[key]}
                    with results_file.open("a") as file:
                        file.write(json.dumps(line) + "\n")
            results[name].append(known[key])
    return results


def _key(script: str, job: dict[str, Any], number: int) -> str:
    return json.dumps([Path(script).name, job, number], sort_keys=True)


def _read_results(results_file: Path | None) -> dict[str, dict[str, Any]]:
    if results_file is None or not results_file.exists():
        return {}
    whole, end, cut = results_file.read_text().rpartition("\n")
    if cut:
        # A run that was killed while it wrote.
        results_file.write_text(whole + end)
    lines = [json.loads(line) for line in whole.splitlines()]
    return {_key(line["script"], line["job"], line["round"]): line["result"] for line in lines}


def median(results: Iterable[dict[str, Any]], key: str) -> float:
    """The median over rounds; where a round holds several values, over all of them."""
    values = [result[key] if isinstance(result[key], list) else [result[key]] for result in results]
    return statistics.median(value for several in values for value in several)
