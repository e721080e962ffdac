"""The text model of a multimodal checkpoint: the same logits, bit for bit, and an ordinary causal LM ever after."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BertConfig, Mamba2Config, Qwen3ForCausalLM

from examples.benchmarks.tiny_architectures import tiny_model
from hf_draftkd.data.generation import generate_alignment_data
from hf_draftkd.evaluation.evaluate import evaluate_draft
from hf_draftkd.models.building import build_draft
from hf_draftkd.models.loading import extract_text_model, load_draft, load_target, load_without_weights
from hf_draftkd.models.resolve import resolve
from hf_draftkd.models.text_model import text_config
from tests.multimodal import MULTIMODAL, tiny_multimodal
from tests.tiny import tiny_llama, tiny_tokenizer

IDS = torch.arange(3, 290).reshape(7, 41)


def _logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def _shaken(model):
    """Every weight random, norms and biases too: at their start values they cannot be told from forgotten ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", MULTIMODAL)
def test_logits_are_those_of_the_whole_and_stay_so_when_saved(name, tied, tmp_path):
    whole = _shaken(tiny_multimodal(name, tied=tied))
    text = extract_text_model(whole)
    # PaliGemma's positions begin with 1, which rounds otherwise.
    bound = 1e-6 * float(_logits(whole).abs().max()) if name == "PaliGemma" else 0.0
    torch.testing.assert_close(_logits(text), _logits(whole), rtol=0, atol=bound)
    assert text.config.tie_word_embeddings == tied
    text.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(text)
    assert torch.equal(_logits(again), _logits(text))
    assert not any("vision" in key or "visual" in key for key in again.state_dict())
    prompt = IDS[:1, :9]
    plain = whole.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(again.generate(prompt, max_new_tokens=4, do_sample=False), plain)


@pytest.mark.parametrize(("tied", "tied_text"), [(False, True), (True, False)])
@pytest.mark.parametrize("name", ["Gemma3", "Llava", "Mistral3", "Qwen3VL", "SmolVLM"])
def test_configs_that_disagree_on_tying(name, tied, tied_text, tmp_path):
    """Untied outside and tied in `text_config`: taking the text config's word gave logits 5.7 off, silently; and of
    InternVL, the other way round, `doctor` said that its weights were incomplete.
    """
    whole = _shaken(tiny_multimodal(name, tied=tied, tied_text=tied_text))
    whole.save_pretrained(tmp_path / "whole")
    text = extract_text_model(tmp_path / "whole")
    assert torch.equal(_logits(text), _logits(whole))
    assert load_without_weights(resolve(tmp_path / "whole")).num_parameters() == text.num_parameters()
    text.save_pretrained(tmp_path / "text")
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "text")), _logits(whole))


@pytest.mark.parametrize("kind", ["qwen2_audio", "voxtral"])
def test_a_whole_that_does_not_say_whether_it_is_tied(kind):
    """Its head belongs to the text part: `object has no attribute 'tie_word_embeddings'`."""
    whole = CONFIG_MAPPING[kind]()
    assert text_config(whole, kind).tie_word_embeddings == whole.get_text_config().tie_word_embeddings


def test_settings_of_the_whole_come_along(tmp_path):
    """Ends of turn stand in the generation config of the whole; precision is that of the file."""
    whole = tiny_multimodal("Gemma3").to(torch.bfloat16)
    # Gemma 3's own config lists two: `unhashable type: 'list'`.
    whole.generation_config.eos_token_id = whole.config.eos_token_id = [1, 5]
    whole.save_pretrained(tmp_path)
    text = extract_text_model(str(tmp_path), dtype="auto")
    assert text.generation_config.eos_token_id == [1, 5]
    assert text.config.eos_token_id == [1, 5]
    assert text.dtype == torch.bfloat16
    assert not text.training
    assert text.name_or_path == str(tmp_path)


def test_a_model_in_memory_shares_its_weights():
    """A 27B model must not be held twice."""
    whole = tiny_multimodal("Qwen3VL").train()
    text = extract_text_model(whole)
    places = {parameter.data_ptr() for parameter in whole.parameters()}
    assert {parameter.data_ptr() for parameter in text.parameters()} <= places
    assert whole.training


def test_what_is_not_equal_is_refused(monkeypatch):
    """A text model that scales its embeddings otherwise would load, and be wrong."""
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", _doubled(Qwen3ForCausalLM.forward))
    with pytest.raises(ValueError, match="not equal to the whole: logits differ"):
        extract_text_model(tiny_multimodal("Qwen3VL"))


