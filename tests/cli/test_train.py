"""`draftkd train` and `draftkd init`, from paths, as a user runs them."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_draftkd.cli.errors import UsageError
from hf_draftkd.cli.main import dispatch
from hf_draftkd.cli.train import _publish
from hf_draftkd.data.target_cache import cache_target_distributions
from tests.training.rows import alignment_rows


@pytest.fixture
def files(tmp_path, saved_pair, pair, tokenizer):
    """Draft, target and data on disk."""
    draft, target = saved_pair
    rows = alignment_rows(pair[1], tokenizer, name="elsewhere")  # written once
    Dataset.from_list([row | {"target": str(target)} for row in rows]).to_json(tmp_path / "rows.jsonl")
    return {"model": draft, "target_model": target, "dataset": tmp_path / "rows.jsonl"}


def options(files, output, **more):
    common = {"output_dir": output, "max_steps": 2, "report_to": "none", "learning_rate": 0.01, "save_strategy": "no"}
    pairs = {**files, **common, **more}
    return [str(word) for name, value in pairs.items() for word in (f"--{name}", value)]


def test_train_writes_a_draft_that_assists_the_target(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert dispatch(["train", *options(files, out, eval_dataset=files["dataset"])]) == 0
    draft = AutoModelForCausalLM.from_pretrained(out)
    target = AutoModelForCausalLM.from_pretrained(files["target_model"])
    ids = torch.tensor([[0, 9, 8, 7]])
    plain = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8)
    assert torch.equal(
        plain, target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, assistant_model=draft)
    )
    metrics = json.loads((out / "eval_results.json").read_text())
    assert 1 <= metrics["eval_block_efficiency"] <= 6
    assert 0 <= metrics["eval_acceptance_rate"] <= 1
    assert (out / "README.md").is_file()
    assert (out / "tokenizer.json").is_file()


def test_options_from_yaml(files, tmp_path, capsys):
    out = tmp_path / "out"
    settings = {name: str(value) for name, value in files.items()}
    settings |= {"output_dir": str(out), "max_steps": 1, "report_to": "none", "divergence": "total_variation"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert dispatch(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    assert (out / "model.safetensors").is_file()


def test_text_is_mixed_in(files, tmp_path, capsys):
    """By options, from a text file; and the card of the draft says so."""
    (tmp_path / "text.txt").write_text("one two three\nfour five\n")
    out = tmp_path / "out"
    assert dispatch(["train", *options(files, out, mix_dataset=tmp_path / "text.txt", mix="1:1")]) == 0
    training = json.loads((out / "provenance.json").read_text())["training"]
    assert training["num_rows"] == 8
    assert 0 < training["num_mixed_rows"] < 30
    assert f"| Mixed in | {training['num_mixed_rows']} rows of other text" in (out / "README.md").read_text()


def test_a_mix_in_yaml_needs_quotes(files, tmp_path, capsys):
    """YAML 1.1 reads 9:1 as 541 seconds."""
    settings = {**{name: str(value) for name, value in files.items()}, "output_dir": str(tmp_path / "out")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**settings, "mix_dataset": "x.txt"}) + "mix: 9:1\n")
    assert dispatch(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "`mix` must be text, got 541 in the YAML file. YAML reads 9:1, no and" in capsys.readouterr().err


def test_lora_ends_in_a_plain_model(files, tmp_path, capsys):
    """An adapter where a draft was promised."""
    out = tmp_path / "out"
    argv = options(files, out, lora_r=2, lora_target_modules="all-linear")
    assert dispatch(["train", *argv, "--use_peft"]) == 0
    assert "lm_head.weight" in load_file(out / "model.safetensors")
    assert not (out / "adapter_config.json").exists()


def test_output_directories_are_not_written_over(files, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert dispatch(["train", *options(files, out)]) == 2
    assert "is not empty and holds no checkpoint" in capsys.readouterr().err
    assert dispatch(["train", *options(files, out), "--overwrite_output_dir"]) == 0
    assert (out / "thesis.txt").read_text() == "years of work"


def test_an_interrupted_run_goes_on_from_its_checkpoint(files, tmp_path, capsys):
    """A second start that begins again, or is refused, with a good checkpoint lying there."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    assert dispatch(["train", *options(files, whole, max_steps=4, **more)]) == 0
    assert dispatch(["train", *options(files, parts, max_steps=2, **more)]) == 0
    (parts / "model.safetensors").unlink()
    assert dispatch(["train", *options(files, parts, max_steps=4, **more)]) == 0
    assert "Resuming from" in capsys.readouterr().out
    first, second = (load_file(path / "model.safetensors") for path in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_options_for_the_same_folder_are_refused(files, tmp_path, capsys):
    """Nothing trained, and a card that names the options of the second run."""
    more = {"save_strategy": "steps", "save_steps": 1}
    assert dispatch(["train", *options(files, tmp_path / "out", **more)]) == 0
    assert dispatch(["train", *options(files, tmp_path / "out", **more, divergence="reverse_kl")]) == 2
    assert "was trained with `divergence='forward_kl'`" in capsys.readouterr().err


def test_starting_again_removes_checkpoints_alone(files, tmp_path):
    """A user's folder that happens to begin with the same word."""
    more = {"save_strategy": "steps", "save_steps": 1}
    assert dispatch(["train", *options(files, tmp_path / "out", max_steps=2, **more)]) == 0
    (tmp_path / "out" / "checkpoint-notes").mkdir()
    again = options(files, tmp_path / "out", max_steps=1, **more)
    assert dispatch(["train", *again, "--overwrite_output_dir"]) == 0
    found = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert found == {"checkpoint-notes", "checkpoint-1"}


def test_half_a_checkpoint_is_not_resumed_from(files, tmp_path, capsys):
    """The highest number is taken, and the run dies reading it."""
    more = {"save_strategy": "steps", "save_steps": 1}
    assert dispatch(["train", *options(files, tmp_path / "out", **more)]) == 0
    (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").unlink()
    assert dispatch(["train", *options(files, tmp_path / "out", **more)]) == 0
    printed = capsys.readouterr().out
    assert "checkpoint-2 (its saving was interrupted" in printed
    assert f"Resuming from {tmp_path / 'out' / 'checkpoint-1'}" in printed


def test_cached_distributions_need_no_target(files, tmp_path, pair, tokenizer, capsys):
    """A target asked for, or loaded, although the data holds all that it would say."""
    rows = cache_target_distributions(alignment_rows(pair[1], tokenizer, name="org/target"), pair[1], top_k=8)
    rows.to_parquet(tmp_path / "rows.parquet")
    target = files.pop("target_model")
    shutil.rmtree(target)
    files["dataset"] = files["eval_dataset"] = tmp_path / "rows.parquet"
    out = tmp_path / "out"
    assert dispatch(["train", *options(files, out)]) == 0
    metrics = json.loads((out / "eval_results.json").read_text())
    assert 0 < metrics["eval_acceptance_rate_upper_bound"] < 1
    assert metrics["eval_block_efficiency"] > 1
    assert json.loads((out / "provenance.json").read_text())["training"]["signal"] == "cached"
    assert dispatch(["train", *options(files, tmp_path / "no", divergence="forward_kl", loss_temperature=2)]) == 2
    assert "cached at `loss_temperature=1`" in capsys.readouterr().err


def test_resuming_by_true_takes_the_newest_checkpoint(files, tmp_path, capsys):
    """`resume_from_checkpoint: true` in a YAML file taken for a directory of that name."""
    out = tmp_path / "out"
    more = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    assert dispatch(["train", *options(files, out, **more)]) == 0
    (tmp_path / "run.yaml").write_text("resume_from_checkpoint: true\n")
    again = options(files, out, **more | {"max_steps": 2})
    assert dispatch(["train", "--config", str(tmp_path / "run.yaml"), *again]) == 0
    assert "Resuming from" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resume_from_checkpoint": "nope"}, "`--resume_from_checkpoint nope` is not a directory"),
        (
            {"resume_from_checkpoint": ".", "overwrite_output_dir": True},
            "`--resume_from_checkpoint` goes on and `--overwrite_output_dir` starts again: leave one out.",
        ),
        ({"model": "no/such/path"}, "no/such/path"),
        ({"target_model": "./nowhere"}, "nowhere"),
        ({"dataset": "missing.jsonl"}, "missing.jsonl"),
        ({"dataset_split": "tset"}, "tset"),
        ({"loss_temperature": 0}, "`loss_temperature` must be a number"),
        ({"lora_r": 2}, "`--lora_r` would do nothing without `--use_peft`: the whole draft would be trained"),
        ({"lora_target_modules": "all-linear"}, "`--lora_target_modules` would do nothing without `--use_peft`"),
        ({"use_dora": True}, "`--use_dora` would do nothing without `--use_peft`"),
        ({"load_in_4bit": True}, "is quantised, and what it learns could not be saved"),
        ({"max_length": 4}, "Nothing is left to learn from"),
    ],
)
def test_bad_input_is_exit_code_2(files, tmp_path, capsys, change, message):
    assert dispatch(["train", *options(files | change, tmp_path / "out")]) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert "Traceback" not in captured


