"""What a tokenizer is, apart from how its files are written: the contents that give token ids their meaning."""

import json
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_draftkd.utils.hashing import sha256

# Cut up and put together by both tokenizers where their pipelines are written differently: case, accents and other
# normalisation, leading, inner and trailing space, digits, code, scripts without spaces, emoji, no text at all.
_PROBES = (
    "",
    " ",
    "Hello, world!",
    "  leading,  inner   and trailing  ",
    "tabs\tand\nlines\r\n\n\n",
    "don't DON'T we'LL naïve café cafe\u0301 Straße ﬁ ① Å",
    "0 12 345 6789 3.14159 1,000,000 2026-11-21",
    'def f(x: int) -> str:\n    return f"{x!r}"  # comment',
    "日本語のテキスト 中文文本 한국어 Ελληνικά русский العربية हिन्दी",
    "🙂 👩‍👩‍👧 →€ \u200b\u00a0 end",
    '{"name": "sorted", "arguments": {"reverse": true}}',
)


SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def listed_ids(ids: int | Iterable[int] | None) -> list[int]:
    """A config's `eos_token_id`, which may be None, a number or several, as a list."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def require_tokenizer(tokenizer: Any, argument: str = "tokenizer") -> None:
    """Refuse what is no tokenizer, such as the prompts where it was left out, by the name of the `argument`."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"`{argument}` must be the tokenizer that draft and target share, got a `{type(tokenizer).__name__}`. Load "
            "it with `load_tokenizer`; a processor has it as `.tokenizer`."
        )


def tokenizer_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id the tokenizer knows; added tokens included, holes counted."""
    return max(tokenizer.get_vocab().values()) + 1


def pad_id(model: PreTrainedModel, *wanted: int | None) -> int:
    """An id to pad with under a mask: the first wanted one that the model has a row for, or else 0.

    Published checkpoints have none, have -1, or have added a `[PAD]` that their embedding lacks.
    """
    rows = model.config.get_text_config().vocab_size
    return next((each for each in wanted if each is not None and 0 <= each < rows), 0)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash, 64 hexadecimal digits, of what maps text to token ids and back.

    Every token with its id, merges or scores, normaliser, pre-tokeniser, decoder and added tokens enter it. The chat
    template, the choice of bos, eos and pad among the tokens, truncation and padding, and the formatting of files do
    not: they can be changed without changing what an id means.
    """
    text = json.dumps(_contents(tokenizer), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return sha256([text])


def vocabulary_difference(draft: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> str | None:
    """The first difference that matters to a pair, as a sentence or two; None where there is none."""
    if draft is target:
        return None
    mine, theirs = _contents(draft), _contents(target)
    if mine == theirs:
        return None
    if difference := _token_difference(mine["vocab"], theirs["vocab"]):
        return difference
    for part in ("merges", "scores"):
        if mine["model"].get(part) != theirs["model"].get(part):
            return f"they have the same tokens, but other {part}."
    return _behaviour_difference(draft, target)


def _contents(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The parts that matter; lists are in an order that does not depend on any file."""
    vocab = tokenizer.get_vocab()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        # A tokenizer in Python has no description of itself beyond its class.
        return {"vocab": vocab, "model": {"type": type(tokenizer).__name__}, "pipeline": {}, "added_tokens": []}
    parts = json.loads(backend.to_str())
    model = parts["model"]
    pieces = model.pop("vocab", None)
    if isinstance(pieces, list):  # Unigram: [piece, score] in the order of ids
        model["scores"] = pieces
    return {
        "vocab": vocab,
        "model": model,
        "pipeline": {name: parts.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")},
        "added_tokens": sorted(
            ({key: value for key, value in token.items() if key != "special"} for token in parts["added_tokens"]),
            key=lambda token: token["id"],
        ),
    }


def _token_difference(draft: dict[str, int], target: dict[str, int]) -> str | None:
    differing = [token for token in draft.keys() | target.keys() if draft.get(token) != target.get(token)]
    if not differing:
        return None

    def smallest_id(token: str) -> tuple[int, str]:
        return min(ids[token] for ids in (draft, target) if token in ids), token

    first = min(differing, key=smallest_id)
    places = [
        f"id {ids[first]} in the {name}'s" if first in ids else f"absent from the {name}'s"
        for name, ids in (("draft", draft), ("target", target))
    ]
    sentence = f"token {first!r} is {places[0]} and {places[1]} ({len(differing)} tokens differ in all)."
    if draft.items() <= target.items():
        sentence += (
            " The draft's are all among the target's: to keep this draft, give it the target's tokenizer and new rows "
            "with `resize_token_embeddings`, and train it."
        )
    return sentence


def _behaviour_difference(draft: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> str | None:
    """Pipelines written differently may do the same (files of one tokenizer vary with the version that saved them)."""
    for text in _PROBES:
        mine, theirs = (t(text, add_special_tokens=False)["input_ids"] for t in (draft, target))
        if mine != theirs:
            return f"{text!r} is cut into {mine} by the draft's and {theirs} by the target's."
        mine, theirs = (t.decode(mine, clean_up_tokenization_spaces=False) for t in (draft, target))
        if mine != theirs:
            return f"the ids of {text!r} become {mine!r} with the draft's and {theirs!r} with the target's."
    return None
