"""Whether llama.cpp's converter takes a pair's tokenizer, and by which name llama.cpp knows how it cuts text.

The converter does not read how a byte-level tokenizer splits text. It hashes the ids of one text and looks the hash up,
so a custom vocabulary is refused, whatever its rules.
"""

import json
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

from transformers import PreTrainedTokenizerBase

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
# The expressions of llama-vocab.cpp that are one of tokenizers' own pre-tokenizers; others are written out as patterns.
RULES = {"gpt-2": [_BYTES], "smollm": [_DIGITS, _BYTES]}


@cache
def converter() -> dict[str, Any]:
    """The converter's `build`, the `text` that it looks at, and the hashes `known` to it."""
    return json.loads(files("hf_draftkd.hub").joinpath("llama_cpp_converter.json").read_text(encoding="utf-8"))


def conversion_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What `PairFacts` says about a conversion for llama.cpp: nothing for a tokenizer that is no byte-level BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {} if backend is None else json.loads(backend.to_str())
    if parts.get("model", {}).get("type") != "BPE" or (parts.get("decoder") or {}).get("type") != "ByteLevel":
        return {}
    known = sha256(str(tokenizer.encode(converter()["text"])).encode()).hexdigest() in converter()["known"]
    return {"llama_cpp_converts": known, "llama_cpp_pre_tokenizer": None if known else _rules_name(parts)}


def _rules_name(parts: dict[str, Any]) -> str | None:
    split, model = parts["pre_tokenizer"] or {}, parts["model"]
    steps = split["pretokenizers"] if split.get("type") == "Sequence" else [split]
    if parts["normalizer"] is not None or model["ignore_merges"]:
        return None
    return next((name for name, rules in RULES.items() if steps == rules), None)