def test_each_data_set_has_its_own_configuration(files, tmp_path, capsys, monkeypatch):
    """Held-out data was looked for in the configuration of the training data."""
    opened = []
    monkeypatch.setattr("hf_draftkd.cli.train.open_dataset", lambda name, **at: opened.append((name, at["config"])))
    data = {name: f"org/{name}" for name in ("dataset", "eval_dataset", "mix_dataset")}
    configs = {f"{name}_config": f"{name}'s" for name in data}
    assert dispatch(["train", *options(files | data, tmp_path / "out", **configs)]) == 2  # nothing was read
    assert opened == [(f"org/{name}", f"{name}'s") for name in data]
    opened.clear()
    same = {"dataset": "org/one", "eval_dataset": "org/one"}
    assert dispatch(["train", *options(files | same, tmp_path / "out", dataset_config="main")]) == 2
    assert opened == [("org/one", "main")] * 2


@pytest.mark.parametrize(("split", "is_said"), [("train", True), ("test", False)])
def test_held_out_data_that_are_the_training_data_are_named(files, tmp_path, caplog, monkeypatch, split, is_said):
    """The split of `--eval_dataset` is `train` unless it is named: figures of the training rows went on the card."""
    monkeypatch.setattr("hf_draftkd.cli.train.open_dataset", lambda *_, **__: None)
    same = {"dataset": "org/one", "eval_dataset": "org/one"}
    assert dispatch(["train", *options(files | same, tmp_path / "out", eval_dataset_split=split)]) == 2
    assert ("`--eval_dataset` is the training data" in caplog.text) == is_said


