"""Reading options: dataclasses, the command line and `--config FILE.yaml`, through `trl.TrlParser`."""

import dataclasses
import difflib
import os
from argparse import Action, _StoreFalseAction
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trl import TrlParser
from yaml import YAMLError

from hf_draftkd.cli.errors import UsageError, usage_errors


def parse(command: str, dataclass_types: Sequence[type], argv: list[str], description: str) -> tuple[Any, ...]:
    """One instance of each dataclass, from `argv` and the YAML file it may name.

    Raises:
        UsageError: A value is refused by its dataclass, the file cannot be read, or an option does not exist (the
            nearest one is named).
    """
    parser = _Parser(dataclass_types, prog=f"draftkd {command}", description=description, allow_abbrev=False)
    with usage_errors():
        try:
            *instances, unknown = parser.parse_args_and_config(
                list(_config_in_two_words(argv)), return_remaining_strings=True
            )
        except (YAMLError, TypeError) as error:
            # YAML knows more types than options have: `divergence: [forward_kl]`.
            raise UsageError(f"the options cannot be read: {error}") from error
    for instance in instances:
        # TRL's own classes have their own ideas: `lora_target_modules` may be one word.
        if type(instance).__module__.startswith("hf_draftkd.cli"):
            _one_is_a_list_of_one(instance)
            _expand_home(instance)
    for option in unknown:
        if option.startswith("--"):
            name = option.split("=", 1)[0]
            close = difflib.get_close_matches(name, parser._option_string_actions, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else f" See `draftkd {command} --help`."
            raise UsageError(f"there is no option `{name}`.{hint}")
    if unknown:
        raise UsageError(f"these words belong to no option: {' '.join(unknown)}")
    return tuple(instances)


def _config_in_two_words(argv: list[str]) -> Iterator[str]:
    """`--config=FILE`, which every other option allows, as TRL reads it: in two words."""
    for place, word in enumerate(argv, start=1):
        if word == "--config" and (place == len(argv) or argv[place].startswith("--")):
            raise UsageError("`--config` needs the name of a YAML file behind it.")
        name, equals, file = word.partition("=")
        yield from ("--config", os.path.expanduser(file)) if name == "--config" and equals else (word,)


class _Parser(TrlParser):
    """Reads a YAML file as strictly as the command line; TRL takes any value of any type for any option."""

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        hints = {name: hint for each in self.dataclass_types for name, hint in get_type_hints(each).items()}
        ours = {
            name
            for each in self.dataclass_types
            if each.__module__.startswith("hf_draftkd")
            for name in vars(each).get("__annotations__", {})
        }
        read: dict[str, Any] = {}
        for key, value in config.items():
            # By every name that the command line knows: `output-dir`, `no_measure_speed`.
            action = self._option_string_actions.get(f"--{key}")
            name = action.dest if action is not None else key
            if name in read:
                raise UsageError(f"the YAML file names `{name}` twice, once as `{key}`: leave one of them out.")
            if action is not None and name in hints:
                # What transformers calls text may be more: `fsdp: true`, `resume_from_checkpoint: true`.
                is_only_called_text = name not in ours and set(_alternatives(hints[name])) <= {str, NoneType}
                if not (is_only_called_text and isinstance(value, bool | list)):
                    _check_value(key, value, action, hints[name])
                value = not value if isinstance(action, _StoreFalseAction) else value
            read[name] = value
        return super().set_defaults_with_config(**read)


def _check_value(key: str, value: Any, action: Action, hint: Any) -> None:
    """Refuse a value of a YAML file that the option cannot have; strings are converted, or refused, by argparse."""
    if isinstance(value, str) and not isinstance(action, _StoreFalseAction):
        # argparse looks at the choices of words on the command line, not of defaults.
        if action.choices and value not in action.choices:
            choices = ", ".join(map(str, action.choices))
            raise UsageError(f"`{key}` must be one of {choices}, got {value!r} in the YAML file.")
    elif not _fits(value, hint):
        in_quotes = str in _alternatives(hint) and isinstance(value, int | float)
        advice = " YAML reads 9:1, no and 1.10 as something else: put it in quotes." if in_quotes else ""
        raise UsageError(f"`{key}` must be {_in_words(hint)}, got {value!r} in the YAML file.{advice}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    for choice in _alternatives(hint):
        kind = get_origin(choice) or choice
        if kind is list:
            # One is a list of one.
            each = value if isinstance(value, list) else [value]
            fits = all(_fits(item, *get_args(choice)) for item in each)
        elif kind in (int, float):
            fits = isinstance(value, int | kind) and not isinstance(value, bool)
        elif kind in (str, bool, dict, NoneType):
            fits = isinstance(value, kind)
        elif kind is Literal:
            fits = value in get_args(choice)
        else:  # of names transformers makes classes of its own; other classes are for it to judge
            fits = isinstance(value, str) or not issubclass(kind, Enum)
        if fits:
            return True
    return False


def _in_words(hint: Any) -> str:
    kinds = [choice for choice in _alternatives(hint) if choice is not NoneType]
    words = {int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping"}
    found = [
        f"a list, each {_in_words(get_args(kind)[0])}"
        if get_origin(kind) is list
        else words.get(get_origin(kind) or kind, "text")
        for kind in kinds
    ]
    return " or ".join(dict.fromkeys(found))


def _one_is_a_list_of_one(options: Any) -> None:
    """`temperatures: 0.5` in a YAML file means what `--temperatures 0.5` means."""
    hints = get_type_hints(type(options))
    for item in dataclasses.fields(options):
        value = getattr(options, item.name)
        takes_list = any(get_origin(choice) is list for choice in (hints[item.name], *get_args(hints[item.name])))
        takes_scalar = any(
            isinstance(choice, type) and isinstance(value, choice) for choice in get_args(hints[item.name])
        )
        if takes_list and not takes_scalar and value is not None and not isinstance(value, list):
            setattr(options, item.name, [value])


def _expand_home(options: Any) -> None:
    """`~/drafts` in a YAML file, or behind an equals sign, where no shell expands it."""

    def expanded(value: Any) -> Any:
        return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value

    for name, value in vars(options).items():
        setattr(options, name, [expanded(each) for each in value] if isinstance(value, list) else expanded(value))


def required(**options: Any) -> None:
    """Refuse options that were not given. They are not positional, so that `--config` may hold them."""
    missing = [f"--{name}" for name, value in options.items() if value is None]
    if missing:
        raise UsageError(f"missing: {', '.join(missing)}")


def new_directory(path: str, *, overwrite: bool = False, target_model: str | None = None) -> Path:
    """A directory that results may be written to.

    Args:
        path: Where the user wants them.
        overwrite: Whether it may hold something.
        target_model: The target, where a draft is written: it must not be replaced by its own draft.

    Raises:
        UsageError: It is a file or the target, it cannot be written, or it holds something and `overwrite` is off.
    """
    directory = Path(path)
    existing = next(part for part in (directory, *directory.absolute().parents) if part.exists())
    if not existing.is_dir():
        raise UsageError(f"`--output_dir {path}` cannot be a directory: {existing} is a file. Name another.")
    # Results are written last: hours later would be too late to find out.
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"`--output_dir {path}` cannot be written: no permission in {existing}. Name another.")
    if target_model is not None and directory.is_dir() and directory.resolve() == Path(target_model).resolve():
        raise UsageError(f"`--output_dir {path}` is the target itself, which the draft would replace. Name another.")
    if not overwrite and directory.is_dir() and any(directory.iterdir()):
        raise UsageError(
            f"`--output_dir {path}` is not empty. Name another directory, or pass `--overwrite_output_dir`."
        )
    return directory
