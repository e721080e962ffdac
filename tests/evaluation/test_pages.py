"""Plots and the HTML page: self-contained, and without effect on anything else."""

import re
from html.parser import HTMLParser

import matplotlib as mpl
import pytest

from hf_draftkd.evaluation import plots
from hf_draftkd.evaluation.html import render_answers, render_page, save_page, training_log
from hf_draftkd.evaluation.report import DraftResult, ModelInfo
from tests.evaluation import samples

FIGURES = [
    plots.block_efficiency_figure,
    plots.acceptance_by_position_figure,
    plots.speed_figure,
    plots.speed_by_length_figure,
    plots.acceptance_by_place_figure,
    plots.kind_figure,
    plots.group_figure,
]


@pytest.mark.parametrize("draw", FIGURES)
def test_figures_are_drawn_without_global_effects(draw, tmp_path):
    """A pyplot keeps figures alive and picks a backend: neither may happen to a user who asked for a file."""
    before = dict(mpl.rcParams)
    figure = draw(samples.report())
    path = plots.save_figure(figure, tmp_path / "figure.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [item.name for item in tmp_path.iterdir()] == ["figure.png"]
    assert dict(mpl.rcParams) == before


def test_a_figure_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    """Half a picture that stays on a full disk, and would be what the next upload of the folder finds."""
    figure = plots.speed_figure(samples.report())

    def full(path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        plots.save_figure(figure, tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("draw", FIGURES)
def test_nothing_to_draw_is_said(draw):
    report = samples.report()
    report.groups = report.baseline = report.latency = None
    for entry in report.settings:
        entry.block_efficiency = entry.acceptance_by_position = entry.assisted = entry.speculative = None
        entry.acceptance_by_place = entry.acceptance_by_kind = None
    with pytest.raises(ValueError, match="holds no"):
        draw(report)


def test_block_efficiency_is_drawn_as_reported():
    """Curves drawn from the wrong draft, or against the wrong lengths."""
    report = samples.report()
    (axes,) = plots.block_efficiency_figure(report).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"baseline, greedy", "baseline, temperature 1", "draft, greedy", "draft, temperature 1"}
    line = lines["draft, temperature 1"]
    assert list(line.get_xdata()) == list(range(1, 17))
    assert list(line.get_ydata()) == [report.settings[1].block_efficiency[length].value for length in range(1, 17)]


def test_a_group_without_texts_under_a_setting_keeps_the_others_colours():
    """Catches sampled values drawn in the colour that the legend gives to greedy ones."""
    report = samples.report()
    report.groups = {"both": [samples.setting(0.8), samples.setting(0.6, 1.0)], "sampled": [samples.setting(0.5, 1.0)]}
    (axes,) = plots.group_figure(report).axes
    handles, labels = axes.get_legend_handles_labels()
    colours = [(label, handle.lines[0].get_color()) for label, handle in zip(labels, handles, strict=True)]
    assert [label for label, _ in colours] == ["greedy", "temperature 1", "temperature 1"]
    assert colours[1] == colours[2] != colours[0]


def test_names_with_dollars_are_names():
    """Catches a draft's or a group's name read as a formula, which no page survives that is none."""
    report = samples.report()
    report.groups = {"from $5_ to $9^": [samples.setting(0.8)]}
    report.drafts = [DraftResult(draft=ModelInfo(name="runs/$a_$b", num_parameters=1), settings=report.settings)]
    page = render_page(report)
    assert "from $5_ to $9^" in page
    assert "$a_$b" in page[page.index("<svg") : page.index("</svg>")]


def test_missing_matplotlib_names_the_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "hf_draftkd\[plots\]"'):
        plots.block_efficiency_figure(samples.report())


class _Page(HTMLParser):
    """Tags in order, and whether they close properly."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "link", "img", "path", "use", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page():
    """The page of the sample: seven drawings take seconds."""
    return render_page(samples.report())


def test_the_page_is_whole_and_loads_nothing(page):
    parsed = _Page()
    parsed.feed(page)
    assert parsed.open == []
    assert parsed.tags.count("svg") == len(FIGURES)
    assert "script" not in parsed.tags
    assert "link" not in parsed.tags
    assert "img" not in parsed.tags
    for name, value in parsed.attributes:
        if name in ("src", "href", "xlink:href", "action"):
            assert value.startswith("#"), f"{name}={value} points outside the page"
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    assert ("name", "viewport") in parsed.attributes  # a phone would otherwise shrink the page


def test_the_page_has_each_id_once(page):
    """Five drawings on one page: an id used twice makes one of them clip or draw the other's marks."""
    parsed = _Page()
    parsed.feed(page)
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert ids
    assert len(ids) == len(set(ids))


def test_the_page_says_what_the_report_says(page):
    for expected in ("distilled", "org/target", "Worth it.", "function calling", "maths", "prose", "sha256"):
        assert expected in page
    assert "A &lt;fast&gt; &amp; loud CPU" in page
    assert "behind 64 tokens" in page
    assert "<script>alert" not in page


def test_answers_are_shown_as_they_are(page):
    """Catches markup in an answer that becomes the page's, and a correction without what it corrects."""
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    fragment = render_answers(samples.report())
    assert fragment in page
    (shown,) = re.findall(r'aria-label="answer 1, greedy">(.*?)</div>', fragment, flags=re.DOTALL)
    assert re.sub(r"<del>.*?</del>|<[^>]*>", "", shown) == "The&lt;b&gt; end⏎\n"
    assert re.findall(r"<del>(.*?)</del>", shown) == [" fin"]


def test_the_training_of_a_draft_is_read_from_its_folder(page, tmp_path):
    (tmp_path / "trainer_state.json").write_text(
        '{"log_history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]}'
    )
    assert "loss a token" in render_page(bare_report(), training_log(tmp_path))
    assert training_log(tmp_path / "org" / "draft") == []
    assert "loss a token" not in page


def test_the_same_report_gives_the_same_page(page, tmp_path):
    assert save_page(samples.report(), tmp_path / "a" / "report.html").read_text() == page


def bare_report():
    """One that holds nothing to draw."""
    report = samples.report()
    report.baseline = report.paired_difference = report.recommendation = report.latency = None
    report.groups = report.answers = None
    for entry in report.settings:
        entry.assisted = entry.speculative = entry.recommendation = None
        entry.block_efficiency = entry.mbsu = None
        entry.acceptance_by_position = entry.acceptance_by_place = entry.acceptance_by_kind = None
    return report


def test_a_bare_report_makes_a_page():
    page = render_page(bare_report())
    assert "<svg" not in page
    assert "acceptance rate" in page
