"""What a user can get wrong about a model's name must come out as one clear message, before any weight is read."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertGenerationConfig,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    LlamaForSequenceClassification,
    MambaConfig,
    MiniMaxConfig,
    MllamaConfig,
    OpenAIGPTConfig,
    T5Config,
    ViTConfig,
    WhisperConfig,
)

from hf_draftkd.models import loading
from hf_draftkd.models.building import build_draft
from hf_draftkd.models.identity import model_revision
from hf_draftkd.models.loading import load_draft, load_target, load_tokenizer, load_without_weights
from hf_draftkd.models.pairing import check_own_tokenizer
from hf_draftkd.models.resolve import resolve
from tests.multimodal import tiny_multimodal
from tests.tiny import save_gguf, tiny_gpt2, tiny_llama, tiny_qwen3, tiny_tokenizer


@pytest.fixture
def saved(tmp_path):
    """A directory with a tiny Llama and its tokenizer."""
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def no_weights_read(monkeypatch):
    """Any attempt to read weights fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were read before the fault was found")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", refuse)


def test_target_is_frozen_and_draft_is_trainable(saved):
    target, draft = load_target(saved), load_draft(str(saved))
    assert not target.training
    assert not any(p.requires_grad for p in target.parameters())
    assert all(p.requires_grad for p in draft.parameters())
    for name, value in tiny_llama().state_dict().items():
        assert torch.equal(target.state_dict()[name], value)
        assert torch.equal(draft.state_dict()[name], value)
    assert load_tokenizer(saved)("a b").input_ids == tiny_tokenizer()("a b").input_ids


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # as for TestAdapters
@pytest.mark.parametrize("kind", ["plain", "without a generation config", "adapter", "multimodal", "GGUF", "bare"])
def test_without_weights_a_model_says_the_same_of_itself(saved, tmp_path, kind):
    """The special ids of a config where the generation config names others, or the size of a base for its text part."""
    path, options = saved, {}
    generation = GenerationConfig(eos_token_id=[1, 7], suppress_tokens=[5])
    if kind == "adapter":
        path = tmp_path / "adapter"
        config = LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(saved), config).save_pretrained(path)
    elif kind in ("multimodal", "bare"):
        whole = tiny_multimodal("Gemma3")
        whole.config.eos_token_id = [1, 5]
        whole.save_pretrained(saved)
    elif kind == "GGUF":
        path, options = tmp_path / "gguf", {"gguf_file": "tiny.gguf"}
        path.mkdir()
        save_gguf(tiny_llama(), path / "tiny.gguf")
    if kind in ("without a generation config", "bare"):
        (saved / "generation_config.json").unlink()
    else:
        generation.save_pretrained(saved if kind == "adapter" else path)
    loaded, described = load_target(path, **options), load_without_weights(resolve(path, **options))
    assert {weight.device.type for weight in described.parameters()} == {"meta"}
    assert described.num_parameters() == loaded.num_parameters()
    for part in ("config", "generation_config"):
        theirs, ours = (getattr(model, part).to_dict() for model in (loaded, described))
        for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens"):
            assert theirs.get(name) == ours.get(name), (part, name)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_is_as_saved_or_as_asked(saved, dtype):
    assert load_target(saved, dtype=dtype).dtype == torch.bfloat16
    load_target(saved, dtype=dtype).save_pretrained(saved)
    assert load_target(saved).dtype == torch.bfloat16
    assert load_draft(saved, dtype="float32").dtype == torch.float32


def test_every_option_reaches_transformers(saved, monkeypatch):
    """An option that is taken and dropped is worse than none."""
    passed = {}
    original = AutoModelForCausalLM.from_pretrained

    def spy(name, **options):
        passed.update(options)
        options.pop("quantization_config")
        return original(name, **options)

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", spy)
    asked = {"device_map": {"": "cpu"}, "attn_implementation": "eager", "quantization_config": {"quant_method": "gptq"}}
    target = load_target(saved, dtype="float64", **asked)
    assert target.config._attn_implementation == "eager"
    assert target.dtype == torch.float64
    assert {name: passed[name] for name in asked} == asked
    assert passed["use_safetensors"] is True
    assert passed["trust_remote_code"] is False


