"""The report as a file format: what is written can be read, and nothing else can."""

import dataclasses
import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from hf_draftkd.acceptance import Estimate
from hf_draftkd.evaluation import report as report_module
from hf_draftkd.evaluation.html import save_page
from hf_draftkd.evaluation.report import SCHEMA_VERSION, DraftResult, ModelInfo, SpeculationReport
from hf_draftkd.evaluation.tables import ReportTable
from tests.evaluation import samples


def plain():
    return samples.report().to_dict()


def test_json_and_back_is_the_same_report():
    """A key lost, a number turned into text, or int keys that come back as strings."""
    report = samples.report()
    assert SpeculationReport.from_json(report.to_json()) == report


def test_the_keys_are_those_of_the_design():
    """Others read these names: renaming one must fail here first."""
    data = plain()
    assert data["schema_version"] == SCHEMA_VERSION
    assert {"target", "draft", "prompts", "hardware", "versions", "settings", "latency", "recommendation"} <= set(data)
    assert {"baseline", "paired_difference", "warnings", "groups"} <= set(data)
    first = data["settings"][0]
    assert set(first["block_efficiency"]) == {str(length) for length in range(1, 17)}
    assert set(first["block_efficiency"]["5"]) == {"value", "low", "high"}
    assert {"num_spec_steps", "num_draft_tokens", "num_accepted_draft_tokens", "mean_acceptance_length"} <= set(
        first["assisted"]
    )
    assert set(data["latency"]["verify_seconds"]) == {str(length) for length in range(2, 18)}


def test_what_was_not_measured_is_absent():
    """A null reads as a measured nothing."""
    report = samples.report()
    report.latency = report.recommendation = report.groups = None
    report.settings[0].assisted = None
    text = report.to_json()
    assert "null" not in text
    assert SpeculationReport.from_json(text) == report
    with pytest.raises(ValueError, match=r"report\.latency` is null"):
        SpeculationReport.from_dict({**plain(), "latency": None})


def test_a_number_json_cannot_say_is_refused():
    report = samples.report()
    report.settings[0].acceptance_rate = Estimate(float("nan"))
    with pytest.raises(ValueError, match="cannot hold nan"):
        report.to_json()


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_version_is_refused(version):
    data = {**plain(), "schema_version": version}
    with pytest.raises(ValueError, match="this version of hf_draftkd reads 1"):
        SpeculationReport.from_dict(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("target"), "lacks the key `target`. The target."),
        (lambda data: data.update(setings=[]), "unknown key `setings`. Did you mean 'settings'"),
        (lambda data: data["prompts"].update(count="40"), r"report\.prompts\.count` must be a whole number, got '40'"),
        (
            lambda data: data["settings"][1]["acceptance_rate"].update(value="high"),
            r"report\.settings\[1\]\.acceptance_rate\.value` must be a number",
        ),
        (lambda data: data["settings"][1]["acceptance_rate"].update(value=float("inf")), "must be a number"),
        (lambda data: data["settings"][1]["acceptance_rate"].update(value=10**400), "must be a number"),
        (lambda data: data["settings"][0]["mbsu"].update(five=1.0), "whole numbers as keys"),
        (lambda data: data.update(warnings="none"), "must be a list"),
        (lambda data: data["recommendation"].update(worth_it=1), "must be true or false"),
    ],
)
def test_a_faulty_report_is_refused_with_the_place(change, message):
    data = plain()
    change(data)
    with pytest.raises(ValueError, match=message):
        SpeculationReport.from_dict(data)


def test_no_file_and_no_json_are_said_so(tmp_path):
    with pytest.raises(ValueError, match="There is no report at"):
        SpeculationReport.load(tmp_path / "report.json")
    for text in (b"{", b"[" * 100_000, b"\x1f\x8b\x08"):  # out of the reader's stack; compressed
        (tmp_path / "report.json").write_bytes(text)
        with pytest.raises(ValueError, match="is not JSON"):
            SpeculationReport.load(tmp_path / "report.json")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_report_is_read_in_the_encoding_that_an_editor_gave_it(tmp_path, encoding):
    """A UnicodeDecodeError that named no file, on a report that had been through an editor on Windows."""
    (tmp_path / "report.json").write_text(samples.report().to_json(), encoding=encoding)
    assert SpeculationReport.load(tmp_path / "report.json") == samples.report()


