"""Which checkpoint a run resumes from, whenever the run before it died."""

import json
import logging
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from hf_draftkd.training.checkpoints import last_complete_checkpoint
from hf_draftkd.utils import files
from hf_draftkd.utils.files import only_run
from tests.processes import started
from tests.tiny import tiny_pair, tiny_tokenizer
from tests.training.rows import alignment_rows
from tests.training.trainers import assert_same, build, weights

SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": "sgd"}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """The folder of a run with its three checkpoints. It is for reading: change `finished`, a copy."""
    out, pair, tokenizer = tmp_path_factory.mktemp("finished") / "run", tiny_pair("llama"), tiny_tokenizer()
    build(out, pair, tokenizer, **SAVING).train()
    return out


@pytest.fixture
def finished(untouched, tmp_path):
    return Path(shutil.copytree(untouched, tmp_path / "run"))


def test_a_finished_run_is_not_trained_further(finished, pair, tokenizer):
    """Fault: each time that `draftkd train` was started again, a run of `max_steps` took one step more."""
    trainer = build(finished, pair, tokenizer, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert_same(weights(trainer.model), load_file(finished / "checkpoint-6" / "model.safetensors"))


def train_until_killed(out):
    def deadly(thing, file, *args, save=torch.save, **kwargs):
        if "checkpoint-4" in str(file) and "optimizer" in str(file):
            os.kill(os.getpid(), signal.SIGKILL)
        return save(thing, file, *args, **kwargs)

    torch.save = deadly
    pair, tokenizer = tiny_pair("llama"), tiny_tokenizer()
    build(out, pair, tokenizer, alignment_rows(pair[1], tokenizer), **SAVING).train()


def test_kill_9_in_mid_save_leaves_the_last_complete_checkpoint(tmp_path, tokenizer, caplog):
    """A run that resumes from the highest number: from half a checkpoint."""
    killed = started(tmp_path / "log", __name__, "train_until_killed", tmp_path / "run")
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert (tmp_path / "run" / "checkpoint-4" / "model.safetensors").is_file()

    rows = alignment_rows(tiny_pair("llama")[1], tokenizer)
    resumed = build(tmp_path / "run", tiny_pair("llama"), tokenizer, rows, **SAVING)
    with caplog.at_level(logging.WARNING, "hf_draftkd"):
        resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-4 (its saving was interrupted" in caplog.text
    whole = build(tmp_path / "whole", tiny_pair("llama"), tokenizer, rows, **SAVING)
    whole.train()
    assert_same(weights(whole.model), weights(resumed.model))
    assert last_complete_checkpoint(tmp_path / "run") == (str(tmp_path / "run" / "checkpoint-6"), [])


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: (path / "trainer_state.json").unlink(),
        lambda path: (path / "trainer_state.json").write_text('{"global_'),
    ],
    ids=["no state", "half a state"],
)
def test_half_a_checkpoint_is_skipped_and_named(finished, harm):
    """Its number alone does not tell that it is complete."""
    harm(finished / "checkpoint-6")
    (finished / "checkpoint-notes").mkdir()
    path, (skipped,) = last_complete_checkpoint(finished)
    assert path == str(finished / "checkpoint-4")
    assert skipped.startswith(f"{finished / 'checkpoint-6'} (its saving was interrupted")


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_a_run_that_dies_while_it_replaces_a_checkpoint(finished, pair, tokenizer, monkeypatch):
    """New weights beside an old optimizer, and the older checkpoint's state to call that complete."""

    def dies(thing, file, *args, save=torch.save, **kwargs):
        if "checkpoint-6" in str(file) and "optimizer" in str(file):
            raise Killed
        return save(thing, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(Killed):
        build(finished, pair, tokenizer, **SAVING).train()
    path, skipped = last_complete_checkpoint(finished)
    assert path == str(finished / "checkpoint-4")
    assert len(skipped) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("divergence", "reverse_kl"),
        ("learning_rate", 3e-3),
        ("weight_decay", 0.3),
        ("optim", "adamw_torch"),
        ("seed", 7),
        ("loss_temperature", 2.0),
    ],
)
def test_a_run_does_not_resume_as_another(untouched, pair, tokenizer, name, value):
    """Weights of one divergence under a card that names another; what nothing reads, as the optimizer has its own."""
    resumed = build(untouched, pair, tokenizer, **SAVING | {name: value})
    with pytest.raises(ValueError, match=f"was trained with `{name}="):
        resumed.train(resume_from_checkpoint=True)


