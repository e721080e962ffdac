"""Dataclass fields that explain themselves: the same text in Python and in a command's `--help`."""

from collections.abc import Container
from copy import copy
from dataclasses import field, fields
from typing import Any


def option(default: Any, help: str) -> Any:
    """A field of a config with its help text. Each instance gets its own copy of a list or dict."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def given_fields(config: Any, names: Container[str]) -> list[str]:
    """Those of a config's fields whose value is not their default, in their order."""
    return [each.name for each in fields(config) if each.name in names and getattr(config, each.name) != each.default]
