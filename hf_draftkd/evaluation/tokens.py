"""Which tokens does a draft miss? By their kind, by their place in the answer, and in a few answers token by token."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_draftkd.acceptance import bootstrap_ratio
from hf_draftkd.evaluation.report import Answer, KindResult, SettingResult
from hf_draftkd.evaluation.scoring import Text, TextSums, proposed_tokens
from hf_draftkd.evaluation.statistics import by_prompt
from hf_draftkd.evaluation.texts import TextSet

# In the order of the report. Scripts that put no space between words have no rest of one.
KINDS = ("word", "rest of a word", "number", "punctuation", "white space", "special")
_FIRST_IDEOGRAPH = "\u2e80"
# Tokens of an answer, and characters of its prompt, that are shown.
_SHOWN = 256
_SHOWN_OF_PROMPT = 600

T = TypeVar("T", int, str)


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token by itself, with the space before it; part of a character becomes �."""
    pieces = []
    for name in tokenizer.convert_ids_to_tokens(list(ids)):
        text = "\ufffd" if name is None else tokenizer.convert_tokens_to_string([name])
        # Decoders of SentencePiece drop the space that begins a text.
        pieces.append(f" {text.lstrip(' ')}" if name and name.startswith("▁") else text)
    return pieces


def token_kinds(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """One of `KINDS` for each token of an answer."""
    special = set(tokenizer.all_special_ids)
    kinds, before = [], " "
    for token, piece in zip(ids, token_pieces(tokenizer, ids), strict=True):
        kinds.append("special" if token in special else _kind(piece, before))
        before = piece[-1:] or " "
    return kinds


def _kind(piece: str, before: str) -> str:
    text = piece.strip()
    if not text:
        return "white space"
    if text.isdigit():
        return "number"
    if not any(character.isalnum() or character == "\ufffd" for character in text):
        return "punctuation"
    continues = piece[0].isalpha() and before.isalpha() and piece[0] < _FIRST_IDEOGRAPH
    return "rest of a word" if continues else "word"


def add_token_results(result: SettingResult, sums: TextSums, texts: TextSet, kinds: Sequence[Sequence[str]]) -> None:
    """Put acceptance by kind and by place into the results of one setting.

    `sums` are the draft's on `texts`, which the target wrote under this very setting; `kinds` are those of each token.
    """
    by_kind = _rates(kinds, sums, texts.prompts)
    result.acceptance_by_kind = {kind: by_kind[kind] for kind in KINDS if kind in by_kind}
    # Places 1, 2 to 3, 4 to 7, ...: by the power of two below.
    places = [[1 << (place.bit_length() - 1) for place in range(1, len(each) + 1)] for each in kinds]
    by_place = sorted(_rates(places, sums, texts.prompts).items())
    result.acceptance_by_place = {place: found.acceptance_rate for place, found in by_place}


def _rates(labels: Sequence[Sequence[T]], sums: TextSums, prompts: Sequence[int]) -> dict[T, KindResult]:
    """For each label: the acceptance of its tokens, and how many there are."""
    total: dict[T, list[float]] = defaultdict(lambda: [0.0] * len(labels))
    count: dict[T, list[int]] = defaultdict(lambda: [0] * len(labels))
    for text, (each, accepted) in enumerate(zip(labels, sums.accepted, strict=True)):
        for label, value in zip(each, accepted.tolist(), strict=True):
            total[label][text] += value
            count[label][text] += 1
    rates = {}
    for label in count:
        columns = torch.tensor([total[label], count[label]], dtype=torch.float64)
        rate = bootstrap_ratio(*by_prompt(prompts, *columns))
        rates[label] = KindResult(acceptance_rate=rate, num_tokens=sum(count[label]))
    return rates


def show_answers(
    count: int,
    draft_model: PreTrainedModel,
    target_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: TextSet,
    verification: str,
    sums: TextSums,
    vocab_size: int,
) -> list[Answer]:
    """A few texts token by token, from the one that the draft foresees least to the one that it foresees most."""
    rates = sums.acceptance / sums.num_tokens
    ranked = rates.argsort(stable=True).tolist()
    count = min(count, len(ranked))
    chosen = [ranked[place * (len(ranked) - 1) // max(count - 1, 1)] for place in range(count)]
    answers = []
    for index in chosen:
        prompt_ids, completion_ids = texts.texts[index]
        text = Text(prompt_ids, completion_ids[:_SHOWN])
        proposed = proposed_tokens(draft_model, text, texts.setting, target_model, vocab_size)
        pieces = token_pieces(tokenizer, proposed)
        pairs = enumerate(zip(text.completion_ids, proposed, strict=True))
        answers.append(
            Answer(
                decoding=texts.setting,
                verification=verification,
                prompt=tokenizer.decode(prompt_ids, skip_special_tokens=True)[-_SHOWN_OF_PROMPT:],
                tokens=token_pieces(tokenizer, text.completion_ids),
                accepted=[round(value, 4) for value in sums.accepted[index][:_SHOWN].tolist()],
                proposed={place: pieces[place] for place, (written, drafted) in pairs if written != drafted},
            )
        )
    return answers
