"""Rewrite the golden card after a change that was meant: `python -m tests.hub.make_golden`, then read the diff."""

from tests.hub.test_model_card import GOLDEN, full_card

if __name__ == "__main__":
    full_card().save(GOLDEN)
