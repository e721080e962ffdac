"""`draftkd evaluate`, from paths, as a user runs it."""

import copy
import json
import sys
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, GenerationConfig

from hf_draftkd.acceptance import Estimate
from hf_draftkd.cli import evaluate
from hf_draftkd.cli.main import dispatch
from hf_draftkd.data.generation import generate_alignment_data
from hf_draftkd.evaluation.recommendation import ASSISTANT_MODEL, PARALLEL
from hf_draftkd.evaluation.report import ParallelResult, SpeculationReport
from tests.evaluation import samples
from tests.tiny import TEXT, tiny_llama, tiny_tokenizer

PROMPTS = [f"{text[: 12 + number]} {number}" for number in range(2) for text in TEXT]


@pytest.fixture
def files(tmp_path, saved_pair):
    """Draft, target and prompts on disk."""
    draft, target = saved_pair
    path = tmp_path / "prompts.jsonl"
    rows = ({"prompt": prompt, "category": ("a", "b")[number % 2]} for number, prompt in enumerate(PROMPTS))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": draft, "target_model": target, "dataset": path}


def options(files, out, *words, **more):
    pairs = {"max_new_tokens": 6, "num_speed_prompts": 1, **files, **more, "output_dir": out}
    return ["evaluate", *(str(word) for name, value in pairs.items() for word in (f"--{name}", value)), *words]


def test_what_cannot_be_saved_is_printed(files, tmp_path, capsys, monkeypatch):
    """A disk that is full after hours of measuring took the numbers with it."""

    def full(report, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SpeculationReport, "save", full)
    with pytest.raises(OSError, match="No space"):
        dispatch(options(files, tmp_path / "out", "--no_measure_speed", "--temperatures", "0", "1"))
    assert "acceptance rate" in capsys.readouterr().out


def test_it_writes_and_prints_the_report(files, tmp_path, capsys):
    """With every part switched on."""
    stock = tmp_path / "stock"
    tiny_llama(seed=9).save_pretrained(stock)
    tiny_tokenizer().save_pretrained(stock)
    out = tmp_path / "out"
    assert dispatch(options(files, out, "--html", "--write", temperatures=0, baseline=stock, verify=1)) == 0
    printed = capsys.readouterr().out
    report = SpeculationReport.load(out / "report.json")
    assert report.target.name == str(files["target_model"])
    assert report.prompts.source == str(files["dataset"])
    assert report.self_check.equal
    assert set(report.groups) == {"a", "b"}
    assert "acceptance rate" in printed
    assert "baseline" in printed
    assert "computed and counted numbers agree" in printed
    assert "<svg" in (out / "report.html").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json"]
    stored = GenerationConfig.from_pretrained(files["model"])
    assert stored.num_assistant_tokens == report.recommendation.num_assistant_tokens
    assert stored.num_assistant_tokens_schedule == "constant"
    assert stored.assistant_confidence_threshold == 0
    assert stored.eos_token_id == 1  # what was there stays


