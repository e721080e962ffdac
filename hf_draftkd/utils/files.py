"""Files that are either whole or absent, whoever else writes there and whatever interrupts the writing; and folders
that can be written to, by one run at a time.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

with suppress(ImportError):  # Windows has none
    import fcntl

_PATIENCE = 10  # seconds to wait for the lock of a run that may just have died


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name to write under, which becomes `path` in one step; after a failure nothing of it stays.

    Half a file on a full disk would keep the disk full. The process id in the name keeps two writers apart.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> Path:
    """Write UTF-8 so that a reader never sees half of it; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8", newline="")
    return path


def check_writable(directory: str | Path, what: str) -> None:
    """A `ValueError` if no results can be written to a folder, which need not be there yet; `what` names it.

    Results are written last: hours later would be too late to find out.
    """
    if not str(directory).strip():  # the operating system takes it for the working directory
        raise ValueError(f"{what} is empty: a variable may not be set. Name a directory.")
    directory = Path(directory).absolute()
    existing = next(part for part in (directory, *directory.parents) if part.exists())
    if not existing.is_dir():
        raise ValueError(f"{what} cannot be a directory: {existing} is a file. Name another.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{what} cannot be written: no permission in {existing}. Name another.")


@contextmanager
def only_run(directory: str | Path) -> Iterator[None]:
    """Keep other runs out of a folder until this one ends, however it ends; a `ValueError` if one is in it already.

    Call it on one process of a run. The system's lock on the folder leaves no file behind. Where there is no such lock
    (Windows, some network disks), nothing is kept out.
    """
    os.makedirs(directory, exist_ok=True)
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        yield
        return
    try:
        # Workers of a run that was killed hold its lock until they notice.
        for attempt in range(_PATIENCE + 1):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == _PATIENCE:
                    raise ValueError(
                        f"Another run is writing to {str(directory)!r}, and the results of both would mix. Wait for it "
                        "to end, stop it, or choose another `output_dir`."
                    ) from None
                time.sleep(1)
            except OSError:
                break
        yield
    finally:
        with suppress(OSError):
            # Closing is not enough: persistent workers of the data loader hold the same lock.
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)
