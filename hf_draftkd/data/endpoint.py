"""A target behind an OpenAI-compatible server: vLLM, llama.cpp, `transformers serve`, a hosted API.

Prompts go rendered to `/v1/completions`, so that nothing a server's own chat parser adds gets in.

Each request says all that its row claims, also what changes nothing, because servers have defaults of their own: vLLM
takes them from the model's generation config (a repetition penalty even where decoding is greedy), llama.cpp keeps the
40 likeliest tokens and `min_p` 0.05. vLLM, SGLang and llama.cpp take what OpenAI's protocol has no field for (see
`_beyond_openai`). OpenAI and `transformers serve` refuse it and are then asked without it, with a warning: their own
`top_k`, `min_p` and repetition penalty are unknown to the rows. The same holds, unseen, for a server that ignores these
fields, and for what a server was started with beside them: mirostat, a logit bias, logits processors.
"""

import json
import os
from base64 import b64encode
from collections.abc import Sequence, Set
from importlib.util import find_spec
from multiprocessing.pool import ThreadPool
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_draftkd.data.backends import REFUSED, Backend, Completion, Groups, PromptFailedError
from hf_draftkd.data.config import AlignmentDataConfig
from hf_draftkd.data.server_answers import FaultyAnswerError, TokenTexts, read_completion, require_usable
from hf_draftkd.data.shards import StoppedError
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.utils.checks import did_you_mean, sendable
from hf_draftkd.utils.text import printable

logger = logging.get_logger(__name__)

_RESUME = "Finished shards stay valid: run the same command again to resume."
_SAMPLING_PROBE = 16  # tokens: no language model writes this many alike three times at temperature 2


def endpoint_backend(
    config: AlignmentDataConfig,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    api_key: str | None = None,
    extra_body: dict[str, Any] | None = None,
    end_ids: Sequence[int] = (),
) -> Backend:
    """Answers from a server, many requests in flight. A few tokens are asked for at once, to find what is wrong early.

    Args:
        config: Where the server is (a `name:password@` in its address is sent and shown nowhere), and what it is asked.
        model: The name by which the server knows the target.
        tokenizer: The target's tokenizer.
        api_key: Key of the server; by default the environment's `OPENAI_API_KEY`, if any.
        extra_body: Further fields of each request, such as vLLM's `{"return_tokens_as_token_ids": True}`.
        end_ids: Ids that end a text of the target, besides the tokenizer's `eos_token_id`.

    The rows' `ids_source` is `generated` where log-probabilities name every token the target wrote. Text is encoded
    once and, where the target ended it, given the tokenizer's end token: `retokenized`. So are tokens whose end the
    server hides: they keep their log-probabilities, but the end token, of which nothing is known, is not added.

    Raises:
        ValueError: The key cannot be sent; or the server refuses the connection, the key, the model or a setting, does
            not sample, or returns no log-probabilities.
    """
    server = _Server(config, model, api_key, extra_body)
    _try_out(server, tokenizer("Hello")["input_ids"] if config.send_ids else "Hello", list(config.requests))
    ids_of, warned = TokenTexts(tokenizer), set[str]()
    ends = frozenset(token for token in [tokenizer.eos_token_id, *end_ids] if token is not None)

    def answer(prompt_ids: list[list[int]], setting: DecodingSetting, seed: int, finished: Set[int]) -> Groups:
        sent: list[Any] = prompt_ids if config.send_ids else [prompt_text(ids, tokenizer) for ids in prompt_ids]
        left = [number for number in range(len(sent)) if number not in finished]

        def ask(number: int) -> tuple[int, Any]:
            try:
                return number, server.complete(sent[number], config.max_new_tokens, setting, (seed + number) % 2**31)
            except Exception as error:
                return number, error

        # These threads are daemons: an error or Ctrl-C drops what is queued and waits for no answer in flight, as an
        # executor would, even at the end of the process.
        with ThreadPool(config.concurrency) as pool:
            for number, got in pool.imap_unordered(ask, left):
                if isinstance(got, Exception):
                    failure = server.failure(got, number)
                    if not (config.skip_refused and isinstance(failure, PromptFailedError)):
                        raise failure from None
                    logger.warning("%s. The prompt is left out.", failure)
                    yield {number: Completion([], REFUSED)}
                    continue
                completion = read_completion(got, tokenizer, ids_of, server.top_logprobs, ends)
                gap = _gap(completion) if server.top_logprobs is not None else None
                if gap is not None and gap not in warned:  # said once a run, while it can still be stopped
                    warned.add(gap)
                    logger.warning(gap)
                yield {number: completion}

    return answer