@pytest.mark.parametrize("way", [["--num_layers", "1"], ["--layers", "1"], ["--share", "0.6"]])
def test_init_makes_a_draft_of_the_target(files, tmp_path, capsys, way):
    out = tmp_path / "new"
    assert dispatch(["init", "--target_model", str(files["target_model"]), "--output_dir", str(out), *way]) == 0
    draft = AutoModelForCausalLM.from_pretrained(out)
    target = AutoModelForCausalLM.from_pretrained(files["target_model"])
    assert draft.num_parameters() < target.num_parameters()
    ids = torch.tensor([[0, 9, 8, 7]])
    target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, assistant_model=draft)


def test_init_refuses_a_directory_that_is_not_empty(files, tmp_path, capsys):
    argv = ["init", "--target_model", str(files["target_model"]), "--num_layers", "1", "--output_dir", str(tmp_path)]
    assert dispatch(argv) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_draft_that_cannot_be_published_is_not_trained_again():
    """Fault: a missing licence, which shows after training, ended the command with a traceback and no next step."""

    class Trainer:
        args = SimpleNamespace(output_dir="my draft", hub_model_id=None)

        def push_to_hub(self):
            raise ValueError("Which licence?")

    with pytest.raises(UsageError, match=r"Which licence.*draftkd push --model 'my draft' --repo_id 'my draft'"):
        _publish(Trainer())
