"""Hashes that tell whether two runs read the same prompts, chat template and weights."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_draftkd.utils.hashing import sha256

_SAMPLED = 64  # numbers looked at in each weight


def weights_fingerprint(model: PreTrainedModel) -> str:
    """A hash over some numbers of every weight: another revision or a tuned copy of a model has another one.

    Targets may have hundreds of gigabytes, so not every number is read; training moves all of them.
    """

    def pieces() -> Iterator[str | torch.Tensor]:
        for name, weight in sorted(model.state_dict().items()):
            yield f"{name} {tuple(weight.shape)} {weight.dtype}"
            if not weight.is_meta:  # offloaded by accelerate
                flat = weight.detach().reshape(-1)
                yield flat[:: max(1, flat.numel() // _SAMPLED)]

    return sha256(pieces())[:16]


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A hash of the chat template; None where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return None if not template else text_hash([json.dumps(template, sort_keys=True)])


def text_hash(texts: Iterable[str]) -> str:
    """A hash of texts, in order; their lengths keep ["ab", "c"] apart from ["a", "bc"]."""
    return sha256(f"{len(text)}:{text}" for text in texts)[:16]


def plain(value: Any) -> str:
    """A row as text that is the same in every process."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
