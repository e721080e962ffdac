"""`draftkd COMMAND`: finds the command's module and turns what it raises into an exit code.

Nothing heavy is imported before a command is known, so that `draftkd --help` answers at once.
"""

import io
import logging
import sys
from importlib import import_module

from hf_draftkd import __version__
from hf_draftkd.cli.errors import UsageError
from hf_draftkd.utils.checks import did_you_mean
from hf_draftkd.utils.text import printable

# Command -> what it does. Each lives in hf_draftkd/cli/COMMAND.py as `run(argv) -> exit code`.
COMMANDS = {
    "quickstart": "distil and measure a draft on the bundled demo pair, in a few minutes",
    "doctor": "look at a target and a draft before anything is downloaded: do they fit, and what next",
    "init": "make a draft that fits a target: from its layers, from a config, or by repairing a stock draft",
    "generate": "have the target answer prompts: the data that a draft learns from",
    "train": "distil a target into a draft",
    "vocabulary": "choose the tokens that a draft proposes: a smaller head, a faster draft",
    "evaluate": "measure how good one or several drafts are for a target",
    "push": "publish a draft on the Hugging Face Hub, with a card that says how good it is",
    "find": "find drafts for a target on the Hugging Face Hub, best first",
    "completion": "print a script that completes commands and options in bash and zsh",
}
# What libraries report at a place, and how it begins, that nobody who runs a command can act on.
_IDLE_NOTICES = {
    # Assisted decoding calls the draft's `generate` in a way that transformers itself deprecates.
    "transformers.generation.utils": "Passing `generation_config` together with",
    # bitsandbytes, which peft imports, where an optional package is missing.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}


def usage() -> str:
    commands = "\n".join(f"  {name:<10}  {summary}" for name, summary in COMMANDS.items())
    return f"""usage: draftkd COMMAND [options]

Distil draft models for speculative decoding, and measure honestly what they gain.

commands:
{commands}

`draftkd COMMAND --help` lists a command's options; each takes `--config FILE.yaml` as well.
`draftkd --version` prints the version.
exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted"""


def dispatch(argv: list[str]) -> int:
    """Run `draftkd *argv` and return its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"hf_draftkd {__version__}")
        return 0
    command, *options = argv
    if command not in COMMANDS:
        print(
            f"draftkd: there is no command {command!r}.{did_you_mean(command, COMMANDS)}\n\n{usage()}", file=sys.stderr
        )
        return 2
    try:
        run = import_module(f"hf_draftkd.cli.{command}").run
        from hf_draftkd.models.identity import without_weight_bars

        with without_weight_bars():
            return run(options)
    # A lost connection, or a loss that is not finite, is not the user's mistake, but its message says it all.
    except (UsageError, ConnectionError, FloatingPointError) as error:
        # It may quote a stranger's file, template or server.
        print(f"draftkd {command}: {printable(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print(f"draftkd {command}: interrupted", file=sys.stderr)
        return 130


def main() -> None:
    """Entry point of the console script."""
    # A console or a file of an old encoding has no γ: that must not end a command whose work is done.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    for name in _IDLE_NOTICES:
        logging.getLogger(name).addFilter(_is_of_use)
    sys.exit(dispatch(sys.argv[1:]))


def _is_of_use(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_IDLE_NOTICES[record.name])
