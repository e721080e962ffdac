"""The commit of a loaded model."""

from huggingface_hub import constants

from hf_draftkd.models.revisions import model_revision, remember_revision, resolved_revision
from tests.tiny import tiny_llama


def test_the_commit_comes_from_the_cache(tmp_path, monkeypatch):
    """Fault 11 of the field; and `config._commit_hash`, which transformers no longer sets, would always say None."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--org--target"
    for name, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / "config.json").write_text("{}")
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / name).write_text(commit)
    assert resolved_revision("org/target") == "a" * 40
    assert resolved_revision("org/target", "v2") == "b" * 40
    assert resolved_revision("org/target", "b" * 40) == "b" * 40
    assert resolved_revision("org/other") is None
    assert resolved_revision(str(tmp_path)) is None
    assert resolved_revision("") is None
    assert resolved_revision("not/a/repo") is None

    # The name alone would stand for the newest commit.
    model = tiny_llama()
    assert model_revision(model) is None
    remember_revision(model, "org/target", "v2")
    assert model_revision(model) == "b" * 40


def test_an_adapter_has_a_commit_too(tmp_path, monkeypatch):
    """Its repository holds no `config.json`, so figures of an adapter named no commit, or that of its base."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--adapter" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "adapter_config.json").write_text("{}")
    assert resolved_revision("org/adapter", "c" * 40) == "c" * 40
