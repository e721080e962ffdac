"""Processes for tests, forked from a server that has imported the package once: trl's import alone takes seconds."""

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
_FORK, _SERVER = multiprocessing.get_context("fork"), multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["pytest", "tests.training.trainers", "tests.data.small", "hf_draftkd.data.synthesis"])


def _run(log: str, environment: dict[str, str], module: str, name: str, arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    torch.set_num_threads(1)
    function = getattr(import_module(module), name)
    # `Trainer.train()` collects garbage each time: not among all that was imported.
    gc.freeze()
    function(*arguments)
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


def python(*words: object, cwd: Path | None = None, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    """`python SCRIPT ...` or `python -m MODULE ...`, forked from the server, as scripts that it runs itself are."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "out", Path(folder) / "log"
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        given = [str(word) for word in words], str(cwd or ROOT), str(out)
        process = started(log, __name__, "_script", *given, **environment)
        process.join(timeout)
        process.kill()
        process.join()
        printed = out.read_text() if out.exists() else ""
        return subprocess.CompletedProcess(given[0], process.exitcode, printed, log.read_text())


def run(*words: object, cwd: Path) -> str:
    """What such a process printed, once it has succeeded."""
    done = python(*words, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _script(words: list[str], cwd: str, out: str) -> None:
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stdout.fileno())
    os.chdir(cwd)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # it may have pools
    subprocess.run = _forked(subprocess.run)
    multiprocessing.get_context = lambda method=None: _FORK  # type: ignore[assignment, misc] # whatever they ask for
    _execute(words)


def _execute(words: list[str]) -> None:
    """Be the Python that was started with these words."""
    if words[0] == "-m":
        sys.argv, sys.path[:0] = words[1:], [os.getcwd()]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = words, [str(Path(words[0]).resolve().parent)]
        runpy.run_path(words[0], run_name="__main__")


def _forked(run: Any) -> Any:
    """`subprocess.run`, but for scripts and our own commands, which are forked."""

    def forking(command: list[str], *, env: dict[str, str] | None = None, check: bool = False, **options: Any) -> Any:
        if command[0] != sys.executable or (command[1] == "-m" and command[2] != "hf_draftkd"):
            return run(command, env=env, check=check, **options)
        sys.stdout.flush()
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
            pid = os.fork()
            if pid == 0:
                code: Any = 0
                try:
                    # Renews torch's pool, lost in the fork, before the threads that load weights race to do so.
                    torch.set_num_threads(1)
                    os.environ |= env or {}
                    os.dup2(out.fileno(), sys.stdout.fileno())
                    os.dup2(log.fileno(), sys.stderr.fileno())
                    _execute(command[1:])
                except SystemExit as error:
                    code = error.code if isinstance(error.code, int) else int(error.code is not None)
                except BaseException:
                    traceback.print_exc()
                    code = 1
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            out.seek(0)
            log.seek(0)
            done = subprocess.CompletedProcess(command, code, out.read(), log.read())
        if code:
            sys.stderr.write(done.stderr)
        if check:
            done.check_returncode()
        return done

    return forking
