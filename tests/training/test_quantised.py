"""Quantised weights: a target may have them (bitsandbytes computes in 4 bits on a CPU too), a draft may not."""

import json

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from hf_draftkd import DraftDistillTrainer, load_draft, load_target
from tests.tiny import tiny_pair, tiny_tokenizer
from tests.training.rows import alignment_rows, reference_forward_kl
from tests.training.trainers import build, config

FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Wide enough for blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("pair")
    for name, model in zip(("draft", "target"), tiny_pair("llama", hidden_size=128), strict=True):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def test_a_quantised_target_teaches_a_dense_draft(folders, tmp_path):
    """The loss must be of what the quantised target says, and nothing may change what that is."""
    tokenizer = tiny_tokenizer()
    target = load_target(str(folders / "target"), quantization_config=BitsAndBytesConfig(**FOUR_BITS))
    layer = target.model.layers[0].mlp.up_proj.weight
    assert layer.dtype == torch.uint8, "otherwise nothing here is of quantised weights"
    rows = alignment_rows(target, tokenizer, count=4)
    # Not its weights: bitsandbytes packs them again when they are first used on a CPU.
    probe = torch.tensor([rows[0]["prompt_ids"]])
    with torch.no_grad():
        said = target(probe).logits
    draft = load_draft(str(folders / "draft"), dtype="float32")
    expected = reference_forward_kl(draft, target, rows)
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=True)
    trainer = build(tmp_path, (draft, target), tokenizer, rows, rows, peft=lora)
    before = trainer.evaluate()["eval_loss"]
    assert before == pytest.approx(expected, rel=1e-4)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    with torch.no_grad():
        assert torch.equal(target(probe).logits, said)
    trainer.save_model()
    assert getattr(load_draft(str(tmp_path)).config, "quantization_config", None) is None


def test_a_target_by_name_is_quantised_as_its_arguments_say(folders, tmp_path):
    """JSON from the command line, say."""
    rows = alignment_rows(load_target(str(folders / "target"), dtype="float32"), tiny_tokenizer(), count=2)
    options = {"target_model_init_kwargs": json.dumps({"quantization_config": FOUR_BITS})}
    pair = (str(folders / "draft"), str(folders / "target"))
    trainer = build(tmp_path, pair, tiny_tokenizer(), rows, **options)
    assert trainer.target_model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    trainer.train()


class TestAQuantisedDraft:
    """Merging a LoRA adapter into 4-bit weights changes what it says by rounding: what is saved was not trained."""

    MESSAGE = "is quantised, and what it learns could not be saved"

    def test_asked_for(self, folders, tmp_path):
        rows = alignment_rows(tiny_pair("llama")[1], tiny_tokenizer(), count=2)
        pair = {"model": str(folders / "draft"), "target_model": str(folders / "target"), "train_dataset": rows}
        for options in (
            {"args": config(tmp_path), "quantization_config": BitsAndBytesConfig(**FOUR_BITS)},
            {"args": config(tmp_path, model_init_kwargs={"quantization_config": FOUR_BITS})},
        ):
            with pytest.raises(ValueError, match=self.MESSAGE):
                DraftDistillTrainer(**pair, **options)

    def test_given_as_a_model(self, folders, tmp_path):
        draft = load_draft(str(folders / "draft"), quantization_config=BitsAndBytesConfig(**FOUR_BITS))
        target = load_target(str(folders / "target"))
        with pytest.raises(ValueError, match=self.MESSAGE):
            build(tmp_path, (draft, target), tiny_tokenizer())
