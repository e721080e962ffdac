"""Hashes that tell whether two runs read the same prompts and chat template."""

import json
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_draftkd.utils.hashing import sha256


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
