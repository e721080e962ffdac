"""Run `draftkd` as a user does: in its own process, with exit code and output."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def draftkd(*argv, launcher: tuple[str, ...] = (), timeout: int = 240) -> subprocess.CompletedProcess:
    """`python -m hf_draftkd *argv`, or `python -m LAUNCHER -m hf_draftkd *argv`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, *(("-m", *launcher) if launcher else ()), "-m", "hf_draftkd", *map(str, argv)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
