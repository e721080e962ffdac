"""Names as strangers may read them: no path of this machine is published."""

import os
import re

from hf_draftkd.data.markdown import is_hub_id, one_line

# `/home/me/draft`, `~/draft`, `C:\\draft` inside a text; not the `/org/name` of an address or of `me/org/name`.
_PATH = re.compile(r"(?<![\w:/.~\\-])(?:~?/|[A-Za-z]:[\\/])[^\s'\"`,;:()]*\w[^\s'\"`,;:()]*")


def public_name(name: str) -> str:
    """A name as a stranger may read it: a Hub id as it is, a local path without the directories that lead to it."""
    if is_hub_id(name) and not os.path.exists(name):
        return name
    # Both kinds of slash: a report may come from Windows.
    last = re.split(r"[\\/]", one_line(name).rstrip("\\/"))[-1]
    return f"path/to/{last or 'model'}"


def without_paths(text: str) -> str:
    """A text, or a command line, in which absolute paths tell no more than their last part."""
    return _PATH.sub(lambda match: public_name(match[0].rstrip(".")) + "." * match[0].endswith("."), text)


def is_public(name: str | None) -> bool:
    """Whether a name that went through `public_name` is a Hub id."""
    return is_hub_id(name) and not str(name).startswith("path/to/")
