"""Distributions kept while the target writes, against a second pass of it over what it wrote."""

import gc

import pytest
import torch
from transformers import ContinuousBatchingConfig

from hf_draftkd.data.backends import local_backend
from hf_draftkd.data.generation import generate_alignment_data
from hf_draftkd.data.kept_distributions import CacheOptions, KeptDistributions
from hf_draftkd.data.target_cache import cache_target_distributions
from hf_draftkd.decoding.setting import DecodingSetting
from tests.data.small import make_target
from tests.tiny import ARCHITECTURES, tiny_pair, tiny_tokenizer

TEXTS = ["the cat", "on", "sat on the mat, the cat", "a", "mat mat mat mat mat"]
FORMS = [
    {"top_k": 5, "dtype": "float32"},
    {"top_k": 5, "loss_temperature": 2.5, "dtype": "float32"},
    {"sampled": 40, "dtype": "float32", "seed": 7},
]


def assert_same(found, expected):
    assert found.features == expected.features
    assert found.column_names == expected.column_names
    for one, other in zip(found, expected, strict=True):
        for name, value in other.items():
            if name in ("completion_logprobs", "target_logprobs", "target_tail_logprob"):
                torch.testing.assert_close(torch.tensor(one[name]), torch.tensor(value), atol=2e-5, rtol=1e-5)
            else:
                assert one[name] == value, name


def second_pass(target, tokenizer, form, **options):
    rows = generate_alignment_data(target, tokenizer, TEXTS, **options)
    return cache_target_distributions(rows, target, tokenizer=tokenizer, **form)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_is_kept_while_writing_is_what_a_second_pass_finds(tokenizer, batch_size):
    """Catches processed logits, a step too early or late, another text's row, pads, the padded vocabulary.

    Several completions of a prompt under filters and a penalty; texts of a batch end at different places.
    """
    target = make_target(vocab_size=300)  # 264 of them are tokens
    target.generation_config.eos_token_id = [1, *range(20, 60)]
    options = {"max_new_tokens": 9, "batch_size": batch_size, "temperatures": (0, 0.7), "num_completions": 3}
    options |= {"top_p": 0.9, "top_k": 50, "repetition_penalty": 1.3}
    written = generate_alignment_data(target, tokenizer, TEXTS, **options)
    assert len({len(ids) for ids in written["completion_ids"]}) > 3
    for form in FORMS if batch_size > 1 else FORMS[:1]:
        found = generate_alignment_data(target, tokenizer, TEXTS, cache_distributions=form, **options)
        assert_same(found, cache_target_distributions(written, target, tokenizer=tokenizer, **form))
        assert not target._forward_hooks


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("helped", [False, True])
def test_every_architecture_alone_and_with_a_drafts_help(architecture, helped):
    """A draft's rounds bring several tokens of some texts at once, and texts of a batch advance apart."""
    draft, target = tiny_pair(architecture, target_vocab_size=320, draft_vocab_size=320, real_vocab_size=300)
    tokenizer, form = tiny_tokenizer(), {"top_k": 6, "dtype": "float32"}
    options = {"max_new_tokens": 7, "batch_size": 3, "temperatures": (0, 1.0)}
    options |= {"draft_model": draft} if helped else {}
    found = generate_alignment_data(target, tokenizer, TEXTS, cache_distributions=form, **options)
    assert_same(found, second_pass(target, tokenizer, form, **options))


def test_continuous_batching_keeps_them_too(target, tokenizer):
    """It shows no logits, so the target reads its answers again."""
    options = {"max_new_tokens": 6, "continuous_batching": True, "batch_size": 2}
    options["continuous_batching_config"] = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)
    found = generate_alignment_data(target, tokenizer, TEXTS, cache_distributions=FORMS[0], **options)
    assert_same(found, second_pass(target, tokenizer, FORMS[0], **options))


def test_logits_of_one_step_at_most_are_held(target, tokenizer, monkeypatch):
    """`output_logits=True` would hold those of every step until the last: 40 times as many here."""
    vocab_size, held = target.config.vocab_size, []
    add_step, own = KeptDistributions.add_step, {id(parameter) for parameter in target.parameters()}

    def weighed(self, tokens, logits):
        tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and id(each) not in own]
        held.append(sum(each.numel() for each in tensors if each.shape[-1:] == (vocab_size,)))
        add_step(self, tokens, logits)

    monkeypatch.setattr(KeptDistributions, "add_step", weighed)
    target.generation_config.eos_token_id = None
    backend = local_backend(target, tokenizer, max_new_tokens=40, batch_size=2, cache=(CacheOptions(4), vocab_size))
    list(backend([[0, 5], [0, 9]], DecodingSetting(temperature=1.0), 0, frozenset()))
    assert len(held) == 40
    assert held[-1] <= held[1] <= 6 * 2 * vocab_size


def test_a_failure_leaves_no_hook_on_the_target(target, tokenizer):
    """A hook that stayed would copy the logits of every later call, and keep the last of them."""
    target.lm_head.weight.data[5, 0] = float("inf")  # NaN would be found before anything is written
    with pytest.raises(FloatingPointError, match="NaN"):
        generate_alignment_data(target, tokenizer, TEXTS, max_new_tokens=3, cache_distributions="top_k=4")
    assert not target._forward_hooks
