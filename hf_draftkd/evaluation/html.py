"""The report as one self-contained page: no scripts, nothing loaded from elsewhere, readable on a phone."""

import os
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hf_draftkd.acceptance import Estimate
from hf_draftkd.evaluation import plots
from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.evaluation.tables import named_settings
from hf_draftkd.utils.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Heading, what the reader should see in it, and the function that draws it.
_PLOTS: list[tuple[str, str, Callable[[SpeculationReport], "Figure"]]] = [
    (
        "Tokens per target call",
        "How far one target call gets, by how many tokens the draft proposes. Bands are 95% intervals.",
        plots.block_efficiency_figure,
    ),
    (
        "Predicted and measured speed",
        "Real decoding on this machine beside what block efficiency and step times predict. 1 is plain decoding.",
        plots.speed_figure,
    ),
    (
        "Acceptance by position",
        "How often a step keeps the draft's 1st, 2nd, ... token, all before it included.",
        plots.acceptance_by_position_figure,
    ),
    ("By group", "Where the draft helps, and where it does not.", plots.group_figure),
]


def render_page(report: SpeculationReport) -> str:
    """The page as HTML text.

    Raises:
        ImportError: matplotlib is not installed.
    """
    environment = Environment(
        loader=PackageLoader("hf_draftkd.evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(interval=_interval, short=lambda name: PurePath(name).name)
    figures = []
    for number, (heading, text, draw) in enumerate(_PLOTS):
        try:
            figure = draw(report)
        except ValueError:  # nothing of the kind was measured
            continue
        figures.append({"heading": heading, "text": text, "svg": _inline_svg(figure, heading, str(number))})
    return environment.get_template("report.html.jinja").render(
        report=report,
        figures=figures,
        columns=named_settings(report),
        length=report.num_assistant_tokens,
    )


def save_page(report: SpeculationReport, path: str | os.PathLike[str]) -> Path:
    """Write the page; a reader never sees half a file."""
    return write_text(Path(path), render_page(report))


def _inline_svg(figure: "Figure", title: str, salt: str) -> Markup:
    """A figure as an `<svg>` element that takes the width it is given."""
    from matplotlib import rc_context

    text = StringIO()
    # Letters stay text; ids are salted, because several drawings share one page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    # Every drawing names its parts figure_1, axes_1, ...: once on a page is enough.
    body = re.sub(r'<g id="[A-Za-z][\w.]*_\d+">', "<g>", body)
    return Markup(f'{head} role="img" aria-label="{Markup.escape(title)}">{body}')


def _interval(estimate: Estimate | None, digits: int = 2) -> Any:
    if estimate is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.{digits}f}"
    return Markup('{} <span class="interval">{} to {}</span>').format(
        f"{estimate.value:.{digits}f}", f"{estimate.low:.{digits}f}", f"{estimate.high:.{digits}f}"
    )
