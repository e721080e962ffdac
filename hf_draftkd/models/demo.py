"""The demo pair that ships with the package: a drifted target, its stock draft, and their prompts."""

from pathlib import Path

DEMO = Path(__file__).resolve().parent.parent / "assets" / "demo"


def demo_path(name: str) -> str:
    """Path of a part of the demo pair: `target`, `draft`, `train.jsonl`, `dev.jsonl` or `test.jsonl`."""
    return str(DEMO / name)