def test_rounding_is_told_from_a_mistake_in_float32_alone():
    """PaliGemma was refused for 9e-8."""
    whole = _shaken(tiny_multimodal("PaliGemma")).bfloat16()
    with pytest.raises(ValueError, match=r"only shows in float32 \(here torch\.bfloat16\): load it so"):
        extract_text_model(whole)


def _doubled(forward):
    def wrapped(self, **inputs):
        output = forward(self, **inputs)
        output.logits = 2 * output.logits
        return output

    return wrapped


def test_what_cannot_be_extracted_says_why():
    with pytest.raises(ValueError, match="a text model already"):
        extract_text_model(tiny_llama())
    quantised = tiny_multimodal("Llava")
    quantised.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="on the CPU in plain weights"):
        extract_text_model(quantised)
    alone = tiny_multimodal("Qwen3VL")
    alone.config.text_config.model_type = "qwen9_vl_text"
    with pytest.raises(ValueError, match="no causal LM class in transformers"):
        extract_text_model(alone)


@pytest.mark.parametrize("name", ["Gemma3", "Qwen3VL"])
def test_load_target_and_load_draft_take_the_text_model_out(name, tmp_path):
    whole = _shaken(tiny_multimodal(name))
    whole.save_pretrained(tmp_path)
    target, draft = load_target(tmp_path), load_draft(tmp_path)
    assert torch.equal(_logits(target), _logits(whole))
    assert not any(parameter.requires_grad for parameter in target.parameters())
    assert all(parameter.requires_grad for parameter in draft.parameters())
    with pytest.raises(ValueError, match=r"draftkd init --text_of"):
        load_target(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def test_incomplete_weights_are_refused(tmp_path):
    """Transformers fills them with random numbers."""
    whole = tiny_multimodal("Qwen3VL")
    state = {name: value for name, value in whole.state_dict().items() if name != "lm_head.weight"}
    whole.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lm_head\.weight missing"):
        load_target(tmp_path)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("cut off", "cannot be read"),
        ("config", r"down_proj\.weight is \[32, 48\] in the file and \[32, 64\]"),
        ("pickle", "names 'model.bin', which is not a safetensors file"),
    ],
)
def test_weights_are_read_as_carefully_as_those_of_a_text_model(tmp_path, fault, message):
    """Tracebacks of safetensors and transformers; and an index that names a pickle was followed."""
    tiny_multimodal("Qwen3VL").save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if fault == "cut off":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif fault == "config":
        config.write_text(config.read_text().replace('"intermediate_size": 48', '"intermediate_size": 64'))
    else:
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), "model.bin")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        weights.rename(tmp_path / "model.bin")
    with pytest.raises(ValueError, match=message):
        extract_text_model(tmp_path)


IN_MEMORY = {
    "Gemma3": lambda: tiny_multimodal("Gemma3"),
    "Qwen3VL": lambda: tiny_multimodal("Qwen3VL"),
    "Mamba2": lambda: AutoModelForCausalLM.from_config(
        Mamba2Config(hidden_size=16, num_heads=4, head_dim=8, state_size=8, num_hidden_layers=1, vocab_size=300)
    ),
    "Bert": lambda: AutoModelForCausalLM.from_config(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=300)
    ),
    "CpmAnt": lambda: tiny_model("cpmant"),
}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Gemma3", r"extract_text_model\(model\)"),
        ("Qwen3VL", r"extract_text_model\(model\)"),
        ("Mamba2", "running state"),
        ("Bert", "its config has no `is_decoder=True`"),
        ("CpmAnt", "what follows a token changes the logits before it"),
    ],
)
def test_models_in_memory_are_checked_as_loaded_ones_are(name, reason):
    """They ended late or obscurely, and `build_draft(share=...)` made a draft with a vision tower."""
    model, tokenizer = IN_MEMORY[name](), tiny_tokenizer()
    with pytest.raises(ValueError, match=reason):
        build_draft(model, share=0.5)
    with pytest.raises(ValueError, match=reason):
        generate_alignment_data(model, tokenizer, ["a prompt"])
    with pytest.raises(ValueError, match=reason):
        evaluate_draft(tiny_llama(), model, tokenizer, ["a prompt"])
    with pytest.raises(ValueError, match=reason):
        evaluate_draft(model, tiny_llama(), tokenizer, ["a prompt"])
