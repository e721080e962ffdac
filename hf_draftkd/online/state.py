"""The state of an online draft on disk: one safetensors file, replaced in one step, so that it is always of one save.

Tensors are named `group/name`: the draft's weights as they are trained, the optimiser's moments, the buffer. Counters
and history are the JSON of its metadata.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_draftkd.utils.files import replacing

STATE = "state.safetensors"


def save_state(directory: str, groups: Mapping[str, Mapping[str, Tensor]], facts: dict[str, Any]) -> None:
    """Write a whole state, or leave the previous one; a missing directory is made, `facts` are JSON values."""
    path = Path(directory, STATE)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{group}/{name}": tensor.detach().cpu().contiguous()
        for group, named in groups.items()
        for name, tensor in named.items()
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"facts": json.dumps(facts)})


def last_written(directory: str) -> int | None:
    """When the state that lies here was written, in nanoseconds; None where there is none."""
    try:
        return Path(directory, STATE).stat().st_mtime_ns
    except FileNotFoundError:
        return None


def read_facts(directory: str) -> dict[str, Any] | None:
    """The facts of the state that lies here, None where there is none; a `ValueError` if it cannot be read."""
    path = Path(directory, STATE)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["facts"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"The state in {directory!r} cannot be read: {error}. Restore the folder, or name another `output_dir` to "
            "start again."
        ) from error


def load_tensors(directory: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of a state whose facts could be read, by group and name."""
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in load_file(Path(directory, STATE)).items():
        group, _, name = key.partition("/")
        groups[group][name] = tensor
    return groups
