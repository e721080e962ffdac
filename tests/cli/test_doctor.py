"""`draftkd doctor`: one screen, the exit code, and commands that the parser takes."""

import shlex

import pytest

from hf_draftkd.cli import doctor
from hf_draftkd.cli.main import dispatch
from tests import tiny


@pytest.mark.parametrize("free", [10**9, 300_000, 1000])
def test_a_pair_and_what_to_do_next(free, tmp_path, tokenizer, capsys, monkeypatch):
    """A command that does not exist any more, or one for another machine than this."""
    pair = tiny.tiny_pair("llama", draft_vocab_size=304, target_vocab_size=320)
    for name, model in zip(("draft", "target"), pair, strict=True):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.setattr(doctor, "_memory", lambda: (free, "a machine of the test"))
    monkeypatch.setenv("COLUMNS", "120")
    words = ["doctor", str(tmp_path / "target"), str(tmp_path / "draft"), "--model_revision", "main"]
    assert dispatch([*words, "--target_model_revision", "main", "--trust_remote_code"]) == 0
    shown = capsys.readouterr().out
    assert "320 rows for 300 tokens; context: 256 tokens" in shown
    assert "padded to other sizes" in shown
    assert "once the draft is repaired: SpeculativeDecoding, transformers: generate" in shown
    next_commands = shown.partition("\nnext\n")[2]
    assert ("--cache_distributions" in next_commands, "--endpoint" in next_commands) == {
        10**9: (False, False),
        300_000: (True, False),
        1000: (False, True),
    }[free]
    assert f"--model {tmp_path / 'draft'} --model_revision main " in next_commands
    for line in next_commands.splitlines():
        words = shlex.split(line)
        assert (words[0], words[-1]) == ("draftkd", "--trust_remote_code")
        with pytest.raises(SystemExit, match="0"):
            dispatch([*words[1:], "--help"])
        known = capsys.readouterr().out
        assert all(word in known for word in words if word.startswith("--"))


def test_a_pair_the_wrong_way_round_is_said(tmp_path, tokenizer, capsys):
    """Fault: `draftkd doctor DRAFT TARGET` found nothing amiss, and its next commands trained the target."""
    for name, layers in (("draft", 1), ("target", 3)):
        tiny.tiny_llama(num_layers=layers).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for first, second in (("target", "draft"), ("draft", "target")):
        assert dispatch(["doctor", str(tmp_path / first), str(tmp_path / second)]) == 0
        assert ("the wrong way round" in " ".join(capsys.readouterr().out.split())) is (first == "draft")


def test_a_pair_that_will_be_refused_is_exit_code_2(saved_pair, tmp_path, capsys):
    """A shell that goes on with the next command."""
    draft, target = saved_pair
    tiny.tiny_tokenizer(text=[*tiny.TEXT, "zebra " * 50]).save_pretrained(draft)
    assert dispatch(["doctor", "--target_model", str(target), "--model", str(draft)]) == 2
    shown = capsys.readouterr().out
    assert "The tokenizers of draft and target differ" in shown
    assert "draftkd init" in shown
    for name, message in ((str(tmp_path / "nothing"), "There is no directory"), ("", "A model needs a name")):
        assert dispatch(["doctor", str(target), name]) == 2
        assert message in capsys.readouterr().err
