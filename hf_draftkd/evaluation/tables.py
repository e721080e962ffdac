"""The report as a console table: one column a draft, one block of rows a decoding setting."""

from collections.abc import Callable

from rich.table import Table

from hf_draftkd.acceptance import Estimate
from hf_draftkd.evaluation.report import DraftResult, PairedDifference, SettingResult, SpeculationReport

_RULES = {
    "rejection_sampling": "rejection sampling",
    "greedy_draft": "greedy draft",
    "exact_match": "exact match",
}


def setting_name(setting: SettingResult | PairedDifference) -> str:
    """A setting in words: "temperature 1, top-p 0.9, rejection sampling"."""
    parts = ["greedy" if setting.temperature == 0 else f"temperature {setting.temperature:g}"]
    if setting.top_p < 1:
        parts.append(f"top-p {setting.top_p:g}")
    if setting.top_k > 0:
        parts.append(f"top-k {setting.top_k}")
    if setting.repetition_penalty != 1:
        parts.append(f"repetition penalty {setting.repetition_penalty:g}")
    if setting.temperature > 0:
        parts.append(_RULES.get(setting.verification, setting.verification))
    return ", ".join(parts)


def report_table(report: SpeculationReport) -> Table:
    """One column for the baseline, one for the draft (or each of several), one for the paired difference."""
    columns = _columns(report)
    table = Table(title=f"{report.draft.name} for {report.target.name}", title_justify="left", caption_justify="left")
    table.add_column("")
    for name, _ in columns:
        table.add_column(name, justify="right")
    if report.paired_difference:
        table.add_column("difference", justify="right")
    length = report.num_assistant_tokens
    for index, setting in enumerate(report.settings):
        difference = report.paired_difference[index] if report.paired_difference else None
        table.add_section()
        heading = f"[bold]{setting_name(setting)}[/bold], {setting.num_texts} texts, {setting.num_tokens} tokens"
        table.add_row(heading, *[""] * (len(table.columns) - 1))
        figures: list[tuple[str, Callable[[SettingResult], str], str]] = [
            (
                "acceptance rate",
                lambda result: _interval(result.acceptance_rate),
                _signed(difference.acceptance_rate) if difference else "",
            ),
            (
                f"tokens per target call, γ = {length}",
                lambda result: _interval((result.block_efficiency or {}).get(length), 2),
                _signed((difference.block_efficiency or {}).get(length), 2) if difference else "",
            ),
            (f"memory-bound speed-up, γ = {length}", lambda result: _number((result.mbsu or {}).get(length), "x"), ""),
            ("best γ, predicted speed-up", _prediction, ""),
            ("measured speed-up", _measured, ""),
        ]
        for label, show, change in figures:
            cells = [show(settings[index]) for _, settings in columns]
            if any(cells):
                table.add_row(f"  {label}", *cells, *([change] if report.paired_difference else []))
    if report.recommendation is not None:
        table.caption = report.recommendation.reason
    return table


def _columns(report: SpeculationReport) -> list[tuple[str, list[SettingResult]]]:
    if report.drafts:
        return [(draft.draft.name, draft.settings) for draft in report.drafts]
    columns = [("draft", report.settings)]
    if isinstance(report.baseline, DraftResult):
        columns.insert(0, ("baseline", report.baseline.settings))
    return columns


def _interval(estimate: Estimate | None, digits: int = 3) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:.{digits}f}" + _bounds(estimate, f".{digits}f")


def _signed(estimate: Estimate | None, digits: int = 3) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:+.{digits}f}" + _bounds(estimate, f"+.{digits}f")


def _bounds(estimate: Estimate, form: str) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" [{estimate.low:{form}}, {estimate.high:{form}}]"


def _number(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.2f}{unit}"


def _prediction(result: SettingResult) -> str:
    found = result.recommendation
    return "" if found is None else f"γ = {found.num_assistant_tokens}, {found.predicted_speedup:.2f}x"


def _measured(result: SettingResult) -> str:
    found = result.assisted
    if found is None or found.speedup is None:
        return ""
    return f"γ = {found.num_assistant_tokens}, {found.speedup.value:.2f}x" + _bounds(found.speedup, ".2f")