def test_each_config_and_tokenizer_is_read_once(files, tmp_path, monkeypatch):
    """For two models 8 lookups, 10 configs and 4 tokenizers were read; of Hub ids each was a request."""
    opened, built = Counter(), Counter()
    from_pretrained = AutoTokenizer.from_pretrained

    def count(event, args):
        if watching and event == "open":
            opened[str(args[0])] += 1

    def counted(name, **options):
        built[name] += 1
        return from_pretrained(name, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", counted)
    watching = True
    sys.addaudithook(count)  # it cannot be taken away again
    try:
        assert dispatch(options(files, tmp_path / "out", "--no_measure_speed", temperatures=0, limit=2)) == 0
    finally:
        watching = False
    for name in ("model", "target_model"):
        assert opened[str(files[name] / "config.json")] == opened[str(files[name] / "tokenizer.json")] == 1
        assert built[str(files[name])] == 1


def test_drafts_are_loaded_in_the_targets_format(files, pair, tmp_path):
    """Catches a draft that was saved in float32 and is timed so beside a target in bfloat16."""
    copy.deepcopy(pair[1]).to(torch.bfloat16).save_pretrained(files["target_model"])
    found = []
    for words in ([], ["--dtype", "float32"]):
        assert dispatch(options(files, tmp_path / "out", "--no_measure_speed", *words, temperatures=0, limit=2)) == 0
        report = SpeculationReport.load(tmp_path / "out" / "report.json")
        found.append((report.target.dtype, report.draft.dtype))
    assert found == [("bfloat16", "bfloat16"), ("float32", "float32")]


def test_a_target_on_several_devices_has_its_draft_where_it_begins(files, tmp_path, monkeypatch):
    """Catches a target that fits on no single device, and a draft that is timed on another kind than its target."""
    given = {}
    for name in ("load_target", "load_draft"):
        load = getattr(evaluate, name)

        def loaded(*names, load=load, name=name, **how):
            given[name] = how["device_map"]
            return load(*names, **how)

        monkeypatch.setattr(evaluate, name, loaded)
    # As on a machine with an accelerator, on which the target is not.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    words = ["--no_measure_speed", "--device_map", "cpu"]
    assert dispatch(options(files, tmp_path / "out", *words, temperatures=0, limit=2)) == 0
    assert given == {"load_target": "cpu", "load_draft": {"": torch.device("cpu")}}


def test_several_drafts_and_a_yaml_file(files, tmp_path, capsys):
    other = tmp_path / "other"
    tiny_llama(seed=9).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    config = tmp_path / "options.yaml"
    config.write_text(
        f"model: ['{other}', '{files['model']}']\ntarget_model: '{files['target_model']}'\nmeasure_speed: false\n"
        f"dataset: '{files['dataset']}'\ntemperatures: [1.0]\nmax_new_tokens: 10\nlimit: 5\n"
    )
    out = tmp_path / "out"
    assert dispatch(["evaluate", "--config", str(config), "--output_dir", str(out)]) == 0
    report = SpeculationReport.load(out / "report.json")
    assert [result.draft.name for result in report.drafts] == [str(files["model"]), str(other)]
    assert report.prompts.count == 5
    assert report.latency is None
    assert "1. draft" in capsys.readouterr().out


def test_recorded_answers_are_taken_as_they_are(files, pair, tmp_path, capsys):
    """Alignment data evaluated again under other settings, at a cost nobody asked for."""
    rows = generate_alignment_data(pair[1], tiny_tokenizer(), PROMPTS[:5], max_new_tokens=9, temperatures=(0.5,))
    rows.to_json(tmp_path / "rows.jsonl")
    files["dataset"] = tmp_path / "rows.jsonl"
    out = tmp_path / "out"
    assert dispatch(options(files, out, "--no_measure_speed")) == 0
    (setting,) = SpeculationReport.load(out / "report.json").settings
    assert setting.decoding.temperature == 0.5
    assert setting.num_tokens == sum(map(len, rows["completion_ids"]))
    assert dispatch(options(files, out, "--no_measure_speed", "--regenerate")) == 0
    assert [setting.decoding.temperature for setting in SpeculationReport.load(out / "report.json").settings] == [0, 1]


def test_prompts_of_alignment_data_are_answered_once(files, pair, tmp_path):
    """Data written at three temperatures cost three times the generation, and `--limit` counted completions."""
    temperatures = (0.0, 0.5, 1.0)
    rows = generate_alignment_data(pair[1], tiny_tokenizer(), PROMPTS[:3], max_new_tokens=4, temperatures=temperatures)
    rows.to_json(tmp_path / "rows.jsonl")
    files["dataset"] = tmp_path / "rows.jsonl"
    words = ["--no_measure_speed", "--regenerate"]
    assert dispatch(options(files, tmp_path / "out", *words, temperatures=0, limit=2)) == 0
    report = SpeculationReport.load(tmp_path / "out" / "report.json")
    assert report.prompts.count == report.settings[0].num_texts == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "no/such/draft"}, "no/such/draft"),
        ({"dataset": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"verification": "rejection"}, "rejection_sampling"),
        ({"temperatures": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"temperatures": 0, "top_p": 0.9}, "greedy decoding, which `top_p`"),
        ({"limit": 0}, "`limit`"),
        ({"num_assistant_tokens": 99}, "from 1 to 16"),
        ({"max_new_tokens": 1000}, "leaves no room"),
        ({"num_asistant_tokens": 3}, "Did you mean '--num_assistant_tokens'"),
        ({"dtype": "float3"}, "float3"),
        ({"verify": -1}, "`verify` must be a whole number of at least 0, got -1"),
        ({"run_name": "first"}, "`--run_name` would do nothing without `--report_to`"),
        ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_usage_is_one_message_and_exit_code_2(files, tmp_path, capsys, change, message):
    assert dispatch(options({**files, **change}, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_prompts_may_stand_in_conversations_of_another_column(files, tmp_path):
    """Fault: `draftkd generate` could read such data, and `evaluate`, of the same data's test split, could not."""
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}] for text in TEXT[:2]]
    files["dataset"].write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(files["target_model"])
    words = ["--no_measure_speed", "--prompt_column", "messages", "--drop_last_answer"]
    assert dispatch(options(files, tmp_path / "out", *words, temperatures=0)) == 0
    assert SpeculationReport.load(tmp_path / "out" / "report.json").prompts.count == 2


