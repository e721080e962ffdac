"""Where data come from, in values that can be compared: hashes of prompts, template, tokenizer and weights."""

import hashlib
import json
import platform
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_draftkd import __version__

_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers")
_SAMPLED = 64  # numbers looked at in each weight


def weights_fingerprint(model: PreTrainedModel) -> str:
    """A hash over some numbers of every weight: another revision or a tuned copy of a model has another one.

    Targets may have hundreds of gigabytes, so not every number is read; training moves all of them.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.is_meta:  # offloaded by accelerate
            continue
        flat = weight.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLED)
        # Bytes rather than floats: quantised weights are integers, and rounding must not hide a difference.
        digest.update(flat[::step].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A hash of the chat template; None where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return None if not template else text_hash([json.dumps(template, sort_keys=True)])


def text_hash(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        # The length keeps ["ab", "c"] apart from ["a", "bc"].
        digest.update(f"{len(text)}:".encode() + text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    return {
        "python": platform.python_version(),
        "hf_draftkd": __version__,
        **{name: version(name) for name in _PACKAGES},
    }


def plain(value: Any) -> str:
    """A row as text that is the same in every process."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
