"""What is asked of an engine, whichever it is: completions by token ids, with what its draft did."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any, Protocol

from hf_draftkd.decoding.setting import DecodingSetting

_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Completion:
    """One answer of an engine.

    Args:
        token_ids: What it wrote; whether the end token is among them depends on the engine.
        seconds: Wall-clock of the request.
        num_spec_steps: Target calls behind the one that read the prompt, which wrote the first token.
        num_draft_tokens: Tokens proposed by the draft; 0 where none is loaded.
        num_accepted_draft_tokens: Of these, how many were accepted.
        is_cut: Whether the engine's own context ended the text.
    """

    token_ids: list[int]
    seconds: float
    num_spec_steps: int
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    is_cut: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_later_tokens(self) -> int:
        """Those behind the first, which the prompt's own call writes."""
        return max(len(self.token_ids) - 1, 0)


@dataclass(frozen=True)
class ServedPair:
    """What to start an engine with.

    Args:
        target: The target as this engine reads it: a folder, or a GGUF file.
        draft: The draft; None for plain decoding.
        num_assistant_tokens: Draft length γ.
        is_greedy: Whether the draft is to propose its likeliest token, as it should for greedy text.
        threads: CPU threads.
        max_context: Tokens of the longest prompt and completion together.
        binary: The program, or the Python of the environment where the engine is installed.
        dtype: Number format that the target was evaluated in, for an engine that reads the models' own files.
    """

    target: str
    draft: str | None
    num_assistant_tokens: int
    is_greedy: bool
    threads: int
    max_context: int
    binary: str
    dtype: str = "auto"


class Engine(Protocol):
    """One engine: how it is started, and how it is asked. Every method may raise as `fetch_json` does."""

    name: str
    tested_version: str
    binary: str

    def command(self, pair: ServedPair, port: int) -> tuple[list[str], dict[str, str]]:
        """The words of the command that serves a pair on this machine, and its environment variables."""

    def version(self, url: str) -> str:
        """The version that a server says it is."""

    def tokenize(self, url: str, text: str) -> list[int]:
        """Token ids of a text, special tokens read as such and none added."""

    def complete(
        self, url: str, prompt_ids: Sequence[int], setting: DecodingSetting, max_new_tokens: int, seed: int
    ) -> Completion:
        """Answer one prompt."""

    def verification(self, is_greedy: bool) -> str:
        """The verification rule by which a launched server accepts drafted tokens."""


def fetch(url: str, data: dict[str, Any] | None = None) -> str:
    """The body of an answer to GET, or to POST of JSON.

    Raises:
        ValueError: It answers with an error, or this is no address.
        ConnectionError: Nothing answers there.
    """
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")
        raise ValueError(f"{url} answered with status {error.code}: {said:.300}") from error
    except OSError as error:
        raise ConnectionError(
            f"Nothing answers at {url} ({error}). Start the server first, or let `--launch` start it."
        ) from error


def fetch_json(url: str, data: dict[str, Any] | None = None) -> Any:
    """The same, read as JSON; a `ValueError` too where the answer is none."""
    answer = fetch(url, data)
    try:
        return json.loads(answer)
    except json.JSONDecodeError as error:
        raise ValueError(f"{url} did not answer in JSON but: {answer:.120}. Is it another program?") from error


def timed_json(url: str, data: dict[str, Any]) -> tuple[Any, float]:
    """An answer, and the seconds it took."""
    started = time.perf_counter()
    answer = fetch_json(url, data)
    return answer, time.perf_counter() - started


def part(answer: Any, url: str, *path: Any) -> Any:
    """A part of an answer by keys and indices; a `ValueError` where it is not there."""
    try:
        return reduce(getitem, path, answer)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"The answer of {url} has no {'.'.join(map(str, path))}: another engine or version? {answer!s:.200}"
        ) from error