class _Server:
    """The client of one server, and what it says, without key or password."""

    def __init__(
        self, config: AlignmentDataConfig, model: str, api_key: str | None, extra_body: dict[str, Any] | None
    ) -> None:
        if find_spec("openai") is None:
            raise ImportError(
                "A target behind an endpoint needs the `openai` client: pip install 'hf_draftkd[endpoint]'"
            )
        import openai

        self.openai, self.model, self.max_retries = openai, model, config.max_retries
        self.top_logprobs = config.cache.top_k if config.cache else None
        self.extra_body = extra_body or {}
        self.is_told_all = True  # until it turns out to refuse what OpenAI's protocol lacks
        self.url, login = without_login(str(config.endpoint))
        key = api_key or os.environ.get("OPENAI_API_KEY")
        if key:
            origin = "`api_key`" if api_key else "OPENAI_API_KEY"
            # A file of secrets ends with a line break.
            key = sendable(f"The API key (from {origin})", key.rstrip("\r\n"), "Copy it again.")
        # A name and password go in the header that they become anyway: addresses are logged, and quoted in errors.
        encoded = b64encode(login.encode()).decode() if login else ""
        name, _, password = (login or "").partition(":")
        self.secrets = [secret for secret in (key, encoded, password or name) if secret]  # a key may be the name
        self.client = openai.OpenAI(
            base_url=self.url,
            timeout=config.timeout,
            max_retries=config.max_retries,
            api_key=key or "none",  # a local server wants no key, but the client insists on one
            default_headers={"Authorization": f"Basic {encoded}"} if login else None,
        )

    def complete(self, prompt: "str | list[int]", max_tokens: int, setting: DecodingSetting, seed: int) -> Any:
        """A usable answer; the client tries again after 429, 5xx, a time-out or a lost connection."""
        body = (_beyond_openai(setting) if self.is_told_all else {}) | self.extra_body
        if setting.top_k:
            body["top_k"] = setting.top_k
        if setting.repetition_penalty != 1:
            body["repetition_penalty"] = setting.repetition_penalty
        options: dict[str, Any] = {"extra_body": body, "frequency_penalty": 0.0, "presence_penalty": 0.0}
        if not setting.is_greedy:
            options |= {"top_p": setting.top_p, "seed": seed}
        if self.top_logprobs is not None:
            options["logprobs"] = self.top_logprobs
        try:
            answer = self.client.completions.create(
                model=self.model, prompt=prompt, max_tokens=max_tokens, temperature=setting.temperature, **options
            )
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise FaultyAnswerError(f"its JSON is broken ({error})") from None
        require_usable(answer)
        return answer

    def refusal(self, error: Exception) -> Exception:
        """What a first request that failed means for the whole run."""
        openai, said = self.openai, self.said(error).rstrip(".")
        if isinstance(error, FaultyAnswerError):
            hint = "" if error.about_prompt else " Does the address end in /v1?"
            return ValueError(f"{self.url} does not answer as an OpenAI-compatible server does: {said}.{hint}")
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return ValueError(f"{self.url} refuses the API key: {said}. Set OPENAI_API_KEY or pass `api_key`.")
        if isinstance(error, openai.NotFoundError):
            return ValueError(f"{self.url} knows no model {self.model!r}: {said}.{self._models()}")
        if isinstance(error, openai.APIConnectionError):
            return ValueError(
                f"{self.url} does not answer: {said}. Is the server running, and does the address end in /v1?"
            )
        if isinstance(error, openai.APIStatusError):
            return ValueError(f"{self.url} refuses a request for one token: {said}.")
        return error

    def failure(self, error: Exception, number: int) -> Exception:
        """What a later request that failed means: for its prompt, or for the run."""
        status = getattr(error, "status_code", 500)
        if isinstance(error, FaultyAnswerError):
            text = f"{self.url} gave no usable answer: {self.said(error)}"
            if error.about_prompt:
                return PromptFailedError(number, text)
        elif not isinstance(error, self.openai.APIError):
            return error
        elif status >= 500 or status in (408, 409, 429):  # what the client tries again
            text = f"{self.url} stopped answering after {self.max_retries} retries: {self.said(error)}"
        elif status in (401, 402, 403, 404):  # about the account or the model, whatever the prompt
            text = f"{self.url} no longer serves {self.model!r} to this key: {self.said(error)}"
        else:
            return PromptFailedError(
                number,
                f"{self.url} refused the prompt: {self.said(error).rstrip('.')}. If that is for its length, "
                "`skip_too_long` with the server's `context_length` leaves out all such prompts",
            )
        return StoppedError(f"{text.rstrip('.')}. {_RESUME}")

    def said(self, error: Exception) -> str:
        """Why a request failed, without the key, which the client's own error may repeat: raise `from None`."""
        # The client repeats what OpenAI's servers say, and drops what others say in a form of their own (`detail`).
        answer = getattr(error, "response", None)
        known, detail = str(error), str(error.__cause__ or "") if answer is None else answer.text[:500]
        text = known if not detail or " - " in known else f"{known.rstrip('.')} ({detail})"
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return printable(text)

    def _models(self) -> str:
        try:
            names = [each.id for each in self.client.models.list()]
        except self.openai.APIError:
            return ""
        return f" It serves: {', '.join(names)}.{did_you_mean(self.model, names)}"


