"""The marks in a card: what stands between them is rewritten from data, what stands outside is somebody's prose.

A mark is a whole line. Escaped data never makes a whole line of its own, so no name or text from a report can fake one.
"""

import re

_HINT = "written by hf_draftkd; put your own text outside these marks"
_SECTION = re.compile(
    r"^<!-- draftkd:begin (?P<name>[a-z]+)[^\n]*-->[ \t]*\r?\n(?P<content>.*?)"
    r"^<!-- draftkd:end (?P=name) -->[ \t]*\r?$\n?",
    re.MULTILINE | re.DOTALL,
)


def marked(name: str, content: str) -> str:
    """A section between its marks; an empty one keeps them, so that it can be filled later."""
    body = content.strip("\n")
    return f"<!-- draftkd:begin {name} | {_HINT} -->\n{body}{chr(10) if body else ''}<!-- draftkd:end {name} -->\n"


def sections_of(text: str) -> dict[str, str]:
    """Section name to its text, marks included, in order of appearance."""
    return {match["name"]: match[0] for match in _SECTION.finditer(text)}


def prose_of(text: str) -> str:
    """What is left of a card's text without its sections, blank lines aside: the part that people write."""
    lines = (line.rstrip() for line in _SECTION.sub("", text).splitlines())
    return "\n".join(line for line in lines if line)


def with_sections(prose: str, fresh: str) -> str:
    """The prose of one card with the sections of another.

    Args:
        prose: Text of the card whose words, and order of sections, are kept.
        fresh: Text of the card whose sections are taken. A section that `prose` lacks is put after the one it follows
            in `fresh`, or at the end; one that `fresh` lacks is emptied: it described other weights.
    """
    new = sections_of(fresh)
    used = set()

    def replace(match: re.Match[str]) -> str:
        # A name twice in one card: the second copy is stale and goes.
        name = match["name"]
        if name in used:
            return ""
        used.add(name)
        return new.get(name, marked(name, ""))

    result = _SECTION.sub(replace, prose)
    missing = [section for name, section in new.items() if name not in used]
    if missing:
        result = result.rstrip("\n") + "\n\n" + "\n".join(missing)
    return result
