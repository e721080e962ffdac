"""Checks of values that users give: each returns the value, or raises a `ValueError` that repeats what was given."""

import math
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


def nearest(name: object, valid: Iterable[str]) -> str | None:
    """The valid name that was probably meant, or None: `"jsd"` → `"generalized_jsd"`, `"--modle"` → `"--model"`.

    Initials count as a name: `"--lr"` → `"--learning_rate"`.
    """
    names = list(valid)
    initials = {each: "".join(word[:1] for word in each.strip("-").split("_")) for each in names if "_" in each}
    near = [each for each in initials if initials[each] == str(name).strip("-")][:1]
    near = near or get_close_matches(str(name), names, n=1, cutoff=0.6)
    # A short form is far from its name in letters, but part of it.
    near = near or [each for each in names if str(name) and str(name) in each]
    near = near or get_close_matches(str(name), names, n=1, cutoff=0.4)
    return near[0] if near else None


def did_you_mean(name: object, valid: Iterable[str]) -> str:
    """`" Did you mean 'model'?"`, or nothing where no valid name is near."""
    near = nearest(name, valid)
    return f" Did you mean {near!r}?" if near else ""


def one_of(kind: str, value: Any, valid: Iterable[str]) -> Any:
    """Refuse a name that is not one of `valid` with a `ValueError`, suggesting the nearest one that is.

    `kind` says what the name is of: `"verification rule"`, "`cache_dtype`".
    """
    names = list(valid)
    if value not in names:
        raise ValueError(f"Unknown {kind} {value!r}.{did_you_mean(value, names)} Choose one of: {', '.join(names)}.")
    return value


def in_range(name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """Refuse anything but a finite number in [low, high], or in (low, high] with `open_low`.

    Values read from YAML may be strings (`"1e-1"`), booleans or nan: none of them is a number in range.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not (low < value if open_low else low <= value) or value > high:
        interval = f"{'(' if open_low else '['}{low:g}, {'∞)' if math.isinf(high) else f'{high:g}]'}"
        raise ValueError(f"`{name}` must be a number in {interval}, got {value!r}.")
    return value


def whole_number(name: str, value: Any, low: int = 1, high: int | None = None) -> int:
    """Refuse anything but an integer in [low, high]; booleans and floats such as 3.0 are not integers."""
    if type(value) is not int or value < low or (high is not None and value > high):
        wanted = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"`{name}` must be a whole number {wanted}, got {value!r}.")
    return value


def sendable(what: str, secret: str, instead: str) -> str:
    """Refuse a key that no HTTP header can hold: the client that refuses it later would quote it."""
    if not re.fullmatch(r"[\x21-\x7e]+", secret):
        raise ValueError(
            f"{what} is empty, or holds spaces, line breaks or other characters that no key contains. {instead}"
        )
    return secret
