"""Names and texts from others, made harmless for a Markdown page and for a terminal.

A model name, a domain, a reason in a report: all of it is data that somebody else may have written. Whatever is put
into a card goes through one of these functions; what they return is marked as `Markdown`, and the card's template
engine escapes everything that is not.
"""

import html
import json
import re
from urllib.parse import quote

from hf_draftkd.models.resolve import is_hub_id
from hf_draftkd.utils.text import one_line

# The characters that begin or end Markdown inside a line. Escaping more would only make the source harder to read.
_ACTIVE = re.compile(r"([\\`*_\[\]|~$!#])")


class Markdown(str):
    """Text that may stand in a card as it is: it was escaped, or written by this package."""


def text(value: object) -> Markdown:
    """Escape a value for running text or a table cell; numbers stay as they are."""
    if isinstance(value, Markdown):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Markdown(value)
    # `--` too: `<!--` is gone with `<`, but `-->` could otherwise close a comment of ours.
    return Markdown(_ACTIVE.sub(r"\\\1", html.escape(one_line(value), quote=False)))


def code(value: object) -> Markdown:
    """An inline code span that its content cannot leave, in a table cell either."""
    content = one_line(value)
    if "\\|" in content:
        # Renderers disagree on whether `\\|` ends a table cell inside a code span; they agree on escaped text.
        return text(content)
    runs = re.findall("`+", content)
    fence = "`" * (1 + max(map(len, runs), default=0))
    pad = " " if content.startswith("`") or content.endswith("`") or not content else ""
    return Markdown(f"{fence}{pad}{content}{pad}{fence}".replace("|", "\\|"))


def fenced(language: str, content: str) -> Markdown:
    """A code block whose fence is longer than any run of backticks inside it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", content)), default=0))
    return Markdown(f"{fence}{language}\n{content.strip()}\n{fence}")


def python_string(value: str) -> str:
    """A Python literal in double quotes, whatever the value holds."""
    return json.dumps(one_line(value), ensure_ascii=False)


def model_link(name: str) -> Markdown:
    """A link to a model on the Hub, or the escaped name where it is none."""
    if "/" in name and is_hub_id(name):
        return Markdown(f"[{text(name)}](https://huggingface.co/{quote(name)})")
    return code(name)


def dataset_link(name: str) -> Markdown:
    """A link to a data set on the Hub, or the escaped name where it is none."""
    if "/" in name and is_hub_id(name):
        return Markdown(f"[{text(name)}](https://huggingface.co/datasets/{quote(name)})")
    return code(name)
