"""A pair on the Hub is looked at without its weights."""

from pathlib import Path

from huggingface_hub import constants

from hf_draftkd.models.examination import examine
from hf_draftkd.models.resolve import resolve
from tests.hub.fake_hub import Repo


def test_no_weights_are_downloaded(hub, saved_pair):
    """A look at a pair that takes as long as having it."""
    for folder in saved_pair:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        hub.repos[f"me/{folder.name}"] = Repo()
        hub.repos[f"me/{folder.name}"].commit(files, "saved")
    found = examine(resolve("me/target"), resolve("me/draft"))
    assert found.refused == []
    assert found.draft.stored == {"F32": found.draft.num_parameters}
    cached = {path.name for path in Path(constants.HF_HUB_CACHE).rglob("*")}
    assert "config.json" in cached
    assert not any(name.endswith(".safetensors") for name in cached)
