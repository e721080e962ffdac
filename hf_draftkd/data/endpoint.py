"""A target behind an OpenAI-compatible server: vLLM, llama.cpp, `transformers serve`, a hosted API.

Prompts go rendered to `/v1/completions`, so that nothing a server's own chat parser adds gets in. What the protocol
cannot set (a server's own penalties or `top_k`) stays the server's.
"""

import difflib
import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_draftkd.data.backends import LENGTH, STOP, Backend, Completion
from hf_draftkd.data.decoding import DecodingSetting
from hf_draftkd.data.shards import StoppedError
from hf_draftkd.data.target_cache import TEMPERATURE_COLUMN
from hf_draftkd.models.tokenizers import tokenizer_size

logger = logging.get_logger(__name__)

_SAMPLING_PROBE = 16  # tokens: no language model writes so many alike three times at temperature 2


def endpoint_backend(
    url: str,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    settings: Sequence[DecodingSetting] = (DecodingSetting(),),
    top_logprobs: int | None = None,
    api_key: str | None = None,
    concurrency: int = 16,
    timeout: float = 600.0,
    max_retries: int = 8,
    send_ids: bool = False,
    extra_body: dict[str, Any] | None = None,
) -> Backend:
    """Answers from a server, many requests in flight. A few tokens are asked for at once, to find what is wrong early.

    Args:
        url: Base address, such as `http://localhost:8000/v1`.
        model: The name by which the server knows the target.
        tokenizer: The target's tokenizer.
        max_new_tokens: Longest completion, in tokens.
        settings: The decoding settings that will be asked for; the server has to take each of them.
        top_logprobs: Keep this many log-probabilities a token, as the server returns them.
        api_key: Key of the server; by default the environment's `OPENAI_API_KEY`, if any.
        concurrency: Requests in flight.
        timeout: Seconds to wait for one answer.
        max_retries: Further attempts, with back-off, after 429, 5xx, a time-out or a lost connection.
        send_ids: Send token ids instead of text. vLLM and OpenAI take them, `transformers serve` does not.
        extra_body: Further fields of each request, such as vLLM's `{"return_tokens_as_token_ids": True}`.

    Raises:
        ValueError: The key cannot be sent; or the server refuses the connection, the key, the model or a setting, does
            not sample, or returns no log-probabilities.
    """
    server = _Server(url, model, api_key, timeout, max_retries, top_logprobs, extra_body)
    hello = tokenizer("Hello")["input_ids"] if send_ids else "Hello"

    def first_answer(max_tokens: int, setting: DecodingSetting, seed: int = 0) -> Any:
        return _first_answer(server, partial(server.complete, hello, max_tokens, setting, seed))

    for setting in settings:
        _require_logprobs(url, first_answer(1, setting), top_logprobs)
    if not all(setting.is_greedy for setting in settings):
        _require_sampling(url, first_answer)
    ids_of = _TokenTexts(tokenizer)

    def answer(
        prompt_ids: list[list[int]], setting: DecodingSetting, seed: int, on_finished: Callable[[Completion], None]
    ) -> list[Completion]:
        sent: list[Any] = prompt_ids if send_ids else [prompt_text(ids, tokenizer) for ids in prompt_ids]
        completions: dict[int, Completion] = {}
        with ThreadPoolExecutor(concurrency) as pool:
            jobs = {
                pool.submit(server.complete, prompt, max_new_tokens, setting, (seed + number) % 2**31): number
                for number, prompt in enumerate(sent)
            }
            try:
                for job in as_completed(jobs):
                    completion = _completion(job.result(), tokenizer, ids_of, top_logprobs)
                    completions[jobs[job]] = completion
                    on_finished(completion)
            except server.openai.APIError as error:
                pool.shutdown(wait=False, cancel_futures=True)
                raise StoppedError(
                    f"{_what_stopped(server, error, str(sent[jobs[job]]))}. Finished shards stay "
                    "valid: run the same command again to go on."
                ) from None
        missing = sum(completion.distributions is None for completion in completions.values())
        if top_logprobs is not None and missing:
            logger.warning(
                f"{missing} of {len(completions)} answers hold no usable log-probabilities, and training from "
                "distributions will leave them out: tokens came as text that is not unique, or fewer than asked for. "
                "vLLM names ids with extra_body={'return_tokens_as_token_ids': True}."
            )
        return [completions[number] for number in range(len(prompt_ids))]

    return answer


