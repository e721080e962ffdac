"""Drafts that could not learn, or would be saved as another model than was trained: refused before training."""

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_draftkd.models.pairing import check_weights_apart
from tests.tiny import tiny_pair
from tests.training.rows import alignment_rows
from tests.training.test_trainer import build

LORA = LoraConfig(target_modules=["q_proj"])


def test_a_frozen_draft_is_refused_where_it_is_to_learn(tmp_path, pair, tokenizer):
    """The first backward failed, in torch's words."""
    rows = alignment_rows(pair[1], tokenizer, count=2)
    pair[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"Every parameter of the draft .* is frozen"):
        build(tmp_path, pair, tokenizer, rows)
    assert build(tmp_path, pair, tokenizer, eval_rows=rows).evaluate()["eval_loss"] > 0
    build(tmp_path, pair, tokenizer, rows, peft=LORA).train()


def test_a_draft_that_shares_weights_with_its_target_is_refused(tmp_path, pair, tokenizer):
    """Freezing the target froze the draft's head in silence; were it not frozen, the target would be trained."""
    draft, target = pair
    rows = alignment_rows(target, tokenizer, count=2)
    draft.lm_head = target.lm_head
    with pytest.raises(ValueError, match=r"Draft and target share weights \(lm_head.weight\)"):
        build(tmp_path, pair, tokenizer, rows)
    assert draft.lm_head.weight.requires_grad, "refused before anything was changed"
    # What an adapter stands on stays as it is.
    build(tmp_path, pair, tokenizer, rows, peft=LORA)


def test_the_same_numbers_below_two_parameters_are_shared_too(pair):
    draft, target = pair
    check_weights_apart(draft, target)
    draft.model.norm.weight.data = target.model.norm.weight.data
    with pytest.raises(ValueError, match=r"\(model\.norm\.weight\)"):
        check_weights_apart(draft, target)


def test_a_reference_that_shares_weights_with_the_draft_is_refused(tmp_path, pair, tokenizer):
    """It is frozen, and the draft with it."""
    reference = copy.deepcopy(pair[0])
    reference.lm_head = pair[0].lm_head
    with pytest.raises(ValueError, match="Draft and `reference_model` share weights"):
        build(tmp_path, pair, tokenizer, reference_model=reference, token_selection="adaspec")


def test_a_draft_in_half_precision_warns_once(tmp_path, pair, tokenizer):
    """At 1e-5 99% of its weights stayed what they were, without a word."""
    rows = alignment_rows(pair[1], tokenizer, count=2)
    draft = pair[0].bfloat16()
    with pytest.warns() as said:
        build(tmp_path, (draft, pair[1]), tokenizer, rows)
    lost = [str(each.message) for each in said if "in which small updates are lost" in str(each.message)]
    assert len(lost) == 1
    assert lost[0].startswith("The draft's weights are bfloat16")
    # Warnings are errors: none where nothing learns, or where the adapter does, which is float32.
    build(tmp_path, (draft, pair[1]), tokenizer, eval_rows=rows)
    build(tmp_path, (draft, pair[1]), tokenizer, rows, peft=LORA)


def test_an_adapter_that_no_plain_draft_can_hold_is_refused(tmp_path, pair, tokenizer):
    """Virtual tokens: training failed at a mask of another shape, and saving had nothing to merge."""
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="type PROMPT_TUNING cannot be merged"):
        build(tmp_path, pair, tokenizer, peft=prompt)


# Adapters on tied weights --------------------------------------------------------------------------------------------


# peft's own doubts about tied weights, which need not be the user's last word on it.
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True", "ignore:You have requested `ensure_weight_tying`")
@pytest.mark.parametrize(
    ("architecture", "module", "ties"),
    [("qwen3", "embed_tokens", False), ("gpt2", "wte", False), ("gpt2", "wte", True)],
)
def test_an_adapter_on_one_of_two_tied_weights_is_refused(tmp_path, tokenizer, architecture, module, ties):
    """The saved draft's logits were off by 2.8: merged, the adapter changed the head as well."""
    pair = tiny_pair(architecture)
    lora = LoraConfig(target_modules=[module], ensure_weight_tying=ties)
    with pytest.raises(ValueError, match=f"The adapter changes '.*{module}'.*modules_to_save"):
        build(tmp_path, pair, tokenizer, peft=lora)
    wrapped = get_peft_model(tiny_pair(architecture)[0], lora)
    with pytest.raises(ValueError, match=f"The adapter changes '.*{module}'"):
        build(tmp_path, (wrapped, pair[1]), tokenizer)


def test_tying_the_adapters_instead_is_refused_by_trl(tmp_path, tokenizer):
    """Were it not, the refusal of an adapter on one of two tied weights should say that this is the way."""
    lora = LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match="PEFT adapter to `lm_head` is not supported"):
        build(tmp_path, tiny_pair("qwen3"), tokenizer, peft=lora)


@pytest.mark.filterwarnings(
    "ignore:.*tie_word_embeddings=True", "ignore:Input and output embeddings are no longer tied"
)
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
        ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("qwen3", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}),
    ],
    ids=["untied", "whole copy", "whole copy, tied by peft", "rows"],
)
def test_adapters_that_are_not_refused_are_saved_as_trained(tmp_path, tokenizer, architecture, options):
    pair = tiny_pair(architecture)
    rows = alignment_rows(pair[1], tokenizer, count=4)
    trainer = build(tmp_path, pair, tokenizer, rows, peft=LoraConfig(r=4, **options), learning_rate=0.03)
    trainer.train()
    trainer.save_model(str(tmp_path / "draft"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    ids = torch.tensor([rows[0]["prompt_ids"] + rows[0]["completion_ids"]])
    with torch.no_grad():
        trained, loaded = trainer.model.eval()(ids).logits, saved(ids).logits
        stock = tiny_pair(architecture)[0](ids).logits
    torch.testing.assert_close(loaded, trained, atol=1e-4, rtol=0)
    assert (trained - stock).abs().max() > 0.1, "nothing was trained"
