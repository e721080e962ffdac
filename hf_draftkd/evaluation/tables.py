"""The report as a console table: one column a draft, one block of rows a decoding setting."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from textwrap import fill

from rich import box
from rich.console import Console, ConsoleOptions
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from hf_draftkd.acceptance import Estimate
from hf_draftkd.evaluation.recommendation import WAYS, measured_run
from hf_draftkd.evaluation.report import (
    AssistedResult,
    EngineResult,
    Recommendation,
    SettingResult,
    SpeculationReport,
    VocabularyResult,
)
from hf_draftkd.utils.text import one_line

_BOUNDS = " [{:.2f}, {:.2f}]"


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


@dataclass(frozen=True)
class ReportTable:
    """What rich prints of a report, in the width that it has: numbers are never cut.

    Where the columns do not fit, intervals stand below their values, and drafts that still do not fit in a further
    table below.
    """

    report: SpeculationReport

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | str]:
        headings, *rows = report_cells(self.report)

        def table(columns: Iterable[int], shape: Callable[[str], str]) -> Table:
            return _table([[row[0], *(shape(row[i]) for i in columns if i < len(row))] for row in (headings, *rows)])

        def fits(shown: Table) -> bool:
            return Measurement.get(console, options.update(width=10_000), shown).maximum <= options.max_width

        names = (PurePath(model.name).name for model in (self.report.draft, self.report.target))
        yield f"[italic]{escape(one_line(' for '.join(names)))}[/italic]\n"
        left = list(range(1, len(headings)))
        if fits(whole := table(left, str)):
            yield whole
        else:
            while left:
                count = next((n for n in range(len(left), 1, -1) if fits(table(left[:n], _folded))), 1)
                yield table(left[:count], _folded)
                left = left[count:]
        if self.report.recommendation is not None:
            yield "\n" + escape(one_line(self.report.recommendation.reason))
        for found in self.report.engines or []:
            yield ""
            yield _table([["", one_line(f"{found.engine} {found.version}, {found.decoding}")], *engine_rows(found)])
            if found.recommendation is not None:
                yield "\n" + escape(one_line(found.recommendation.reason))


def report_cells(report: SpeculationReport) -> Iterator[list[str]]:
    """The rows of the table, headings first; that of a setting's name has no other cell.

    One column for the baseline, one for the draft (or each of several), one for each paired difference. A report may be
    a stranger's: control characters in names would be commands to a terminal, and square brackets are markup to rich.
    """
    columns = named_settings(report)
    differences = [("1. less baseline" if report.drafts else "difference", report.paired_difference)]
    differences += [
        (f"{place}. less 1.", of.paired_difference) for place, of in enumerate(report.drafts or [], start=1)
    ]
    paired = [(name, entries) for name, entries in differences if entries]
    length = report.num_assistant_tokens
    batch_sizes = sorted({size for setting in report.settings for size in setting.speculative_batches or {}})
    yield ["", *(one_line(name) for name, _ in columns), *(name for name, _ in paired)]
    for index, setting in enumerate(report.settings):
        changes = [
            (entries[index].acceptance_rate, (entries[index].block_efficiency or {}).get(length))
            for _, entries in paired
        ]
        yield [one_line(setting.words)]
        by_column = [_rows(settings[index], length, batch_sizes) for _, settings in columns]
        for place, row in enumerate(zip(*by_column, strict=True)):
            change = [estimate_text(each[place], "+.2f") if place < len(each) else "" for each in changes]
            yield [f" {row[0][0]}", *(cell for _, cell in row), *change]
        for place, by_size in enumerate(setting.draft_vocabulary or []):
            cells = [_of_size(settings[index], place, length) for _, settings in columns]
            yield [f" {by_size.size:,} tokens proposed", *cells, *("" for _ in paired)]


def engine_rows(found: EngineResult) -> list[list[str]]:
    """What an engine counted beside what was predicted: labels and values, empty where there is none."""
    predicted = found.predicted_draft_acceptance_rate
    equal, plain, speedup = found.num_identical, found.plain_tokens_per_second, found.speedup
    return [
        ["prompts, each in turns", f"{found.num_prompts}, {found.num_rounds} times"],
        ["draft length", str(found.num_assistant_tokens)],
        ["tokens/call, counted", estimate_text(found.mean_acceptance_length)],
        ["  predicted", estimate_text(found.predicted_mean_acceptance_length)],
        ["accepted ÷ drafted, counted", f"{found.draft_acceptance_rate:.2f}"],
        ["  predicted", "" if predicted is None else f"{predicted:.2f}"],
        ["texts equal to the target's", "" if equal is None else f"{equal} of {found.num_prompts}"],
        ["tokens/s", f"{found.tokens_per_second:.0f}" + ("" if plain is None else f" (plain {plain:.0f})")],
        ["speed-up", "" if speedup is None else f"{speedup.value:.2f}x{speedup.interval(_BOUNDS)}"],
        ["threads", "" if found.threads is None else str(found.threads)],
    ]


def _table(rows: list[list[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    for place, heading in enumerate(rows[0]):
        table.add_column(escape(heading), justify="right" if place else "left", no_wrap=True)
    for label, *cells in rows[1:]:
        if any(cells):
            table.add_row(label, *map(escape, cells))
        elif not cells:
            table.add_section()
            table.add_row(f"[bold]{escape(label)}[/bold]")
    return table


def _folded(cell: str) -> str:
    """A cell in fewer columns: an interval below its value, a draft's name on several lines."""
    lines = re.sub(r" (?=[\[(])|(?<=\]), ", "\n", cell).split("\n")
    return "\n".join(fill(line, 14) for line in lines)


