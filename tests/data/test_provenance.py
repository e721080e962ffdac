import torch
from huggingface_hub import constants

from hf_draftkd.data.provenance import resolved_revision, template_hash, text_hash, weights_fingerprint
from tests.data.small import make_target, make_tokenizer


def test_a_fingerprint_changes_with_any_training(target):
    """One optimiser step moves every weight a little; the same weights give the same fingerprint in any dtype."""
    before = weights_fingerprint(target)
    assert weights_fingerprint(make_target()) == before
    assert weights_fingerprint(make_target(seed=1)) != before
    with torch.no_grad():
        target.lm_head.weight.mul_(1 + 1e-5)
    assert weights_fingerprint(target) != before
    half = make_target().to(torch.bfloat16)
    assert weights_fingerprint(half) == weights_fingerprint(make_target().to(torch.bfloat16)) != before


def test_templates_and_texts_are_told_apart():
    assert template_hash(make_tokenizer()) != template_hash(make_tokenizer(template="{{ messages }}"))
    assert template_hash(make_tokenizer(template=None)) is None
    assert text_hash(["ab", "c"]) != text_hash(["a", "bc"])


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
