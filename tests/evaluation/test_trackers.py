"""Training and report in an experiment tracker, offline."""

from importlib import import_module
from types import SimpleNamespace

import pytest

from hf_draftkd.cli.main import dispatch
from hf_draftkd.evaluation import trackers
from hf_draftkd.evaluation.report import ParallelResult
from hf_draftkd.evaluation.trackers import log_report
from tests.evaluation import samples
from tests.training.rows import alignment_rows
from tests.training.trainers import build

TRAINED = {"train/acceptance_rate", "eval/acceptance_rate", "eval/block_efficiency_at_3"}
REPORTED = {"report/greedy/acceptance_rate": 0.7, "report/greedy/speedup": 1.5, "report/temperature 1/speedup": 1.3}


def train(path, pair, tokenizer, tracker):
    rows = alignment_rows(pair[1], tokenizer, count=2)
    options = {"max_steps": 1, "report_to": tracker, "run_name": "both", "project": "drafts", "eval_strategy": "steps"}
    build(path, pair, tokenizer, rows, rows, eval_steps=1, **options).train()


def test_trackio_shows_training_and_report_in_one_run(tmp_path, pair, tokenizer, monkeypatch):
    """Acceptance that no dashboard shows, or a report in a run of its own."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    train(tmp_path, pair, tokenizer, "trackio")
    log_report(samples.report(), ["trackio"], project="drafts", run_name="both")
    (run,) = trackio.Api().runs("drafts")
    entries = import_module("trackio.sqlite_storage").SQLiteStorage.get_logs("drafts", "both", run_id=run.id)
    logged = {name: value for entry in entries for name, value in entry.items()}
    assert logged.keys() >= TRAINED
    assert {name: pytest.approx(logged[name]) for name in REPORTED} == REPORTED
    assert [row["draft"] for row in logged["report/table"]["_value"]][1] == "0.70 [0.68, 0.72]"


def test_tensorboard_shows_training_and_report(tmp_path, pair, tokenizer, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    train(tmp_path, pair, tokenizer, "tensorboard")
    log_report(samples.report(), ["tensorboard"], logging_dir=tmp_path / "runs")
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    tags = events.Tags()
    assert {name.replace(" ", "_") for name in TRAINED | set(REPORTED)} <= {
        tag.replace(" ", "_") for tag in tags["scalars"]
    }
    (table,) = events.Tensors("report/table/text_summary")
    assert "| 0.40 [0.38, 0.42] | 0.70 [0.68, 0.72] | +0.30 [0.25, 0.35] |" in table.tensor_proto.string_val[0].decode()


def test_every_way_of_decoding_shows_its_speed_up(monkeypatch):
    """A parallel draft, made for decoding in one pass, whose own speed-up no tracker showed."""
    report, logged = samples.report(), {}
    report.settings[0].parallel = ParallelResult(
        num_tokens=2, acceptance_by_depth=[], block_efficiency={}, speculative=samples.assisted(1.9)
    )
    tracker = SimpleNamespace(run=None, init=dict, log=logged.update, finish=dict, Table=dict)
    monkeypatch.setattr(trackers, "tracker_modules", lambda _: {"wandb": tracker})
    log_report(report, ["wandb"])
    assert {name: logged[f"report/greedy/{name}"] for name in trackers._SPEEDUPS} == {
        "speedup": 1.5,
        "speedup_speculative_decoding": 1.7,
        "speedup_speculative_decoding_in_parallel": 1.9,
    }


def test_a_tracker_that_is_not_there_is_refused_before_the_work(saved_pair, tmp_path, capsys):
    """An evaluation of hours whose report goes nowhere."""
    draft, target = saved_pair
    command = ["evaluate", "--model", str(draft), "--target_model", str(target), "--dataset", "prompts.jsonl"]
    assert dispatch([*command, "--output_dir", str(tmp_path / "out"), "--report_to", "trakio"]) == 2
    assert "Did you mean 'trackio'?" in capsys.readouterr().err
