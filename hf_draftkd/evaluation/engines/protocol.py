"""What is asked of an engine, whichever it is: completions by token ids, with what its draft did."""

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.utils.text import one_line

_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class EngineAnswer:
    """One answer of an engine.

    Args:
        token_ids: What it wrote; whether the end token is among them depends on the engine.
        seconds: Wall-clock of the request.
        num_spec_steps: Target calls after the one that read the prompt, which wrote the first token.
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
        """Those after the first, which the prompt's own call writes."""
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
        parallel_drafting: Whether the draft drafts in one pass.
    """

    target: str
    draft: str | None
    num_assistant_tokens: int
    is_greedy: bool
    threads: int
    max_context: int
    binary: str
    dtype: str = "auto"
    parallel_drafting: bool = False


class Engine(ABC):
    """One engine: how it is started, and how it is asked. Every question may raise as `fetch` and `ask` do.

    Attributes:
        name: As `--engine` calls it.
        tested_version: The version that this was written for.
        binary: What `command` runs unless the user names another.
        sampled_rule: The verification rule of a launched server when sampling; greedy text is matched exactly. None
            where a launched server does not sample rightly (`fault`).
        busy_seconds: Seconds for which an idle server still occupies a core, which slows the server asked next.
    """

    name: str
    tested_version: str
    binary = "python"
    sampled_rule: str | None = None
    busy_seconds = 0.0

    @abstractmethod
    def command(self, pair: ServedPair, port: int) -> tuple[list[str], dict[str, str]]:
        """The words of the command that serves a pair on this machine, and its environment variables."""

    def fault(self, setting: DecodingSetting, is_launched: bool) -> str | None:
        """Why its texts under a setting would not be the target's, as a clause; None where they are."""
        if setting.repetition_penalty != 1:
            return f"{self.name} applies a repetition penalty differently from transformers"
        return None

    def version(self, url: str) -> str:
        """The version that a server says it is."""
        return str(ask(f"{url}/version")["version"])

    @abstractmethod
    def tokenize(self, url: str, text: str) -> list[int]:
        """Token ids of a text, special tokens read as such and none added."""

    @abstractmethod
    def complete(
        self, url: str, prompt_ids: Sequence[int], setting: DecodingSetting, max_new_tokens: int, seed: int
    ) -> EngineAnswer:
        """Answer one prompt."""


class Reply(dict[str, Any]):
    """An object in an engine's answer: a key that is not there is a `ValueError`, of another engine or version."""

    seconds: float
    """Wall-clock of the request."""

    def __init__(self, url: str, pairs: dict[str, Any]) -> None:
        super().__init__(pairs)
        self.url = url

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"The answer of {self.url} has no {key}: another engine or version? {dict(self)!s:.200}")


def ask(url: str, data: dict[str, Any] | None = None) -> Reply:
    """The JSON object that GET, or POST of JSON, is answered with.

    Raises:
        ValueError: It answers with an error or something else, or this is no address.
        ConnectionError: Nothing answers there.
    """
    started = time.perf_counter()
    text = fetch(url, data)
    seconds = time.perf_counter() - started
    try:
        answer = json.loads(text, object_hook=lambda pairs: Reply(url, pairs))
        answer.seconds = seconds
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{url} did not answer in JSON but: {text:.120}. Is it another program?") from error
    return answer


def counter(metrics: str, name: str) -> int:
    """A counter in what Prometheus would read, added up over its labels; 0 where it is not."""
    found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)", metrics, re.MULTILINE)
    return int(sum(map(float, found)))


def fetch(url: str, data: dict[str, Any] | None = None) -> str:
    """The same as text, whatever it is."""
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        said = one_line(error.read().decode(errors="replace"))
        raise ValueError(f"{url} answered with status {error.code}: {said:.300}") from error
    except http.client.HTTPException as error:
        said = one_line(error)
        raise ValueError(f"What answers at {url} does not speak HTTP: {said:.120}. Is it another program?") from error
    except OSError as error:
        raise ConnectionError(
            f"Nothing answers at {url} ({error}). Start the server first, or let `--launch` start it."
        ) from error
