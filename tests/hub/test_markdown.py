"""Escapes: what no name of a stranger may become, character by character."""

import re

import pytest

from hf_draftkd.hub.markdown import code, table, text
from hf_draftkd.utils.text import one_line


@pytest.mark.parametrize("escape", [code, text])
@pytest.mark.parametrize("name", ["a|b", "a\\|b", "a\\\\|b", "\\|", "|\\|", "a\\", "`\\|`", "x\\|<script>"])
def test_no_name_ends_its_table_cell(escape, name: str):
    r"""Catches `\|` in a code span: some renderers read `\\|` as an escaped backslash and the end of the cell, after
    which the rest of the name is live HTML.
    """
    shown = escape(name)
    for match in re.finditer(r"(\\*)\|", shown):
        assert len(match[1]) % 2 == 1, shown
    row = table(("", "", ""), [("first", shown, "last")])
    assert row is not None


@pytest.mark.parametrize(
    "mark",
    ["\u202e", "\u2066", "\u061c", "\u200b", "\u2060", "\ufeff", "\x1b", "\x9b", "\U000e0041", "\ud800"],
)
def test_invisible_marks_and_half_characters_go(mark: str):
    """Catches text that turns round, hides words, drives a terminal, or cannot be written as UTF-8."""
    assert one_line(f"a{mark}b") == "a b"
    for escape in (code, text):
        assert mark not in escape(f"a{mark}b")
        escape(f"a{mark}b").encode()


@pytest.mark.parametrize("word", ["Zürich", "東京", "שלום", "مرحبا", "e\u0301", "🙂"])
def test_words_of_any_language_stay(word: str):
    """Catches a filter that is too strict."""
    assert word in text(word)
