"""`transformers serve` in its own process, on a port that the system chooses."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STARTING_SECONDS = 120.0


@contextmanager
def transformers_serve(model: Path, log: Path) -> Iterator[str]:
    """Serve `model` until the block ends; gives the base address. What the server says goes to `log`."""
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
    options = ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", "0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen([*command, *options], stdout=output, stderr=output, env=environment)
    try:
        yield f"http://127.0.0.1:{_port(process, log)}/v1"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    # The model is loaded before the server listens, and the line comes once it does: nothing is left to poll for.
    end = time.monotonic() + STARTING_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if running := re.search(r"Uvicorn running on http://127\.0\.0\.1:(\d+)", log.read_text()):
            return int(running[1])
        time.sleep(0.1)
    raise RuntimeError(f"`transformers serve` did not start: {log.read_text()[-2000:]}")