def _rows(of: SettingResult, length: int, batch_sizes: Iterable[int]) -> list[tuple[str, str]]:
    """The rows of a setting, labels and values; the first two have a paired difference."""
    parallel = of.parallel
    run = parallel.speculative if parallel else None
    return [
        ("acceptance rate", estimate_text(of.acceptance_rate)),
        (f"tokens/call, γ={length}", _tokens(of.block_efficiency, length)),
        (f"  in one pass, γ={length}", _tokens(parallel.block_efficiency if parallel else None, length)),
        (f"MBSU, γ={length}", f"{of.mbsu[length]:.2f}x" if of.mbsu and length in of.mbsu else ""),
        ("predicted, at γ", _prediction(of.recommendation)),
        ("measured at γ", str(of.assisted.num_assistant_tokens) if of.assisted else ""),
        ("assistant_model=", _measured(of.assisted)),
        ("  of the limit", _share_of_limit(of.assisted)),
        ("SpeculativeDecoding", _measured(of.speculative)),
        ("  of the limit", _share_of_limit(of.speculative)),
        ("  in parallel, at γ", f"{_measured(run)} at {run.num_assistant_tokens}" if run else ""),
        ("tokens/s", _rate(of)),
        *((f"in batches of {size}", _measured((of.speculative_batches or {}).get(size))) for size in batch_sizes),
    ]


def _of_size(result: SettingResult, place: int, length: int) -> str:
    """Tokens per target call, and the predicted speed, of a draft that proposes only some tokens."""
    sizes = result.draft_vocabulary or []
    if place >= len(sizes):
        return ""
    found = sizes[place]
    return ", ".join(filter(None, [_tokens(found.block_efficiency, length), _prediction(found)]))


def _tokens(efficiency: Mapping[int, Estimate] | None, length: int) -> str:
    return estimate_text((efficiency or {}).get(length))


def _share_of_limit(run: AssistedResult | None) -> str:
    return "" if run is None or run.share_of_limit is None else f"{run.share_of_limit:.0%}"


def estimate_text(estimate: Estimate | None, form: str = ".2f") -> str:
    """`0.61 [0.60, 0.63]`, or without the bracket where no interval was estimated; nothing for None."""
    return "" if estimate is None else f"{estimate.value:{form}}{estimate.interval(_BOUNDS)}"


def _measured(run: AssistedResult | None) -> str:
    return "" if run is None else f"{run.speedup.value:.2f}x{run.speedup.interval(_BOUNDS)}"


def _prediction(found: Recommendation | VocabularyResult | None) -> str:
    if found is None or found.predicted_speedup is None:
        return ""
    return f"{found.predicted_speedup:.2f}x at {found.num_assistant_tokens}"


def _rate(result: SettingResult) -> str:
    """Tokens per second of the fastest way."""
    runs = [run for way in WAYS if (run := measured_run(result, way))]
    best = max(runs, key=lambda run: run.tokens_per_second, default=None)
    return f"{best.tokens_per_second:.0f} (plain {best.plain_tokens_per_second:.0f})" if best else ""
