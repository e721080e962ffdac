"""The report as a console table: one column a draft, one block of rows a decoding setting."""

from collections.abc import Callable
from pathlib import PurePath

from rich import box
from rich.markup import escape
from rich.table import Table

from hf_draftkd.acceptance import Estimate
from hf_draftkd.evaluation.report import SettingResult, SpeculationReport
from hf_draftkd.utils.text import one_line


def _plain(words: str) -> str:
    """A report may be a stranger's: square brackets are markup to rich, control characters commands to a terminal."""
    return escape(one_line(words))


def named_settings(report: SpeculationReport) -> list[tuple[str, list[SettingResult]]]:
    """Every draft of a report with its settings, under the name to show: baseline first, or the drafts as ranked."""
    named = [("draft", report.settings)]
    if report.drafts:
        named = [
            (f"{place}. {PurePath(result.draft.name).name}", result.settings)
            for place, result in enumerate(report.drafts, start=1)
        ]
    if report.baseline is not None:
        named.insert(0, ("baseline", report.baseline.settings))
    return named


def report_table(report: SpeculationReport) -> Table:
    """One column for the baseline, one for the draft (or each of several), one for the paired difference."""
    columns = named_settings(report)
    differences = report.paired_difference if not report.drafts else None
    length = report.num_assistant_tokens
    table = Table(
        title=_plain(f"{PurePath(report.draft.name).name} for {PurePath(report.target.name).name}"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        min_width=76,  # or a narrow table squeezes the caption below it
    )
    table.add_column("", no_wrap=True)
    for name, _ in columns:
        table.add_column(_plain(name), justify="right", no_wrap=True)
    if differences:
        table.add_column("difference", justify="right", no_wrap=True)
    for index, setting in enumerate(report.settings):
        difference = differences[index] if differences else None
        changes = (difference.acceptance_rate, (difference.block_efficiency or {}).get(length)) if difference else ()
        table.add_section()
        table.add_row(f"[bold]{_plain(setting.words)}[/bold]", *[""] * (len(table.columns) - 1))
        for place, (label, show) in enumerate(_rows(length)):
            cells = [show(settings[index]) for _, settings in columns]
            change = [_signed(changes[place]) if place < len(changes) else ""] if differences else []
            if any(cells):
                table.add_row(f" {label}", *cells, *change)
    if report.recommendation is not None:
        table.caption = _plain(report.recommendation.reason)
    return table


def _rows(length: int) -> list[tuple[str, Callable[[SettingResult], str]]]:
    """The rows of a setting; the first two have a paired difference."""
    return [
        ("acceptance rate", lambda result: _interval(result.acceptance_rate)),
        (f"tokens/call, γ={length}", lambda result: _interval((result.block_efficiency or {}).get(length))),
        (f"MBSU, γ={length}", lambda result: _times((result.mbsu or {}).get(length))),
        ("predicted, at γ", _prediction),
        ("measured at γ", _measured_length),
        ("measured", _measured),
        ("tokens/s", _rate),
    ]


def _interval(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.value:.2f}{_bounds(estimate)}"


def _signed(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.value:+.2f}{_bounds(estimate)}"


def _bounds(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" [{estimate.low:.2f}, {estimate.high:.2f}]"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _prediction(result: SettingResult) -> str:
    found = result.recommendation
    return "" if found is None else f"{found.predicted_speedup:.2f}x at {found.num_assistant_tokens}"


def _measured(result: SettingResult) -> str:
    found = result.assisted
    if found is None or found.speedup is None:
        return ""
    return f"{found.speedup.value:.2f}x{_bounds(found.speedup)}"


def _measured_length(result: SettingResult) -> str:
    return "" if result.assisted is None else str(result.assisted.num_assistant_tokens)


def _rate(result: SettingResult) -> str:
    found = result.assisted
    if found is None or found.tokens_per_second is None:
        return ""
    return f"{found.tokens_per_second:.0f} (plain {found.plain_tokens_per_second:.0f})"
