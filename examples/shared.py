"""What several examples do: remember the settings of a run that can be resumed, write whole files, print intervals."""

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any


def claim(folder: Path, options: Namespace) -> dict[str, Any]:
    """Make `folder` the place of a run with these options, or resume the run that is there.

    Returns:
        The options without `output_dir`, for the result.

    Raises:
        SystemExit: The run that is there has other options: its parts do not belong to this one.
    """
    settings = {name: value for name, value in vars(options).items() if name != "output_dir"}
    path = folder / "settings.json"
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        unlike = [name for name in sorted(there | settings) if there.get(name) != settings.get(name)]
        if unlike:
            told = ", ".join(f"{name}={there.get(name)}" for name in unlike)
            raise SystemExit(f"{folder} holds a run with {told}. Go on with the same, or name another --output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)
    return settings


def write_json(path: Path, value: Any) -> None:
    """Write a file whole, or leave the one before."""
    unfinished = path.with_name(f"_unfinished-{path.name}")
    unfinished.write_text(json.dumps(value, indent=2), encoding="utf-8")
    os.replace(unfinished, path)


def read_seconds(path: Path) -> float:
    """The seconds that a step noted."""
    return json.loads(path.read_text(encoding="utf-8"))["seconds"]


def cell(estimate: dict[str, float], digits: int = 2) -> str:
    """A value and its 95% interval, which a single text does not have."""
    if "low" not in estimate:
        return f"{estimate['value']:.{digits}f}"
    return f"{estimate['value']:.{digits}f} [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"
