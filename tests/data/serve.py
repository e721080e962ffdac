"""`transformers serve` in its own process, on a port that the system chooses."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.processes import started

STARTING_SECONDS = 120.0


def serve(model: Path) -> None:
    """What `transformers serve MODEL` does."""
    from transformers.cli.transformers import main

    options = ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", "0"]
    sys.argv = ["transformers", "serve", str(model), *options]
    main()


@contextmanager
def transformers_serve(model: Path, log: Path) -> Iterator[str]:
    """Serve `model` until the block ends; gives the base address. What the server says goes to `log`."""
    process = started(log, __name__, "serve", model)
    try:
        yield f"http://127.0.0.1:{_port(process, log)}/v1"
    finally:
        process.kill()
        process.join()


def _port(process: BaseProcess, log: Path) -> int:
    # The model is loaded before the server listens, and the line comes once it does: nothing is left to poll for.
    end = time.monotonic() + STARTING_SECONDS
    while time.monotonic() < end and process.is_alive():
        if log.exists() and (running := re.search(r"Uvicorn running on http://127\.0\.0\.1:(\d+)", log.read_text())):
            return int(running[1])
        time.sleep(0.1)
    raise RuntimeError(f"`transformers serve` did not start: {log.read_text()[-2000:]}")
