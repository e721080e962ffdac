"""The versions of Python and of the packages that a result depends on."""

import platform
from importlib.metadata import version

from hf_draftkd import __version__

_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers")


def package_versions() -> dict[str, str]:
    """Name -> version, `python` and `hf_draftkd` first."""
    return {
        "python": platform.python_version(),
        "hf_draftkd": __version__,
        **{name: version(name) for name in _PACKAGES},
    }
