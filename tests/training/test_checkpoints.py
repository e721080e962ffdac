"""Checkpoints that are whole or not there."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from hf_draftkd.training import checkpoints
from hf_draftkd.training.checkpoints import UNFINISHED, last_complete_checkpoint
from tests.tiny import tiny_pair
from tests.training.rows import alignment_rows
from tests.training.trainers import assert_same, build, weights

SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": "sgd"}

KILLED = """
import os, signal, sys
import torch
from pathlib import Path
from tests.tiny import tiny_pair, tiny_tokenizer
from tests.training.rows import alignment_rows
from tests.training.trainers import build
from tests.training.test_checkpoints import SAVING

def deadly(thing, file, *args, save=torch.save, **kwargs):
    if "checkpoint-4" in str(file) and "optimizer" in str(file):
        os.kill(os.getpid(), signal.SIGKILL)
    return save(thing, file, *args, **kwargs)

torch.save = deadly
torch.set_num_threads(1)
pair, tokenizer = tiny_pair("llama"), tiny_tokenizer()
build(sys.argv[1], pair, tokenizer, alignment_rows(pair[1], tokenizer), **SAVING).train()
"""


def test_kill_9_in_mid_save_leaves_the_last_complete_checkpoint(tmp_path, tokenizer, caplog):
    """Files are written into the final folder, then resumes from the highest number: half a checkpoint."""
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run")], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "run" / UNFINISHED / "checkpoint-4" / "model.safetensors").is_file()
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2"]

    rows = alignment_rows(tiny_pair("llama")[1], tokenizer)
    resumed = build(tmp_path / "run", tiny_pair("llama"), tokenizer, rows, **SAVING)
    with caplog.at_level(logging.WARNING, "hf_draftkd"):
        resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-4 (its saving was interrupted)" in caplog.text
    whole = build(tmp_path / "whole", tiny_pair("llama"), tokenizer, rows, **SAVING)
    whole.train()
    assert_same(weights(whole.model), weights(resumed.model))
    assert not (tmp_path / "run" / UNFINISHED).exists()


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: (path / "trainer_state.json").unlink(), "no readable trainer_state.json"),
        (lambda path: (path / "trainer_state.json").write_text('{"global_'), "no readable trainer_state.json"),
        (lambda path: (path / "model.safetensors").unlink(), "no weights"),
        (
            lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-9]),
            "unreadable weights",
        ),
    ],
    ids=["no state", "half a state", "no weights", "half the weights"],
)
def test_half_a_checkpoint_is_skipped_and_named(tmp_path, pair, tokenizer, harm, reason):
    """Left by other software, a broken copy or a full disk: its number alone says nothing."""
    build(tmp_path, pair, tokenizer, **SAVING).train()
    harm(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-notes").mkdir()
    path, skipped = last_complete_checkpoint(tmp_path)
    assert path == str(tmp_path / "checkpoint-4")
    assert len(skipped) == 1
    assert skipped[0].startswith(f"{tmp_path / 'checkpoint-6'} ({reason}")


def test_without_a_complete_checkpoint_resuming_is_refused(tmp_path, pair, tokenizer):
    trainer = build(tmp_path / "run", pair, tokenizer, **SAVING)
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_the_best_checkpoint_is_kept_and_found(tmp_path, pair, tokenizer):
    """A best checkpoint remembered by its unfinished name is deleted by rotation, and cannot be loaded at the end."""
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


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path, pair, tokenizer):
    """A folder cannot be renamed onto another: the second run would fail at its first save."""
    build(tmp_path, pair, tokenizer, **SAVING).train()
    shutil.rmtree(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6" / "leftover").write_text("half")
    build(tmp_path, pair, tokenizer, **SAVING).train()
    assert last_complete_checkpoint(tmp_path) == (str(tmp_path / "checkpoint-6"), [])
    assert not (tmp_path / "checkpoint-6" / "leftover").exists()
    assert not (tmp_path / UNFINISHED).exists()


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.fixture
def dies_between_renames(tmp_path, pair, tokenizer, monkeypatch):
    """A run whose second saving of step 6 died when the older checkpoint had made way and the new one had no name."""
    settings = SAVING | {"save_steps": 6}
    rows = alignment_rows(pair[1], tokenizer)
    build(tmp_path, pair, tokenizer, rows, **settings).train()
    (tmp_path / "checkpoint-6" / "older").touch()
    replace = os.replace

    def dies(source, destination):
        if destination == tmp_path / "checkpoint-6":
            raise Killed
        replace(source, destination)

    monkeypatch.setattr(checkpoints.os, "replace", dies)
    again = build(tmp_path, tiny_pair("llama"), tokenizer, rows, **settings)
    with pytest.raises(Killed):
        again.train()
    monkeypatch.undo()
    assert not list(tmp_path.glob("checkpoint-*"))
    return tmp_path


def test_dying_between_the_renames_loses_nothing(dies_between_renames, caplog):
    """No `checkpoint-*` at all, two complete ones in `_unfinished`, and the run starts anew."""
    run = dies_between_renames
    with caplog.at_level(logging.WARNING, "hf_draftkd"):
        assert last_complete_checkpoint(run) == (str(run / "checkpoint-6"), [])
    assert "has its name back" in caplog.text
    assert not (run / "checkpoint-6" / "older").exists(), "the newer one is taken"
    # Another process, or the same one later, changes nothing any more.
    assert last_complete_checkpoint(run) == (str(run / "checkpoint-6"), [])


def test_the_older_checkpoint_comes_back_if_the_newer_one_is_broken(dies_between_renames):
    """A disk that lost the newer one's last pages."""
    run = dies_between_renames
    (run / UNFINISHED / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    path, skipped = last_complete_checkpoint(run)
    assert path == str(run / "checkpoint-6")
    assert (run / "checkpoint-6" / "older").exists()
    assert skipped == [f"{run / UNFINISHED / 'checkpoint-6'} (its saving was interrupted)"]


def test_the_next_saving_adopts_before_it_removes(dies_between_renames, tokenizer, monkeypatch):
    """A run that does not resume, and dies in its own first save: both complete copies are gone by then."""
    run = dies_between_renames
    monkeypatch.setattr(checkpoints.Trainer, "_save_checkpoint", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        build(run, tiny_pair("llama"), tokenizer, **SAVING).train()
    assert last_complete_checkpoint(run) == (str(run / "checkpoint-6"), [])


def test_two_processes_that_finish_the_renaming_at_once(dies_between_renames, monkeypatch):
    """The slower one fails because the folder is no longer where it saw it."""
    run, replace = dies_between_renames, os.replace

    def slower(source, destination):
        replace(source, destination)
        replace(source, destination)

    monkeypatch.setattr(checkpoints.os, "replace", slower)
    assert last_complete_checkpoint(run) == (str(run / "checkpoint-6"), [])


def test_two_runs_into_one_folder(tmp_path, pair, tokenizer, monkeypatch):
    """Each removed the other's unfinished checkpoint while it was written, and a run begun anew the finished ones."""
    rows = alignment_rows(pair[1], tokenizer)
    monkeypatch.setattr(checkpoints, "_PATIENCE", 0)
    hold = "import sys, time; from hf_draftkd.training.checkpoints import only_run\n"
    hold += "with only_run(sys.argv[1]): print('in', flush=True); time.sleep(120)"
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match=r"Another run is training into .*name another `output_dir`"):
            build(tmp_path, pair, tokenizer, rows, **SAVING).train()
        other.kill()
    assert not list(tmp_path.iterdir()), "a lock that stays keeps the next run out"
    build(tmp_path, pair, tokenizer, rows, **SAVING).train()
    build(tmp_path, pair, tokenizer, rows, **SAVING).train(resume_from_checkpoint=True)


def test_workers_that_stay_do_not_keep_the_lock(tmp_path, pair, tokenizer, monkeypatch):
    """Forked while the lock was held, they kept it, and the same trainer could not go on."""
    monkeypatch.setattr(checkpoints, "_PATIENCE", 0)
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = build(tmp_path, pair, tokenizer, alignment_rows(pair[1], tokenizer), **workers, **SAVING)
    trainer.train()
    trainer.train(resume_from_checkpoint=True)


def test_no_token_is_saved_with_a_draft(tmp_path, pair, tokenizer):
    """Pickled by transformers among its arguments: `hub_token` in plain letters, beside what people share."""
    token = f"hf_{'A' * 34}"
    trainer = build(tmp_path, pair, tokenizer, alignment_rows(pair[1], tokenizer), hub_token=token, **SAVING)
    trainer.train()
    trainer.save_model()
    assert trainer.args.hub_token == token
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
