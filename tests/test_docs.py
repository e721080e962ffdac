"""What the README and the examples say is run: a page that went stale fails here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_draftkd.models.demo import demo_path
from tests.cli.run import ROOT

# What a reader replaces by names of their own, and what stands for it here. Runs are cut short.
STAND_INS = {
    '"org/draft"': repr(demo_path("draft")),
    '"org/target"': repr(demo_path("target")),
    "test_size=32": "test_size=8",
    "max_new_tokens=96": "max_new_tokens=16",
    "output_dir=": "max_steps=2, output_dir=",
}
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def run(command: list[str], cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_readme_python_runs_from_top_to_bottom(tmp_path):
    """The blocks belong to one session: later ones use what earlier ones made."""
    assert BLOCKS
    script = "\n".join(BLOCKS)
    for placeholder, value in STAND_INS.items():
        assert placeholder in script, f"{placeholder} is no longer in the README"
        script = script.replace(placeholder, value)
    queries = Path(demo_path("dev.jsonl")).read_text(encoding="utf-8").splitlines()[:24]
    (tmp_path / "prompts.jsonl").write_text("\n".join(queries), encoding="utf-8")
    (tmp_path / "readme.py").write_text(script, encoding="utf-8")
    run([sys.executable, "readme.py"], tmp_path)


def test_custom_divergence_example_is_short_and_helps(tmp_path):
    script = ROOT / "examples" / "custom_divergence.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) < 40
    output = run([sys.executable, str(script), "--max_steps", "10", "--output_dir", str(tmp_path)], tmp_path)
    before, after = map(float, re.findall(r"(\d+\.\d+) (?:before|after)", output))
    assert after > before


@pytest.mark.parametrize("command", ["quickstart", "init", "train", "evaluate"])
def test_commands_named_in_the_readme_have_help(command, tmp_path):
    assert f"draftkd {command}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "--output_dir" in run([sys.executable, "-m", "hf_draftkd", command, "--help"], tmp_path)
