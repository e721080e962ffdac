"""What the command line calls bad usage."""

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """Something the user has to change; the command ends with exit code 2 before any long work starts."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """What is refused while options are read, and models and data are looked at, is bad usage.

    The rooms below raise `ValueError` (and loaders `OSError` or `ImportError`) with a message for the user. A lost
    connection is not the user's mistake and stays what it is; what fails outside, in the work itself, keeps its
    traceback and exit code 1.
    """
    try:
        yield
    except ConnectionError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error
