"""What is said of a pair before its weights are read is what loading and training say later."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_draftkd.models.examination import examine
from hf_draftkd.models.resolve import resolve
from tests import tiny


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


def test_quantised_weights_are_counted_as_stored_and_refused_in_a_draft(saved_pair):
    """A 4-bit target taken for four times its size; a draft that could never be saved."""
    draft, target = saved_pair
    for folder in saved_pair:
        config = json.loads((folder / "config.json").read_text())
        quantised = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
        (folder / "config.json").write_text(json.dumps(quantised))
    found = examine(resolve(target), resolve(draft))
    assert found.memory["live"] == found.memory["4 bits"]
    (message,) = found.refused
    assert message.startswith(f"The weights of {str(draft)!r} are quantised")
