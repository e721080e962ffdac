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
_STOP_SECONDS = 20


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
    with tempfile.TemporaryFile() as log, _ended_by_signals():
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
            try:
                _stop(process, signal.SIGTERM)
            finally:
                _stop(process, signal.SIGKILL)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A command that is ended or interrupted stops its servers first, as they are sessions of their own; further
    signals do not keep it from that.
    """
    if threading.current_thread() is not threading.main_thread():  # only there can a signal be handled
        yield
        return

    def end(number: int, _: Any) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    # A shell has its background jobs ignore Ctrl-C.
    before = {each: handler for each, handler in handlers.items() if handler != signal.SIG_IGN}
    try:
        for each in before:
            signal.signal(each, end)
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _answers(engine: Engine, url: str) -> bool:
    try:
        engine.tokenize(url, "a")
    except (ValueError, ConnectionError):  # it is still loading
        return False
    return True


def _stop(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """With what it started itself: vLLM has workers."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, how)
        process.wait(timeout=_STOP_SECONDS)
