"""Which model is this: its commit, and checksums that are equal for equal drafts in any folder, format or wrapping."""

import copy
import resource
import signal

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model

from hf_draftkd.models.identity import (
    ModelIdentity,
    identity_of,
    loaded_checksum,
    model_revision,
    remember_checkpoint,
    resolved_revision,
    weights_checksum,
    weights_fingerprint,
)
from hf_draftkd.models.loading import load_draft
from hf_draftkd.models.resolve import resolve
from tests import tiny

FORMATS = ("float32", "bfloat16")


@pytest.mark.parametrize("kind", sorted(tiny.ARCHITECTURES))
def test_a_loaded_model_has_the_checksum_of_its_folder(tmp_path, kind):
    """Catches tied heads, buffers and renamed tensors that are stored otherwise in memory than on disk."""
    draft, _ = tiny.tiny_pair(kind)
    draft.save_pretrained(tmp_path)
    assert loaded_checksum(draft) == loaded_checksum(load_draft(tmp_path)) == weights_checksum(tmp_path)
    with torch.no_grad():
        next(draft.parameters()).view(-1)[0] += 1
    assert loaded_checksum(draft) != weights_checksum(tmp_path)


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("measured", FORMATS)
def test_the_format_of_measuring_is_applied_to_the_folder(tmp_path, pair, stored, measured):
    """Catches a draft that is not recognised because it was rounded, or widened, on loading."""
    pair[0].to(getattr(torch, stored)).save_pretrained(tmp_path)
    checksum = loaded_checksum(load_draft(tmp_path, dtype=measured))
    assert checksum == weights_checksum(tmp_path, measured) == weights_checksum(tmp_path, getattr(torch, measured))
    assert (checksum == weights_checksum(tmp_path)) == (stored == measured)


def test_a_generation_config_that_cannot_be_saved_is_no_matter(tmp_path, pair):
    """An evaluation died of a published pad id of -1."""
    pair[0].save_pretrained(tmp_path)
    pair[0].generation_config.pad_token_id = -1
    assert loaded_checksum(pair[0]) == weights_checksum(tmp_path)
    assert pair[0].generation_config.pad_token_id == -1