def test_saving_leaves_one_whole_file(tmp_path):
    report = samples.report()
    path = report.save(tmp_path / "deep" / "report.json")
    assert [item.name for item in path.parent.iterdir()] == ["report.json"]
    assert SpeculationReport.load(path) == report
    assert json.loads(path.read_text())["prompts"]["domain"] == "function calling"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("save", [SpeculationReport.save, save_page], ids=["report", "page"])
def test_a_full_disk_leaves_the_report_before_and_nothing_beside_it(tmp_path, monkeypatch, save):
    """Half a file that stays keeps a full disk full; two evaluations met under one temporary name."""
    (tmp_path / "report").write_text("the one before")
    write = Path.write_text

    def onto_a_full_device(path, *args, **kwargs):
        path.symlink_to("/dev/full")
        return write(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", onto_a_full_device)
    with pytest.raises(OSError, match="No space"):
        save(samples.report(), tmp_path / "report")
    assert [(item.name, item.read_text()) for item in tmp_path.iterdir()] == [("report", "the one before")]


def test_every_key_is_documented():
    for item in vars(report_module).values():
        if dataclasses.is_dataclass(item) and item.__module__ == report_module.__name__:
            for field in dataclasses.fields(item):
                assert len(field.metadata["help"]) > 5, f"{item.__name__}.{field.name} has no documentation"


@pytest.mark.parametrize("width", [60, 79, 80, 90])
@pytest.mark.parametrize("count", [0, 2, 5])
def test_no_number_is_cut_in_a_narrow_terminal(width, count):
    """`[0.20, 0.3…`: what a terminal of 80 columns showed of an interval."""
    report = samples.report()
    drafts = [ModelInfo(name=f"runs/a-long-name-{number}", num_parameters=1) for number in range(count)]
    report.drafts = [DraftResult(draft=draft, settings=report.settings) for draft in drafts] or None
    console = Console(width=width, record=True, file=StringIO())
    console.print(ReportTable(report))
    text = console.export_text()
    assert "…" not in text
    for whole in ("0.70", "[0.68, 0.72]", "1.50x", "[1.40, 1.60]", "[1.60, 1.80]", "(plain 100)"):
        assert text.count(whole) >= max(1, count)
    assert "[0.25, 0.35]" in text


def test_the_table_shows_both_drafts_and_their_difference():
    console = Console(width=80, record=True, file=StringIO())
    console.print(ReportTable(samples.report()))
    text = console.export_text()
    for expected in ("distilled for target", "baseline", "draft", "greedy", "temperature 1", "0.70 [0.68, 0.72]"):
        assert expected in text
    assert "+0.30 [0.25, 0.35]" in text
    assert "1.50x [1.40, 1.60]" in text
    assert "Worth it." in text


def test_the_table_shows_how_several_drafts_differ():
    """They were compared on the same texts, paired, and the comparison was shown nowhere."""
    report = samples.report()
    pairs = (report.paired_difference, None), (None, report.paired_difference)
    for baseline, second in pairs:
        report.paired_difference = baseline
        report.drafts = [DraftResult(draft=report.draft, settings=report.settings) for _ in range(2)]
        report.drafts[1].paired_difference = second
        console = Console(width=200, record=True, file=StringIO())
        console.print(ReportTable(report))
        text = console.export_text()
        assert ("1. less baseline" in text, "2. less 1." in text) == (baseline is not None, second is not None)
        assert "+0.30 [0.25, 0.35]" in text


def test_the_table_of_a_bare_report_has_no_empty_rows():
    report = samples.report()
    report.baseline = report.paired_difference = report.recommendation = report.latency = None
    for entry in report.settings:
        entry.assisted = entry.speculative = entry.recommendation = None
        entry.block_efficiency = entry.mbsu = None
    console = Console(width=90, record=True, file=StringIO())
    console.print(ReportTable(report))
    text = console.export_text()
    assert "acceptance rate" in text
    assert "tokens/call" not in text
    assert "predicted" not in text


def test_the_table_shows_names_as_they_are():
    """Catches brackets in a folder's name taken for console markup: swallowed, or an error after all the work."""
    report = samples.report()
    report.draft.name, report.recommendation.reason = "runs/draft[lr=1e-3]", "\x1b[2J\x9b\u202eWorth it [/bold]."
    report.drafts = [DraftResult(draft=report.draft, settings=report.settings)]
    console = Console(width=90, record=True, file=StringIO())
    console.print(ReportTable(report))
    text = console.export_text()
    assert "draft[lr=1e-3] for target" in text
    assert not {"\x1b", "\x9b", "\u202e"} & set(text)
    assert "1. draft[lr=1e-3]" in text
    assert "Worth it [/bold]." in text
