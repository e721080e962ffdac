"""`draftkd completion`: what bash and zsh need to complete commands and options.

Reading the options of a command imports trl, which takes seconds. So they are written down once, and completing costs
nothing; after an update of the package, or of trl, the script is made again.
"""

import io
import re
from contextlib import redirect_stdout, suppress
from importlib import import_module

from hf_draftkd import __version__
from hf_draftkd.cli.errors import UsageError
from hf_draftkd.cli.main import COMMANDS

_SCRIPT = """\
# Completion of draftkd {version} for bash, and for zsh after `autoload -U bashcompinit && bashcompinit`.
_draftkd() {{
    local words
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands} --help --version"
    else
        case "${{COMP_WORDS[1]}}" in
{options}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _draftkd draftkd
"""


def run(argv: list[str]) -> int:
    """Run `draftkd completion`, which takes no options."""
    if argv in (["-h"], ["--help"]):
        print("usage: draftkd completion > FILE, and `source FILE` in ~/.bashrc or ~/.zshrc")
    elif argv:
        raise UsageError(f"it takes no options, got {' '.join(argv)}")
    else:
        options = (f'            {command}) words="{" ".join(_options(command))}" ;;' for command in COMMANDS)
        print(_SCRIPT.format(version=__version__, commands=" ".join(COMMANDS), options="\n".join(options)), end="")
    return 0


def _options(command: str) -> list[str]:
    """The options that a command's own help names; without those that only write `-` for `_`."""
    text = io.StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        import_module(f"hf_draftkd.cli.{command}").run(["--help"])
    named = re.findall(r"^  (-.*?)(?:  |$)", text.getvalue(), re.MULTILINE)
    return re.findall(r"(--\w+)(?=[ ,\n]|$)", "\n".join(named))
