"""Dataclasses to and from plain JSON data: absent instead of null, and errors that name the key.

The dataclasses are the schema: their fields say which keys exist, which are required, and of what type.
"""

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hf_draftkd.utils.checks import did_you_mean

T = TypeVar("T")


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


def read_json(text: str, where: str) -> Any:
    """Plain data from JSON text that a stranger may have written; a `ValueError` says `where` it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter: brackets within brackets, by thousands
        raise ValueError(f"`{where}` is not JSON: {error}. Expected what hf_draftkd writes into such a file.") from None


_WORDS = {int: "a whole number", str: "a string", bool: "true or false"}


def from_plain(expected: type[T], data: Any, where: str) -> T:
    """The inverse of `to_plain`: an instance of the dataclass (or other type) that is expected.

    Raises:
        ValueError: A key is missing, unknown or of the wrong type; the message names it, and `where` it stands.
    """
    return _read(expected, data, where)


def _read(expected: Any, data: Any, where: str) -> Any:
    origin = get_origin(expected)
    if origin in (Union, types.UnionType):
        (inner,) = (choice for choice in get_args(expected) if choice is not type(None))
        if data is None:
            raise ValueError(f"`{where}` is null. Leave out the key of what was not measured.")
        return _read(inner, data, where)
    if is_dataclass(expected):
        return _read_dataclass(expected, data, where)
    if origin is list:
        _check(isinstance(data, list), "a list", data, where)
        (inner,) = get_args(expected)
        return [_read(inner, item, f"{where}[{index}]") for index, item in enumerate(data)]
    if origin is dict:
        _check(isinstance(data, dict), "an object", data, where)
        key_type, value_type = get_args(expected)
        return {
            _read_key(key_type, name, where): _read(value_type, item, f"{where}.{name}") for name, item in data.items()
        }
    if expected is float:
        is_number = isinstance(data, (int, float)) and not isinstance(data, bool) and abs(data) < float("inf")
        _check(is_number, "a number", data, where)
        return float(data)
    if expected in _WORDS:
        _check(type(data) is expected, _WORDS[expected], data, where)
    return data


def _read_dataclass(cls: Any, data: Any, where: str) -> Any:
    _check(isinstance(data, dict), "an object", data, where)
    known = {item.name: item for item in fields(cls)}
    for name in data:
        if name not in known:
            hint = did_you_mean(name, known) or f" Known keys: {', '.join(known)}."
            raise ValueError(f"`{where}` has an unknown key `{name}`.{hint}")
    required = [name for name, item in known.items() if item.default is MISSING and item.default_factory is MISSING]
    missing = [name for name in required if name not in data]
    if missing:
        raise ValueError(f"`{where}` lacks the key `{missing[0]}`. {known[missing[0]].metadata.get('help', '')}")
    hints = get_type_hints(cls)
    return cls(**{name: _read(hints[name], content, f"{where}.{name}") for name, content in data.items()})


def _read_key(key_type: type, name: str, where: str) -> Any:
    if key_type is not int:
        return name
    _check(name.isdecimal(), "whole numbers as keys", name, where)
    return int(name)


def _check(is_right: bool, expected: str, data: Any, where: str) -> None:
    if not is_right:
        raise ValueError(f"`{where}` must be {expected}, got {data!r:.80}.")
