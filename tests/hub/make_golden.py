"""Rewrite the golden cards after a change that was meant: `python -m tests.hub.make_golden`, then read the diff."""

from hf_draftkd.hub.model_card import DraftModelCard
from tests.hub import samples
from tests.hub.test_model_card import GOLDEN, full_card

if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    full_card().save(GOLDEN / "full.md.txt")
    DraftModelCard.from_report(training=samples.training(), name="me/draft").save(GOLDEN / "training_only.md.txt")
