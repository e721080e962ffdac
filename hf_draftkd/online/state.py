"""The state of an online draft on disk: two safetensors files, of which one is the point where a saving is complete.

`draft-N.safetensors` holds the weights as they are trained and the optimiser's moments after N kept updates.
`requests.safetensors` holds the buffer, counters and history, and names the draft file it belongs to. The draft is
written first, the requests take their name in one step, and only then older drafts are removed: whenever the process
dies, the two that are found belong together.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

REQUESTS = "requests.safetensors"
_FORMAT = 1


def save_state(
    directory: str | os.PathLike[str],
    draft: Mapping[str, Tensor] | None,
    requests: Mapping[str, Tensor],
    facts: dict[str, Any],
    num_updates: int,
) -> None:
    """Write a state whole, or leave the one before.

    Args:
        directory: Created if need be.
        draft: Weights and moments; None where the file of `num_updates` is known to be there.
        requests: The buffer's tensors.
        facts: What else there is, as JSON.
        num_updates: Updates that the draft has seen and kept.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"draft-{num_updates:08d}.safetensors"
    if draft is not None:
        _write(folder / name, draft, {})
    _write(folder / REQUESTS, requests, {"format": str(_FORMAT), "facts": json.dumps({**facts, "draft_file": name})})
    for old in folder.glob("draft-*.safetensors"):
        if old.name != name:
            old.unlink()


def has_state(directory: str | os.PathLike[str]) -> bool:
    """Whether a saving was ever completed here."""
    return Path(directory, REQUESTS).is_file()


def saved_by(directory: str | os.PathLike[str]) -> str | None:
    """The `writer` among the facts of the state that lies here; None where none can be read."""
    try:
        with safe_open(Path(directory, REQUESTS), framework="pt") as file:
            return str(json.loads((file.metadata() or {})["facts"]).get("writer"))
    except (OSError, SafetensorError, ValueError, KeyError):
        return None


def load_state(directory: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Read what `save_state` wrote.

    Returns:
        The draft's tensors, the buffer's, and the facts.

    Raises:
        ValueError: A file is missing or cannot be read.
    """
    folder = Path(directory)
    try:
        with safe_open(folder / REQUESTS, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != str(_FORMAT):
            raise ValueError(f"it is of format {metadata.get('format')!r}, and this version reads {_FORMAT}")
        facts = json.loads(metadata["facts"])
        return load_file(folder / facts["draft_file"]), load_file(folder / REQUESTS), facts
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"The state in {str(folder)!r} cannot be read: {error}. Restore the folder, or name another `output_dir` "
            "to start anew."
        ) from error


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    unfinished = path.with_name(f"_unfinished-{path.name}")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, unfinished, metadata)
        os.replace(unfinished, path)
    finally:
        # Half a file on a full disk would keep it full.
        unfinished.unlink(missing_ok=True)