def test_missing_options_are_named(capsys):
    assert dispatch(["evaluate", "--model", "x"]) == 2
    assert "--target_model, --dataset, --output_dir" in capsys.readouterr().err


def test_tokenizers_that_differ_are_refused(files, tmp_path, capsys):
    tiny_tokenizer(text=[line[::-1] for line in TEXT]).save_pretrained(files["model"])
    assert dispatch(options(files, tmp_path / "out")) == 2
    assert "token" in capsys.readouterr().err


# peft 0.21 asks transformers 5.23 for an attribute under its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_without_its_base_is_refused(files, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    model = tiny_llama()
    model.config.name_or_path = str(tmp_path / "gone")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(adapter)
    tiny_tokenizer().save_pretrained(adapter)
    files["model"] = adapter
    assert dispatch(options(files, tmp_path / "out")) == 2
    assert "base_model_name_or_path" in capsys.readouterr().err


def test_write_needs_a_local_draft_and_times(files, tmp_path, capsys):
    assert dispatch(options(files, tmp_path / "out", "--write", "--no_measure_speed")) == 2
    assert "--measure_speed" in capsys.readouterr().err
    assert dispatch(options({**files, "model": "org/draft"}, tmp_path / "out", "--write")) == 2
    assert "`--write` changes the draft's own generation config, so 'org/draft' must be" in capsys.readouterr().err