class _Server:
    """The client of one server, and what it says, without the key."""

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str | None,
        timeout: float,
        max_retries: int,
        top_logprobs: int | None,
        extra_body: dict[str, Any] | None,
    ) -> None:
        if find_spec("openai") is None:
            raise ImportError(
                "A target behind an endpoint needs the `openai` client: pip install 'hf_draftkd[endpoint]'"
            )
        import openai

        self.openai, self.url, self.model, self.max_retries = openai, url, model, max_retries
        self.top_logprobs, self.extra_body = top_logprobs, extra_body
        self.key = _sendable_key(api_key)
        # Servers of one's own want no key, but the client insists on one.
        self.client = openai.OpenAI(base_url=url, timeout=timeout, max_retries=max_retries, api_key=self.key or "none")

    def complete(self, prompt: "str | list[int]", max_tokens: int, setting: DecodingSetting, seed: int | None) -> Any:
        body = dict(self.extra_body or {})
        if setting.top_k:
            body["top_k"] = setting.top_k
        if setting.repetition_penalty != 1:
            body["repetition_penalty"] = setting.repetition_penalty
        options: dict[str, Any] = {"extra_body": body} if body else {}
        if not setting.is_greedy:
            options |= {"top_p": setting.top_p, "seed": seed}
        if self.top_logprobs is not None:
            options["logprobs"] = self.top_logprobs
        return self.client.completions.create(
            model=self.model, prompt=prompt, max_tokens=max_tokens, temperature=setting.temperature, **options
        )

    def said(self, error: Exception) -> str:
        """Why a request failed. Whoever quotes it raises `from None`: the client's own error may repeat the key."""
        # The client repeats what OpenAI's servers say, and drops what others say in a form of their own (`detail`).
        answer = getattr(error, "response", None)
        detail = self._without_key(str(error.__cause__ or "") if answer is None else answer.text)[:500]
        known = self._without_key(str(error))
        return known if not detail or " - " in known else f"{known.rstrip('.')} ({detail})"

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text


def _sendable_key(api_key: str | None) -> str | None:
    given = api_key or os.environ.get("OPENAI_API_KEY")
    if not given:
        return None
    key = given.rstrip("\r\n")  # how a file of secrets ends
    # An HTTP client that refuses a header quotes it: such a key must not get that far.
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ValueError(
            f"The API key (from {'`api_key`' if api_key else 'OPENAI_API_KEY'}) is empty, or holds spaces, line breaks "
            "or other characters that no key has. Copy it again from the server's settings."
        )
    return key


def endpoint_logprobs(cache_options: dict[str, Any] | None) -> int | None:
    """How many log-probabilities to ask a server for, from the options of the cache."""
    if cache_options is None:
        return None
    if set(cache_options) - {"top_k", "temperature"} or not cache_options.get("top_k"):
        raise ValueError(
            f"A server returns its likeliest tokens and nothing else: give `top_k` alone, got {cache_options}. "
            "OpenAI's servers return 5 at most, vLLM 20 unless started with more."
        )
    if cache_options.get("temperature", 1.0) != 1.0:
        raise ValueError("A server returns log-probabilities at temperature 1, and a tail cannot be re-tempered.")
    return int(cache_options["top_k"])


