"""What examples run on: the demo pair with most of its target's layers left out, as they cost most of the time."""

import shutil
from pathlib import Path

import pytest

from hf_draftkd import build_draft, load_target
from hf_draftkd.models.demo import DEMO


@pytest.fixture(scope="session")
def small_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the demo pair's. Tests read it only."""
    folder = tmp_path_factory.mktemp("small") / "pair"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    build_draft(load_target(DEMO / "target"), layers=[0, 7]).save_pretrained(folder / "target")
    shutil.copy(DEMO / "draft" / "model.safetensors", folder / "draft")
    return folder
