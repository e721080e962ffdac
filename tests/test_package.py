"""What is installed from a wheel."""

import subprocess
import sys
import zipfile

from tests.cli.run import ROOT


def test_a_wheel_holds_every_file_of_the_package(tmp_path):
    """Templates, the demo pair or `py.typed` left out: an editable install, as here, has them all the same."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("hf_draftkd/")}
    package = (path for path in (ROOT / "hf_draftkd").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert held == {path.relative_to(ROOT).as_posix() for path in package}
