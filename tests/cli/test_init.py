"""`draftkd init` and `draftkd quickstart`: what is refused, and when."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_draftkd.cli.main import dispatch
from hf_draftkd.cli.quickstart import _lines
from hf_draftkd.models.demo import demo_path
from hf_draftkd.models.loading import load_draft
from hf_draftkd.models.resolve import resolve
from tests.multimodal import tiny_multimodal
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_layers", "5"], "`num_layers` must be a whole number from 1 to 2"),
        (["--layers", "1", "0"], "in ascending order"),
        (["--share", "5"], "`share` must lie between 0 and 1"),
        (["--draft_config", "CONFIG"], "`config` has vocab_size=310 and the target 300"),
        (["--model", "PICKLED"], "has a config.json but no weights"),
    ],
)
def test_what_cannot_work_is_refused_before_the_target_is_loaded(
    saved_pair, tmp_path, capsys, monkeypatch, words, message
):
    """A target of 70 B parameters is read for minutes before a number out of range is found."""
    monkeypatch.setattr("hf_draftkd.cli.init.load_target", lambda *_, **__: pytest.fail("too late"))
    draft, target = saved_pair
    tiny_llama(vocab_size=310).config.save_pretrained(tmp_path / "CONFIG")
    (draft / "model.safetensors").unlink()
    places = {"CONFIG": str(tmp_path / "CONFIG"), "PICKLED": str(draft)}
    words = [places.get(word, word) for word in words]
    assert dispatch(["init", "--target_model", str(target), "--output_dir", str(tmp_path / "new"), *words]) == 2
    assert message in capsys.readouterr().err


def test_the_text_model_of_a_multimodal_one(tmp_path, capsys):
    """It is written by `--text_of`, and cut like any other where the multimodal model is named as the target."""
    tiny_multimodal("Gemma3").save_pretrained(tmp_path / "whole")
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    cut = ["init", "--output_dir", str(tmp_path / "cut"), "--num_layers", "1"]
    assert dispatch([*cut, "--target_model", str(tmp_path / "whole")]) == 0
    assert resolve(tmp_path / "cut").config.num_hidden_layers == 1
    command = ["init", "--output_dir", str(tmp_path / "text")]
    assert dispatch([*command, "--text_of", str(tmp_path / "whole"), "--target_model", "x"]) == 2
    assert dispatch([*command, "--text_of", str(tmp_path / "whole")]) == 0
    assert "weights:" not in capsys.readouterr().err  # a bar of transformers for each model
    checkpoint = resolve(tmp_path / "text")
    assert checkpoint.config.get_text_config() is checkpoint.config
    assert len(checkpoint.tokenizer) == 300


@pytest.mark.parametrize(("words", "written"), [([], "bfloat16"), (["--dtype", "float16"], "float16")])
def test_the_text_model_is_written_as_asked(tmp_path, capsys, words, written):
    """`--dtype` did nothing beside `--text_of`."""
    tiny_multimodal("Qwen3VL").to(torch.bfloat16).save_pretrained(tmp_path / "whole")
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    command = ["init", "--text_of", str(tmp_path / "whole"), "--output_dir", str(tmp_path / "text"), *words]
    assert dispatch(command) == 0
    assert {str(value.dtype) for value in load_file(tmp_path / "text" / "model.safetensors").values()} == {
        f"torch.{written}"
    }


def test_code_is_trusted_for_a_text_model_too(tmp_path, capsys, monkeypatch):
    """`--trust_remote_code` did nothing beside `--text_of`: the multimodal model's own config was refused."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    whole = tmp_path / "whole"
    tiny_multimodal("Qwen3VL").save_pretrained(whole)
    tiny_tokenizer().save_pretrained(whole)
    config = json.loads((whole / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (whole / "config.json").write_text(json.dumps(config))
    code = 'from transformers import Qwen3VLConfig\n\n\nclass Config(Qwen3VLConfig):\n    model_type = "mine"\n'
    (whole / "mine.py").write_text(code)
    command = ["init", "--text_of", str(whole), "--output_dir", str(tmp_path / "text")]
    assert dispatch(command) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert dispatch([*command, "--trust_remote_code"]) == 0
    assert resolve(tmp_path / "text").config.model_type == "qwen3"


def test_a_stock_draft_is_repaired_without_the_weights_of_the_target(saved_pair, tmp_path, capsys):
    """The whole target was read for the size of its vocabulary and its special ids."""
    draft, target = saved_pair
    (target / "model.safetensors").write_bytes(b"never read")
    config = json.loads((target / "generation_config.json").read_text()) | {"eos_token_id": [1, 7]}
    (target / "generation_config.json").write_text(json.dumps(config))
    command = ["init", "--model", str(draft), "--target_model", str(target), "--output_dir", str(tmp_path / "new")]
    assert dispatch(command) == 0
    assert ", 0.00% of" not in capsys.readouterr().out
    made = load_draft(tmp_path / "new")
    assert made.config.vocab_size == resolve(target).config.vocab_size
    assert made.generation_config.eos_token_id == [1, 7]


def test_quickstart_refuses_before_it_trains(tmp_path, capsys, monkeypatch):
    """A traceback after two minutes of training, for a number that was wrong from the start."""
    monkeypatch.setattr("hf_draftkd.cli.quickstart.generate_alignment_data", lambda *_, **__: pytest.fail("too late"))
    for option in ("--num_speed_prompts", "--max_new_tokens"):
        assert dispatch(["quickstart", option, "0", "--output_dir", str(tmp_path / "out")]) == 2
        assert f"`{option[2:]}` must be" in capsys.readouterr().err
    # It ended well, and had trained nothing.
    assert dispatch(["quickstart", "--num_train_epochs=-1", "--output_dir", str(tmp_path / "out")]) == 2
    assert "`num_train_epochs` must be a number in (0, ∞), got -1.0" in capsys.readouterr().err
    assert dispatch(["quickstart", "--seed=-1", "--output_dir", str(tmp_path / "out")]) == 2
    assert "`seed` must be a whole number from 0 to 4294967295, got -1" in capsys.readouterr().err


def test_quickstart_leaves_a_draft_that_is_there_alone(tmp_path, capsys):
    """`draftkd quickstart --output_dir .` replaced the weights in `./draft`."""
    (tmp_path / "draft").mkdir()
    assert dispatch(["quickstart", "--output_dir", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_the_lines_that_quickstart_ends_with_show_the_draft_at_work(capsys):
    """Lines that do not run, or name a folder relative to where nobody is."""
    exec(_lines(Path(demo_path("draft")), 8), {})
    without, with_draft = capsys.readouterr().out.splitlines()
    assert without.partition(" the draft: ")[2] == with_draft.partition(" the draft: ")[2] != ""