def test_a_page_without_matplotlib_is_refused_before_the_work(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("hf_draftkd.cli.evaluate.load_target", lambda *_, **__: pytest.fail("too late"))
    assert dispatch(options(files, tmp_path / "out", "--html")) == 2
    assert 'pip install "hf_draftkd[plots]"' in capsys.readouterr().err


def test_a_length_is_written_beside_the_special_ids_of_the_config(files, tmp_path):
    """A draft without a generation config lost its end of sequence with the first `--write`."""
    (files["model"] / "generation_config.json").unlink()
    assert dispatch(options(files, tmp_path / "out", "--write", temperatures=0, limit=2)) == 0
    stored = GenerationConfig.from_pretrained(files["model"])
    assert (stored.bos_token_id, stored.eos_token_id, stored.pad_token_id) == (0, 1, 2)
    assert stored.num_assistant_tokens_schedule == "constant"


def test_a_length_is_written_beside_a_temperature_that_does_nothing(files, tmp_path):
    """Transformers refuses to save such a config once it was changed: after the whole measurement."""
    (files["model"] / "generation_config.json").write_text('{"eos_token_id": 1, "temperature": 0.6, "top_p": 0.9}')
    assert dispatch(options(files, tmp_path / "out", "--write", temperatures=0, limit=2)) == 0
    stored = GenerationConfig.from_pretrained(files["model"])
    assert (stored.eos_token_id, stored.num_assistant_tokens_schedule) == (1, "constant")


def served(files, tmp_path, *words, **more):
    """`draftkd evaluate` with vLLM, whose servers nobody starts."""
    binary = {"engine": "vllm", "engine_binary": sys.executable}
    return dispatch(options({**files, **binary, **more}, tmp_path / "out", "--launch", *words))


def test_an_engine_that_decodes_nothing_that_was_asked_for(files, pair, tmp_path, capsys, monkeypatch):
    """An evaluation at temperature 1, since the data holds greedy texts too, at the end of which nothing was served."""
    monkeypatch.setattr(evaluate, "evaluate_draft", lambda *_, **__: pytest.fail("too late"))
    rows = generate_alignment_data(pair[1], tiny_tokenizer(), PROMPTS[:2], max_new_tokens=4, temperatures=(0.0, 1.0))
    rows.to_json(tmp_path / "rows.jsonl")
    files["dataset"] = tmp_path / "rows.jsonl"
    assert served(files, tmp_path, temperatures=1) == 2
    assert "vllm cannot measure temperature 1: " in capsys.readouterr().err


def test_an_engine_drafts_as_many_tokens_as_suit_its_way(files, tmp_path, capsys, monkeypatch):
    """The length that was best for one pass, handed to an engine that drafts one by one, or the other way round."""
    report, given = samples.report(), []
    report.latency.parallel_draft_seconds = dict.fromkeys((1, 2), 0.001)
    for setting in report.settings:
        parallel = {length: Estimate(1 + length / 2) for length in (1, 2)}
        setting.parallel = ParallelResult(num_tokens=2, acceptance_by_depth=[], block_efficiency=parallel)
    monkeypatch.setattr(evaluate, "evaluate_draft", lambda *_, **__: report)
    monkeypatch.setattr(evaluate, "evaluate_in_engine", lambda *_, **how: given.append(how["num_assistant_tokens"]))
    config = json.loads((files["model"] / "config.json").read_text())
    (files["model"] / "config.json").write_text(json.dumps({**config, "pard_token": 2, "parallel_tokens": 2}))

    def gain(length):  # tokens per target call ÷ its time, by the figures of the sample
        return sum(0.6**power for power in range(length + 1)) / (length * (1e-3 + 1e-4) + 11e-3 + 1e-3)

    one_by_one = max(range(1, 17), key=gain)
    assert one_by_one > 2
    for way in (PARALLEL, ASSISTANT_MODEL):
        report.recommendation.way = way
        report.recommendation.num_assistant_tokens = 2 if way == PARALLEL else one_by_one
        assert served(files, tmp_path, temperatures=0) == 0
        assert served(files, tmp_path, "--parallel_drafting", temperatures=0) == 0
    assert given == [one_by_one, 2] * 2
    assert served(files, tmp_path, "--no_measure_speed", temperatures=0, num_assistant_tokens=7) == 0
    assert given[-1] == 7
    monkeypatch.setattr(evaluate, "evaluate_draft", lambda *_, **__: pytest.fail("too late"))
    assert served(files, tmp_path, "--parallel_drafting", temperatures=0, num_assistant_tokens=3) == 2
    assert "drafts 2 tokens in one pass at most" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"top_p": 0.9}, {"top_k": 5}, {"repetition_penalty": 1.2}, {"prompt_column": "a"}])
def test_a_setting_beside_recorded_answers_is_refused(files, tmp_path, capsys, change, pair, tokenizer):
    """It was left out silently: the answers have been written."""
    rows = generate_alignment_data(pair[1], tokenizer, PROMPTS[:2], max_new_tokens=4)
    rows.to_json(tmp_path / "rows.jsonl")
    files["dataset"] = tmp_path / "rows.jsonl"
    assert dispatch(options({**files, **change}, tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert f"{next(iter(change))}` " in said
    assert "would do nothing" in said


def test_other_files_in_the_output_directory_are_left_alone(files, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "report.json").write_text("old")
    assert dispatch(options(files, out, "--no_measure_speed", limit=2)) == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert SpeculationReport.load(out / "report.json").prompts.count == 2
