"""Dataclasses to and from plain JSON data: absent instead of null, and errors that name the key.

The dataclasses are the schema: their fields say which keys exist, which are required, and of what type.
"""

import json
import sys
import types
from collections.abc import Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from hf_draftkd.utils.checks import did_you_mean


def key(help: str, **options: Any) -> Any:
    """A documented dataclass field."""
    return field(metadata={"help": help}, **options)


def optional(help: str) -> Any:
    """A documented field that is None, and absent from the JSON, where nothing is known of it."""
    return key(help, default=None)


def to_plain(value: Any) -> Any:
    """JSON-ready data. Fields that are None are left out: what was not measured is absent.

    Raises:
        ValueError: A number is NaN or infinite, which JSON cannot say.
    """
    if is_dataclass(value) and not isinstance(value, type):
        pairs = ((item.name, getattr(value, item.name)) for item in fields(value))
        return {name: to_plain(content) for name, content in pairs if content is not None}
    if isinstance(value, Mapping):
        return {str(name): to_plain(content) for name, content in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(content) for content in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        raise ValueError(f"A report cannot hold {value}: leave absent what could not be measured.")
    return value


def read_json(text: str | bytes, where: str) -> Any:
    """Plain data from JSON text, or its bytes in any encoding of Unicode, that a stranger may have written; a
    `ValueError` says `where` it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter: brackets within brackets, by thousands
        raise ValueError(f"`{where}` is not JSON: {error}. Expected what hf_draftkd writes into such a file.") from None


_WORDS = {int: "a whole number", str: "a string", bool: "true or false"}


def from_plain(expected: Any, data: Any, where: str) -> Any:
    """The inverse of `to_plain`: an instance of the dataclass (or other type) that is expected.

    Raises:
        ValueError: A key is missing, unknown or of the wrong type; the message names it, and `where` it stands.
    """

    def check(is_right: bool, wanted: str) -> None:
        if not is_right:
            raise ValueError(f"`{where}` must be {wanted}, got {data!r:.80}.")

    origin, inner = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        if data is None:
            raise ValueError(f"`{where}` is null. Leave out the key of what was not measured.")
        (expected,) = (choice for choice in inner if choice is not type(None))
        return from_plain(expected, data, where)
    if is_dataclass(expected):
        check(isinstance(data, dict), "an object")
        known = {item.name: item for item in fields(expected)}
        for name in data:
            if name not in known:
                hint = did_you_mean(name, known) or f" Known keys: {', '.join(known)}."
                raise ValueError(f"`{where}` has an unknown key `{name}`.{hint}")
        for name, item in known.items():
            if name not in data and item.default is MISSING and item.default_factory is MISSING:
                raise ValueError(f"`{where}` lacks the key `{name}`. {item.metadata.get('help', '')}")
        hints = get_type_hints(expected)
        read = {name: from_plain(hints[name], content, f"{where}.{name}") for name, content in data.items()}
        return expected(**read)  # type: ignore[operator]
    if origin is list:
        check(isinstance(data, list), "a list")
        return [from_plain(inner[0], item, f"{where}[{index}]") for index, item in enumerate(data)]
    if origin is dict:
        check(isinstance(data, dict), "an object")
        key_type, value_type = inner
        check(key_type is not int or all(name.isdecimal() for name in data), "an object with whole numbers as keys")
        return {key_type(name): from_plain(value_type, item, f"{where}.{name}") for name, item in data.items()}
    if expected is float:
        is_number = isinstance(data, (int, float)) and not isinstance(data, bool) and abs(data) <= sys.float_info.max
        check(is_number, "a number")
        return float(data)
    if expected in _WORDS:
        check(type(data) is expected, _WORDS[expected])
    return data
