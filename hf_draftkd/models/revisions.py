"""Which commit a loaded model is: transformers keeps none on it, and a figure without its commit cannot be checked."""

from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

_CONFIGS = ("config.json", "adapter_config.json")
_ATTRIBUTE = "_draftkd_revision"


def resolved_revision(name_or_path: str, revision: str | None = None) -> str | None:
    """The commit of a model that was loaded from the Hub, as the local cache knows it; None for a local directory."""
    if not name_or_path or Path(name_or_path).exists():
        return None
    try:
        found = [try_to_load_from_cache(name_or_path, name, revision=revision) for name in _CONFIGS]
    except HFValidationError:  # a name that cannot be a repository
        return None
    # .../models--org--name/snapshots/COMMIT/config.json
    return next((Path(path).parent.name for path in found if isinstance(path, str)), None)


def remember_revision(model: Any, name_or_path: str, revision: str | None) -> None:
    """Keep on a model the commit it was loaded at; the name alone would later stand for its newest commit."""
    setattr(model, _ATTRIBUTE, resolved_revision(name_or_path, revision))


def model_revision(model: Any) -> str | None:
    """The commit of a loaded model; None for one from a local directory or made in code.

    A model that was not loaded by `load_target` or `load_draft` is taken for the newest commit in the local cache.
    """
    if hasattr(model, _ATTRIBUTE):
        return getattr(model, _ATTRIBUTE)
    return resolved_revision(model.name_or_path)
