"""What a server's answer is worth: whether it can be used at all, and which tokens and distributions it tells."""

import math
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_draftkd.data.backends import LENGTH, STOP, Completion
from hf_draftkd.data.kept_distributions import TEMPERATURE_COLUMN, VOCAB_COLUMN
from hf_draftkd.data.sources import HALF_PAIR
from hf_draftkd.models.tokenizers import tokenizer_size


class FaultyAnswerError(Exception):
    """A server answered 200, and the answer cannot be used.

    `about_prompt`: the answer to this one prompt is at fault, and not what lies between server and client.
    """

    def __init__(self, message: str, *, about_prompt: bool = False) -> None:
        super().__init__(message)
        self.about_prompt = about_prompt


def require_usable(answer: Any) -> None:
    """Raise a `FaultyAnswerError` unless `answer` holds a text that its writer or the limit ended.

    The client checks nothing: a proxy's HTML page comes as a string, and any JSON as an object with missing fields.
    """
    choices = getattr(answer, "choices", None)
    if not isinstance(choices, list) or not choices or not isinstance(getattr(choices[0], "text", None), str):
        raise FaultyAnswerError(f"it holds no completion: {str(answer)[:200]!r}")
    if (reason := choices[0].finish_reason) not in (STOP, LENGTH):
        # Whatever cut the text off, the target did not end it there.
        raise FaultyAnswerError(f"its finish_reason is {reason!r}, neither {STOP!r} nor {LENGTH!r}", about_prompt=True)
    if HALF_PAIR.search(choices[0].text):
        raise FaultyAnswerError("its text holds half of a surrogate pair", about_prompt=True)


class TokenTexts:
    """From a token as a server writes it to its id, or None where several ids are written alike."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __call__(self, token: str) -> int | None:
        number = token.removeprefix("token_id:")
        if number != token and number.isdecimal():
            # One beyond the vocabulary is of another tokenizer than the one given.
            return int(number) if int(number) < self._size else None
        return self._ids.get(token)

    @cached_property
    def _size(self) -> int:
        return tokenizer_size(self._tokenizer)

    @cached_property
    def _ids(self) -> dict[str, int | None]:
        """Decodes the whole vocabulary: only where a server writes tokens as text."""
        ids: dict[str, int | None] = {}
        for number in range(self._size):
            for text in {self._tokenizer.decode([number]), str(self._tokenizer.convert_ids_to_tokens(number))}:
                ids[text] = number if ids.get(text, number) == number else None
        return ids


def read_completion(
    answer: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids_of: TokenTexts,
    top_logprobs: int | None,
    end_ids: frozenset[int],
) -> Completion:
    """The completion that a usable answer tells: the client's, checked by `require_usable`.

    `ids_of` knows the tokenizer's tokens as the server writes them, `end_ids` end a text of the target, and
    `top_logprobs` log-probabilities per token were asked for.
    """
    choice = answer.choices[0]
    if top_logprobs is not None and (ids := _written_ids(choice.logprobs, ids_of)):
        found = _distributions(choice.logprobs, ids_of, top_logprobs)
        distributions = found if all(len(each) == top_logprobs for each in found["target_token_ids"]) else None
        # Where a server hides the end token (OpenAI's, llama.cpp, SGLang), nothing says which one it was or how likely.
        # The row keeps the tokens that are known, with their distributions, and does not count as exact.
        whole = choice.finish_reason == LENGTH or ids[-1] in end_ids
        if whole or distributions is not None:
            source = "generated" if whole else "retokenized"
            return Completion(ids, choice.finish_reason, choice.text, source, distributions)
    ids = tokenizer(choice.text, add_special_tokens=False)["input_ids"]
    hidden = choice.finish_reason == STOP and (not ids or ids[-1] not in end_ids)
    if hidden and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]  # the server ended the text with it and does not show it
    return Completion(ids, choice.finish_reason, choice.text, "retokenized")


def _written_ids(logprobs: Any, ids_of: TokenTexts) -> list[int] | None:
    """The ids of the tokens with log-probabilities; None where one is not known, or something is missing."""
    fields: list[Any] = [getattr(logprobs, name, None) for name in ("tokens", "token_logprobs", "top_logprobs")]
    if not all(fields) or len({len(field) for field in fields}) > 1 or any(None in field for field in fields):
        return None
    ids = [ids_of(token) for token in logprobs.tokens]
    return None if None in ids else ids  # type: ignore[return-value]


def _distributions(logprobs: Any, ids_of: TokenTexts, top_logprobs: int) -> dict[str, Any]:
    token_ids, values, tails = [], [], []
    for likeliest in logprobs.top_logprobs:
        pairs = sorted(((value, ids_of(text)) for text, value in likeliest.items()), key=lambda pair: -pair[0])
        # A server adds the written token where it is not among the likeliest.
        pairs = [pair for pair in pairs[:top_logprobs] if pair[1] is not None]
        token_ids.append([number for _, number in pairs])
        values.append([value for value, _ in pairs])
        rest = 1 - math.fsum(math.exp(value) for value, _ in pairs)
        tails.append(math.log(rest) if rest > 1e-12 else -math.inf)
    return {
        "completion_logprobs": list(logprobs.token_logprobs),
        "target_token_ids": token_ids,
        "target_logprobs": values,
        "target_tail_logprob": tails,
        TEMPERATURE_COLUMN: 1.0,
        VOCAB_COLUMN: None,  # a server does not say how far its vocabulary is padded
    }
