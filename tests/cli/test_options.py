"""Options in a YAML file: they mean what the same words on the command line mean, and are refused as those are."""

import os
from dataclasses import dataclass, field

import pytest

from hf_draftkd.cli.errors import UsageError
from hf_draftkd.cli.evaluate import EvaluateOptions
from hf_draftkd.cli.init import InitOptions
from hf_draftkd.cli.main import dispatch
from hf_draftkd.cli.options import new_directory, parse, whole_draft
from hf_draftkd.cli.push import PushOptions
from hf_draftkd.cli.train import TrainOptions
from hf_draftkd.evaluation.config import EvaluationConfig
from hf_draftkd.training.config import DraftDistillConfig


@pytest.fixture
def read(tmp_path):
    """Options of a class from the text of a YAML file and further words."""

    def read(kind, text, *words):
        path = tmp_path / "run with spaces.yaml"
        path.write_text(text)
        (options,) = parse("command", (kind,), ["--config", str(path), *words], "")
        return options

    return read


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (EvaluationConfig, "temperatures: [warm]", "--temperatures: invalid float value: 'warm'"),
        (EvaluateOptions, "limit: 2.5", "--limit: invalid int value: '2.5'"),
        (EvaluationConfig, "max_new_tokens: null", "--max_new_tokens.*: invalid int value: 'null'"),
        (EvaluateOptions, "target_model: [a, b]", r"`target_model` takes a single value, got \['a', 'b'\]"),
        (EvaluateOptions, "html: 2", "--html: Truthy value expected: got 2"),
        (InitOptions, "num_layers: true", "--num_layers.*: invalid int value: 'True'"),
        (InitOptions, "dtype: fp16", "--dtype: invalid choice: 'fp16'"),
        (InitOptions, "target_model_revision: 1.10", "must be text, got 1.1 .*put it in quotes"),
        (PushOptions, "prose: mine", "--prose: invalid choice: 'mine'"),
        (PushOptions, "language: [en, no]", "`language` must be text, got False .*put it in quotes"),
        (DraftDistillConfig, "per_device_train_batch_size: 2.5", "invalid int value: '2.5'"),
        (DraftDistillConfig, "save_strategy: no", "--save_strategy.*: invalid choice: 'False'"),
        (DraftDistillConfig, "model_init_kwargs: [a]", "`model_init_kwargs` takes a single value"),
        (EvaluateOptions, "- limit", "must hold options as `name: value`"),
        (EvaluateOptions, "limit: [", "is not YAML"),
        (EvaluateOptions, "limits: 3", "there is no option `--limits`. Did you mean '--limit'"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(read, kind, text, message):
    """A traceback from the middle of a run, since TRL takes whatever YAML makes of a value."""
    with pytest.raises(UsageError, match=message):
        read(kind, text)


def test_an_option_has_every_name_that_the_command_line_knows(read):
    """`output-dir` and `no_measure_speed` stand in --help, and were "no option: did you mean `--output-dir`?"."""
    options = read(EvaluateOptions, "output-dir: out\nmodel: one")
    assert (options.output_dir, options.model) == ("out", ["one"])
    config = read(EvaluationConfig, "no_measure_speed: true\ntemperatures: 0")
    assert (config.measure_speed, list(config.temperatures)) == (False, [0])
    assert read(EvaluationConfig, "no-measure-speed: false").measure_speed


def test_text_that_transformers_takes_as_a_switch(read, tmp_path, monkeypatch):
    """`fsdp: true`, as its help has it, beside an annotation of `str | None`."""
    monkeypatch.setattr(DraftDistillConfig, "__post_init__", lambda self: None)
    for text, value in (("fsdp: true", True), ("fsdp: full_shard", "full_shard")):
        assert read(DraftDistillConfig, f"output_dir: {tmp_path}\n{text}").fsdp == value


def test_what_trl_and_transformers_take_is_taken(read, tmp_path):
    """The check of values refuses what other people's YAML files hold."""
    text = (
        f"output_dir: {tmp_path}\nlearning_rate: 3e-4\nlogging_steps: 0.5\nreport_to: [none]\nmax_length: null\n"
        "model_init_kwargs: {dtype: float32}\nlr_scheduler_type: cosine\nlr_scheduler_kwargs: {}\nmax_steps: 1\n"
        "bf16: false\nfsdp: ''\nsave_strategy: 'no'\nnum_train_epochs: 1\nwarmup_steps: 2\noptim: adafactor\n"
        'resume_from_checkpoint: true\ntarget_model_init_kwargs: \'{"dtype": "float32"}\'\n'
        "env: {DRAFTKD_TEST_OPTION: 3}\n"
    )
    args = read(DraftDistillConfig, text)
    assert (args.learning_rate, args.max_length, args.warmup_steps) == (3e-4, None, 2)
    assert args.target_model_init_kwargs == args.model_init_kwargs == {"dtype": "float32"}
    assert args.resume_from_checkpoint == "True"
    assert os.environ.pop("DRAFTKD_TEST_OPTION") == "3"


def test_env_may_be_empty_and_must_be_a_mapping(read):
    """`env:` with nothing behind it was an AttributeError."""
    assert read(EvaluateOptions, "env:\nlimit: 3").limit == 3
    with pytest.raises(UsageError, match="`env` takes environment variables as `NAME: value`, got 'A=1'"):
        read(EvaluateOptions, "env: A=1")


def test_the_command_line_wins_over_the_file(read):
    assert read(EvaluateOptions, "limit: 3\nhtml: true", "--limit", "4").limit == 4


def test_config_with_an_equals_sign_and_without_a_file(tmp_path, monkeypatch):
    """`--config=FILE` was "no option"; `--config` alone was an IndexError."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("limit: 3")
    for word in (f"--config={tmp_path / 'run.yaml'}", "--config=~/run.yaml"):
        (options,) = parse("command", (EvaluateOptions,), [word], "")
        assert options.limit == 3
    for words in (["--config"], ["--config", "--html"]):
        with pytest.raises(UsageError, match="--config: expected one argument"):
            parse("command", (EvaluateOptions,), words, "")


def test_every_kind_of_field_of_ours_is_understood(read):
    """An annotation that the check does not know would refuse every value."""

    @dataclass
    class Options:
        one: str | None = None
        many: list[int] | None = None
        share: float = 0.5
        flag: bool = field(default=True)

    options = read(Options, "one: null\nmany: [1, 2]\nshare: 1\nno_flag: true")
    assert (options.one, options.many, options.share, options.flag) == (None, [1, 2], 1, False)
    assert read(TrainOptions, "model: a\neval_dataset: null").eval_dataset is None


def test_home_is_where_a_shell_would_find_it(read, tmp_path, monkeypatch):
    """A folder named `~` in the working directory, with the results of a night in it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    options = read(EvaluateOptions, "output_dir: ~/out\nmodel: [~/draft, org/draft]")
    assert options.output_dir == f"{tmp_path}/out"
    assert options.model == [f"{tmp_path}/draft", "org/draft"]


def test_an_output_directory_that_cannot_be_written_is_found_out_first(tmp_path, monkeypatch):
    """PermissionError after hours of work: results are written last."""
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(UsageError, match=f"cannot be written: no permission in {tmp_path}"):
        new_directory(str(tmp_path / "deep" / "out"))
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is a file"):
        new_directory(str(tmp_path / "file" / "out"))
    with pytest.raises(UsageError, match="is empty: a variable may not be set"):
        new_directory("")


def test_a_draft_that_cannot_be_written_is_found_out_first(saved_pair, monkeypatch):
    """PermissionError after hours of measuring, where `--write` stores the best length."""
    folder = str(saved_pair[0])
    assert whole_draft(folder, "`--write`") == saved_pair[0]
    monkeypatch.setattr("os.access", lambda path, mode: path != saved_pair[0])
    with pytest.raises(UsageError, match=r"`--write` changes .*cannot be written: no permission"):
        whole_draft(folder, "`--write`")


@pytest.mark.parametrize("command", ["init", "train"])
def test_a_draft_does_not_replace_its_target(saved_pair, tmp_path, capsys, command):
    """`--output_dir TARGET --overwrite_output_dir`: the large model is gone, and nothing was said."""
    draft, target = saved_pair
    before = (target / "model.safetensors").read_bytes()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    argv = {
        "init": ["--num_layers", "1"],
        "train": ["--model", str(draft), "--dataset", str(tmp_path / "rows.jsonl"), "--max_steps", "1"],
    }[command]
    argv += ["--target_model", str(target), "--output_dir", f"{target}/../target", "--overwrite_output_dir"]
    assert dispatch([command, *argv]) == 2
    assert "is the target itself, which the draft would replace" in capsys.readouterr().err
    assert (target / "model.safetensors").read_bytes() == before
