"""A target that exists only as a GGUF file, from one command to the next."""

import json
import shlex

import pytest
from datasets import load_dataset

from hf_draftkd.cli.main import dispatch
from hf_draftkd.models.loading import load_target
from tests.tiny import save_gguf, tiny_llama, tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    """A GGUF file and a tokenizer, no config and no safetensors, in a folder that a shell needs quoted."""
    folder = tmp_path / "the target"
    folder.mkdir()
    save_gguf(tiny_llama(), folder / "tiny.gguf")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run(*argv):
    return dispatch([str(each) for each in argv])


def test_a_draft_is_made_of_it_and_learns_from_it(tmp_path, folder, capsys):
    """Every command that loads a target reads the file, and what it prints to go on with names it: the file, its
    folder and the revision, as a shell reads them.
    """
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("The quick", "A draft", "When")))
    target = ["--target_model", folder, "--target_model_revision", "main", "--gguf_file", "tiny.gguf"]
    named = shlex.join(map(str, target))
    assert run("doctor", *target) == 0
    shown = capsys.readouterr().out
    assert "300 rows for 300 tokens" in shown
    assert shown.count(named) == 4
    assert run("init", *target, "--num_layers", 1, "--output_dir", tmp_path / "a draft") == 0
    assert f"draftkd train --model '{tmp_path / 'a draft'}' {named} " in capsys.readouterr().out
    answers = ["generate", "--dataset", prompts, "--max_new_tokens", 8]
    assert run(*answers, *target, "--output_dir", tmp_path / "the rows") == 0
    assert f"{named} --dataset '{tmp_path / 'the rows'}' " in capsys.readouterr().out
    plain = tmp_path / "plain"
    load_target(folder, gguf_file="tiny.gguf").save_pretrained(plain)
    tiny_tokenizer().save_pretrained(plain)
    assert run(*answers, "--target_model", plain, "--output_dir", tmp_path / "same") == 0
    rows, same = (load_dataset(str(tmp_path / name), split="train") for name in ("the rows", "same"))
    assert rows["completion_ids"][:] == same["completion_ids"][:]
    losses = []
    for name, given in (("trained", target), ("beside", ["--target_model", plain])):
        words = ["train", "--model", tmp_path / "a draft", "--dataset", tmp_path / "the rows", "--max_steps", 1]
        words += ["--report_to", "none", "--save_strategy", "no", "--logging_steps", 1]
        assert run(*words, *given, "--output_dir", tmp_path / name) == 0
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        losses.append(state["log_history"][0]["loss"])
    assert losses[0] == pytest.approx(losses[1])
    words = ["evaluate", "--model", tmp_path / "trained", "--dataset", tmp_path / "the rows", "--no_measure_speed"]
    assert run(*words, *target, "--output_dir", tmp_path / "report") == 0


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("generate", ["--gguf_file", "other.gguf"], "GGUF files: begun.gguf, cut.gguf, notes"),
        ("train", ["--gguf_file", "other.gguf"], "GGUF files: begun.gguf, cut.gguf, notes"),
        ("init", ["--gguf_file", "other.gguf", "--num_layers", "1"], "GGUF files: begun.gguf, cut.gguf, notes"),
        ("generate", [], "name a target's GGUF file as `gguf_file`"),
        ("train", ["--gguf_file", "notes.gguf"], "does not start with the GGUF magic bytes"),
        ("train", ["--gguf_file", "cut.gguf"], "The cut.gguf of "),
        ("generate", ["--gguf_file", "begun.gguf"], "The begun.gguf of "),
        ("generate", ["--gguf_file", "notes.gguf"], "does not start with the GGUF magic bytes"),
    ],
)
def test_the_wrong_file(tmp_path, folder, capsys, command, words, message):
    (folder / "notes.gguf").write_text("a text")
    whole = (folder / "tiny.gguf").read_bytes()
    (folder / "cut.gguf").write_bytes(whole[:-5000])
    (folder / "begun.gguf").write_bytes(whole[:100])
    words = [*words, "--target_model", folder, "--output_dir", tmp_path / "out"]
    if command != "init":
        rows = tmp_path / "rows.jsonl"
        rows.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
        words += ["--dataset", rows]
    if command == "train":
        tiny_llama().save_pretrained(tmp_path / "draft")
        tiny_tokenizer().save_pretrained(tmp_path / "draft")
        words += ["--model", tmp_path / "draft", "--report_to", "none"]
    assert run(command, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_file_without_a_model(tmp_path, folder, capsys):
    words = ["--dataset", "rows.jsonl", "--model", "draft", "--output_dir", tmp_path / "out"]
    assert run("train", *words, "--gguf_file", "tiny.gguf") == 2
    assert "give `--target_model` too" in capsys.readouterr().err
    assert run("init", "--text_of", folder, "--gguf_file", "tiny.gguf", "--output_dir", tmp_path / "out") == 2
    assert "leave out `--gguf_file`" in capsys.readouterr().err