def _beyond_openai(setting: DecodingSetting) -> dict[str, Any]:
    """What a setting says beyond the fields of OpenAI's protocol, as vLLM and SGLang call it, and llama.cpp."""
    penalty = setting.repetition_penalty
    return {
        "top_k": setting.top_k or -1,  # SGLang refuses 0
        "min_p": 0.0,
        "repetition_penalty": penalty,
        # llama.cpp: its own name, over the whole text and not the last 64 tokens; and the filters behind the
        # temperature, as in transformers, where by default they come before it.
        "repeat_penalty": penalty,
        "repeat_last_n": -1,
        "samplers": ["penalties", "dry", "temperature", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc"],
    }


def without_login(url: str) -> tuple[str, str | None]:
    """The address of a server as it may be shown, and the `name:password` that stood in it."""
    parts = urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    name, _, password = login.partition(":")  # the colon is sent without a password, too
    return (urlunsplit(parts._replace(netloc=host)), f"{unquote(name)}:{unquote(password)}") if at else (url, None)


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


def _try_out(server: _Server, hello: "str | list[int]", settings: Sequence[DecodingSetting]) -> None:
    """Ask for a few tokens under each setting: what the server cannot do is found out before any work."""

    def ask(max_tokens: int, setting: DecodingSetting, seed: int = 0) -> Any:
        try:
            return server.complete(hello, max_tokens, setting, seed)
        except Exception as error:
            if not server.is_told_all or getattr(error, "status_code", None) not in (400, 422):
                raise server.refusal(error) from None
            said = server.said(error)
        server.is_told_all = False
        answer = ask(max_tokens, setting, seed)
        logger.warning(
            "%s takes only the fields of OpenAI's protocol (%s): its own `top_k`, `min_p` and repetition penalty, such "
            "as those of the model's generation config, may apply, and the rows will not say so.",
            *(server.url, said.rstrip(".")),
        )
        return answer

    for setting in settings:
        choice = ask(1, setting).choices[0]
        # The answer counts and not the status: servers ignore what they do not know. An end token alone, where it is
        # hidden, leaves empty lists.
        nothing_to_show = choice.logprobs is not None and not choice.text
        has_logprobs = nothing_to_show or (choice.logprobs and choice.logprobs.top_logprobs)
        if server.top_logprobs is not None and not has_logprobs:
            raise ValueError(
                f"Log-probabilities were asked for, but {server.url} returns none. Use a server that has them (vLLM "
                "does), or train on the text alone without `cache_distributions`."
            )
    if all(setting.is_greedy for setting in settings):
        return
    # `transformers serve` takes any temperature and decodes greedily where the model's generation config says so: its
    # rows would be recorded under a setting that did not write them.
    texts = {ask(_SAMPLING_PROBE, DecodingSetting(temperature=2.0), seed).choices[0].text for seed in range(3)}
    if len(texts) == 1:
        raise ValueError(
            f"{server.url} does not sample: it wrote the same {_SAMPLING_PROBE} tokens three times at temperature 2. "
            "Ask for temperature 0 only, or have the server sample: `transformers serve` does where the model's "
            "generation_config.json holds `do_sample: true`."
        )


def _gap(completion: Completion) -> str | None:
    """What an answer lacks of the log-probabilities that were asked for."""
    if completion.distributions is None:
        return (
            "An answer holds no usable log-probabilities, and training from distributions will leave out such rows: "
            "tokens came as text that is not unique, or fewer than asked for. vLLM names ids with "
            "extra_body={'return_tokens_as_token_ids': True}."
        )
    if completion.ids_source != "generated":
        return (
            "An answer lacks the end token, which the server does not show: a draft will not learn where to stop from "
            "such rows, and they do not count as exact. vLLM shows it."
        )
    return None
