"""Files that are whole or not there, whoever else writes beside, and whatever stops the writing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write under, which becomes `path` in one step; after a failure nothing of it stays.

    Half a file on a full disk would keep it full. The name is this process's own: two may write the same file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> Path:
    """Write UTF-8; a reader never sees half of it. Folders are made.

    Halves of characters, with which Python stands for what in a file's name is no text, become `\\udcff`: in JSON
    that is what they are. Nothing that took hours may be lost to the name of a folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8", errors="backslashreplace", newline="")
    return path