def test_an_adapter_counts_once_it_is_merged(tmp_path, pair):
    """Catches the base model's checksum on metrics of its adapter."""
    draft, _ = pair
    wrapped = get_peft_model(draft, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    assert loaded_checksum(wrapped) is None
    copy.deepcopy(wrapped).merge_and_unload().save_pretrained(tmp_path / "merged")
    assert loaded_checksum(wrapped.merge_and_unload()) == weights_checksum(tmp_path / "merged")


def test_no_checksum_where_no_plain_weights_can_be_saved(pair, monkeypatch):
    """Catches an evaluation that fails at its very start: there is no temporary folder, or the draft is quantised."""
    draft, _ = pair
    draft.hf_quantizer = object()
    assert loaded_checksum(draft) is None
    del draft.hf_quantizer
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    assert loaded_checksum(draft) is None


def test_no_checksum_where_the_disk_fills_up(pair):
    """An evaluation failed at its very start: the error is one of safetensors then, and no `OSError`."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        assert loaded_checksum(pair[0]) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_format_that_is_none_is_refused(tmp_path, pair):
    """Catches `getattr(torch, dtype)` on a word from somebody else's report."""
    pair[0].save_pretrained(tmp_path)
    for wrong in ("int8", "load", "bf16", torch.int64):
        with pytest.raises(ValueError, match="floating number format"):
            weights_checksum(tmp_path, wrong)


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
    assert resolved_revision("org/other") is None
    assert resolved_revision(str(tmp_path)) is None
    assert resolved_revision("") is None
    assert resolved_revision("not/a/repo") is None

    # The name alone would stand for the newest commit.
    model = tiny.tiny_llama()
    assert model_revision(model) is None
    remember_checkpoint(model, resolve("org/target", revision="v2"))
    assert model_revision(model) == model_revision(copy.deepcopy(model)) == "b" * 40


def test_an_adapter_has_a_commit_too(tmp_path, monkeypatch):
    """Its repository holds no `config.json`, so metrics of an adapter named no commit, or that of its base."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--adapter" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "adapter_config.json").write_text("{}")
    (tmp_path / "models--org--adapter" / "refs").mkdir()
    (tmp_path / "models--org--adapter" / "refs" / "main").write_text("c" * 40)
    assert resolved_revision("org/adapter") == "c" * 40


def test_a_model_is_known_by_its_weights_and_else_by_its_name():
    """A folder that was moved is no other model; one name at two commits is."""
    here = ModelIdentity("here", None, "weights")
    assert here.matches(ModelIdentity("there", None, "weights"))
    assert not here.matches(ModelIdentity("there", None, "others"))
    assert not ModelIdentity("here").matches(ModelIdentity("there"))
    assert here.matches(ModelIdentity("here", "commit"))
    assert ModelIdentity("here", "commit").matches(ModelIdentity("here", "commit", "in another format"))
    assert not ModelIdentity("here", "commit").matches(ModelIdentity("here", "other commit"))


def test_weights_that_both_know_decide_whatever_the_names():
    """A target tuned in its own folder passed for the one before, and unnamed ones for each other; the message says
    which of the two it was.
    """
    before, now = ModelIdentity("here", None, "weights"), ModelIdentity("here", None, "others")
    assert "further in place" in before.difference(now)
    assert "further in place" in ModelIdentity("here", "commit", "weights").difference(now)
    for author, target in (
        (ModelIdentity("", None, "weights"), ModelIdentity("", None, "others")),
        (ModelIdentity("here", "commit", "weights"), ModelIdentity("here", "other commit", "others")),
        (before, ModelIdentity("there", None, "others")),
    ):
        assert author.difference(target) == "another model, by its weights"
    assert ModelIdentity("here").difference(ModelIdentity("there")) == "another model, by its name or commit"
    assert ModelIdentity("here", "commit", "weights").matches(ModelIdentity("here", "other commit", "weights"))


@pytest.mark.parametrize("wrote", FORMATS)
@pytest.mark.parametrize("now", FORMATS)
@pytest.mark.parametrize("stored", FORMATS)
def test_a_number_format_makes_no_other_model(tmp_path, stored, wrote, now):
    """Catches rows written in bfloat16 that a target loaded in float32 does not know as its own; numbers that were
    rounded away cannot be compared.
    """
    tiny.tiny_llama().to(getattr(torch, stored)).save_pretrained(tmp_path)
    author, target = (identity_of(load_draft(tmp_path, dtype=dtype)) for dtype in (wrote, now))
    is_told = (stored, wrote, now) != ("float32", "float32", "bfloat16")
    assert author._replace(other_formats=()).matches(target) == is_told
    assert not author.matches(identity_of(tiny.tiny_llama(1).to(getattr(torch, now)))._replace(name=target.name))


def test_weights_that_are_not_at_hand_identify_nothing():
    """Two offloaded models of one shape would otherwise be taken for the same."""
    target = tiny.tiny_llama()
    assert identity_of(target).weights == weights_fingerprint(target)
    assert identity_of(target.to("meta")).weights is None


def test_an_adapter_in_memory_makes_another_model_without_a_name():
    """Rows that an adapted target wrote were not its own to the trainer, which unwraps it, and bore its base's name."""
    base = tiny.tiny_llama()
    base.name_or_path = "org/base"
    plain = identity_of(base)
    adapted = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM"))
    found = identity_of(adapted)
    assert found == identity_of(adapted.get_base_model())
    assert (found.name, found.matches(plain), plain.name) == ("", False, "org/base")
    assert identity_of(adapted.merge_and_unload()).matches(plain)


def test_a_fingerprint_changes_with_any_training():
    """One optimiser step moves every weight a little; the same weights give the same fingerprint."""
    target = tiny.tiny_llama()
    before = weights_fingerprint(target)
    assert weights_fingerprint(tiny.tiny_llama()) == before
    assert weights_fingerprint(tiny.tiny_llama(1)) != before
    with torch.no_grad():
        target.lm_head.weight.mul_(1 + 1e-5)
    assert weights_fingerprint(target) != before
    half = tiny.tiny_llama().to(torch.bfloat16)
    assert weights_fingerprint(half) == weights_fingerprint(tiny.tiny_llama().to(torch.bfloat16)) != before
