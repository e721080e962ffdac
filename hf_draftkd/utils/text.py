"""Text that a stranger may have written, made safe for one line or for a terminal."""

import re

# Control characters, invisible marks and tags, and lone surrogates, which JSON can hold and UTF-8 cannot.
_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e007f]+"
)


def one_line(value: object) -> str:
    """A value as a single line, without control characters or invisible direction marks."""
    return _CONTROL.sub(" ", str(value)).strip()


def printable(value: object) -> str:
    """Text for a terminal: line breaks stay, other control characters, which a terminal would obey, become spaces."""
    return "\n".join(_CONTROL.sub(" ", line) for line in str(value).split("\n"))