def prompt_text(prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that a server's tokenizer turns into exactly `prompt_ids`.

    A server puts the beginning-of-text token in front of what it receives, as the tokenizer does; a rendered chat
    template that brings one along must therefore be sent without it.
    """
    text = tokenizer.decode(prompt_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    for candidate in (text, text.removeprefix(str(tokenizer.bos_token))):
        if tokenizer(candidate)["input_ids"] == prompt_ids:
            return candidate
    raise ValueError(
        f"The prompt {text[:60]!r}... cannot be sent as text: the server's tokenizer would turn it into other tokens. "
        "Pass `send_ids=True` if the server takes token ids."
    )


class _TokenTexts:
    """From a token as a server writes it to its id, or None where several ids are written alike."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.ids: dict[str, int | None] = {}
        for number in range(tokenizer_size(tokenizer)):
            for text in {tokenizer.decode([number]), str(tokenizer.convert_ids_to_tokens(number))}:
                self.ids[text] = number if self.ids.get(text, number) == number else None

    def __call__(self, token: str) -> int | None:
        if token.startswith("token_id:"):
            return int(token.removeprefix("token_id:"))
        return self.ids.get(token)


def _completion(
    answer: Any, tokenizer: PreTrainedTokenizerBase, ids_of: _TokenTexts, top_logprobs: int | None
) -> Completion:
    choice = answer.choices[0]
    reason = LENGTH if choice.finish_reason == "length" else STOP
    if top_logprobs is not None and choice.logprobs is not None and choice.logprobs.top_logprobs:
        written = [token for token in map(ids_of, choice.logprobs.tokens) if token is not None]
        if len(written) == len(choice.logprobs.tokens):
            distributions = _distributions(choice.logprobs, ids_of, top_logprobs)
            if all(len(ids) == top_logprobs for ids in distributions["target_token_ids"]):
                return Completion(written, reason, choice.text, "generated", distributions)
            return Completion(written, reason, choice.text, "generated")
    ids = tokenizer(choice.text, add_special_tokens=False)["input_ids"]
    if reason == STOP and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]  # the server ended the text with it and does not show it
    return Completion(ids, reason, choice.text, "retokenized")


def _distributions(logprobs: Any, ids_of: _TokenTexts, top_logprobs: int) -> dict[str, Any]:
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
    }


def _first_answer(server: _Server, request: Callable[[], Any]) -> Any:
    openai, url, said = server.openai, server.url, server.said
    try:
        answer = request()
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise ValueError(f"{url} refuses the API key: {said(error)}. Set OPENAI_API_KEY or pass `api_key`.") from None
    except openai.NotFoundError as error:
        raise ValueError(f"{url} knows no model {server.model!r}: {said(error)}.{_nearest_model(server)}") from None
    except openai.APIConnectionError as error:
        raise ValueError(
            f"{url} does not answer: {said(error)}. Is the server running, and does the address end as it should "
            "(usually in /v1)?"
        ) from None
    except openai.APIStatusError as error:
        raise ValueError(f"{url} refuses a request for one token: {said(error)}.") from None
    if not getattr(answer, "choices", None):
        raise ValueError(f"{url} does not answer like an OpenAI-compatible server; does the address end in /v1?")
    return answer


def _require_logprobs(url: str, answer: Any, top_logprobs: int | None) -> None:
    # The answer counts and not the status: servers ignore what they do not know.
    choices = answer.choices
    if top_logprobs is not None and not (choices[0].logprobs and choices[0].logprobs.top_logprobs):
        raise ValueError(
            f"Log-probabilities were asked for, but {url} returns none. Use a server that has them (vLLM does), or "
            "train on the text alone without `cache_distributions`."
        )


def _require_sampling(url: str, answer: Callable[[int, DecodingSetting, int], Any]) -> None:
    # `transformers serve` takes any temperature and decodes greedily where the model's generation config says so: its
    # rows would be recorded under a setting that did not write them.
    hot = DecodingSetting(temperature=2.0)
    texts = {answer(_SAMPLING_PROBE, hot, seed).choices[0].text for seed in range(3)}
    if len(texts) == 1:
        raise ValueError(
            f"{url} does not sample: it wrote the same {_SAMPLING_PROBE} tokens three times at temperature 2. Ask for "
            "temperature 0 only, or have the server sample: `transformers serve` does where the model's "
            "generation_config.json holds `do_sample: true`."
        )


def _what_stopped(server: _Server, error: Exception, prompt: str) -> str:
    status = getattr(error, "status_code", 500)
    if status >= 500 or status in (408, 409, 429):  # what the client tries again
        return f"{server.url} stopped answering after {server.max_retries} retries: {server.said(error)}"
    return f"{server.url} refused the prompt {prompt[:60]!r}...: {server.said(error)}"


def _nearest_model(server: _Server) -> str:
    try:
        names = [each.id for each in server.client.models.list()]
    except server.openai.APIError:
        return ""
    near = difflib.get_close_matches(server.model, names, n=1, cutoff=0.4)
    return f" It serves: {', '.join(names)}." + (f" Did you mean {near[0]!r}?" if near else "")
