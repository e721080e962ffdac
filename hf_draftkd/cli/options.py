"""Reading options: dataclasses from the command line and `--config FILE.yaml`, through `trl.TrlParser`."""

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from hf_draftkd.cli.errors import UsageError, usage_errors
from hf_draftkd.utils.checks import did_you_mean
from hf_draftkd.utils.files import check_writable


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)  # argparse would print the usage of a hundred options in front of it


def parse(
    command: str, dataclass_types: Sequence[type], argv: list[str], description: str, usage: str = ""
) -> tuple[Any, ...]:
    """One instance of each dataclass, from `argv` and the YAML file it may name.

    `usage` holds the options that one cannot do without, for the first line of the help: argparse would list them all.

    A `UsageError` names a value that is refused, or an option that does not exist and the nearest one.
    """
    usage = " ".join(filter(None, ["draftkd", command, usage, "[options]"]))
    parser = _Parser(dataclass_types, usage=usage, description=description, allow_abbrev=False)
    file_parser = _Parser(add_help=False, allow_abbrev=False)
    for each in (parser, file_parser):
        each.add_argument("--config", metavar="FILE", help="YAML file with options; the command line wins over it.")
    argv = [_expand_home(word) for word in argv]
    file = file_parser.parse_known_args(argv)[0].config
    with usage_errors():
        words = [] if file is None else list(_read_yaml(Path(file), parser))
        try:
            *instances, _, unknown = parser.parse_args_into_dataclasses(
                [*words, *argv], return_remaining_strings=True, look_for_args_file=False
            )
        except TypeError as error:  # a dataclass that does not expect a mapping or a list
            raise UsageError(f"the options cannot be read: {error}") from error
    for option in unknown:
        if option.startswith("--"):
            name = option.partition("=")[0]
            near = did_you_mean(name, parser._option_string_actions) or f" See `draftkd {command} --help`."
            raise UsageError(f"there is no option `{name}`.{near}")
    if unknown:
        raise UsageError(f"these words belong to no option: {' '.join(unknown)}")
    return tuple(instances)


def _read_yaml(file: Path, parser: TrlParser) -> Iterator[str]:
    """The options of a YAML file as words of a command line, so that they are read and refused as those are.

    Mappings and lists for options that do not take several words become defaults of the parser. As in TRL, `env` sets
    environment variables.
    """
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{file} must hold options as `name: value`.")
    variables = config.pop("env", None) or {}
    if not isinstance(variables, dict):
        raise UsageError(f"`env` takes environment variables as `NAME: value`, got {variables!r} in the YAML file.")
    os.environ.update({name: str(value) for name, value in variables.items()})
    hints = {name: hint for each in parser.dataclass_types for name, hint in get_type_hints(each).items()}
    for key, value in config.items():
        action = parser._option_string_actions.get(f"--{key}")
        if action is None:
            yield f"--{key}"  # refused with the command line's
        elif action.nargs == 0:  # `no_measure_speed: true`
            yield f"--{action.dest}={not value}"
        elif value is True and action.nargs == "?":
            yield f"--{key}"
        elif value is None and action.default is None:
            pass
        elif isinstance(value, list) and value and action.nargs == "+":
            _check_text(key, action, *value)
            yield f"--{key}"
            yield from (_expand_home(str(item)) for item in value)
        elif isinstance(value, list | dict):
            hint = hints[action.dest]
            alternatives = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
            if type(value) not in [get_origin(each) or each for each in alternatives]:
                raise UsageError(f"`{key}` takes a single value, got {value!r} in the YAML file.")
            parser.set_defaults(**{action.dest: value})
        else:
            if not (isinstance(value, bool) and action.default is None):  # `resume_from_checkpoint: true`
                _check_text(key, action, value)
            yield _expand_home(f"--{key}={'null' if value is None else value}")


def _check_text(key: str, action: Any, *values: Any) -> None:
    """Refuse what YAML does not read as the text that was meant."""
    for value in values:
        if action.type is str and isinstance(value, bool | int | float):
            raise UsageError(
                f"`{key}` must be text, got {value!r} in the YAML file. YAML reads 9:1, no and 1.10 as something else: "
                "put it in quotes."
            )


def _expand_home(word: str) -> str:
    """`~/drafts` in a YAML file, or behind an equals sign, where no shell expands it."""
    return re.sub(r"^(--[\w-]+=)?~/", lambda found: (found[1] or "") + os.path.expanduser("~/"), word)


def required(**options: Any) -> None:
    """Refuse options that were not given. They are not positional, so that `--config` may hold them."""
    missing = [f"--{name}" for name, value in options.items() if value is None]
    if missing:
        raise UsageError(f"missing: {', '.join(missing)}")


def target_words(name: str, revision: str | None = None, gguf_file: str | None = None) -> str:
    """The options that name a target, as a shell reads them, for the command that a user is told to run next."""
    given = {"target_model": name, "target_model_revision": revision, "gguf_file": gguf_file}
    return " ".join(f"--{option} {shlex.quote(value)}" for option, value in given.items() if value)


def trust_words(trust_remote_code: bool) -> str:
    """The option at the end of such a command where a model's own code was allowed."""
    return " --trust_remote_code" if trust_remote_code else ""


def whole_draft(path: str, command: str) -> Path:
    """The folder of a draft whose generation config a command or an option changes; a `UsageError` if it is none."""
    # An adapter's folder has no generation config: the base model's would be changed.
    if not (Path(path) / "config.json").is_file():
        raise UsageError(
            f"{command} changes the draft's own generation config, so {path!r} must be a local folder with a whole "
            "model (merge an adapter first)."
        )
    with usage_errors():
        check_writable(path, f"{command} changes {path!r}, which")
    return Path(path)


def new_directory(path: str, *, overwrite: bool = False, target_model: str | None = None) -> Path:
    """The directory at `path` for results, which may hold something already only with `overwrite`.

    A `UsageError` if it has no name, is a file, cannot be written, or is the `target_model`, which its draft must not
    replace.
    """
    with usage_errors():
        check_writable(path, f"`--output_dir {path}`")
    directory = Path(path)
    if target_model is not None and directory.is_dir() and directory.resolve() == Path(target_model).resolve():
        raise UsageError(f"`--output_dir {path}` is the target itself, which the draft would replace. Name another.")
    if not overwrite and directory.is_dir() and any(directory.iterdir()):
        raise UsageError(
            f"`--output_dir {path}` is not empty. Name another directory, or pass `--overwrite_output_dir`."
        )
    return directory
