"""The state of an online draft on disk: one file, replaced in one step, so that it is always of one save."""

import pickle
from pathlib import Path
from typing import Any

import torch

from hf_draftkd.utils.files import replacing

STATE = "state.pt"


def save_state(directory: str, state: dict[str, Any]) -> None:
    """Write a whole state of tensors and plain data, or leave the previous one; a missing directory is made."""
    path = Path(directory, STATE)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(state, temporary)


def read_state(directory: str, *, whole: bool = True) -> dict[str, Any] | None:
    """The state that lies here, on the CPU; None where there is none. Unless it is wanted whole, tensors stay on disk.

    Raises:
        ValueError: It cannot be read.
    """
    path = Path(directory, STATE)
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", mmap=not whole, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"The state in {directory!r} cannot be read: {error}. Restore the folder, or name another `output_dir` to "
            "start again."
        ) from error
