"""Processes for tests, forked from a server that has imported the package once: trl's import alone takes seconds."""

import multiprocessing
import os
import socket
import sys
import time
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["pytest", "tests.training.trainers", "tests.data.small", "hf_draftkd.data.synthesis"])


def _run(log: str, environment: dict[str, str], module: str, name: str, arguments: tuple[Any, ...]) -> None:
    import torch

    os.environ.update(environment)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    torch.set_num_threads(1)
    getattr(import_module(module), name)(*arguments)
    if torch.distributed.is_initialized():
        # A process that leaves while the other still works would abort it.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def started(log: Path, module: str, name: str, *arguments: Any, **environment: str) -> BaseProcess:
    """A process that calls a test module's function; what it says on stderr goes to `log`."""
    process = _SERVER.Process(target=_run, args=(str(log), environment, module, name, arguments), daemon=True)
    # The server, which starts with its first process, imports the package where it stands.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        process.start()
    return process


def in_two_processes(folder: Path, module: str, name: str, *arguments: Any, **environment: str) -> None:
    """Call a function in two processes with the environment that `torchrun` gives to each."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    logs = [folder / f"process-{rank}.log" for rank in range(2)]
    processes = [
        started(log, module, name, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared, **environment)
        for rank, log in enumerate(logs)
    ]
    deadline = time.monotonic() + 240
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            break
        time.sleep(0.05)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
