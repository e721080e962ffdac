"""Acceptance and block efficiency as an `evaluate` metric: the metric card, README.md, says how it is loaded."""