def test_an_adapter_does_not_resume_from_the_whole_draft(untouched, pair, tokenizer):
    """Lists of missing keys, then "a parameter group that doesn't match the size of optimizer's group"."""
    resumed = build(untouched, pair, tokenizer, **SAVING, peft=LoraConfig(r=2))
    with pytest.raises(ValueError, match="trained as the whole draft, and this run trains an adapter"):
        resumed.train(resume_from_checkpoint=True)


def test_weights_alone_are_not_resumed_from(tmp_path, pair, tokenizer):
    """An empty optimizer, and the learning rate of the first step once more."""
    build(tmp_path, pair, tokenizer, **SAVING | {"max_steps": 2}, save_only_model=True).train()
    path, skipped = last_complete_checkpoint(tmp_path)
    assert path is None
    assert all("`save_only_model`" in each for each in skipped)
    resumed = build(tmp_path, pair, tokenizer, **SAVING)
    with pytest.raises(ValueError, match="holds weights alone"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_without_a_complete_checkpoint_resuming_is_refused(tmp_path, pair, tokenizer):
    trainer = build(tmp_path / "run", pair, tokenizer, **SAVING)
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_the_best_checkpoint_is_kept_and_found(tmp_path, pair, tokenizer):
    """Rotated away, or not loaded at the end."""
    rows = alignment_rows(pair[1], tokenizer)
    trainer = build(
        tmp_path,
        pair,
        tokenizer,
        rows,
        rows,
        **SAVING,
        eval_strategy="steps",
        eval_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        learning_rate=0.2,
    )
    trainer.train()
    # The loss falls, so by this choice the first checkpoint is the best one: kept beside the last.
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[0] == max(losses)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    best = str(tmp_path / "checkpoint-2")
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert (trainer.state.best_model_checkpoint, state["best_model_checkpoint"]) == (best, best)
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert torch.equal(saved["lm_head.weight"], trainer.model.lm_head.weight)


def hold(out, is_in):
    with only_run(out):
        is_in.touch()
        time.sleep(120)


def test_two_runs_into_one_folder(tmp_path, pair, tokenizer, monkeypatch):
    """Checkpoints of both, mixed; and a run with `--overwrite_output_dir` removes the other's."""
    rows = alignment_rows(pair[1], tokenizer)
    monkeypatch.setattr(files, "_PATIENCE", 0)
    out = tmp_path / "out"
    other = started(tmp_path / "log", __name__, "hold", out, tmp_path / "in")
    while not (tmp_path / "in").exists():
        assert other.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.02)
    with pytest.raises(ValueError, match=r"Another run is writing to .*choose another `output_dir`"):
        build(out, pair, tokenizer, rows, **SAVING).train()
    other.kill()
    other.join()
    assert not list(out.iterdir()), "a lock that stays keeps the next run out"
    trainer = build(out, pair, tokenizer, rows, **SAVING | {"max_steps": 2})
    trainer.train()
    trainer.train(resume_from_checkpoint=True)


def test_workers_that_stay_do_not_keep_the_lock(tmp_path, pair, tokenizer, monkeypatch):
    """Forked while the lock was held, they kept it, and the same trainer could not train again."""
    monkeypatch.setattr(files, "_PATIENCE", 0)
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = build(
        tmp_path, pair, tokenizer, alignment_rows(pair[1], tokenizer), **workers, **SAVING | {"max_steps": 2}
    )
    trainer.train()
    trainer.train(resume_from_checkpoint=True)


def test_a_card_is_written_after_a_save_that_was_interrupted(tmp_path, pair, tokenizer, monkeypatch):
    """None, without a word: the trainer still waited for the checkpoint, and a pushed draft had no card."""

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    trainer = build(tmp_path, pair, tokenizer, **SAVING)
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not (tmp_path / "README.md").exists()
    trainer.create_model_card()
    assert "| Optimiser steps | 2 |" in (tmp_path / "README.md").read_text()


def test_no_token_is_saved_with_a_draft(tmp_path, pair, tokenizer):
    """Pickled by transformers among its arguments: `hub_token` in plain letters, beside what people share."""
    token = f"hf_{'A' * 34}"
    options = SAVING | {"max_steps": 2, "hub_token": token}
    trainer = build(tmp_path, pair, tokenizer, alignment_rows(pair[1], tokenizer), **options)
    trainer.train()
    trainer.save_model()
    assert trainer.args.hub_token == token
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
