"""The command itself: exit codes, help, and how little it loads."""

import io
import subprocess
import sys

import pytest

from hf_draftkd.cli import main
from tests.cli.run import ROOT


def loaded_by(code: str) -> set[str]:
    script = f"import sys; {code}; print(*sorted(sys.modules))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return set(output.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import hf_draftkd; dir(hf_draftkd)",
        "from hf_draftkd.cli.main import dispatch; assert dispatch(['--help']) == 0",
        "from hf_draftkd.cli.main import dispatch; assert dispatch(['--version']) == 0",
    ],
)
def test_neither_import_nor_help_loads_anything_heavy(code):
    """`draftkd --help` that takes ten seconds because torch is imported first."""
    assert not loaded_by(code) & {"torch", "transformers", "trl", "datasets", "numpy"}


def test_every_command_has_a_module_and_a_public_name_a_home():
    """A command in the help or a name in `dir(hf_draftkd)` that does not exist."""
    import hf_draftkd

    for command in main.COMMANDS:
        assert (ROOT / "hf_draftkd" / "cli" / f"{command}.py").is_file()
    for name in hf_draftkd.__all__:
        assert getattr(hf_draftkd, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'DraftDistilTrainer'"):
        hf_draftkd.DraftDistilTrainer  # noqa: B018


@pytest.mark.parametrize("command", [name for name in main.COMMANDS if name != "completion"])
def test_a_help_begins_with_the_options_that_one_needs(command, capsys):
    """Fault: the help of `draftkd train` began with 105 lines of usage that named every option."""
    with pytest.raises(SystemExit, match="0"):
        main.dispatch([command, "--help"])
    first, second, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"usage: draftkd {command} ")
    assert first.endswith("[options]")
    assert second == ""
    assert "options:" in lines


def test_commands_and_options_are_completed(capsys, tmp_path):
    """An option that a shell does not know of, or half of one that is written with a dash as well."""
    assert main.dispatch(["completion"]) == 0
    (tmp_path / "completion.sh").write_text(capsys.readouterr().out)

    def completed(*words: str) -> list[str]:
        code = f"source completion.sh; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _draftkd"
        command = ["bash", "-c", f'{code}; echo "${{COMPREPLY[@]}}"']
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()

    assert completed("draftkd", "in") == ["init"]
    assert completed("draftkd", "train", "--diverg") == ["--divergence"]
    assert completed("draftkd", "evaluate", "--output") == ["--output_dir"]
    assert main.dispatch(["completion", "bash"]) == 2


def test_what_a_message_quotes_is_no_command_to_the_terminal(capsys, tmp_path):
    """A chat template, a column or a server's refusal with escape codes in it: the title set, the screen wiped."""
    assert (
        main.dispatch(
            [
                "evaluate",
                "--model",
                "x",
                "--target_model",
                "y",
                "--dataset",
                "\x1b]0;z\x07\u202e",
                "--output_dir",
                str(tmp_path),
            ]
        )
        == 2
    )
    said = capsys.readouterr().err
    assert said.endswith("\n")
    assert said.removesuffix("\n").replace("\n", "").isprintable()


def test_an_old_encoding_ends_no_command(monkeypatch):
    """UnicodeEncodeError instead of the table of an evaluation of hours, in a file that Windows writes as cp1252."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252", write_through=True))
    monkeypatch.setattr(main, "dispatch", lambda argv: print("γ = 5, é"))
    with pytest.raises(SystemExit):
        main.main()
    assert written.getvalue().decode("cp1252").split() == ["\\u03b3", "=", "5,", "é"]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ([], 2, "usage: draftkd COMMAND"),
        (["trian"], 2, "Did you mean 'train'?"),
        (["train"], 2, "missing: --model, --dataset"),
        (["train", "--divergance", "forward_kl"], 2, "there is no option `--divergance`. Did you mean '--divergence'?"),
        (["train", "--divergence", "forward_k"], 2, "forward_kl"),
        (["train", "--config", "no_such_file.yaml"], 2, "no_such_file.yaml"),
        (["find", "--limit", "2.5"], 2, "draftkd find: argument --limit: invalid int value: '2.5'"),
        (["init", "--target_model", "x", "--output_dir", "y"], 2, "give exactly one of --model, --num_layers"),
    ],
)
def test_bad_usage_is_exit_code_2_and_one_message(capsys, argv, code, message):
    assert main.dispatch(argv) == code
    captured = capsys.readouterr().err
    assert message in captured
    assert "Traceback" not in captured
