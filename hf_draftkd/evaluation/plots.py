"""Figures of a report. Made without pyplot, so nothing global is touched and no display is needed.

    block_efficiency_figure(report).savefig("block_efficiency.png")

Needs matplotlib: `pip install "hf_draftkd[plots]"`.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.evaluation.tables import named_settings, setting_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Told apart in print and by colour-blind readers (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", ":", "-.")


def block_efficiency_figure(report: SpeculationReport) -> "Figure":
    """Tokens per target call against draft length: a colour for each draft, a line style for each setting.

    The shaded bands are the 95% intervals.

    Raises:
        ValueError: The report holds no block efficiency.
        ImportError: matplotlib is not installed.
    """
    figure, axes = _figure("draft length γ", "tokens per target call")
    drawn = 0
    for index, (name, settings) in enumerate(named_settings(report)):
        for style, setting in enumerate(setting for setting in settings if setting.block_efficiency):
            curve = setting.block_efficiency or {}
            lengths = sorted(curve)
            colour = _COLOURS[index % len(_COLOURS)]
            axes.plot(
                lengths,
                [curve[length].value for length in lengths],
                _STYLES[style % len(_STYLES)],
                color=colour,
                label=f"{name}, {setting_name(setting)}",
            )
            low = [_or(curve[length].low, curve[length].value) for length in lengths]
            high = [_or(curve[length].high, curve[length].value) for length in lengths]
            axes.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
            drawn += 1
    _require(drawn, "block efficiency")
    axes.set_xticks([1, *range(2, 17, 2)])
    axes.set_ylim(bottom=1)
    axes.legend(frameon=False)
    return figure


def acceptance_by_position_figure(report: SpeculationReport) -> "Figure":
    """The chance that a step keeps its 1st, 2nd, ... drafted token.

    Raises:
        ValueError: The report holds no acceptance by position.
        ImportError: matplotlib is not installed.
    """
    figure, axes = _figure("position in the draft", "share of steps that keep the token")
    drawn = 0
    for index, (name, settings) in enumerate(named_settings(report)):
        for style, setting in enumerate(setting for setting in settings if setting.acceptance_by_position):
            shares = setting.acceptance_by_position or []
            axes.plot(
                range(1, len(shares) + 1),
                shares,
                _STYLES[style % len(_STYLES)],
                marker="o",
                markersize=4,
                color=_COLOURS[index % len(_COLOURS)],
                label=f"{name}, {setting_name(setting)}",
            )
            drawn += 1
    _require(drawn, "acceptance by position")
    axes.set_xticks(range(1, report.num_assistant_tokens + 1))
    axes.set_ylim(0, 1)
    axes.legend(frameon=False)
    return figure


def save_figure(figure: "Figure", path: str | os.PathLike[str]) -> Path:
    """Write a figure in the format its name ends with; a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.tmp{path.suffix}")
    figure.savefig(unfinished, dpi=150)
    unfinished.replace(path)
    return path


def _figure(x_label: str, y_label: str) -> tuple["Figure", Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "hf_draftkd[plots]".') from error
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _require(drawn: int, what: str) -> None:
    if not drawn:
        raise ValueError(f"The report holds no {what} to draw: its texts were not written under a recorded setting.")