def test_what_find_drafts_returns_can_be_loaded(saved, tmp_path, monkeypatch):
    found = SimpleNamespace(repo_id=str(saved), revision=None)
    assert load_draft(found).config.hidden_size == 16
    commits = {"abc": "a" * 40, "v2": "b" * 40}

    def model_info(self, repo_id, *, revision, **_):
        assert repo_id == "org/draft"
        commit = commits.get(revision, revision)
        return SimpleNamespace(sha=commit, siblings=[SimpleNamespace(rfilename=f"of-{commit[0]}")])

    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    draft = SimpleNamespace(repo_id="org/draft", revision="abc")
    for checkpoint, letter in ((resolve(draft), "a"), (resolve(draft, revision="v2"), "b")):
        assert (checkpoint.revision, checkpoint.files) == (letter * 40, {f"of-{letter}"})


@pytest.mark.usefixtures("no_weights_read")
class TestNothingThere:
    @pytest.mark.parametrize("load", [load_target, load_draft, load_tokenizer])
    def test_typing_error_in_a_path_names_the_near_one(self, saved, load):
        with pytest.raises(ValueError, match=r"There is no directory .*modle.*Did you mean .*model"):
            load(str(saved.parent / "modle"))
        with pytest.raises(ValueError, match="There is no directory"):
            load("./no/such/place")

    def test_hub_id_without_a_network_says_so(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "drafts" / "good").mkdir(parents=True)
        with pytest.raises(ValueError, match=r"Hub cannot be asked .*offline mode is enabled.*local cache does not"):
            load_target("org/name")
        with pytest.raises(ValueError, match="did you mean 'drafts/good'"):
            load_target("drafts/god")

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (RepositoryNotFoundError, "no repository of that name, or it is private"),
            (RevisionNotFoundError, "has no revision 'v9'"),
            (HTTPError, "Hub cannot be asked"),
        ],
    )
    def test_each_answer_of_the_hub_has_its_message(self, monkeypatch, error, message):
        def model_info(self, repo_id, **_):
            raise error.__new__(error, "403 Forbidden")

        monkeypatch.setattr(HfApi, "model_info", model_info)
        with pytest.raises(ValueError, match=message):
            load_draft("org/name", revision="v9")

    def test_a_name_that_is_none(self):
        with pytest.raises(ValueError, match="not a Hub id either"):
            load_target("what is this?")
        with pytest.raises(ValueError, match="needs a name, got ''"):
            load_target("")
        with pytest.raises(ValueError, match=r"got LlamaForCausalLM.*already loaded"):
            load_target(tiny_llama())

    def test_a_file_and_a_revision_of_a_directory(self, saved):
        with pytest.raises(ValueError, match="is a file"):
            load_target(saved / "config.json")
        with pytest.raises(ValueError, match="local directory and has no revisions"):
            load_target(saved, revision="v1.0")
        with pytest.raises(ValueError, match="give `revision` to `resolve`"):
            load_draft(resolve(saved), revision="v1.0")


