"""What is installed from a wheel."""

import doctest
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.cli.run import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_a_wheel_holds_every_file_of_the_package(wheel):
    """Templates, the demo pair or `py.typed` left out: an editable install, as here, has them all the same."""
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("hf_draftkd/")}
    package = (path for path in (ROOT / "hf_draftkd").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert held == {path.relative_to(ROOT).as_posix() for path in package}


def test_the_metric_loads_from_an_installed_wheel_by_the_call_on_its_card(wheel, tmp_path):
    """A card whose path exists in a checkout only, or whose figures went stale."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*install, "--target", str(tmp_path / "site"), str(wheel)], check=True, timeout=120)
    card = (tmp_path / "site/hf_draftkd/evaluation/metric/README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)# (.*?)\n```", card, flags=re.DOTALL)
    assert len(blocks) == 2
    # The last line of a block is a call whose value the comment below it shows.
    shown = [
        re.sub(r"^(metric\.compute)", r"print(\1", code, flags=re.MULTILINE).rstrip() + ")\n" for code, _ in blocks
    ]
    (tmp_path / "card.py").write_text("".join(shown) + "print(hf_draftkd.__path__[0])\n", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "card.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *results, place = done.stdout.splitlines()
    assert place == str(tmp_path / "site" / "hf_draftkd")
    for (_, expected), result in zip(blocks, results, strict=True):
        assert doctest.OutputChecker().check_output(f"{expected}\n", f"{result}\n", doctest.ELLIPSIS), result
