"""The state of an online draft on disk: two safetensors files that are only ever seen together.

`draft-N.safetensors` holds the weights as they are trained and the optimiser's moments after N kept updates.
`requests.safetensors` holds the buffer, counters and history, and names the draft file it belongs to. The draft is
written first, the requests replace their predecessor in one step, and only then are older drafts removed: whenever the
process dies, the two files that are found belong together.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_draftkd.utils.files import replacing

REQUESTS = "requests.safetensors"


def save_state(
    directory: str | os.PathLike[str],
    draft: Mapping[str, Tensor] | None,
    requests: Mapping[str, Tensor],
    facts: dict[str, Any],
) -> None:
    """Write a whole state, or leave the previous one.

    Args:
        directory: Created if need be.
        draft: Weights and moments; None where the draft file of this many updates is known to be there.
        requests: The buffer's tensors.
        facts: Everything else, as JSON; `num_updates` names the draft file.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"draft-{facts['num_updates']:08d}.safetensors"
    if draft is not None:
        _write(folder / name, draft, {})
    _write(folder / REQUESTS, requests, {"facts": json.dumps({**facts, "draft_file": name})})
    for old in folder.glob("draft-*.safetensors"):
        if old.name != name:
            old.unlink()


def read_facts(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The facts of the state that lies here; None where no saving was ever completed.

    Raises:
        ValueError: The file cannot be read.
    """
    path = Path(directory, REQUESTS)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["facts"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise _unreadable(directory, error) from error


def load_tensors(
    directory: str | os.PathLike[str], facts: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The draft's tensors and the buffer's.

    Raises:
        ValueError: A file is missing or damaged.
    """
    try:
        return load_file(Path(directory, facts["draft_file"])), load_file(Path(directory, REQUESTS))
    except (OSError, SafetensorError) as error:
        raise _unreadable(directory, error) from error


def check_same(directory: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse a state whose distributions mean something else here: a `ValueError` if anything in `current` differs."""
    for name, value in current.items():
        if saved[name] != value:
            raise ValueError(
                f"The state in {directory!r} was saved with {name}={saved[name]!r}, and here it is {value!r}, so the "
                "distributions in its buffer are of no use. Set it as it was, or name another `output_dir`."
            )


def _unreadable(directory: str | os.PathLike[str], error: Exception) -> ValueError:
    return ValueError(
        f"The state in {str(directory)!r} cannot be read: {error}. Restore the folder, or name another `output_dir` to "
        "start again."
    )


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
