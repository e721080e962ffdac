"""Logits at chosen positions are the model's own logits there, in row-major order, and nothing stays patched."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from examples.benchmarks.tiny_architectures import tiny_model
from hf_draftkd.losses import distillation_loss
from hf_draftkd.models.forward import evaluating, head_arithmetic, hidden_at, in_head, logits_at, predicting_positions
from tests.losses.selected import in_chunks_of
from tests.tiny import ARCHITECTURES, tiny_llama, tiny_pair


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


# Without logits ------------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
BEHIND = {
    "softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)),
    "factor": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
    "divisor": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=7.0)),
}


@pytest.mark.parametrize(
    ("name", "scale", "softcap"), [("softcap", 1.0, 2.0), ("factor", 0.3, None), ("divisor", 1 / 7, None)]
)
def test_what_stands_behind_the_head_is_found_out(name, scale, softcap):
    """A soft-cap or scale that goes by another name in the config, and is left out of the loss."""
    model = BEHIND[name]().train()
    found = head_arithmetic(model)
    assert found.scale == pytest.approx(scale, rel=1e-6)
    assert found.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-6))
    assert model.training


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_most_models_have_nothing_behind_their_head(architecture):
    assert head_arithmetic(ARCHITECTURES[architecture]()) == (1.0, None)


class _Masked(type(tiny_llama())):
    """Bars one token, as no scale or soft-cap does."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.index_fill(-1, torch.tensor([7]), -100.0)
        return output


def test_a_head_that_is_more_than_arithmetic_is_left_to_the_model():
    """An adapter, a mask behind the head, or offloaded weights: ignored, the loss is that of another model."""
    masked = _Masked(tiny_llama().config)
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    moved = tiny_llama()
    moved.lm_head.forward = moved.lm_head.forward
    assert head_arithmetic(masked) is None
    assert head_arithmetic(adapted) is None
    assert head_arithmetic(moved) is None
    plain = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert head_arithmetic(plain) == (1.0, None)


def _pair(name):
    torch.manual_seed(1)
    return (BEHIND[name](), BEHIND[name]()) if name in BEHIND else tiny_pair(name)


@pytest.mark.parametrize("vocab_size", [300, 290])
@pytest.mark.parametrize("name", [*BEHIND, *sorted(ARCHITECTURES)])
def test_the_loss_inside_the_head_has_the_value_and_gradient_of_the_logits(name, vocab_size):
    draft, target = _pair(name)
    ids = torch.randint(3, 290, (2, 9))
    keep = torch.rand(2, 9) < 0.6
    tokens = torch.randint(3, 290, (int(keep.sum()),))
    inputs = {"input_ids": ids}
    with torch.no_grad():
        p = logits_at(target, inputs, keep)[:, :vocab_size]
        hidden = hidden_at(target, inputs, keep, head_arithmetic(target), vocab_size)
    whole = distillation_loss(logits_at(draft, inputs, keep)[:, :vocab_size], p, tokens)
    whole.loss.backward()
    expected = {key: value.grad.clone() for key, value in draft.named_parameters()}
    draft.zero_grad()
    arithmetic = head_arithmetic(draft)

    def compute(q):
        with in_chunks_of(3):
            result = distillation_loss(q, hidden, tokens)
        return result, result.loss

    found = in_head(draft, inputs, keep, arithmetic, vocab_size, compute)
    found.loss.backward()
    torch.testing.assert_close(found.token_losses, whole.token_losses, atol=1e-5, rtol=1e-4)
    for key, value in draft.named_parameters():
        torch.testing.assert_close(value.grad, expected[key], atol=1e-5, rtol=1e-3)
    assert draft(ids).logits.shape == (2, 9, 300), "the head must be as before"


class _Largest(TorchDispatchMode):
    """The most numbers that any tensor made meanwhile holds."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


def test_no_tensor_of_tokens_times_vocabulary_is_made():
    """Memory that grows with both: forward, loss or backward."""
    draft, target = tiny_pair("llama")
    ids = torch.randint(3, 300, (4, 60))
    keep = torch.ones(4, 60, dtype=torch.bool)
    with _Largest() as largest:
        with torch.no_grad():
            p = hidden_at(target, {"input_ids": ids}, keep, head_arithmetic(target), 300)

        def compute(q):
            with in_chunks_of(32):
                return (distillation_loss(q, p, ids.flatten(), with_acceptance=True).loss,) * 2

        in_head(draft, {"input_ids": ids}, keep, head_arithmetic(draft), 300, compute).backward()
    assert largest.numel < 240 * 300 / 2


def test_batches_are_decoded_without_load_balancing_losses():
    """A mixture of experts published with `output_router_logits` died at the second token of a batch."""
    model = tiny_model("mixtral")
    batch = {"input_ids": torch.tensor([[0, 0, 7, 8], [5, 6, 7, 8]]), "max_new_tokens": 4, "do_sample": False}
    batch["attention_mask"] = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    expected = model.generate(**batch)
    model.config.output_router_logits = True
    model.train()
    with evaluating(model, model):
        assert torch.equal(model.generate(**batch), expected)
    assert model.config.output_router_logits
    assert model.training


def test_a_mixture_of_experts_reads_a_mask_of_blocks():
    """A parallel draft published with `output_router_logits` died in its first step, for a loss that nobody adds."""
    model = tiny_model("mixtral")
    ids, keep = torch.randint(3, 60, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    sees = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    vocab_size = model.config.vocab_size
    expected = logits_at(model, {"input_ids": ids}, keep)
    model.config.output_router_logits = True
    inputs = {"input_ids": ids, "attention_mask": sees}
    torch.testing.assert_close(logits_at(model, inputs, keep), expected)
    unprojected = hidden_at(model, inputs, keep, head_arithmetic(model), vocab_size)
    torch.testing.assert_close(unprojected.hidden @ model.lm_head.weight.T, expected)
    assert model.config.output_router_logits
