"""The report as a console table: one column a draft, one block of rows a decoding setting."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import PurePath

from rich import box
from rich.markup import escape
from rich.table import Table

from hf_draftkd.acceptance import Estimate
from hf_draftkd.evaluation.report import AssistedResult, SettingResult, SpeculationReport
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
    batch_sizes = sorted({size for setting in report.settings for size in setting.speculative_batches or {}})
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
        for place, (label, show) in enumerate(_rows(length, batch_sizes)):
            cells = [show(settings[index]) for _, settings in columns]
            change = [_signed(changes[place]) if place < len(changes) else ""] if differences else []
            if any(cells):
                table.add_row(f" {label}", *cells, *change)
        for place, by_size in enumerate(setting.draft_vocabulary or []):
            cells = [_of_size(settings[index], place, length) for _, settings in columns]
            table.add_row(f" {by_size.size:,} tokens proposed", *cells, *([""] if differences else []))
    if report.recommendation is not None:
        table.caption = _plain(report.recommendation.reason)
    return table


def _rows(length: int, batch_sizes: Iterable[int]) -> list[tuple[str, Callable[[SettingResult], str]]]:
    """The rows of a setting; the first two have a paired difference."""
    return [
        ("acceptance rate", lambda result: _interval(result.acceptance_rate)),
        (f"tokens/call, γ={length}", lambda result: _interval((result.block_efficiency or {}).get(length))),
        (f"MBSU, γ={length}", lambda result: _times((result.mbsu or {}).get(length))),
        ("predicted, at γ", _prediction),
        ("measured at γ", lambda result: str(result.assisted.num_assistant_tokens) if result.assisted else ""),
        ("assistant_model=", lambda result: _measured(result.assisted)),
        ("  of the limit", lambda result: _share(result.assisted)),
        ("SpeculativeDecoding", lambda result: _measured(result.speculative)),
        ("  of the limit", lambda result: _share(result.speculative)),
        ("tokens/s", _rate),
        *[(f"in batches of {size}", partial(_in_batches, size)) for size in batch_sizes],
    ]


def _of_size(result: SettingResult, place: int, length: int) -> str:
    """Tokens per target call, and the predicted speed, of a draft that proposes only some tokens."""
    if place >= len(result.draft_vocabulary or []):
        return ""
    found = (result.draft_vocabulary or [])[place]
    efficiency = _interval((found.block_efficiency or {}).get(length))
    speed = (
        "" if found.predicted_speedup is None else f", {found.predicted_speedup:.2f}x at {found.num_assistant_tokens}"
    )
    return f"{efficiency}{speed}"


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


def _measured(run: AssistedResult | None) -> str:
    return "" if run is None or run.speedup is None else f"{run.speedup.value:.2f}x{_bounds(run.speedup)}"


def _share(run: AssistedResult | None) -> str:
    return "" if run is None or run.share_of_limit is None else f"{run.share_of_limit:.0%}"


def _in_batches(size: int, result: SettingResult) -> str:
    return _measured((result.speculative_batches or {}).get(size))


def _rate(result: SettingResult) -> str:
    """Tokens per second of the faster way."""
    runs = [run for run in (result.assisted, result.speculative) if run is not None and run.tokens_per_second]
    if not runs:
        return ""
    best = max(runs, key=lambda run: run.tokens_per_second or 0)
    return f"{best.tokens_per_second:.0f} (plain {best.plain_tokens_per_second:.0f})"
