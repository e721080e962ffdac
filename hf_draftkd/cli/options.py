"""Reading options: dataclasses, the command line and `--config FILE.yaml`, through `trl.TrlParser`."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from trl import TrlParser
from yaml import YAMLError

from hf_draftkd.cli.errors import UsageError, usage_errors


def parse(command: str, dataclass_types: Sequence[type], argv: list[str], description: str) -> tuple[Any, ...]:
    """One instance of each dataclass, from `argv` and the YAML file it may name.

    Raises:
        UsageError: A value is refused by its dataclass, the file cannot be read, or an option does not exist (the
            nearest one is named).
    """
    parser = TrlParser(dataclass_types, prog=f"draftkd {command}", description=description, allow_abbrev=False)
    with usage_errors():
        try:
            *instances, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
        except (YAMLError, TypeError) as error:
            # YAML knows more types than options have: `divergence: [forward_kl]`.
            raise UsageError(f"the options cannot be read: {error}") from error
    for instance in instances:
        # TRL's own classes have their own ideas: `lora_target_modules` may be one word.
        if type(instance).__module__.startswith("hf_draftkd.cli"):
            _one_is_a_list_of_one(instance)
    for option in unknown:
        if option.startswith("--"):
            name = option.split("=", 1)[0]
            close = difflib.get_close_matches(name, parser._option_string_actions, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else f" See `draftkd {command} --help`."
            raise UsageError(f"there is no option `{name}`.{hint}")
    if unknown:
        raise UsageError(f"these words belong to no option: {' '.join(unknown)}")
    return tuple(instances)


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


def required(**options: Any) -> None:
    """Refuse options that were not given. They are not positional, so that `--config` may hold them."""
    missing = [f"--{name}" for name, value in options.items() if value is None]
    if missing:
        raise UsageError(f"missing: {', '.join(missing)}")


def new_directory(path: str, *, overwrite: bool = False) -> Path:
    """A directory that results may be written to.

    Raises:
        UsageError: It is a file, or holds something and `overwrite` is off.
    """
    directory = Path(path)
    for part in (directory, *directory.absolute().parents):
        if part.exists() and not part.is_dir():
            raise UsageError(f"`--output_dir {path}` cannot be a directory: {part} is a file. Name another.")
    if not overwrite and directory.is_dir() and any(directory.iterdir()):
        raise UsageError(
            f"`--output_dir {path}` is not empty. Name another directory, or pass `--overwrite_output_dir`."
        )
    return directory
