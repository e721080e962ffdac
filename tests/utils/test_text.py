"""Text by strangers on our terminal. What `one_line` does to each mark stands in tests/hub/test_markdown.py."""

from hf_draftkd.utils.text import one_line, printable


def test_a_line_stays_one_line():
    assert one_line(" a\nb\r\n\x1b[31mc ") == "a b [31mc"
    assert one_line(3.5) == "3.5"


def test_a_terminal_keeps_line_breaks_and_obeys_nothing_else():
    """Catches an escape sequence that would clear the screen or rewrite the line above."""
    assert printable("a\n\x1b[2Jb\rc") == "a\n [2Jb c"
