import torch

from hf_draftkd.data.fingerprints import template_hash, text_hash
from hf_draftkd.models.identity import weights_fingerprint
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
