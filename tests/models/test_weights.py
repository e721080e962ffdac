"""Checksums of weights: equal for equal drafts, in whatever folder, format or wrapping, and only for those."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_draftkd.models.loading import load_draft
from hf_draftkd.models.weights import loaded_checksum, weights_checksum
from tests import tiny

FORMATS = ("float32", "bfloat16")


@pytest.mark.parametrize("kind", sorted(tiny.ARCHITECTURES))
def test_a_loaded_model_has_the_checksum_of_its_folder(tmp_path, kind):
    """Catches tied heads, buffers and renamed tensors that lie in memory otherwise than on disk."""
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


def test_an_adapter_counts_once_it_is_merged(tmp_path, pair):
    """Catches the base model's checksum on figures of its adapter."""
    draft, _ = pair
    wrapped = get_peft_model(draft, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    assert loaded_checksum(wrapped) is None
    copy.deepcopy(wrapped).merge_and_unload().save_pretrained(tmp_path / "merged")
    assert loaded_checksum(wrapped.merge_and_unload()) == weights_checksum(tmp_path / "merged")


def test_no_checksum_where_no_plain_weights_can_be_saved(pair, monkeypatch):
    """Catches an evaluation that fails at its very start because a disk is full or the draft is quantised."""
    draft, _ = pair
    draft.hf_quantizer = object()
    assert loaded_checksum(draft) is None
    del draft.hf_quantizer

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(draft, "save_pretrained", full)
    assert loaded_checksum(draft) is None


def test_a_format_that_is_none_is_refused(tmp_path, pair):
    """Catches `getattr(torch, dtype)` on a word from somebody else's report."""
    pair[0].save_pretrained(tmp_path)
    for wrong in ("int8", "load", "bf16", torch.int64):
        with pytest.raises(ValueError, match="floating number format"):
            weights_checksum(tmp_path, wrong)
