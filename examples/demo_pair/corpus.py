"""Text for the demo pair: the source and docstrings of the running interpreter's own standard library.

Modules of `DEV_MODULES` and `TEST_MODULES` are left out of everything that is trained on. Their text measures the
held-out loss; their functions make the development and test queries.
"""

import importlib
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path

DEV_MODULES = ("bisect", "calendar", "csv", "fileinput", "gzip", "linecache", "pprint", "queue", "shelve", "textwrap")
TEST_MODULES = (
    "colorsys", "fractions", "glob", "heapq", "mailcap", "netrc", "quopri", "sched", "secrets", "shutil", "statistics",
    "tempfile", "timeit", "wave", "zipapp", "zipfile",
)  # fmt: skip
HELD_OUT_MODULES = frozenset(DEV_MODULES + TEST_MODULES)

# Tests and fixtures repeat themselves, `idlelib` and `turtledemo` are applications, the encodings are character tables.
EXCLUDED_DIRECTORIES = frozenset(
    {"site-packages", "__pycache__", "test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3", "encodings",
     "ensurepip", "__phello__"}
)  # fmt: skip
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")

# Modules written in C have no source to read; their docstrings are worth having.
DOCUMENTED_MODULES = (
    "array", "atexit", "binascii", "builtins", "cmath", "collections", "errno", "faulthandler", "fcntl", "functools",
    "gc", "grp", "hashlib", "io", "itertools", "json", "locale", "marshal", "math", "mmap", "operator", "os", "pickle",
    "posix", "pwd", "re", "resource", "select", "signal", "socket", "struct", "sys", "syslog", "termios", "threading",
    "time", "tracemalloc", "unicodedata", "weakref", "zlib",
)  # fmt: skip


def standard_library() -> Path:
    """Directory of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def module_name(path: Path, root: Path) -> str:
    """Dotted name of the module in file `path` below the library's directory `root`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> Iterator[tuple[str, Path]]:
    """Yield (module name, path) of every source file not excluded, held-out modules included, in fixed order."""
    root = standard_library()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if EXCLUDED_DIRECTORIES.isdisjoint(parts) and not parts[0].startswith(EXCLUDED_PREFIXES):
            yield module_name(path, root), path


def is_held_out(module: str) -> bool:
    """Whether a module belongs to the development or test split, as itself or through its package."""
    return module.split(".")[0] in HELD_OUT_MODULES


def source_documents(*, held_out: bool) -> list[str]:
    """The text of the source files, of the held-out modules or of all others."""
    documents = (
        path.read_text(encoding="utf-8", errors="ignore")
        for module, path in source_files()
        if is_held_out(module) == held_out
    )
    return [text for text in documents if text.strip()]


def _described(name: str, value: object) -> str | None:
    """A routine as a reader of the documentation would see it: its name, its signature and its docstring."""
    documentation = inspect.getdoc(value)
    if not documentation:
        return None
    try:
        signature = str(inspect.signature(value))  # type: ignore[arg-type]
    except (AttributeError, TypeError, ValueError):  # AttributeError: `select.epoll` in Python 3.13
        signature = "(...)"
    return f"{name}{signature}\n    " + documentation.replace("\n", "\n    ")


def docstring_documents() -> list[str]:
    """One document a module of `DOCUMENTED_MODULES`: the docstrings of its functions and methods written in C."""
    documents = []
    for module in DOCUMENTED_MODULES:
        try:
            members = vars(importlib.import_module(module))
        except ImportError:  # some modules exist on some systems only
            continue
        entries = []
        for name, value in sorted(members.items()):
            if name.startswith("_"):
                continue
            if inspect.isbuiltin(value):
                entries.append(_described(f"{module}.{name}", value))
            elif inspect.isclass(value) and value.__module__ in (module, "builtins"):
                methods = sorted((key, method) for key, method in vars(value).items() if not key.startswith("_"))
                entries += [
                    _described(f"{name}.{key}", method) for key, method in methods if inspect.ismethoddescriptor(method)
                ]
        text = "\n\n".join(entry for entry in entries if entry)
        if text:
            documents.append(f"Help on module {module}\n\n{text}\n")
    return documents


def training_documents() -> list[str]:
    """Everything that the tokenizer, the base model and the stock draft are trained on."""
    return source_documents(held_out=False) + docstring_documents()
