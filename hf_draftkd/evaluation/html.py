"""The report as one self-contained page: no scripts, nothing loaded from elsewhere, light and dark, wide and narrow."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from hf_draftkd.evaluation import plots
from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.evaluation.tables import engine_rows, estimate_text, report_cells
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
        "Speed by draft length",
        "What block efficiency and step times predict for each way of decoding, and what was measured. 1 is plain "
        "decoding.",
        plots.speed_by_length_figure,
    ),
    (
        "Predicted and measured speed",
        "Real decoding on this machine beside what block efficiency and step times predict. 1 is plain decoding.",
        plots.speed_figure,
    ),
    (
        "Which tokens",
        "Acceptance by kind of token; the number is how many of them the texts hold.",
        plots.kind_figure,
    ),
    (
        "Where in the answer",
        "Acceptance from the first token to the last. Bands are 95% intervals.",
        plots.acceptance_by_place_figure,
    ),
    (
        "Where in the draft",
        "How often a step keeps the draft's 1st, 2nd, ... token, all before it included.",
        plots.acceptance_by_position_figure,
    ),
    ("By group", "Where the draft helps, and where it does not.", plots.group_figure),
]


def render_page(report: SpeculationReport, log_history: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page as HTML text, with a plot of what the draft's trainer logged (`training_log`).

    Raises:
        ImportError: matplotlib is not installed.
    """
    figures = []
    for heading, text, draw in _PLOTS:
        try:
            figures.append((heading, text, draw(report)))
        except ValueError:  # nothing of the kind was measured
            continue
    if training := plots.training_figure(log_history):
        figures.append(("Training", "What was logged while the draft was trained.", training))
    drawn = [
        {"heading": heading, "text": text, "svg": _inline_svg(figure, heading, str(number))}
        for number, (heading, text, figure) in enumerate(figures)
    ]
    headings, *cells = report_cells(report)
    return _render(
        "report",
        report=report,
        figures=drawn,
        headings=headings,
        cells=[row for row in cells if len(row) == 1 or any(row[1:])],
        engines=[(found, [row for row in engine_rows(found) if row[1]]) for found in report.engines or []],
        length=report.num_assistant_tokens,
    )


def render_answers(report: SpeculationReport) -> str:
    """The report's answers as coloured text, an HTML fragment: `IPython.display.HTML(render_answers(report))`."""
    return _render("answers", report=report)


def save_page(
    report: SpeculationReport, path: str | os.PathLike[str], log_history: Sequence[Mapping[str, Any]] = ()
) -> Path:
    """Write the page; a reader never sees half a file."""
    return write_text(Path(path), render_page(report, log_history))


def training_log(draft: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """What was logged while a draft was trained, from the `trainer_state.json` in its folder; empty without one."""
    path = Path(draft) / "trainer_state.json"
    return json.loads(path.read_text(encoding="utf-8"))["log_history"] if path.is_file() else []


def _render(template: str, **context: Any) -> str:
    loader = PackageLoader("hf_draftkd.evaluation")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    filters: dict[str, Callable[..., Any]] = {
        # An interval below its value, in smaller letters.
        "cell": lambda text: Markup(re.sub(r" (\[.*?\])", r' <span class="interval">\1</span>', escape(text))),
        "estimate": estimate_text,
        # A token whose line breaks can be seen: a break of the text behind its sign, or the sign alone.
        "visible": lambda token, keep_lines=False: token.replace("\n", "⏎\n" if keep_lines else "⏎"),
        "short": lambda name: PurePath(name).name,
    }
    environment.filters |= filters
    return environment.get_template(f"{template}.html.jinja").render(context)


def _inline_svg(figure: "Figure", title: str, salt: str) -> Markup:
    """A figure as an `<svg>` element that takes the width it is given, and its black from the text around it."""
    from matplotlib import rc_context

    text = StringIO()
    # Letters stay text; ids are salted, because several drawings share one page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    # Every drawing names its parts figure_1, axes_1, ...: once on a page is enough.
    body = re.sub(r'<g id="[A-Za-z][\w.]*_\d+">', "<g>", body).replace("#000000", "currentColor")
    # Text has no colour of its own: black is what SVG falls back to.
    return Markup(f'{head} role="img" aria-label="{escape(title)}" fill="currentColor">{body}')
