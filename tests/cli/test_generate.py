"""`draftkd generate` as a user runs it."""

import json
import shutil

import datasets
import pytest
import torch
from datasets import load_dataset

from hf_draftkd.cli.main import dispatch
from hf_draftkd.data.generation import generate_alignment_data
from tests.cli.run import draftkd
from tests.data.server import serving
from tests.data.small import make_target, make_tokenizer

CHATS = [[{"role": "user", "content": text}] for text in ("the cat", "on", "sat on the mat", "a mat", "cat")]


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def saved(tmp_path):
    """A saved target with its tokenizer, and a file of prompts."""
    target, tokenizer = make_target(), make_tokenizer()
    bias = torch.full((264,), -30.0)
    bias[tokenizer.convert_tokens_to_ids([*"abcdefghijklmnopqrstuvwxyz", "Ġ"])] = 0.0
    bias[1] = 2.0
    with torch.no_grad():  # letters and end tokens only, in weights that can be saved
        target.model.norm.weight[0] = 0.0
        target.lm_head.weight[bias < -1] *= 0.01
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": chat}) + "\n" for chat in CHATS))
    return tmp_path / "target", prompts


def test_queries_are_answered_resumed_and_carded(tmp_path, saved, capsys):
    path, prompts = saved
    out = tmp_path / "out"
    command = ["generate", "--target_model", path, "--dataset", prompts, "--output_dir", out, "--max_new_tokens", 6]
    command += ["--temperatures", 0, 1, "--num_completions", 2, "--shard_size", 2, "--batch_size", 2]
    command += ["--cache_distributions", "top_k=5"]
    done = draftkd(*command)
    assert done.returncode == 0, done.stderr
    rows = load_dataset(str(out), split="train")
    assert len(rows) == 15
    assert "15 completions" in done.stdout
    assert {"target_logprobs", "target_tail_logprob"} <= set(rows.column_names)
    assert "# Alignment data" in (out / "README.md").read_text()
    assert rows["target"][0] == str(path)
    next(out.glob("data/train-00001*")).unlink()
    assert run(*command) == 0
    assert load_dataset(str(out), split="train").to_list() == rows.to_list()
    assert run(*command, "--seed", 1) == 2
    assert "seed: 0 there, 1 now" in capsys.readouterr().err


def run(*argv):
    return dispatch([str(each) for each in argv])


def test_options_may_come_from_a_file(tmp_path, saved, capsys):
    path, prompts = saved
    config = tmp_path / "generate.yaml"
    config.write_text(
        f"target_model: {path}\ndataset: {prompts}\noutput_dir: {tmp_path / 'out'}\nmax_new_tokens: 4\n"
        "temperatures: [0.0, 0.7]\ntop_p: 0.95\n"
    )
    assert run("generate", "--config", config) == 0
    rows = load_dataset(str(tmp_path / "out"), split="train")
    assert sorted(set(rows["temperature"])) == [0.0, 0.7]
    assert set(rows["top_p"]) == {1.0, 0.95}


def test_domain_text_is_cut_into_prompts(tmp_path, saved):
    path, _ = saved
    text = tmp_path / "domain.txt"
    text.write_text("the cat sat on the mat and the other cat sat on it too\n\nanother mat for another cat to sit on\n")
    options = ["--scenario", "curated", "--opening_tokens", 8, "--max_new_tokens", 5]
    assert run("generate", "--target_model", path, "--dataset", text, "--output_dir", tmp_path / "out", *options) == 0
    rows = load_dataset(str(tmp_path / "out"), split="train")
    assert set(rows["scenario"]) == {"curated"}
    assert "the cat sat on the mat".startswith(rows["prompt"][0])


def test_the_target_writes_its_own_queries(tmp_path, saved):
    path, _ = saved
    options = ["--scenario", "synthetic", "--num_prompts", 5, "--query_max_new_tokens", 60, "--max_new_tokens", 5]
    assert run("generate", "--target_model", path, "--output_dir", tmp_path / "out", *options) == 0
    rows = load_dataset(str(tmp_path / "out"), split="train")
    assert len(rows) == 5
    assert rows["prompt"][0][0]["role"] == "user"
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["prompt_counts"]["kept"] >= 5
    assert run("generate", "--target_model", path, "--output_dir", tmp_path / "out", *options) == 0


