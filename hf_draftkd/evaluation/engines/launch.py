"""Start a server of an engine on this machine, wait until it answers, and stop it."""

import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from hf_draftkd.evaluation.engines.protocol import Engine, ServedPair

_START_SECONDS = 900  # vLLM compiles


@contextmanager
def launched(engine: Engine, pair: ServedPair) -> Iterator[str]:
    """Serve a pair until the block ends; gives the address.

    Raises:
        ValueError: The program is not there, or it stopped before it answered; the end of what it said is quoted.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words, variables = engine.command(pair, port)
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log, _terminated_like_interrupted():
        try:
            process = subprocess.Popen(
                words,
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise ValueError(
                f"{engine.name} cannot be started ({error}). Install it, and name its program with `engine_binary`."
            ) from error
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not _answers(engine, url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    said = log.read().decode(errors="replace").strip()
                    raise ValueError(f"{engine.name} did not start: {' '.join(words)}\n{said[-1500:]}")
                time.sleep(0.2)
            yield url
        finally:
            _stop(process)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """A command that is told to end stops its servers first, as Ctrl-C makes it: they are sessions of their own."""
    if threading.current_thread() is not threading.main_thread():  # only there can a signal be handled
        yield
        return

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _answers(engine: Engine, url: str) -> bool:
    try:
        engine.tokenize(url, "a")
    except (ValueError, ConnectionError):  # it is still loading
        return False
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    """With what it started itself: vLLM has workers."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, how)
            process.wait(timeout=20)
