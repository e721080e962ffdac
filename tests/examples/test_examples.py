"""Every example runs as its docstring says, at a size that shows nothing but that it does."""

import sys

import pytest

from tests.cli.run import ROOT
from tests.test_docs import run


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("adaspec.py", "--prompts 8 --answer_tokens 8 --max_steps 1 --eval_strategy no"),
        ("alignment_data.py", "--prompts 2 --max_new_tokens 8"),
        (
            "direct_alignment.py",
            "--documents 4 --pretraining_steps 1 --tokens_per_step 512 --prompts 2 --queries 2 --max_new_tokens 4 "
            "--epochs 1",
        ),
        ("online_serving.py", "--requests 4 --update_every 1 --max_new_tokens 8"),
        (
            "target_then_draft.py",
            "--prompts 4 --queries 2 --max_new_tokens 8 --target_epochs 1 --draft_epochs 1 --layers 2",
        ),
    ],
)
def test_the_example_runs(script, options, tmp_path):
    """A script behind a figure that no longer runs, so that nobody can make the figure again."""
    where = ["--output_dir", str(tmp_path / "out")]
    assert run([sys.executable, str(ROOT / "examples" / script), *options.split(), *where], tmp_path).strip()
