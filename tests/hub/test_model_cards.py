"""`model_cards/`: its README explains every field, and its cards are what the code makes of the stored reports."""

import importlib.util
import re
from dataclasses import fields
from pathlib import Path

import pytest

from hf_draftkd.hub.metadata import TAGS, eval_results
from hf_draftkd.hub.model_card import SECTIONS
from hf_draftkd.hub.provenance import PairFacts, Provenance, TrainingSummary
from tests.hub import samples

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "model_cards"
STORED = sorted(path for path in FOLDER.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def script():
    """`examples/model_cards.py`, imported without running."""
    spec = importlib.util.spec_from_file_location("model_cards_example", ROOT / "examples" / "model_cards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_cards_to_compare():
    """Catches the comparison below running over nothing: pytest would only skip it."""
    assert STORED


@pytest.mark.parametrize("folder", STORED, ids=lambda path: path.name)
def test_a_stored_card_is_what_the_code_makes_of_its_report(script, folder: Path):
    """Catches a card edited by hand, and a change of the template that forgot `python examples/model_cards.py`."""
    stored = (folder / "README.md").read_text(encoding="utf-8")
    assert script.card_of(folder).render() == stored, "run `python examples/model_cards.py` and read the diff"


def test_every_stored_folder_is_a_recipe_of_the_script(script):
    """Catches a card that nobody can make again."""
    assert {folder.name for folder in STORED} <= set(script.RECIPES)


@pytest.mark.parametrize("kind", [Provenance, TrainingSummary, PairFacts])
def test_the_readme_explains_every_field(kind: type):
    """Catches a field that was added without a word to its reader."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    missing = [item.name for item in fields(kind) if not re.search(rf"`{item.name}`", text)]
    assert missing == []


def test_the_readme_explains_sections_metadata_and_figures():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    results = eval_results(samples.checked_report())
    words = {*SECTIONS, *TAGS, *(result.metric_type for result in results)}
    words |= {key for result in results for key in result.metric_args or {}}
    assert sorted(word for word in words if f"`{word}`" not in text) == []
