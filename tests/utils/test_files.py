"""Files that are whole or absent."""

from pathlib import Path

import pytest

from hf_draftkd.utils.files import replacing, write_text


def test_a_failure_leaves_the_file_before_and_nothing_else(tmp_path: Path):
    """Catches half a file under the right name, or a temporary one that stays."""
    path = tmp_path / "report.json"
    write_text(path, "before")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of it")
            assert path.read_text() == "before", "until the end a reader sees the old file"
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_written_as_it_is(tmp_path: Path):
    """Catches translated line ends, an encoding that depends on the machine, and a folder that does not exist yet."""
    path = write_text(tmp_path / "new" / "folder" / "card.md", "α\r\nβ\n")
    assert path.read_bytes() == "α\r\nβ\n".encode()
