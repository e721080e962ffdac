"""Every example runs as its docstring says, at a size that shows nothing but that it does."""

import importlib

import pytest

from tests.cli.run import ROOT
from tests.processes import python, run


@pytest.mark.parametrize(
    ("script", "options"),
    [
        # 8 is a draft length of the table anyway.
        (
            "adaspec.py",
            "--prompts 8 --answer_tokens 8 --max_steps 1 --eval_strategy no --eval_num_assistant_tokens 8",
        ),
        ("alignment_data.py", "--prompts 2 --max_new_tokens 8 --query_tokens 128"),
        (
            "direct_alignment.py",
            "--documents 2 --pretraining_steps 1 --tokens_per_step 512 --prompts 1 --queries 2 --max_new_tokens 4 "
            "--epochs 1",
        ),
        (
            "parallel_draft.py",
            "--prompts 4 --test_prompts 2 --answer_tokens 8 --seconds 0.1 --speed_prompts 1 --seeds 1 --layers 1 "
            "--parallel_tokens 3 --runs 1",
        ),
        # Nothing but transformers: the engines are not here.
        (
            "engines.py",
            "--engines --num_prompts 2 --max_new_tokens 8 --rounds 1 --target_model {pair}/target --draft {pair}/draft",
        ),
        ("online_serving.py", "--requests 4 --update_every 1 --max_new_tokens 8"),
    ],
)
def test_the_example_runs(script, options, small_pair, tmp_path):
    """A script behind a number that no longer runs, so that nobody can measure it again."""
    options = [word.format(pair=small_pair) for word in options.split()]
    assert run(ROOT / "examples" / script, *options, "--output_dir", tmp_path / "out", cwd=tmp_path).strip()


def test_alignment_data_is_timed_while_it_is_written(tmp_path):
    """Rows of an earlier run read from the disk, and that called the target's speed."""
    (tmp_path / "queries").mkdir()
    done = python(ROOT / "examples" / "alignment_data.py", "--output_dir", tmp_path)
    assert done.returncode == 2
    assert "is not empty" in done.stderr


def test_a_run_that_ended_by_itself_is_not_called_killed(tmp_path, monkeypatch):
    """A proof that killed runs lose nothing, where nothing was killed."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("alignment_data")
    monkeypatch.setattr(example.sys, "executable", "true")
    assert example.killed_and_resumed(tmp_path, [], shards_before=1) is None
