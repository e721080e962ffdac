"""Names and texts from others, made harmless for a Markdown page and for a terminal.

A model name, a domain, a reason in a report: all of it is data that somebody else may have written. Whatever is put
into a card goes through one of these functions; what they return is marked as `Markdown`, and the card's template
engine escapes everything that is not.
"""

import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_draftkd.acceptance import Estimate
from hf_draftkd.hub.card_merge import marked
from hf_draftkd.models.resolve import is_hub_id
from hf_draftkd.utils.text import one_line, printable

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


def fenced(content: str, language: str) -> Markdown:
    """A code block whose fence is longer than any run of backticks inside it, without a line that is a mark of ours."""
    content = re.sub(r"^<!-- (?=draftkd:)", "<!--", printable(content), flags=re.MULTILINE)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", content)), default=0))
    return Markdown(f"{fence}{language}\n{content.strip()}\n{fence}")


def python_string(value: str) -> Markdown:
    """A Python literal in double quotes for a code block, whatever the value holds."""
    return Markdown(json.dumps(one_line(value), ensure_ascii=False))


def hub_link(name: str, kind: str = "") -> Markdown:
    """A link to a model on the Hub, or to a data set (`kind="datasets/"`); the escaped name where it is neither."""
    if "/" in name and is_hub_id(name):
        return Markdown(f"[{text(name)}](https://huggingface.co/{kind}{quote(name)})")
    return code(name)


def estimate_text(estimate: Estimate | float | None, digits: int, *, signed: bool = False) -> Markdown | None:
    r"""`0.612 \[0.598, 0.627\]`, or without the bracket where no interval was estimated; None for None."""
    if estimate is None:
        return None
    form = f"{'+' if signed else ''}.{digits}f"
    if not isinstance(estimate, Estimate):
        estimate = Estimate(estimate)
    return Markdown(f"{estimate.value:{form}}" + estimate.interval(rf" \[{{:{form}}}, {{:{form}}}\]"))


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markdown | None:
    """A Markdown table without the columns that hold nothing; None where no cell is left beside the first column."""
    kept = [column for column in range(len(headers)) if any(row[column] is not None for row in rows)]
    if len(kept) < 2:
        return None
    lines = [[headers[column] for column in kept], ["---"] * len(kept)]
    lines += [["" if row[column] is None else text(row[column]) for column in kept] for row in rows]
    return Markdown("\n".join("| " + " | ".join(cells) + " |" for cells in lines))


def records(rows: Sequence[Mapping[str, Any]]) -> Markdown | None:
    """A table of rows that have the same keys, which are its headers."""
    return table(list(rows[0]), [list(row.values()) for row in rows]) if rows else None


def render_card(template: str, sections: Sequence[str], context: Mapping[str, Any]) -> str:
    """A card's body from a template of this package: its title, and its sections, in order, between their marks.

    Every value that is not `Markdown` is escaped. The file `template` has a block `title` and one for each section; a
    section that comes out empty is left out.
    """
    environment = Environment(
        loader=PackageLoader("hf_draftkd.hub", "templates"),
        undefined=StrictUndefined,
        finalize=text,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "estimate": estimate_text, "fenced": fenced, "python": python_string}
    # For texts of this package only (titles and remarks of commands); data never goes through it.
    environment.filters["markdown"] = Markdown
    card = environment.get_template(template)

    def render(name: str) -> str:
        return "".join(card.blocks[name](card.new_context(dict(context)))).strip("\n")

    parts = [render("title") + "\n", *(marked(name, content) for name in sections if (content := render(name)))]
    return "\n".join(parts)
