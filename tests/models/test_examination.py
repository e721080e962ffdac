"""What is said of a pair before its weights are read is what loading and training say later."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_draftkd.models.examination import examine
from hf_draftkd.models.loading import load_target
from hf_draftkd.models.resolve import resolve
from tests import tiny
from tests.multimodal import tiny_multimodal


def saved(path, model, tokenizer=None):
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return resolve(path)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_sizes_are_those_of_the_loaded_models(architecture, tmp_path, tokenizer):
    """Tied tables counted twice, rows taken for tokens, bytes of another number format."""
    draft, target = tiny.tiny_pair(architecture, draft_vocab_size=304, target_vocab_size=320)
    draft_model, target_model = draft, target.to(torch.bfloat16)
    names = (saved(tmp_path / "draft", draft_model, tokenizer), saved(tmp_path / "target", target_model, tokenizer))
    found = examine(names[1], names[0])
    assert found.refused == []
    for facts, model, rows in ((found.draft, draft_model, 304), (found.target, target_model, 320)):
        assert facts.num_parameters == model.num_parameters()
        tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
        assert facts.table_share == pytest.approx(sum(each.numel() for each in tables) / model.num_parameters())
        assert (facts.rows, facts.num_tokens, facts.context) == (rows, 300, 256)
    assert list(found.target.stored) == ["BF16"]
    answering, trained = 2 * target.num_parameters(), 16 * draft.num_parameters()
    assert found.memory["answering"] == answering
    assert found.memory["live"] == answering + trained
    assert found.memory["cached"] == trained
    assert trained < found.memory["4 bits"] < answering + trained


def test_a_target_alone_is_told_what_its_layers_would_make(saved_pair):
    found = examine(resolve(saved_pair[1]), num_layers=1)
    assert found.cut_parameters == tiny.tiny_llama(num_layers=1).num_parameters()
    assert found.refused == []


@pytest.mark.parametrize(("fault", "message"), [("lost", "lacks 'model-00002-of-"), ("cut off", "cannot be read")])
def test_weight_files_that_are_not_whole_are_refused(tmp_path, saved_pair, fault, message):
    """Of a copy that was interrupted it was said that nothing would be refused."""
    tiny.tiny_llama().save_pretrained(tmp_path / "copy", max_shard_size="10KB")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "copy")
    second = next((tmp_path / "copy").glob("model-00002-of-*"))
    if fault == "lost":
        second.unlink()
    else:
        second.write_bytes(second.read_bytes()[:-8])
    (refused,) = examine(resolve(tmp_path / "copy"), resolve(saved_pair[0])).refused
    assert message in refused


def test_refusals_are_collected_and_nothing_is_loaded(tmp_path, saved_pair, monkeypatch):
    """Half a checkpoint, another tokenizer and rows that are tokens: found one after the other, hours apart."""
    monkeypatch.setattr("hf_draftkd.models.loading._load", lambda *_, **__: pytest.fail("weights were loaded"))
    draft, target = saved_pair
    weights = load_file(draft / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
    other = saved(tmp_path / "other", tiny.tiny_llama(vocab_size=290), tiny.tiny_tokenizer())
    assert [message.split(":")[0] for message in examine(resolve(target), resolve(draft)).refused] == [
        f"The weights of {str(draft)!r} are incomplete"
    ]
    (message,) = examine(resolve(target), other).refused
    assert "the missing rows are tokens" in message
    shutil.rmtree(tmp_path / "other")
    other = saved(tmp_path / "other", tiny.tiny_llama(), tiny.tiny_tokenizer(text=[*tiny.TEXT, "zebra " * 50]))
    (message,) = examine(resolve(target), other).refused
    assert "The tokenizers of draft and target differ" in message
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    found = examine(resolve(target), other)
    assert found.target is None
    assert "reads text in both directions" in found.refused[0]


@pytest.mark.parametrize("kind", ["a config without a number format", "multimodal"])
def test_the_number_format_is_that_of_loading(kind, tmp_path, tokenizer):
    """Bfloat16 taken for float32, and so twice the bytes: the format of a multimodal model stands outside its text
    config.
    """
    model = tiny_multimodal("Gemma3") if kind == "multimodal" else tiny.tiny_llama()
    checkpoint = saved(tmp_path, model.bfloat16(), tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    if kind == "multimodal":
        config["text_config"].pop("dtype", None)
    else:
        config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_target(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert examine(checkpoint).memory["answering"] == 2 * loaded.num_parameters()


def test_quantised_weights_are_counted_as_stored_and_refused_in_a_draft(saved_pair, monkeypatch):
    """A 4-bit target taken for four times its size; 4 bits offered for it again; a draft that could never be saved."""
    draft, target = saved_pair
    weights = load_file(target / "model.safetensors")
    packed = {name: value.to(torch.uint8) if "proj" in name else value.bfloat16() for name, value in weights.items()}
    save_file(packed, target / "model.safetensors", metadata={"format": "pt"})
    for folder, method in ((draft, "gptq"), (target, "compressed-tensors")):
        config = json.loads((folder / "config.json").read_text())
        quantised = config | {"quantization_config": {"quant_method": method}}
        (folder / "config.json").write_text(json.dumps(quantised))
    found = examine(resolve(target), resolve(draft))
    assert found.memory["answering"] == sum(value.numel() * value.element_size() for value in packed.values())
    assert "4 bits" not in found.memory
    (message,) = found.refused
    assert message.startswith(f"The weights of {str(draft)!r} are quantised")
    # Without an accelerator transformers expands such a target to 16 bits.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    config = json.loads((target / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (target / "config.json").write_text(json.dumps(config))
    assert examine(resolve(target)).memory["answering"] == 2 * tiny.tiny_llama().num_parameters()