def test_cached_rows_are_trained_on_without_the_target(tmp_path, saved, capsys):
    """The next command loads the big target, beside which the cache is not read."""
    path, prompts = saved
    options = ["--cache_distributions", "top_k=4", "--max_new_tokens", 4]
    assert (
        run("generate", "--target_model", path, "--dataset", prompts, "--output_dir", tmp_path / "out", *options) == 0
    )
    assert "draftkd train --model DRAFT --dataset" in capsys.readouterr().out


def test_a_target_behind_an_endpoint(tmp_path, saved, capsys):
    path, prompts = saved
    with serving(make_target(), make_tokenizer()) as server:
        options = ["--endpoint", server.url, "--tokenizer", path, "--max_new_tokens", 4, "--concurrency", 2]
        command = ["generate", "--target_model", "tiny-target", "--dataset", prompts, *options]
        assert run(*command, "--output_dir", tmp_path / "long", "--context_length", 14) == 2
        assert "context 14" in capsys.readouterr().err
        assert not server.requests
        assert run(*command, "--output_dir", tmp_path / "out") == 0
        server.die_after = len(server.requests) + 2
        assert run(*command, "--output_dir", tmp_path / "other", "--max_retries", 0, "--shard_size", 1) == 1
    assert len(load_dataset(str(tmp_path / "out"), split="train")) == 5
    printed = capsys.readouterr()
    assert "run the same command again" in printed.err
    assert "draftkd train --model DRAFT --divergence cross_entropy --dataset" in printed.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_completions", 0], "num_completions"),
        (["--batch_size", 0], "batch_size"),
        (["--max_new_tokens", 100], "the target reads at most 128"),
        (["--push_to_hub", "a/b/c"], "Repo id must"),
        (["--push_to_hub", ""], "Repo id must"),  # of a variable that is not set: nothing was published
        (["--push_to_hub", "me/data"], "HF_HUB_OFFLINE is set"),
        ([], "is not empty and holds no manifest.json"),
    ],
)
def test_before_the_target_writes_queries(tmp_path, saved, capsys, monkeypatch, options, message):
    """Refused only after the whole synthesis, with its rounds left in a folder of somebody else's."""
    monkeypatch.setattr("hf_draftkd.data.generation.load_target", lambda *_, **__: pytest.fail("the target was loaded"))
    monkeypatch.setattr("hf_draftkd.cli.generate.is_offline_mode", lambda: True)
    out = tmp_path / "out"
    out.mkdir()
    if not options:
        (out / "thesis.txt").write_text("x")
    command = ["--scenario", "synthetic", "--num_prompts", 3, "--max_new_tokens", 4, "--output_dir", out]
    command += ["--query_max_new_tokens", 60]
    assert run("generate", "--target_model", saved[0], *command, *options) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ([] if options else ["thesis.txt"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--target_model": "./nowhere"}, "nowhere"),
        ({"--dataset": "./nowhere.jsonl"}, "no file or folder"),
        ({"--dataset": None}, "missing: --dataset"),
        ({"--output_dir": None}, "missing: --output_dir"),
        ({"--prompt_column": "promt"}, "Did you mean 'prompt'"),
        ({"--temperatures": "-1"}, "temperature"),
        ({"--top_p": "1.5"}, "top_p"),
        ({"--max_new_tokens": "128"}, "leaves no room"),
        ({"--max_new_tokens": "124"}, "longer than 4 tokens"),
        ({"--cache_distributions": "top=5"}, "top_k=64 or sampled=50"),
        ({"--cache_distributions": "top_k=999"}, "between 1 and the vocabulary's 264"),
        ({"--cache_distributions": "top_k=5", "--cache_loss_temperature": "0"}, "temperature"),
        ({"--scenario": "query"}, "scenario"),
        ({"--scenario": "synthetic"}, "takes no `dataset`"),
        ({"--scenario": "synthetic", "--dataset": None, "--num_prompts": "0"}, "at least 1"),
        ({"--scenario": "synthetic", "--dataset": None, "--query_temperature": "0"}, "would be the same"),
        ({"--scenario": "synthetic", "--dataset": None, "--script": "klingon"}, "begins with 'KLINGON'"),
        (
            {"--scenario": "synthetic", "--dataset": None, "--min_characters": "9", "--max_characters": "8"},
            "above `max_characters` 8",
        ),
        ({"--scenario": "synthetic", "--dataset": None, "--target_model": "UNOPENED"}, "cannot be opened for a user"),
        ({"--batch_siz": "3"}, "Did you mean '--batch_size'"),
        ({"--endpoint": "http://127.0.0.1:9/v1", "--tokenizer": "TARGET", "--max_retries": "0"}, "does not answer"),
        ({"--output_dir": "PROMPTS"}, "is a file"),
        ({"--system_prompt": "Ask about tax."}, "`system_prompt` would do nothing without `scenario synthetic`"),
        ({"--tokenizer": "PROMPTS"}, "`tokenizer` would do nothing without `endpoint`"),
        ({"--endpoint": "http://127.0.0.1:9/v1", "--dtype": "float32"}, "`dtype` would do nothing beside `endpoint`"),
        ({"--endpoint": "http://127.0.0.1:9/v1", "--device_map": "auto"}, "`device_map` would do nothing beside"),
        (
            {"--endpoint": "http://127.0.0.1:9/v1", "--tokenizer": "TARGET", "--target_model_revision": "v2"},
            "`target_model_revision` would do nothing beside `tokenizer`",
        ),
        ({"--instruction": "Continue: {text}"}, "`instruction` would do nothing without `scenario curated`"),
        ({"--cache_dtype": "float32"}, "`cache_dtype` would do nothing without `cache_distributions`"),
        ({"--scenario": "synthetic", "--dataset": None, "--max_prompts": "3"}, "would do nothing without `dataset`"),
    ],
)
def test_bad_input_ends_with_two_before_the_target_is_loaded(tmp_path, saved, capsys, monkeypatch, options, message):
    path, prompts = saved
    if "--output_dir" not in options:

        def refuse(*_, **__):
            raise AssertionError("the target was loaded")

        monkeypatch.setattr("hf_draftkd.data.generation.load_target", refuse)
    values = {"--target_model": path, "--dataset": prompts, "--output_dir": tmp_path / "out", "--max_new_tokens": 4}
    values |= options
    names = {"TARGET": path, "PROMPTS": prompts, "UNOPENED": tmp_path / "unopened"}
    if "UNOPENED" in options.values():  # a template that shows the user's text changed
        shutil.copytree(path, names["UNOPENED"])
        template = "<user>{{ messages[0]['content'] | upper }}"
        (names["UNOPENED"] / "chat_template.jinja").write_text(template)
    argv = [str(names.get(part, part)) for pair in values.items() if pair[1] is not None for part in pair]
    try:
        code = dispatch(["generate", *argv])
    except SystemExit as exit:  # argparse refuses a choice itself
        code = exit.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_help_answers():
    done = draftkd("generate", "--help")
    assert done.returncode == 0
    assert "--cache_distributions" in done.stdout


def test_rows_equal_those_of_the_python_call(tmp_path, saved):
    """The command must not add its own settings."""
    from hf_draftkd import load_target
    from hf_draftkd.models.loading import load_tokenizer

    path, prompts = saved
    command = ["generate", "--target_model", path, "--dataset", prompts, "--output_dir", tmp_path / "out"]
    assert run(*command, "--max_new_tokens", 6, "--temperatures", 1, "--seed", 3) == 0
    expected = generate_alignment_data(
        load_target(path), load_tokenizer(path), CHATS, max_new_tokens=6, temperatures=(1.0,), seed=3
    )
    assert load_dataset(str(tmp_path / "out"), split="train").to_list() == expected.to_list()