@pytest.mark.usefixtures("no_weights_read")
class TestNoModelThere:
    def test_a_directory_of_something_else(self, tmp_path):
        with pytest.raises(ValueError, match="it holds nothing"):
            load_target(tmp_path)
        (tmp_path / "notes.txt").touch()
        with pytest.raises(ValueError, match=r"no config.json \(it holds notes.txt\)"):
            load_target(tmp_path)
        (tmp_path / "model.gguf").touch()
        with pytest.raises(ValueError, match="GGUF"):
            load_target(tmp_path)
        with pytest.raises(ValueError, match="has no tokenizer"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
    def test_a_broken_tokenizer_file_is_named(self, saved, name):
        (saved / name).write_text('{"version": "1.0", "trunc')
        with pytest.raises(
            ValueError, match=rf"tokenizer of .* cannot be read: .*{name} \(Unterminated string.*not valid JSON"
        ):
            load_tokenizer(saved)

    def test_config_without_weights(self, saved):
        (saved / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="no weights"):
            load_target(saved)

    def test_pickle_is_refused_unread(self, saved):
        (saved / "model.safetensors").unlink()
        (saved / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
        with pytest.raises(ValueError, match=r"only as pickle \(pytorch_model.bin\).*Convert it once"):
            load_target(saved)

    def test_an_index_that_names_a_pickle_is_refused_unread(self, saved):
        """Transformers reads whatever file the index of the safetensors names, as what its ending says it is."""
        (saved / "pytorch_model-1.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
        keys = load_file(saved / "model.safetensors")
        (saved / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "pytorch_model-1.bin")}
        (saved / "model.safetensors.index.json").write_text(json.dumps(index))
        for look in (lambda path: resolve(path).config, load_target):
            with pytest.raises(ValueError, match=r"names 'pytorch_model-1\.bin', which is not a safetensors file"):
                look(saved)

    def test_a_broken_config(self, saved):
        (saved / "config.json").write_text("{")
        with pytest.raises(ValueError, match="not a valid JSON"):
            load_target(saved)
        (saved / "config.json").write_text('{"model_type": "llamma"}')
        with pytest.raises(ValueError, match="llamma"):
            load_target(saved)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (T5Config(), "encoder-decoder"),
            (WhisperConfig(), "encoder-decoder"),
            (ViTConfig(), "not a language model"),
            (MllamaConfig(), "other input than text"),
            (MambaConfig(), "running state"),
            (MiniMaxConfig(), "a cache of its own"),
            (OpenAIGPTConfig(), "no cache"),
            (BertGenerationConfig(), "both directions"),
            (BertConfig(architectures=["BertForMaskedLM"]), "no language-modelling head"),
        ],
        ids=lambda value: getattr(value, "model_type", None),
    )
    @pytest.mark.parametrize("load", [load_target, load_draft])
    def test_other_kinds_of_models(self, saved, load, config, message):
        config.save_pretrained(saved)
        with pytest.raises(ValueError, match=message):
            load(saved)

    def test_a_classifier_of_the_right_architecture(self, tmp_path):
        """Loaded as a language model it would get a random head, and a log line."""
        LlamaForSequenceClassification(tiny_llama().config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="LlamaForSequenceClassification, which has no language-modelling head"):
            load_target(tmp_path)

    def test_a_quantisation_that_transformers_does_not_know(self, saved):
        """Of a checkpoint of ModelOpt the 8-bit codes were taken for the weights, and their scales left out."""
        config = json.loads((saved / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
        (saved / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="quantised by 'modelopt', which transformers does not read"):
            load_target(saved)

    def test_code_that_comes_with_a_model_does_not_run_unasked(self, saved):
        config = json.loads((saved / "config.json").read_text())
        config |= {
            "model_type": "mine",
            "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
        }
        (saved / "config.json").write_text(json.dumps(config))
        (saved / "mine.py").write_text("raise SystemExit('ran')")
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_target(saved)

    @pytest.mark.parametrize(
        ("dtype", "message"),
        [("bfloat61", "Did you mean 'bfloat16'"), ("int8", "Unknown .dtype. 'int8'"), (torch.int8, "torch.int8")],
    )
    def test_dtype(self, saved, dtype, message):
        with pytest.raises(ValueError, match=message):
            load_target(saved, dtype=dtype)


def test_a_cached_hub_model_loads_without_the_network(saved, tmp_path, monkeypatch):
    """The Hub is asked for the list of files; where it cannot answer, what was fetched before must still load."""
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(saved, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load_target("org/name").config.hidden_size == 16
    assert load_draft("org/name", revision=commit).config.hidden_size == 16
    assert len(load_tokenizer("org/name")) == 300

    # Looked up once, it is asked for no more, and stays at its commit.
    asked = []

    def model_info(self, repo_id, **_):
        asked.append(repo_id)
        raise HTTPError("502 Bad Gateway")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    checkpoint = resolve("org/name")
    draft = load_draft(checkpoint)
    assert model_revision(draft) == checkpoint.revision == commit
    check_own_tokenizer(draft, load_tokenizer(checkpoint))
    assert asked == ["org/name"]
    with pytest.raises(ValueError, match="Hub cannot be asked"):
        load_target("org/other")


def test_missing_weights_are_never_random(saved):
    """Loaded by transformers, a missing head is filled with random numbers and a log line."""
    weights = load_file(saved / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight missing"):
        load_target(saved)


def test_a_headless_model_with_tied_weights_is_complete(tmp_path):
    model = tiny_gpt2()
    model.transformer.save_pretrained(tmp_path)
    loaded = load_target(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_truncated_weights(saved):
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"weights of .* cannot be read"):
        load_target(saved)


@pytest.mark.parametrize("change", [{"vocab_size": 310}, {"intermediate_size": 64}])
def test_weights_of_another_size_than_the_config_says(saved, change):
    """A RuntimeError that points to "the above report"."""
    config = json.loads((saved / "config.json").read_text()) | change
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"do not fit its config: \S+ is \[.*\] in the file and \[.*\] by the config"):
        load_target(saved)


@pytest.mark.parametrize("change", [{"num_hidden_layers": "two"}, {"num_attention_heads": 3}])
def test_a_config_that_contradicts_itself(saved, no_weights_read, change):
    """An exception of huggingface_hub's own that nobody catches."""
    config = json.loads((saved / "config.json").read_text()) | change
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"The config\.json of .* cannot be read"):
        load_target(saved)


def test_a_broken_generation_config(saved, no_weights_read):
    """Transformers ignores it: a chat target then writes past its end of turn."""
    (saved / "generation_config.json").write_text('{"eos_token_id": [1, ')
    with pytest.raises(ValueError, match=r"generation_config\.json .* is not valid JSON"):
        load_target(saved)


@pytest.mark.parametrize("index", ["{", "{}"])
def test_a_broken_index(saved, index):
    """A KeyError, or a parser's words about no file in particular."""
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json cannot be read"):
        load_target(saved)


# PEFT reads an attribute that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
class TestAdapters:
    @pytest.fixture
    def adapter(self, saved):
        """(adapter directory, logits of base plus adapter)."""
        base = AutoModelForCausalLM.from_pretrained(saved)
        torch.manual_seed(0)
        config = LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM", init_lora_weights=False)
        adapted = get_peft_model(base, config).eval()
        adapted.save_pretrained(saved.parent / "adapter")
        with torch.no_grad():
            return saved.parent / "adapter", adapted(torch.arange(8)[None]).logits

    def test_an_adapter_comes_back_merged_plain_and_trainable(self, adapter, saved, tmp_path):
        path, expected = adapter
        draft = load_draft(path)
        with torch.no_grad():
            torch.testing.assert_close(draft(torch.arange(8)[None]).logits, expected)
        assert all(p.requires_grad for p in draft.parameters())
        assert not any("lora" in name for name, _ in draft.named_parameters())
        assert not any(p.requires_grad for p in load_target(path).parameters())
        draft.save_pretrained(tmp_path / "merged")
        assert not (tmp_path / "merged" / "adapter_config.json").exists()
        again = load_draft(tmp_path / "merged").state_dict()
        assert all(torch.equal(value, again[name]) for name, value in draft.state_dict().items())

    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
    @pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
    @pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
    def test_one_of_two_tied_ends(self, tmp_path, end):
        """Merging changed the other one too: logits up to 49 off, without a word."""
        tiny_qwen3().save_pretrained(tmp_path / "base")
        config = LoraConfig(target_modules=["q_proj", end], r=2, task_type="CAUSAL_LM", init_lora_weights=False)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
        adapted.save_pretrained(tmp_path / "adapter")
        merged = load_target(tmp_path / "adapter")
        merged.save_pretrained(tmp_path / "merged")
        ids = torch.arange(8)[None]
        with torch.no_grad():
            expected = adapted(ids).logits
            for model in (merged, load_target(tmp_path / "merged"), build_draft(merged, num_layers=2)):
                torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)

    def test_one_of_a_whole_multimodal_model(self, tmp_path):
        """An error of PEFT alone, and no word of what to do."""
        tiny_multimodal("Gemma3").save_pretrained(tmp_path / "base")
        base = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "base")
        config = LoraConfig(target_modules=r".*language_model.*\.q_proj", r=2)
        get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match=r"its multimodal base\? Merge it there"):
            load_target(tmp_path / "adapter")

    def test_it_goes_by_its_own_name(self, adapter, saved):
        """A report on the adapter that names the base, and answers of the one taken for those of the other."""
        path, _ = adapter
        draft = load_draft(path)
        assert draft.name_or_path == draft.config.name_or_path == str(path)
        assert load_draft(saved).name_or_path == str(saved)

    def test_its_tokenizer_is_its_own_or_that_of_its_base(self, adapter, saved):
        """`save_pretrained` of an adapter writes none, so every adapter was refused for its tokenizer."""
        path, _ = adapter
        assert load_tokenizer(path).get_vocab() == load_tokenizer(saved).get_vocab()
        tiny_tokenizer(280).save_pretrained(path)
        assert len(load_tokenizer(path)) == 280

    def test_an_adapter_on_an_adapter(self, adapter, saved):
        """The lower one dropped, or applied unmerged."""
        lower, _ = adapter
        upper = lower.parent / "upper"
        shutil.copytree(lower, upper)
        config = json.loads((upper / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(lower)}
        (upper / "adapter_config.json").write_text(json.dumps(config))
        base, once, twice = (load_draft(path).state_dict() for path in (saved, lower, upper))
        for name, weight in twice.items():
            torch.testing.assert_close(weight - once[name], once[name] - base[name], atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize(
        ("found", "replacement"), [("layers.1", "layers.7"), ("self_attn", "attn")], ids=["other layers", "other names"]
    )
    def test_weights_that_fit_in_part_are_refused(self, adapter, found, replacement):
        """PEFT at most warns, and half an adapter is measured."""
        path, _ = adapter
        weights = load_file(path / "adapter_model.safetensors")
        renamed = {name.replace(found, replacement): weight for name, weight in weights.items()}
        save_file(renamed, path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="do not fit its base model, and would be applied in part"):
            load_draft(path)

    def test_a_shorter_base_is_refused(self, adapter, saved):
        """The adapter's weights for the other layers were left out without a word."""
        path, _ = adapter
        tiny_llama(num_layers=1).save_pretrained(saved)
        with pytest.raises(ValueError, match=r"would be applied in part: .*layers\.1\."):
            load_draft(path)

    def test_what_cannot_be_read_is_named(self, adapter, saved):
        """Tracebacks of peft, torch and safetensors."""
        path, _ = adapter
        tiny_llama(hidden_size=32).save_pretrained(saved)
        with pytest.raises(ValueError, match=r"weights of adapter .* cannot be read.*Was the adapter trained on"):
            load_draft(path)
        (path / "adapter_model.safetensors").write_bytes(b"x")
        with pytest.raises(ValueError, match=r"weights of adapter .* cannot be read"):
            load_draft(path)
        for text in ("{", '{"r": 1}', '{"peft_type": "TOMORROW"}'):
            (path / "adapter_config.json").write_text(text)
            with pytest.raises(ValueError, match=r"The adapter_config\.json of .* cannot be read"):
                _ = resolve(path).config

    def test_without_its_base(self, adapter, saved, no_weights_read):
        path, _ = adapter
        shutil.rmtree(saved)
        with pytest.raises(ValueError, match=r"PEFT adapter, and its base model cannot be used: There is no directory"):
            load_draft(path)
        config = json.loads((path / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
        (path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="does not name its base model"):
            _ = resolve(path).config

    def test_pickled_quantised_and_ambiguous(self, adapter, saved, no_weights_read):
        path, _ = adapter
        with pytest.raises(ValueError, match="would round it"):
            load_target(path, quantization_config={"quant_method": "gptq"})
        shutil.copy(path / "adapter_config.json", saved)
        with pytest.raises(ValueError, match="both a whole model and a PEFT adapter"):
            load_target(saved)
        (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
        with pytest.raises(ValueError, match=r"only adapter_model\.bin, a pickle"):
            load_draft(path)


class TestGGUF:
    def test_a_target_that_exists_only_as_gguf(self, tmp_path):
        """Transformers reads it as a quantised model, and then refuses to save it."""
        model = tiny_llama()
        save_gguf(model, tmp_path / "tiny.gguf")
        tiny_tokenizer().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"no file 'other.gguf'. Its GGUF files: tiny.gguf"):
            load_target(tmp_path, gguf_file="other.gguf")
        found = load_target(tmp_path, gguf_file="tiny.gguf")
        found.save_pretrained(tmp_path / "plain")
        again = load_target(tmp_path / "plain")
        ids = torch.arange(10)[None]
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


def test_emulated_bfloat16_is_advised_against_once(saved, caplog, monkeypatch):
    """A model saved in bfloat16, several times slower than it need be on a CPU without instructions for it."""
    monkeypatch.setattr(loading, "emulated_bfloat16", lambda: "slow here")
    load_target(saved, dtype="float32")
    assert "slow here" not in caplog.text
    for _ in range(2):
        load_target(saved, dtype="bfloat16")
    assert caplog.text.count("slow here") == 1


def test_threads_on_shared_cores_are_advised_against_once(saved_pair, caplog, monkeypatch):
    """Two threads of which one waits for another program's turn were ten times slower than one."""
    monkeypatch.setattr(loading, "shared_cores", lambda: "too many threads")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    loading._advise_on_threads.cache_clear()
    for name in saved_pair:
        load_target(name)
    assert caplog.text.count("too many threads") == 1
    loading._advise_on_threads.cache_clear()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    load_target(saved_pair[0])
    assert caplog.text.count("too many threads") == 1
