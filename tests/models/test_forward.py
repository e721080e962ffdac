"""Logits at chosen positions are the model's own logits there, in row-major order, and nothing stays patched."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from hf_draftkd.models.forward import logits_at, predicting_positions
from tests.tiny import ARCHITECTURES, tiny_llama


def test_positions_are_those_before_a_token_that_counts():
    """Off by one: the token at t is predicted at t - 1, and the first token by nothing."""
    labels = torch.tensor([[-100, 5, 6, -100], [7, -100, -100, 8]])
    expected = torch.tensor([[True, True, False, False], [False, False, True, False]])
    assert torch.equal(predicting_positions(labels), expected)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_equal_to_the_full_logits(architecture):
    model = ARCHITECTURES[architecture]()
    ids = torch.randint(3, 300, (2, 9))
    keep = torch.rand(2, 9) < 0.5
    expected = model(ids).logits[keep]
    torch.testing.assert_close(logits_at(model, {"input_ids": ids}, keep), expected)
    assert model(ids).logits.shape == (2, 9, 300), "the head must be as before"


def test_what_a_model_does_behind_its_head_still_happens():
    """Soft-capping skipped because the head was called by hand."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.5,
        pad_token_id=0,
    )
    model = Gemma2ForCausalLM(config).eval()
    ids = torch.randint(3, 300, (1, 6))
    keep = torch.ones(1, 6, dtype=torch.bool)
    logits = logits_at(model, {"input_ids": ids}, keep)
    assert logits.abs().max() <= 0.5
    torch.testing.assert_close(logits, model(ids).logits[0])


def test_through_peft_with_gradients():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    keep = torch.tensor([[False, True, True, False]])
    logits_at(model, {"input_ids": torch.tensor([[0, 5, 6, 7]])}, keep).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_no_position_gives_no_logits_but_a_gradient_path():
    """A batch that truncation left without completion tokens."""
    model = tiny_llama().train()
    logits = logits_at(model, {"input_ids": torch.tensor([[0, 5]])}, torch.zeros(1, 2, dtype=torch.bool))
    assert logits.shape == (0, 300)
    logits.sum().backward()


def test_an_exception_leaves_the_head_as_it_was():
    model = tiny_llama()
    with pytest.raises(ValueError, match="input_ids"):
        logits_at(model, {"no_such_argument": 1}, torch.ones(1, 2, dtype=torch.bool))
    assert not model.get_output_embeddings()._forward_pre_hooks
