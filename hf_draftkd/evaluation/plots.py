"""Plots of a report. Made without pyplot, so nothing global is touched and no display is needed.

    block_efficiency_figure(report).savefig("block_efficiency.png")

Needs matplotlib: `pip install "hf_draftkd[plots]"`; without it each raises `ImportError`. A plot of a report raises
`ValueError` where the report does not hold what it shows. Shaded bands are 95% intervals.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_draftkd.acceptance import Estimate, predicted_speedup
from hf_draftkd.evaluation.recommendation import WAYS, expected_efficiency, measured_run, way_latency, way_overhead
from hf_draftkd.evaluation.report import SettingResult, SpeculationReport
from hf_draftkd.evaluation.tables import named_settings
from hf_draftkd.utils.files import replacing
from hf_draftkd.utils.text import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Told apart in print and by colour-blind readers (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", ":", "-.")


def block_efficiency_figure(report: SpeculationReport) -> "Figure":
    """Tokens per target call against draft length: a colour for each draft, a line style for each setting."""
    figure, axes = _curves(
        report, "draft length γ", "tokens per target call", "block efficiency", lambda of: of.block_efficiency
    )
    axes.set_xticks([1, *range(2, 17, 2)])
    axes.set_ylim(bottom=1)
    return figure


def acceptance_by_position_figure(report: SpeculationReport) -> "Figure":
    """The chance that a step keeps its 1st, 2nd, ... drafted token."""

    def shares(of: SettingResult) -> dict[int, Estimate]:
        return {place: Estimate(share) for place, share in enumerate(of.acceptance_by_position or [], start=1)}

    labels = "position in the draft", "share of steps that keep the token", "acceptance by position"
    figure, axes = _curves(report, *labels, shares, marker="o", markersize=4)
    axes.set_xticks(range(1, report.num_assistant_tokens + 1))
    axes.set_ylim(-0.02, 1.02)
    return figure


def acceptance_by_place_figure(report: SpeculationReport) -> "Figure":
    """Acceptance by place in the answer: a colour for each draft, a line style for each setting."""
    labels = "place in the answer, in tokens", "acceptance rate", "acceptance by place"
    figure, axes = _curves(report, *labels, lambda of: of.acceptance_by_place, marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda place, _: f"{place:.0f}")
    axes.set_ylim(-0.02, 1.02)
    return figure


def speed_figure(report: SpeculationReport) -> "Figure":
    """Predicted beside measured speed-up for every draft and setting that was timed; 1 is plain decoding."""
    figure, axes = _figure("times the plain speed", "")
    names: list[str] = []
    for name, settings in named_settings(report):
        for setting, way in product(settings, WAYS):
            if run := measured_run(setting, way):
                names.append(f"{_label(report, name, setting)}\n{way} γ = {run.num_assistant_tokens}")
                place = len(names) - 1
                if run.predicted_speedup is not None:
                    axes.barh(place - 0.2, run.predicted_speedup, 0.38, color=_COLOURS[5], label="predicted")
                looks = {"color": _COLOURS[0], "label": "measured"}
                axes.barh(place + 0.2, run.speedup.value, 0.38, xerr=_bounds(run.speedup), capsize=3, **looks)
    _require(names, "measured speed-up")
    axes.axvline(1, color="black", linewidth=1)
    figure.set_figheight(1.0 + 0.42 * len(names))
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    _legend(figure, axes)
    return figure


def speed_by_length_figure(report: SpeculationReport) -> "Figure":
    """Predicted speed-up against draft length: a colour for each way of decoding, a line style for each setting.

    Engines that served the pair have lines of their own, from step times measured there. What was measured stands
    beside it, with its 95% interval; 1 is plain decoding.
    """
    figure, axes = _figure("draft length γ", "times the plain speed")
    latency, drawn = report.latency, 0
    for (style, setting), way in product(enumerate(report.settings), WAYS):
        efficiency = expected_efficiency(setting, way)
        if not (latency and setting.is_transformers_rule and way_overhead(latency, way) and efficiency):
            continue
        colour = _COLOURS[WAYS.index(way)]
        lengths = sorted(length for length in efficiency if length + 1 in latency.verify_seconds)
        speedups = [predicted_speedup(efficiency[each], each, way_latency(latency, way)) for each in lengths]
        label = _literal(f"{way}, {setting.words}")
        axes.plot(lengths, speedups, color=colour, linestyle=_STYLES[style % len(_STYLES)], label=label)
        drawn += 1
        if run := measured_run(setting, way):
            at = run.num_assistant_tokens, run.speedup.value
            axes.errorbar(*at, yerr=_bounds(run.speedup), fmt="o", capsize=3, color=colour)
    known = {(setting.decoding, setting.verification): setting.block_efficiency or {} for setting in report.settings}
    for place, served in enumerate(report.engines or []):
        if served.speedup is None or served.target_step_seconds is None:
            continue
        looks = {"color": _COLOURS[(3 + place) % len(_COLOURS)], "linestyle": _STYLES[place % len(_STYLES)]}
        by_length = known.get((served.decoding, str(served.verification)), {})
        lengths = sorted(served.call_seconds.keys() & by_length.keys())
        speedups = [by_length[each].value * served.target_step_seconds / served.call_seconds[each] for each in lengths]
        axes.plot(lengths, speedups, label=_literal(f"{served.engine}, {served.decoding}"), **looks)
        at = served.num_assistant_tokens, served.speedup.value
        axes.errorbar(*at, yerr=_bounds(served.speedup), fmt="s", capsize=3, color=looks["color"])
        drawn += 1
    _require(range(drawn), "step times")
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks([1, *range(2, 17, 2)])
    _legend(figure, axes)
    return figure


def kind_figure(report: SpeculationReport) -> "Figure":
    """Acceptance by kind of token, with 95% intervals."""
    lines = [(found, looks) for setting, looks in _lines(report) if (found := setting.acceptance_by_kind)]
    _require(lines, "acceptance by kind of token")
    kinds = list(dict.fromkeys(kind for found, _ in lines for kind in found))
    figure, axes = _figure("acceptance rate", "", height=len(kinds) * (0.2 + 0.12 * len(lines)))
    for (number, (found, looks)), (place, kind) in product(enumerate(lines), enumerate(kinds)):
        if kind in found:
            at, marks = place + 0.6 * number / len(lines), {"fmt": "os^D"[number % 4], "markersize": 5, "capsize": 2}
            rate = found[kind].acceptance_rate
            axes.errorbar(rate.value, at, xerr=_bounds(rate), color=looks["color"], label=looks["label"], **marks)
    first, _ = lines[-1]
    names = [f"{kind}\n{first[kind].num_tokens:,}" if kind in first else kind for kind in kinds]
    axes.set_yticks(range(len(kinds)), names)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(len(kinds) - 0.2, -0.4)
    _legend(figure, axes)
    return figure


def group_figure(report: SpeculationReport) -> "Figure":
    """Tokens per target call by group, at the report's draft length, with 95% intervals."""
    groups = report.groups or {}
    figure, axes = _figure(f"tokens per target call, γ = {report.num_assistant_tokens}", "", height=0.5 * len(groups))
    # Not every group need have texts under every setting.
    styles: dict[str, int] = {}
    for place, settings in enumerate(groups.values()):
        for setting in settings:
            if setting.block_efficiency:
                style = styles.setdefault(setting.words, len(styles))
                looks = {"color": _COLOURS[style % len(_COLOURS)], "label": setting.words, "fmt": "o", "capsize": 3}
                efficiency = setting.block_efficiency[report.num_assistant_tokens]
                axes.errorbar(efficiency.value, place + 0.15 * style, xerr=_bounds(efficiency), **looks)
    _require(styles, "block efficiency by group")
    axes.set_yticks(range(len(groups)), [_literal(name) for name in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    _legend(figure, axes)
    return figure


def save_figure(figure: "Figure", path: str | os.PathLike[str]) -> Path:
    """Write a figure in the format its name ends with; a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=200, format=path.suffix.removeprefix(".") or None)
    return path


def training_figure(log_history: Sequence[Mapping[str, Any]]) -> "Figure | None":
    """Loss, acceptance and block efficiency over the steps of a training run, each in a panel of its own.

    Args:
        log_history: What a trainer logged (`trainer.state.log_history`): figures of evaluations begin with `eval_`.

    Returns:
        The figure; None if nothing was logged. With several evaluation datasets each has its own line.
    """
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for entry in log_history:
        for key, value in entry.items():
            found = _TRAINING_FIGURE.fullmatch(key)
            if found and "step" in entry:
                parts = ["held-out" if key.startswith("eval_") else "training", found["data"], found["setting"]]
                label = " ".join(part.strip("_").replace("_", " ") for part in parts if part)
                panels.setdefault(found["panel"], {}).setdefault(label, []).append((entry["step"], value))
    if not panels:
        return None
    figure, axes = _figure("step", "", rows=len(panels))
    named = sorted(panels.items(), key=lambda item: list(_TRAINING_PANELS).index(item[0]))
    for panel, (name, curves) in zip(axes if len(panels) > 1 else [axes], named, strict=True):
        panel.set_ylabel(_TRAINING_PANELS[name])
        # Where all texts were written under one setting, its own curve would hide that of all.
        different = {tuple(points): label for label, points in sorted(curves.items(), reverse=True)}
        for index, (points, label) in enumerate(reversed(different.items())):
            panel.plot(
                *zip(*points, strict=True),
                marker="o" if label.startswith("held-out") else None,
                markersize=4,
                color=_COLOURS[index % len(_COLOURS)],
                label=label,
            )
        panel.legend(frameon=False)
    return figure


_TRAINING_PANELS = {
    "loss": "loss a token",
    "acceptance_rate": "acceptance rate",
    "block_efficiency": "tokens per target call",
}
# `eval_loss`, with several data sets `eval_chat_loss`, at one sampling setting `eval_acceptance_rate_t0.7`.
_TRAINING_FIGURE = re.compile(
    rf"(?:eval_(?:(?P<data>\w+)_)?)?(?P<panel>{'|'.join(_TRAINING_PANELS)})(?:_upper_bound)?(?P<setting>_t\d\S*)?"
)


def figure_class() -> type["Figure"]:
    """Matplotlib's figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "hf_draftkd[plots]".') from error
    return Figure


def _figure(x_label: str, y_label: str, rows: int = 1, height: float = 3.0) -> tuple["Figure", Any]:
    # As wide as a phone's page, where letters then keep their size.
    figure = figure_class()(figsize=(4.8, 1.0 + height * rows), layout="constrained")
    panels = figure.subplots(rows, squeeze=False)[:, 0]
    for axes in panels:
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, panels if rows > 1 else panels[0]


def _legend(figure: "Figure", axes: Any) -> None:
    """Above the plot, where it hides no curve; each name once."""
    handles, labels = axes.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    if len(named) > 1:
        columns = 1 if max(map(len, named)) > 24 else 2
        figure.set_figheight(figure.get_figheight() + 0.2 * len(named) / columns)
        figure.legend(named.values(), named.keys(), loc="outside upper left", ncols=columns, frameon=False)


def _lines(report: SpeculationReport) -> Iterator[tuple[SettingResult, dict[str, Any]]]:
    """Every setting of every draft, with how its line is drawn: a colour for the draft, a style for the setting."""
    for colour, (name, settings) in enumerate(named_settings(report)):
        for style, setting in enumerate(settings):
            looks = {"color": _COLOURS[colour % len(_COLOURS)], "linestyle": _STYLES[style % len(_STYLES)]}
            yield setting, looks | {"label": _label(report, name, setting)}


def _label(report: SpeculationReport, name: str, setting: SettingResult) -> str:
    return _literal(f"{name}, {setting.words}" if len(named_settings(report)) > 1 else setting.words)


def _literal(name: str) -> str:
    """A name as it is.

    matplotlib would set text between two dollars as a formula, and cannot draw half a surrogate pair.
    """
    return one_line(name).replace("$", r"\$")


def _curves(
    report: SpeculationReport,
    x_label: str,
    y_label: str,
    what: str,
    pick: Callable[[SettingResult], Mapping[int, Estimate] | None],
    **marks: Any,
) -> tuple["Figure", Any]:
    """A line for each setting of each draft that holds what is picked, in a band of its intervals."""
    figure, axes = _figure(x_label, y_label)
    curves = [(sorted(curve.items()), looks) for setting, looks in _lines(report) if (curve := pick(setting))]
    _require(curves, what)
    for points, looks in curves:
        places, estimates = zip(*points, strict=True)
        axes.plot(places, [estimate.value for estimate in estimates], **looks, **marks)
        low, high = zip(*map(_ends, estimates), strict=True)
        axes.fill_between(places, low, high, color=looks["color"], alpha=0.15, linewidth=0)
    _legend(figure, axes)
    return figure, axes


def _ends(estimate: Estimate) -> tuple[float, float]:
    """Both ends of the interval; the value itself where none was estimated."""
    low, high = estimate.low, estimate.high
    return (estimate.value, estimate.value) if low is None or high is None else (low, high)


def _bounds(estimate: Estimate) -> list[list[float]]:
    """The interval as distances from the value, as matplotlib's error bars want it."""
    low, high = _ends(estimate)
    return [[estimate.value - low], [high - estimate.value]]


def _require(drawn: Sized, what: str) -> None:
    if not drawn:
        raise ValueError(f"The report holds no {what} to draw.")
