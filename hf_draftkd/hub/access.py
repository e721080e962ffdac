"""Talking to the Hub: who is asking, and what its refusals mean for the person at the keyboard.

What the user can fix is a `ValueError`; what only time or a network can fix is a `ConnectionError`. Tokens never become
part of a message.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from hf_draftkd.utils.checks import sendable

# The forms of access tokens; `hf_draftkd` and names like it are shorter, or hold dots.
_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}|\bhf_(?:oauth|jwt)_[A-Za-z0-9._-]{20,}")
LOGIN = "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write (huggingface.co/settings/tokens)."

_NO_RIGHT = "gives this token no right to do this (is the user's or organisation's name correct?)"
_CONFLICT = "has another version by now: somebody else changed the repository at the same time"
_REFUSALS = {
    400: "refused the request",
    401: "does not accept the token",
    402: _NO_RIGHT,
    403: _NO_RIGHT,
    404: "has no such repository, or it is private",
    409: _CONFLICT,
    412: _CONFLICT,
}


def redacted(message: object, token: str | bool | None = None) -> str:
    """A text without anything that is, or looks like, an access token; `token` is one, as `HfApi` holds it."""
    text = str(message)
    return _TOKEN.sub("hf_***", text.replace(token, "hf_***") if isinstance(token, str) and token else text)


def writing_token(token: str | None = None) -> str:
    """The token to publish with; a `ValueError` if there is none, or none that can be sent in a header."""
    found = token or get_token()
    if not found:
        raise ValueError(f"Nobody is logged in to the Hugging Face Hub. {LOGIN}")
    return sendable("The token", found, LOGIN)


@contextmanager
def hub_errors(doing: str, *, afterwards: str, token: str | bool | None) -> Iterator[None]:
    """Say what a failed request means: a `ValueError` where the user has to change something, else a `ConnectionError`.

    `doing` completes "The Hub ... while ...", `afterwards` says what has and has not happened and what to do next, and
    `token` is kept out of every message.
    """
    try:
        yield
    # No `from error`: the chained exception would print request and response, and a retry needs neither.
    except OfflineModeIsEnabled:
        raise ConnectionError(f"HF_HUB_OFFLINE is set, so nothing is sent while {doing}. {afterwards}") from None
    except HfHubHTTPError as error:
        raise _from_response(error, doing, afterwards, token) from None
    # The one about an entry is what a download makes of a Hub that fails; whether it is there, was looked at before.
    except (HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError) as error:
        raise ConnectionError(
            f"The Hub cannot be reached while {doing} ({type(error).__name__}: {redacted(error, token)}). {afterwards}"
        ) from None
    except RuntimeError as error:
        # huggingface_hub wraps what fails in an upload thread, and its Xet client has its own errors.
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise _from_response(cause, doing, afterwards, token) from None
        said = redacted(f"{error} ({type(cause).__name__}: {cause})" if cause else error, token)
        raise ConnectionError(f"The connection broke while {doing}: {said} {afterwards}") from None


def _from_response(error: HfHubHTTPError, doing: str, afterwards: str, token: str | bool | None) -> Exception:
    status = error.response.status_code
    said = redacted(error.server_message or "", token)[:300].rstrip(".")
    said = f" It says: {said}." if said else ""
    if means := _REFUSALS.get(status):
        next_step = LOGIN if status in (401, 402, 403) else afterwards
        return ValueError(f"The Hub {means} ({status}) while {doing}.{said} {next_step}")
    wait = error.response.headers.get("Retry-After", "")
    when = f" It wants you to try again in {wait} seconds." if wait.isdecimal() else ""
    return ConnectionError(f"The Hub failed ({status}) while {doing}.{said}{when} {afterwards}")
